"""Where data is found, and where what was made of it is kept."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from research import UserError

VERSION = 1
"""Of what `cached` keeps: a change in how data is read makes it anew."""

DAY = 24 * 3600


def find(path: str) -> pathlib.Path:
    """A file or folder as it is named or, where the name is relative, below $ERGON_DATA.

    Raises UserError where it is in neither place.
    """
    near = pathlib.Path(path).expanduser()
    places = [near]
    if root := os.environ.get("ERGON_DATA"):
        places.append(pathlib.Path(root).expanduser() / near)
    for place in places:
        if place.exists():
            return place
    hint = f", nor below ERGON_DATA = {root}" if root else "; ERGON_DATA may name its folder"
    raise UserError(f"no data at {path}{hint}")


def stamp(*paths: pathlib.Path) -> list[Any]:
    """What tells files from others of their names, unread: sizes and times of change."""
    found = ((path, path.stat()) for path in paths)
    return [[str(path.resolve()), s.st_size, s.st_mtime_ns] for path, s in found]


def cached(key: Any, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The folder that `make` fills, filled once for each key (JSON values).

    It lies in $ERGON_CACHE, or in ergon/ of $XDG_CACHE_HOME or of ~/.cache, and appears whole:
    processes that make it at once each make their own, and the first stays. What a killed one
    left is removed a day later. Raises UserError where it cannot be written.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    data = pathlib.Path(os.environ.get("ERGON_CACHE") or f"{cache}/ergon") / "data"
    name = hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:32]
    if (data / name).is_dir():
        return data / name
    try:
        data.mkdir(parents=True, exist_ok=True)
        for left in data.glob(".*.*"):
            with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                newest = max(p.stat().st_mtime for p in (left, *left.rglob("*")))
                if time.time() - newest > DAY:
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{name}.", dir=data, ignore_cleanup_errors=True
        ) as temporary:
            whole = pathlib.Path(temporary) / "whole"
            whole.mkdir()
            make(whole)
            (whole / "key.json").write_text(json.dumps(key, indent=2) + "\n")
            try:
                os.rename(whole, data / name)
            except OSError:
                if not (data / name).is_dir():
                    raise
    except OSError as error:
        raise UserError(f"cannot keep data in {data}: {error}") from None
    return data / name


def mapped(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The .npy files of a folder by name, memory-mapped: read when rows are asked for.

    Raises UserError where one is not whole.
    """
    with whole(folder):
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


@contextlib.contextmanager
def whole(folder: pathlib.Path) -> Iterator[None]:
    """Within it a file that is not whole is a UserError: of a folder that `cached` made."""
    try:
        yield
    except (ValueError, EOFError, FileNotFoundError) as error:
        raise UserError(f"{folder} is damaged ({error}): remove it, to have it made anew") from None
