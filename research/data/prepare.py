"""Makes of a user's own files a TFDS directory in ArrayRecord, which TFDS reads without TensorFlow.

<out>/<name>/<version>/
    dataset_info.json  features.json  *.labels.txt
    <name>-<split>.array_record-00000-of-0000N
    checksums.json  bad_rows.txt
<out>/<name>/.<version>.incomplete/   until it is finished: journal.json  data/
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from research import UserError
from research.data import raw

Kind = Literal["images", "idx", "lines", "files", "table"]
Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]
CHECKSUMS = "checksums.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to make a data set of, and how."""

    source: tyro.conf.Positional[Path | None] = None
    """The folder or file to read."""
    kind: Kind | None = None
    """images: by class folder. idx: MNIST's format. lines, files: text, an example a line or a
    file. table: CSV or TSV with a header."""
    name: str | None = None
    """What TFDS is to call the data set."""
    out: Path = Path("data")
    """TFDS's data_dir."""
    version: str = "1.0.0"
    split: str | None = None
    """The split's name where the input has none; None: train."""
    validation: float = 0.0
    """Share of the rows that becomes the split validation."""
    test: float = 0.0
    """Share of the rows that becomes the split test."""
    split_seed: int = 0
    """Which rows these are."""
    shuffle: int | None = None
    """Seed of the rows' order; None: in the order of the sorted files."""
    label: str | None = None
    """table: the column that is a class."""
    shard_mb: float = 256.0
    """Size of a file, about, in 10^6 bytes."""
    on_bad: Literal["raise", "skip"] = "raise"
    """skip: bad rows are left out, counted and listed in bad_rows.txt."""
    max_bad: int = 100
    """More bad rows than this stop it all the same."""
    overwrite: bool = False
    """Replace a finished version, once the new one is finished."""
    verify: Path | None = None
    """Do nothing but check this finished directory against its checksums."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the check of all rows found; as JSON in the journal."""

    features: dict[str, Any]
    """TFDS's JSON, which has no names of classes."""
    names: dict[str, list[str]]
    """Names of classes, by feature."""
    bad: dict[int, str]
    """Rows to leave out, and why."""
    shards: dict[str, list[int]]
    """Rows in each file of each split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished file."""

    sha256: str
    bytes: int
    """Of its records."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A finished data set."""

    directory: Path
    features: dict[str, str]
    splits: dict[str, tuple[int, int]]
    """Rows and files."""
    bad: int
    """Rows left out."""

    def __str__(self) -> str:
        lines = [str(self.directory)]
        lines += [f"  {name}: {what}" for name, what in self.features.items()]
        lines += [
            f"  {k}: rows {rows:,}, files {files:,}" for k, (rows, files) in self.splits.items()
        ]
        if self.bad:
            lines.append(f"  bad rows left out, listed in bad_rows.txt: {self.bad:,}")
        return "\n".join(lines)


