"""TFDS data sets: random access to ArrayRecord files, with no TensorFlow.

What is small is decoded once, into arrays that are memory-mapped; what is not, as it is read.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import operator
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt
from tqdm import tqdm

from research import UserError
from research.data import files
from research.data.bad import Bad, Checked
from research.data.cells import Cells, Named, Places, require, text
from research.data.splits import Batch, Examples, Shuffled, Split, Splits, zeros

Size = tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]]
Path = tuple[str, ...]
"""The name of a feature, after those of the features that it is within."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names of images, by their channels."""
NARROW = {"float64": "float32", "int64": "int32", "uint64": "uint32"}
"""What a step computes with, where a feature is of 64 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDS(Checked):
    """A data set of images, or of other arrays, and their labels.

    inputs: [batch, height, width, channels] uint8 of an image, which tasks take as [0, 1];
    otherwise as the feature is, 64 bits as 32. targets: [batch] int32 of a label, float32
    [batch, 1] of a number, or [batch, ...] of several.
    """

    name: str
    """As `tfds.builder` takes it: cifar10, or cifar10:3.0.2."""
    data_dir: str = "tfds"
    """Folder of data sets, as it stands or below $ERGON_DATA."""
    train: str = "train"
    """Rows to train on, in TFDS's syntax, such as train[:90%]."""
    validation: str | None = None
    """Such as train[90%:]; None: there is no such split."""
    test: str | None = "test"
    inputs: str | None = None
    """The feature that models read; None: the only image, or else the only array."""
    targets: str | None = None
    """The feature that is to be predicted; None: the only label."""
    size: Size | None = None
    """Height and width that images are brought to: scaled until one fits, and the middle kept."""
    cache_gb: Annotated[float, Gt(0)] = 4.0
    """A split of no more than so many GB (10^9 bytes), decoded, is decoded once and kept on disk;
    a larger one is decoded as it is read."""
    threads: Annotated[int, Ge(1)] = 8
    """Threads that decode."""

    def load(self) -> Splits:
        builder = _builder(self.name, self.data_dir)
        asked = {"train": self.train, "validation": self.validation, "test": self.test}
        found: dict[str, Split] = {}
        bad, features = self.bad(), Features.of(builder, self)
        for name, rows in asked.items():
            if rows is not None:
                found[name] = _split(_Rows(builder, rows, features, self.size), self, bad)
        return Splits(found, {}, bad.notes())

    def outline(self, rows: int) -> Splits | None:
        """As `research.data.outline` has it: of images of `size`, in colour, and one label.

        They are as if kept decoded. Of a larger set than `cache_gb` batches of less than 512 KiB
        go to the devices one by one, where these go many at once.
        """
        if self.size is None or self.targets is not None:
            return None
        found = {"inputs": zeros(np.uint8, rows, *self.size, 3), "targets": zeros(np.int32, rows)}
        if self.on_bad == "skip":
            found["bad"] = zeros(bool, rows)
        asked = {"train": self.train, "validation": self.validation, "test": self.test}
        return Splits({name: Examples(found) for name, rows in asked.items() if rows}, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesOrTFDS(Checked):
    """What sources have in common that read files, or else a TFDS data set."""

    tfds: str | None = None
    """A TFDS data set; what names a file names a split of it then, in TFDS's syntax, and what names
    a column a feature, a/b being b within a."""
    data_dir: str = "tfds"
    """Folder of TFDS data sets, as it stands or below $ERGON_DATA."""


def _builder(name: str, data_dir: str) -> Any:
    """A prepared data set's builder. Raises UserError where there is none."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"TFDS data needs a package: pip install 'ergon[tfds]' ({error})") from None
    folder = files.find(data_dir)
    if not folder.is_dir():
        raise UserError(f"data.data_dir: {folder} is no folder")
    try:
        builder = tfds.builder(name, data_dir=folder)
    except tfds.core.registered.DatasetNotFoundError:
        there = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise UserError(f"{folder} has no data set {name}; it has: {', '.join(there)}") from None
    except (ValueError, AssertionError, OSError) as error:
        raise UserError(f"{name} in {folder}: {' '.join(str(error).split())}") from None
    if not builder.is_prepared():
        _prepare(builder, name, folder)
    return builder


def _prepare(builder: Any, name: str, folder: pathlib.Path) -> None:
    """Has TFDS download a data set and write it as ArrayRecord."""
    print(f"preparing {name} in {folder}", file=sys.stderr, flush=True)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        lacking = isinstance(error, ImportError) or "tensorflow is not installed" in str(error)
        advice = (
            "to prepare it takes TensorFlow: pip install 'ergon[prepare]', once, on any machine"
            if lacking
            else f"it could not be prepared: {type(error).__name__}: {error}"
        )
        raise UserError(f"{name} is not prepared in {folder}; {advice}") from None


@dataclasses.dataclass(frozen=True)
class Features:
    """Which features of a data set are read, and as what."""

    inputs: str
    targets: str
    image: bool
    classes: int
    """0: targets are numbers."""

    @classmethod
    def of(cls, builder: Any, source: TFDS) -> "Features":
        from tensorflow_datasets import features as kinds

        features = dict(builder.info.features)
        labels = [k for k, v in features.items() if isinstance(v, kinds.ClassLabel)]
        images = [k for k, v in features.items() if isinstance(v, kinds.Image)]
        arrays = [
            k
            for k, v in features.items()
            if type(v) in (kinds.Tensor, kinds.Scalar) and np.issubdtype(v.np_dtype, np.number)
        ]

        def choose(field: str, named: str | None, among: list[str], what: str) -> str:
            if named is not None:
                if named not in features:
                    raise UserError(f"data.{field}: no feature {named}; there are {known}")
                return named
            if len(among) != 1:
                every = "" if field == "targets" or images else "; data.table.Table reads several"
                raise UserError(f"data.{field}: {len(among)} {what} among {known}: name one{every}")
            return among[0]

        known = ", ".join(sorted(features))
        targets = choose("targets", source.targets, labels, "labels")
        rest = images or [k for k in arrays if k != targets]
        inputs = choose("inputs", source.inputs, rest, "images" if images else "arrays")
        for field, name in (("inputs", inputs), ("targets", targets)):
            if name not in (*images, *arrays, *labels):
                kind = type(features[name]).__name__
                hint = "; data.text.Text reads texts" if kind == "Text" else ""
                raise UserError(f"data.{field}: {name} is a {kind}, not an array{hint}")
        if source.size is not None and inputs not in images:
            raise UserError(f"data.size is for images, and {inputs} is none")
        if inputs == targets:
            raise UserError(f"data.inputs and data.targets are both {inputs}")
        shape, dtype = features[inputs].shape, features[inputs].np_dtype
        if inputs in images and (shape[-1] not in MODES or dtype != np.uint8):
            raise UserError(
                f"data.inputs: {inputs} has images of {shape[-1]} channels of {dtype.__name__}; "
                f"they can have {', '.join(map(str, MODES))}, of uint8"
            )
        if None in shape and source.size is None:
            hint = "data.size must be given" if inputs in images else "data.inputs cannot be read"
            raise UserError(f"{hint}: {inputs} has the shape {shape}")
        if None in features[targets].shape:
            shape = features[targets].shape
            raise UserError(f"data.targets cannot be read: {targets} has the shape {shape}")
        classes = features[targets].num_classes if targets in labels else 0
        return cls(inputs, targets, inputs in images, classes)


class _Rows:
    """The rows of a split as they are read: `rows[i]` is (inputs, target)."""

    def __init__(self, builder: Any, split: str, features: Features, size: Size | None) -> None:
        self.features, self.size, self.split = features, size, split
        self.name = builder.info.full_name
        names = [(features.inputs,), (features.targets,)]
        self.records = _Records(builder, split, names, encoded=names[:1] if features.image else ())
        self.files = self.records.files
        shape = builder.info.features[features.inputs].shape
        self.shape = shape if size is None else (*size, shape[-1])
        dtype = builder.info.features[features.inputs].np_dtype
        self.dtype = np.dtype(NARROW.get(np.dtype(dtype).name, dtype))
        shape = builder.info.features[features.targets].shape
        self.target_shape = shape if features.classes else shape or (1,)
        self.target_dtype = np.dtype(np.int32 if features.classes else np.float32)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def bytes(self) -> int:
        """Of all inputs, decoded."""
        return len(self) * int(np.prod(self.shape)) * self.dtype.itemsize

    def where(self, i: int) -> str:
        return self.records.where(i)

    def blank(self) -> tuple[np.ndarray, np.ndarray]:
        """What stands in the place of a bad row."""
        return np.zeros(self.shape, self.dtype), np.zeros(self.target_shape, self.target_dtype)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and target of a row. Raises ValueError, with the reason, where it is bad."""
        names = self.features
        try:
            row = self.records[i]
        except Exception as error:
            raise ValueError(f"cannot be read: {' '.join(str(error).split())}") from None
        inputs, target = row[names.inputs], row[names.targets]
        if names.image:
            inputs = _image(inputs, self.shape, self.size)
        elif np.shape(inputs) != self.shape:
            raise ValueError(f"{names.inputs} has the shape {np.shape(inputs)}, not {self.shape}")
        if names.classes and not 0 <= target < names.classes:
            raise ValueError(f"{names.targets} is {target}, and there are {names.classes} classes")
        target = np.reshape(target, self.target_shape)
        inputs = _narrowed(names.inputs, inputs, self.dtype)
        return inputs, _narrowed(names.targets, target, self.target_dtype)


def _narrowed(name: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """A feature in a type. Raises ValueError where it is not finite, or does not fit."""
    value = np.asarray(value)
    if not np.isfinite(value).all():
        raise ValueError(f"{name} is not finite")
    with np.errstate(over="ignore"):
        found = value.astype(dtype)
    fits = np.isfinite(found) if np.issubdtype(dtype, np.floating) else found == value
    if not fits.all():
        raise ValueError(f"{name} is too large for {dtype}")
    return found


class Texts:
    """The rows of a split's text feature, as bytes."""

    def __init__(self, name: str, data_dir: str, split: str, feature: str | None) -> None:
        from tensorflow_datasets import features as kinds

        builder = _builder(name, data_dir)
        features = dict(builder.info.features)
        among = [k for k, v in features.items() if isinstance(v, kinds.Text)]
        if feature is None and len(among) != 1:
            known = ", ".join(sorted(features))
            raise UserError(f"data.feature: {len(among)} texts among {known}: name one")
        if feature is not None and feature not in among:
            raise UserError(
                f"data.feature: {name} has no text {feature}; it has {', '.join(among)}"
            )
        self.name, self.split, self.feature = builder.info.full_name, split, feature or among[0]
        self.records = _Records(builder, split, [(self.feature,)])

    def rows(self) -> list[bytes]:
        """Each with an end of line, as a file has them."""
        found = (self.records[i][self.feature] for i in range(len(self.records)))
        return [text if text.endswith(b"\n") else text + b"\n" for text in found]

    def where(self, i: int) -> str:
        return self.records.where(i)

    def key(self) -> list[Any]:
        """What tells these rows from others, unread."""
        return [self.name, self.split, self.feature, _stamps(self.records.files)]


def read_table(
    name: str,
    data_dir: str,
    split: str,
    skip: Bad,
    *,
    named: Named,
    wanted: Callable[[str], bool],
    numbers: bool = False,
) -> Cells:
    """The rows of a split as those of a table: features of one value each are its columns.

    Columns are in the order of their names, a feature b within a feature a being a/b. Only wanted
    ones are read, the others' cells are empty. numbers: a class is its number; False: its name, and
    an empty cell where the row has none. Raises UserError for columns that are not there or not of
    one value, before any row is read.
    """
    builder = _builder(name, data_dir)
    source = f"{builder.info.full_name} {split}"
    leaves = {"/".join(path): (path, f) for path, f in _leaves(builder.info.features)}
    names = sorted(leaves)
    require(source, names, named)
    read = {column: _cell(leaves[column][1], numbers) for column in filter(wanted, names)}
    if odd := [f"{k} ({type(leaves[k][1]).__name__})" for k, cell in read.items() if cell is None]:
        raise UserError(f"{source}: a column is of one value a row, and not so {', '.join(odd)}")
    records = _Records(builder, split, [leaves[column][0] for column in read])

    def cell(row: Any, column: str) -> str:
        made = read.get(column)
        return made(functools.reduce(operator.getitem, leaves[column][0], row)) if made else ""

    def cells() -> Places:
        with _progress(f"reading {source}", len(records)) as bar:
            for i in range(len(records)):
                bar.update()
                try:
                    row = records[i]
                    yield i, tuple(cell(row, column) for column in names)
                except UnicodeDecodeError:
                    yield i, "not UTF-8"
                except Exception as error:
                    yield i, f"cannot be read: {' '.join(str(error).split())}"

    classes = {column: _classes(leaves[column][1]) for column in read}
    known = {} if numbers else {column: of for column, of in classes.items() if of}
    return Cells.of(source, names, cells(), records.where, skip, known)


def _leaves(features: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Features by their names, after those that they are within."""
    from tensorflow_datasets import features as kinds

    for name, feature in features.items():
        if isinstance(feature, kinds.FeaturesDict):
            yield from _leaves(feature, (*above, name))
        else:
            yield (*above, name), feature


def _classes(feature: Any) -> tuple[str, ...]:
    """The names of a feature's classes; () where it has none."""
    from tensorflow_datasets import features as kinds

    if not isinstance(feature, kinds.ClassLabel) or feature.num_classes is None:
        return ()
    return tuple(map(str, map(feature.int2str, range(feature.num_classes))))


def _cell(feature: Any, numbers: bool) -> Callable[[Any], str] | None:
    """What makes a cell of a feature's value; None: the feature is not of one value."""
    from tensorflow_datasets import features as kinds

    if not isinstance(feature, kinds.Tensor) or feature.shape != ():
        return None
    if (classes := _classes(feature)) and not numbers:
        return lambda value: "" if value is None or value < 0 else classes[value]
    if np.issubdtype(feature.np_dtype, np.floating):
        # TFDS keeps 32 bits, and gives them as 64: 0.1 as 0.10000000149011612.
        return lambda value: text(None if value is None else np.float32(value))
    if np.issubdtype(feature.np_dtype, np.bool_) and numbers:
        return lambda value: text(None if value is None else int(value))
    return text


class _Records:
    """The rows of a split, with some of their features: the others are not decoded."""

    def __init__(
        self, builder: Any, split: str, paths: Collection[Path], encoded: Collection[Path] = ()
    ) -> None:
        """encoded: images that are given as they are kept. Raises UserError for an empty split."""
        import tensorflow_datasets as tfds

        self.features = _only(builder.info.features, paths)
        self.decoders = {name: tfds.decode.SkipDecoding() for (name,) in encoded} or None
        self.source, self.files = _source(builder, split)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        return self.features.deserialize_example_np(self.source[i], decoders=self.decoders)

    def where(self, i: int) -> str:
        return _place(self.files, i)


def _only(features: Any, paths: Collection[Path]) -> Any:
    """Features without those that no path leads to."""
    from tensorflow_datasets import features as kinds

    if not isinstance(features, kinds.FeaturesDict):
        return features
    names = dict.fromkeys(path[0] for path in paths)
    below = {name: [path[1:] for path in paths if path[0] == name] for name in names}
    return kinds.FeaturesDict({name: _only(features[name], rest) for name, rest in below.items()})


Files = list[tuple[pathlib.Path, int, int]]
"""A split's files, and in each the first row that is of it and how many are; -1: to the end."""


def _source(builder: Any, split: str) -> tuple[Any, Files]:
    """The rows of a split as bytes, and where they are. Raises UserError where there are none."""
    import tensorflow_datasets as tfds

    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    name = builder.info.full_name
    try:
        info = builder.info.splits[split]
        if info.num_examples < 1:
            raise UserError(f"{name}: the split {split} is empty")
        source = builder.as_data_source(split=split, deserialize_method=raw)
        found = [(pathlib.Path(i.filename), i.skip, i.take) for i in info.file_instructions]
    except UserError:
        raise
    except (ValueError, KeyError, NotImplementedError, AssertionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: the split {split} cannot be read: {reason}") from None
    return source, found


def _stamps(found: Files) -> list[Any]:
    """What tells a split's files from others, unread."""
    return [files.stamp(path) for path, _, _ in found]


def _place(found: Files, i: int) -> str:
    """The file of a row of a split, and its place in it from 0."""
    for path, skip, take in found:
        if take < 0 or i < take:
            return f"{path}, row {skip + i}"
        i -= take
    raise IndexError(i)


def _progress(title: str, n: int) -> Any:
    """A bar on a terminal, and elsewhere a line where there is much to do."""
    on_terminal = sys.stderr.isatty()
    if not on_terminal and n > 10_000:
        print(f"{title}: {n:,} rows", file=sys.stderr, flush=True)
    return tqdm(total=n, desc=title, unit=" rows", disable=not on_terminal)


def _image(encoded: bytes, shape: Sequence[int], size: Size | None) -> np.ndarray:
    """[height, width, channels] uint8 of an encoded image."""
    from PIL import Image

    mode = MODES[shape[-1]]
    try:
        image: Any = Image.open(io.BytesIO(encoded))
        if image.mode.startswith(("I", "F")):  # which Pillow would cut off at 255
            raise ValueError(f"its pixels, of mode {image.mode}, are not of 8 bits")
        image = image if image.mode == mode else image.convert(mode)
        if size is not None and (image.height, image.width) != size:
            scale = max(size[0] / image.height, size[1] / image.width)
            wide, high = round(image.width * scale), round(image.height * scale)
            left, top = (wide - size[1]) // 2, (high - size[0]) // 2
            image = image.resize((wide, high), Image.Resampling.BILINEAR)
            image = image.crop((left, top, left + size[1], top + size[0]))
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
    except Exception as error:
        raise ValueError(f"the image cannot be decoded: {' '.join(str(error).split())}") from None
    if pixels.shape != tuple(shape):
        raise ValueError(f"the image has the shape {pixels.shape}, not {tuple(shape)}")
    return pixels


def _split(rows: _Rows, source: TFDS, bad: Bad) -> Split:
    if rows.bytes > source.cache_gb * 1e9:
        return Decoded(rows, source.threads, bad)
    asked = dataclasses.asdict(source)
    for unread in ("data_dir", "train", "validation", "test", "cache_gb", "threads", "max_bad"):
        del asked[unread]
    key = {"tfds": rows.name, "split": rows.split, "files": _stamps(rows.files)} | asked

    def make(folder: pathlib.Path) -> None:
        _decode(rows, folder, source)

    folder = files.cached(key, make)
    with files.whole(folder):
        reasons = json.loads((folder / "bad.json").read_text())
    for where, reason in reasons.items():
        bad(where, reason)
    return Examples(files.mapped(folder))


def _decode(rows: _Rows, folder: pathlib.Path, source: TFDS) -> None:
    """Writes a split's arrays, and what is wrong with its bad rows, by their places."""
    n, found = len(rows), source.bad()
    free = shutil.disk_usage(folder).free
    if free < rows.bytes:  # to write there is no error, but the end of the process
        raise UserError(
            f"{rows.name} {rows.split} takes {rows.bytes / 1e9:.1f} GB decoded, and the cache has "
            f"{free / 1e9:.1f} GB left: see ERGON_CACHE, and data.cache_gb"
        )
    inputs = np.lib.format.open_memmap(
        folder / "inputs.npy", "w+", dtype=rows.dtype, shape=(n, *rows.shape)
    )
    targets, bad = np.zeros((n, *rows.target_shape), rows.target_dtype), np.zeros(n, bool)

    def read(start: int) -> list[tuple[int, str]]:
        """Reads up to 256 rows, and gives those that are bad."""
        reasons = []
        for i in range(start, min(start + 256, n)):
            try:
                inputs[i], targets[i] = rows[i]
            except ValueError as error:
                inputs[i], targets[i] = rows.blank()
                reasons.append((i, str(error)))
        return reasons

    with (
        concurrent.futures.ThreadPoolExecutor(source.threads) as pool,
        _progress(f"decoding once {rows.name} {rows.split}", n) as bar,
    ):
        try:
            for reasons in pool.map(read, range(0, n, 256)):
                bar.update(min(256, n - bar.n))
                for i, reason in reasons:
                    found(rows.where(i), reason)
                    bad[i] = True
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    inputs.flush()
    np.save(folder / "targets.npy", targets)
    if source.on_bad == "skip":
        np.save(folder / "bad.npy", bad)
    (folder / "bad.json").write_text(json.dumps(found.found))


@dataclasses.dataclass(frozen=True)
class Decoded(Shuffled):
    """Rows that are decoded as they are read."""

    rows: Any
    threads: int
    bad: Bad

    def __len__(self) -> int:
        return len(self.rows)

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Bounds of the targets, and what tells the files from others: rows are not read."""
        names = [[p.name, _ends(p), skip, take] for p, skip, take in self.rows.files]
        digest = hashlib.sha256(json.dumps([self.rows.name, names]).encode()).digest()
        inputs, target = self.rows.blank()
        return {
            "inputs": inputs[None],
            "targets": np.stack([target, target + max(self.rows.features.classes - 1, 0)]),
            "files": np.frombuffer(digest, np.uint8),
        }

    def take(self, index: np.ndarray) -> Batch:
        rows, bad = [], np.zeros(len(index), bool)
        for place, i in enumerate(index):
            try:
                rows.append(self.rows[int(i)])
            except ValueError as error:
                self.bad(self.rows.where(int(i)), str(error))
                rows.append(self.rows.blank())
                bad[place] = True
        inputs, targets = (np.stack(column) for column in zip(*rows, strict=True))
        batch = {"inputs": inputs, "targets": targets}
        weights = np.where(bad, 0, 1).astype(np.float32)
        kept = {"bad": bad} if self.bad.on_bad == "skip" else {}
        return batch | kept | {"weights": weights}


def _ends(path: pathlib.Path) -> list[Any]:
    """A file's size, and the hash of its first and last 64 KiB."""
    with path.open("rb") as file:
        head = file.read(2**16)
        file.seek(max(path.stat().st_size - 2**16, 0))
        return [path.stat().st_size, hashlib.sha256(head + file.read()).hexdigest()]
