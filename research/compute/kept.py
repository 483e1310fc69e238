"""What was measured of a device, in files: by device, and by versions of jax and jaxlib.

They lie in $ERGON_CACHE, or in ergon/ of $XDG_CACHE_HOME or of ~/.cache.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Key(NamedTuple):
    """Of which device something was measured, and with what."""

    device: str
    platform: str
    versions: Mapping[str, str]

    def path(self, what: str) -> pathlib.Path:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = pathlib.Path(os.environ.get("ERGON_CACHE") or f"{cache}/ergon")
        versions = (f"{k} {v}" for k, v in sorted(self.versions.items()))
        key = " ".join((self.device, self.platform, *versions))
        slug = re.sub(r"[^a-z0-9.]+", "-", key.lower()).strip("-")
        return pathlib.Path(os.path.expanduser(folder)) / f"{what}-{slug}.json"


def write(what: str, key: Key, data: Mapping[str, Any]) -> pathlib.Path:
    """Writes the file that `read` reads, at once and whole, and returns its path; OSError where it
    cannot."""
    path = key.path(what)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read(what: str, key: Key) -> Any:
    """Raises OSError where nothing was written, and ValueError where it is not JSON."""
    return json.loads(key.path(what).read_text(encoding="utf-8"))