@contextlib.contextmanager
def shown(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress on stderr: a bar on a terminal, elsewhere a line every ten seconds and at the end.

    Gives a function that takes how many more rows are done.
    """
    with tqdm(total=total, desc=what, unit=" rows", disable=not sys.stderr.isatty()) as bar:
        done, said = 0, time.monotonic()

        def step(rows: int) -> None:
            nonlocal done, said
            done += rows
            bar.update(rows)
            if bar.disable and (done == total or time.monotonic() - said > 10):
                said = time.monotonic()
                _say(f"{what}: {done:,} of {total:,} rows")

        yield step


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare(options: Options, progress: Progress = shown) -> Prepared:
    """Reads, checks and writes; goes on where an interrupted call of the same input stopped.

    Raises UserError for a mistake and for input that is not as it should be, before anything is
    created: all rows are checked first.
    """
    target = _target(options)
    rows = _rows(options)
    _orders(rows, {}, options)
    inputs = _digest(rows, options)
    work = target.with_name(f".{target.name}.incomplete")
    plan, shards = _journal(work, inputs)
    if plan is None:
        if (work / "journal.json").exists():
            _say("the input or the options have changed since an interrupted call: all anew")
        plan = _planned(rows, options, progress)
    elif shards:
        _say(f"files that an interrupted call has finished: {len(shards):,}")
    with _locked(work):
        data = work / "data"
        if not shards:
            shutil.rmtree(data, ignore_errors=True)
            data.mkdir()
        _write_all(work, inputs, rows, plan, shards, options, progress)
        if [raw.stamp(path) for path in rows.files] != rows.stamps:
            raise UserError(
                f"{options.source} was changed while it was read: give the command again"
            )
        features = _finish(data, plan, shards, rows, options)
        _into_place(data, target, options)
        shutil.rmtree(work)
    return Prepared(
        directory=target,
        features=features,
        splits={split: (sum(lengths), len(lengths)) for split, lengths in plan.shards.items()},
        bad=len(plan.bad),
    )


def verify(directory: Path) -> int:
    """Checks every file of a finished directory; gives their number.

    Raises UserError, naming the files that differ, are missing, or were not there.
    """
    try:
        wanted = json.loads((directory / CHECKSUMS).read_text())["sha256"]
    except FileNotFoundError:
        raise UserError(f"{directory} has no {CHECKSUMS}: not a finished data set") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{directory / CHECKSUMS} is damaged") from None
    found = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    wrong = [f"{name} is missing" for name in sorted(set(wanted) - found)]
    wrong += [f"{name} is not of it" for name in sorted(found - set(wanted) - {CHECKSUMS})]
    for name in sorted(set(wanted) & found):
        if _sha256(directory / name) != wanted[name]:
            wrong.append(f"{name} differs")
    if wrong:
        raise UserError(f"{directory}: {', '.join(wrong)}")
    return len(wanted)


def _target(options: Options) -> Path:
    """Where the finished version will be. Raises UserError for options that cannot be."""
    for package in ("tensorflow_datasets", "array_record", "PIL"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'ergon[tfds]'")
    import tensorflow_datasets as tfds

    if options.source is None or options.kind is None or options.name is None:
        raise UserError("give a file or folder, --kind and --name; or --verify and a directory")
    if not options.source.exists():
        raise UserError(f"there is no {options.source}")
    if options.kind in ("images", "idx") and not options.source.is_dir():
        raise UserError(f"{options.source} is not a folder, as --kind {options.kind} reads")
    if options.label is not None and options.kind != "table":
        raise UserError(f"--label is a column of a table, and --kind is {options.kind}")
    # TFDS turns capitals into _ and a small letter, and then finds nothing.
    if not re.fullmatch("[a-z][a-z0-9_]*", options.name):
        raise UserError(f"--name {options.name!r} must be of a-z, 0-9 and _, a letter first")
    if options.name in tfds.list_builders(with_community_datasets=False):
        raise UserError(
            f"--name {options.name} is a data set that TFDS has: it would not find yours"
        )
    if not tfds.core.Version.is_valid(options.version):
        raise UserError(f"--version {options.version!r} must be three numbers such as 1.0.0")
    if (
        not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", options.split or "train")
        or options.split == "all"
    ):
        raise UserError(f"--split {options.split!r} must be of letters, digits and _, and not all")
    shares = {"--validation": options.validation, "--test": options.test}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise UserError(f"{name} {share} must be 0 or more, and less than 1")
    if sum(shares.values()) >= 1:
        raise UserError("--validation and --test leave nothing of the rows")
    if min(options.split_seed, options.shuffle or 0, options.max_bad) < 0:
        raise UserError("--split_seed, --shuffle and --max_bad must be 0 or more")
    if not options.shard_mb > 0:
        raise UserError(f"--shard_mb {options.shard_mb} must be more than 0")
    target = options.out / options.name / options.version
    if target.resolve().is_relative_to(options.source.resolve()):
        raise UserError(f"{target} would be inside of what is read")
    _refuse_finished(target, options)
    return target


def _refuse_finished(target: Path, options: Options) -> None:
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} is there already: give another --version, or --overwrite")


def _rows(options: Options) -> raw.Rows:
    assert options.source is not None
    rows: raw.Rows
    if options.kind == "table":
        rows = raw.Table(options.source, options.label)
    else:
        kinds = {"images": raw.Images, "idx": raw.Idx, "lines": raw.Lines, "files": raw.Files}
        rows = kinds[str(options.kind)](options.source)
    if options.split is not None and "" not in rows.splits:
        raise UserError(f"--split {options.split}: {options.source} has splits of its own")
    return rows


def _orders(rows: raw.Rows, bad: dict[int, str], options: Options) -> dict[str, np.ndarray]:
    """The rows of each split, in the order in which they are written."""
    base = (options.split or "train") if "" in rows.splits else "train"
    orders = {
        split or base: np.array([row for row in found if row not in bad], np.int64)
        for split, found in rows.splits.items()
    }
    shares = {"validation": options.validation, "test": options.test}
    shares = {name: share for name, share in shares.items() if share}
    if shares:
        if base not in orders:
            raise UserError(f"--{next(iter(shares))} is taken from {base}, and there is none")
        drawn = np.random.default_rng(options.split_seed).permutation(orders[base])
        for name, share in shares.items():
            if name in orders:
                raise UserError(f"--{name} {share}: {options.source} has a split {name} already")
            count = round(share * len(orders[base]))
            orders[name], drawn = np.sort(drawn[:count]), drawn[count:]
        orders[base] = np.sort(drawn)
    for split, order in orders.items():
        if not len(order):
            without = " without its bad rows" if bad else ""
            raise UserError(f"{options.source}: the split {split} has no rows{without}")
    if options.shuffle is not None:
        for i, split in enumerate(sorted(orders)):
            orders[split] = np.random.default_rng((options.shuffle, i)).permutation(orders[split])
    return orders


def _digest(rows: raw.Rows, options: Options) -> str:
    """SHA-256 of all that the written bytes depend on, the files by name, size and time."""
    about = dataclasses.asdict(options)
    for name in ("source", "out", "overwrite", "verify"):
        del about[name]
    packages = ("tensorflow_datasets", "array_record", "pillow", "numpy")
    about["packages"] = {name: metadata.version(name) for name in packages}
    digest = hashlib.sha256(json.dumps(about).encode())
    for path, stamp in zip(rows.files, rows.stamps, strict=True):
        name = path.relative_to(rows.base).as_posix()
        digest.update(json.dumps([name, *stamp]).encode())
    return digest.hexdigest()


def _journal(work: Path, inputs: str) -> tuple[Plan | None, dict[str, Shard]]:
    """What an interrupted call left: its plan, and its finished files as they are still there.

    None where there was no such call, and where it was of other input.
    """
    try:
        journal = json.loads((work / "journal.json").read_text())
        if journal["inputs"] != inputs:
            return None, {}
        plan = Plan(
            **journal["plan"] | {"bad": {int(k): v for k, v in journal["plan"]["bad"].items()}}
        )
        shards = {name: Shard(**shard) for name, shard in journal["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}
    whole = {
        name: shard
        for name, shard in shards.items()
        if (work / "data" / name).is_file() and _sha256(work / "data" / name) == shard.sha256
    }
    return plan, whole


def _planned(rows: raw.Rows, options: Options, progress: Progress) -> Plan:
    """Checks every row. Raises UserError for a bad one, or for too many where they are skipped."""
    from tensorflow_datasets.core.utils import shard_utils

    sizes = np.zeros(len(rows), np.int64)
    bad: dict[int, str] = {}

    def refuse(row: int, problem: str) -> None:
        line = f"{rows.base / rows.where(row)} {problem}"
        if options.on_bad == "raise":
            raise UserError(line)
        bad[row] = problem
        if len(bad) > options.max_bad:
            raise UserError(f"more than --max_bad {options.max_bad} rows are bad, now {line}")

    with progress("checking", len(rows)) as step:
        for row, found in enumerate(_checked(rows)):
            if isinstance(found, int):
                sizes[row] = found
            else:
                refuse(row, str(found))
            step(1)
    good = [row for row in range(len(rows)) if row not in bad]
    if good:
        for row, problem in rows.odd(good).items():
            refuse(row, problem)
    orders = _orders(rows, bad, options)
    made = rows.features([row for row in good if row not in bad])
    shards = {}
    for split, order in orders.items():
        files = -(-int(sizes[order].sum()) // max(1, round(options.shard_mb * 1e6)))
        ends = shard_utils.get_shard_boundaries(len(order), min(max(files, 1), len(order)))
        shards[split] = np.diff([0, *ends]).tolist()
    return Plan(
        features=_connector(made).to_json(),
        names={name: f.names for name, f in made.items() if hasattr(f, "names")},
        bad=dict(sorted(bad.items())),
        shards=shards,
    )


def _checked(rows: raw.Rows) -> Iterator[int | raw.BadRow]:
    """Of every row, in order, its size or what is wrong with it."""

    def check(row: int) -> int | raw.BadRow:
        try:
            return rows.check(row)
        except raw.BadRow as error:
            return error

    if rows.threads == 1:
        yield from map(check, range(len(rows)))
        return
    with ThreadPoolExecutor(min(rows.threads, os.cpu_count() or 1)) as pool:
        # map() starts all at once: a million waiting rows take a gigabyte.
        for start in range(0, len(rows), 1024):
            yield from pool.map(check, range(start, min(start + 1024, len(rows))))


def _connector(made: Any) -> Any:
    from tensorflow_datasets import features

    return features.FeaturesDict(dict(made))


def _features(plan: Plan) -> Any:
    """TFDS's features of a plan."""
    from tensorflow_datasets import features

    found = features.FeaturesDict.from_json(plan.features)
    for name, names in plan.names.items():
        found[name].names = names
    return found


def _template(split: str, options: Options) -> Any:
    """TFDS's names of a split's files."""
    from tensorflow_datasets.core import naming

    return naming.ShardedFileTemplate(
        data_dir="", dataset_name=options.name, split=split, filetype_suffix="array_record"
    )


def _write_all(
    work: Path,
    inputs: str,
    rows: raw.Rows,
    plan: Plan,
    shards: dict[str, Shard],
    options: Options,
    progress: Progress,
) -> None:
    """Writes what is not yet in `shards`, the journal after every file."""
    features = _features(plan)
    orders = _orders(rows, plan.bad, options)
    _write_journal(work, inputs, plan, shards)
    with progress("writing", sum(map(len, orders.values()))) as step:
        for split, lengths in plan.shards.items():
            names = _template(split, options).sharded_filenames(len(lengths))
            ends = np.cumsum(lengths).tolist()
            for name, start, end in zip(names, [0, *ends], ends, strict=False):
                if name in shards:
                    step(end - start)
                    continue
                shard = _write_shard(
                    work / "data" / name, features, rows, orders[split][start:end], step
                )
                shards[name] = shard
                _write_journal(work, inputs, plan, shards)


def _write_shard(
    path: Path, features: Any, rows: raw.Rows, order: Iterable[int], step: Callable[[int], None]
) -> Shard:
    from tensorflow_datasets.core import example_serializer, file_adapters

    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    size = 0

    def records() -> Iterator[tuple[int, bytes]]:
        nonlocal size
        for row in order:
            try:
                example = rows.example(int(row))
            except raw.BadRow as error:
                raise UserError(
                    f"{rows.base / rows.where(row)} {error}, and did not before"
                ) from None
            proto = serializer.get_tf_example(features.encode_example(example))
            # Without this the features of a record may stand in another order the next time.
            record = proto.SerializeToString(deterministic=True)
            size += len(record)
            yield int(row), record
            step(1)

    temporary = path.with_name(f".{path.name}.new")
    file_adapters.ArrayRecordFileAdapter.write_examples(temporary, records())
    _sync(temporary)
    digest = _sha256(temporary)
    os.replace(temporary, path)
    return Shard(sha256=digest, bytes=size)


def _write_journal(work: Path, inputs: str, plan: Plan, shards: dict[str, Shard]) -> None:
    about = {
        "inputs": inputs,
        "plan": dataclasses.asdict(plan),
        "shards": {name: dataclasses.asdict(shard) for name, shard in shards.items()},
    }
    temporary = work / ".journal.json.new"
    with temporary.open("w") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, work / "journal.json")


def _finish(
    data: Path, plan: Plan, shards: dict[str, Shard], rows: raw.Rows, options: Options
) -> dict[str, str]:
    """Writes all that is not a shard, the checksums last; gives the features in words."""
    from tensorflow_datasets.core import Version, dataset_info, splits

    features = _features(plan)
    wanted = {"image", "label"} <= set(features)
    identity = dataset_info.DatasetIdentity(
        name=options.name,
        version=Version(options.version),
        data_dir=str(data),
        module_name=__name__,
    )
    info = dataset_info.DatasetInfo(
        builder=identity,
        features=features,
        supervised_keys=("image", "label") if wanted else None,
    )
    info.set_file_format("array_record")
    found = []
    for split, lengths in plan.shards.items():
        names = _template(split, options).sharded_filenames(len(lengths))
        size = sum(shards[name].bytes for name in names)
        found.append(splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    info.set_splits(splits.SplitDict(found))
    info.write_to_directory(data)
    if plan.bad:
        lines = [f"{rows.where(row)} {problem}\n" for row, problem in plan.bad.items()]
        (data / "bad_rows.txt").write_text("".join(lines), "utf-8", errors="backslashreplace")
    sums = {name: shard.sha256 for name, shard in shards.items()}
    for path in data.iterdir():
        if path.name.startswith("."):
            path.unlink()
        elif path.name not in sums and path.name != CHECKSUMS:
            sums[path.name] = _sha256(path)
    text = json.dumps({"sha256": dict(sorted(sums.items()))}, indent=2) + "\n"
    (data / CHECKSUMS).write_text(text)
    for path in (*data.iterdir(), data):
        _sync(path)
    return {name: repr(feature) for name, feature in sorted(features.items())}


def _into_place(data: Path, target: Path, options: Options) -> None:
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # a call ended between the two renamings below
        os.rename(old, target)
    _refuse_finished(target, options)  # another process may have finished it since
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(data, target)
    _sync(target.parent)
    _sync(target.parent.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Has a file's bytes, or a folder's names, on the disk before anything else is done."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems cannot do it to a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Makes the folder, and holds it alone. Raises UserError where another process does."""
    work.mkdir(parents=True, exist_ok=True)
    folder = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another process is at work in {work}") from None
    finally:
        os.close(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
