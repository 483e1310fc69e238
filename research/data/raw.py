"""Files as rows: images by class, IDX, text and tables, and what is wrong with a row.

Rows are numbered from 0 in the sorted order of the files. Hidden files (.name) are not looked at;
every other file counts, so that none is left out unseen.
"""

import csv
import gzip
import io
import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from research import UserError
from research.data.cells import require

# What a folder or file must be called to be a split, and the split's name.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "t10k": "test",
}
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|nan|[+-]?inf")
_IDX = re.compile(r"(?P<stem>.*?)[-_.]?(?P<what>images|labels)[-.]idx\d-ubyte(\.gz)?")
_BOM = b"\xef\xbb\xbf"


class BadRow(ValueError):
    """What is wrong with a row, to stand after its place."""


class Rows:
    """The rows of an input. Raises UserError where the files are no such input at all."""

    threads: ClassVar[int] = 1
    """Threads that gain something in `check`."""
    base: Path
    """The folder that `where` is below."""
    files: list[Path]
    """All that was found."""
    stamps: list[tuple[int, int]]
    """Their `stamp`s, from before anything was read."""
    splits: dict[str, range]
    """Rows of each split; of "" alone where the input has no splits."""

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def where(self, row: int) -> str:
        """A row's file below `base`, and its place in it."""
        raise NotImplementedError

    def check(self, row: int) -> int:
        """Bytes that a row will take, about. Raises BadRow."""
        raise NotImplementedError

    def odd(self, rows: Sequence[int]) -> dict[int, str]:
        """Which of some checked rows do not go with the others, and why."""
        return {}

    def features(self, rows: Sequence[int]) -> Mapping[str, Any]:
        """TFDS's features of some checked rows, by name."""
        raise NotImplementedError

    def example(self, row: int) -> dict[str, Any]:
        """A row as its features take it. Raises BadRow."""
        raise NotImplementedError


def stamp(path: Path) -> tuple[int, int]:
    """A file's size, and when it was last changed."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class Images(Rows):
    """root/class/image or root/split/class/image, in any format that Pillow reads."""

    threads = 16

    def __init__(self, root: Path) -> None:
        self.base = root
        folders = _class_folders(root)
        splits = _by_split(root, folders)
        roots = {split: root / name for name, split in splits.items()} or {"": root}
        found = {split: _class_folders(folder) for split, folder in sorted(roots.items())}
        for split, names in found.items():
            if not names:
                raise UserError(f"{roots[split]} has no class folders")
        self.classes = sorted({name for names in found.values() for name in names})
        _check_names(self.classes, root)
        number = {name: i for i, name in enumerate(self.classes)}
        self.files, self.splits = [], {}
        self._labels = array("q")
        for split, names in found.items():
            first = len(self.files)
            for name in names:
                inside, files = _listing(roots[split] / name)
                if inside:
                    raise UserError(f"{inside[0]} is a folder, and a class holds images alone")
                if not files:
                    raise UserError(f"{roots[split] / name} is a class without images")
                self.files += files
                self._labels.extend([number[name]] * len(files))
            self.splits[split] = range(first, len(self.files))
        self.stamps = [stamp(path) for path in self.files]
        self._shapes = np.zeros((len(self.files), 3), np.int64)

    def where(self, row: int) -> str:
        return self.files[row].relative_to(self.base).as_posix()

    def check(self, row: int) -> int:
        data = self.files[row].read_bytes()
        image, whole = _image(data, decode=True)
        shape = (image.height, image.width, len(image.getbands()))
        self._shapes[row] = shape
        return len(data) if whole else math.prod(shape)

    def odd(self, rows: Sequence[int]) -> dict[int, str]:
        channels = self._shapes[rows, 2]
        # The most common; of two equally common the smaller.
        usual, count = max(sorted(Counter(channels.tolist()).items()), key=lambda item: item[1])
        return {
            int(row): f"has {c} channels, and {count:,} of {len(rows):,} images have {usual}"
            for row, c in zip(rows, channels, strict=True)
            if c != usual
        }

    def features(self, rows: Sequence[int]) -> Mapping[str, Any]:
        from tensorflow_datasets import features

        shapes = self._shapes[rows]
        *size, channels = shapes[0].tolist()
        if (shapes != shapes[0]).any():
            size = [None, None]
        return {
            "image": features.Image(shape=(*size, channels)),
            "label": features.ClassLabel(names=self.classes),
        }

    def example(self, row: int) -> dict[str, Any]:
        data = self.files[row].read_bytes()
        image, whole = _image(data, decode=False)
        return {"image": data if whole else _png(image), "label": self._labels[row]}


class Idx(Rows):
    """MNIST's format: NAME-images-idx3-ubyte beside NAME-labels-idx1-ubyte, either also as .gz.

    A fourth dimension of the images is channels. The split is the last word of NAME.
    """

    def __init__(self, root: Path) -> None:
        self.base = root
        pairs: dict[str, dict[str, Path]] = {}
        for path in _listing(root)[1]:
            match = _IDX.fullmatch(path.name)
            if match:
                pair = pairs.setdefault(match["stem"], {})
                if match["what"] in pair:
                    raise UserError(
                        f"{path} and {pair[match['what']].name} are the same file twice"
                    )
                pair[match["what"]] = path
        if not pairs:
            raise UserError(f"{root} has no files such as train-images-idx3-ubyte")
        words = {re.split(r"[-_.]", stem)[-1]: stem for stem in pairs}
        if len(words) < len(pairs):
            raise UserError(f"{root} has several pairs of one split: {', '.join(sorted(pairs))}")
        splits = _by_split(root, sorted(words))
        if len(pairs) > 1 and not splits:
            raise UserError(f"{root} has pairs that name no split: {', '.join(sorted(pairs))}")
        stems = {split: words[word] for word, split in splits.items()} or {"": next(iter(pairs))}
        self.files, self.stamps, self.splits = [], [], {}
        self._images: list[np.ndarray] = []
        self._names: list[str] = []
        labels = []
        for split, stem in sorted(stems.items()):
            for what, other in (("images", "labels"), ("labels", "images")):
                if what not in pairs[stem]:
                    raise UserError(f"{pairs[stem][other]} has no file of {what} beside it")
            pair = pairs[stem]
            self.files += [pair["images"], pair["labels"]]
            self.stamps += [stamp(pair["images"]), stamp(pair["labels"])]
            images, numbers = _idx(pair["images"], (3, 4)), _idx(pair["labels"], (1,))
            images = images if images.ndim == 4 else images[..., None]
            if len(images) != len(numbers):
                raise UserError(
                    f"{pair['images']} has {len(images):,} images, and {pair['labels'].name} "
                    f"{len(numbers):,} labels"
                )
            if 0 in images.shape[1:] or images.shape[3] not in (1, 3, 4):
                raise UserError(f"{pair['images']} has images of shape {images.shape[1:]}")
            self.splits[split] = range(len(self), len(self) + len(images))
            self._images.append(images)
            self._names.append(pair["images"].name)
            labels.append(numbers)
        if len({images.shape[3] for images in self._images}) > 1:
            raise UserError(f"{root}: the splits have images of different channels")
        self._labels = np.concatenate(labels)

    def _place(self, row: int) -> tuple[int, int]:
        """The number of the split, and the row in it."""
        for i, rows in enumerate(self.splits.values()):
            if row in rows:
                return i, row - rows.start
        raise IndexError(row)

    def where(self, row: int) -> str:
        split, place = self._place(row)
        return f"{self._names[split]} row {place}"

    def check(self, row: int) -> int:
        return self._images[self._place(row)[0]][0].size

    def features(self, rows: Sequence[int]) -> Mapping[str, Any]:
        from tensorflow_datasets import features

        sizes = {images.shape[1:3] for images in self._images}
        size = next(iter(sizes)) if len(sizes) == 1 else (None, None)
        names = [str(i) for i in range(int(self._labels.max()) + 1)]
        return {
            "image": features.Image(shape=(*size, self._images[0].shape[3])),
            "label": features.ClassLabel(names=names),
        }

    def example(self, row: int) -> dict[str, Any]:
        from PIL import Image

        split, place = self._place(row)
        pixels = self._images[split][place]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return {"image": _png(image), "label": int(self._labels[row])}


class Files(Rows):
    """Text files in UTF-8, each an example; folders named train, test, ... are splits."""

    def __init__(self, source: Path) -> None:
        self.base = source if source.is_dir() else source.parent
        self.files, self.splits = [], {}
        for split, files in _grouped(source, by_stem=False).items():
            first = len(self.files)
            self.files += files
            self.splits[split] = range(first, len(self.files))
        self.stamps = [stamp(path) for path in self.files]

    def where(self, row: int) -> str:
        return self.files[row].relative_to(self.base).as_posix()

    def check(self, row: int) -> int:
        return len(self.example(row)["text"])

    def features(self, rows: Sequence[int]) -> Mapping[str, Any]:
        from tensorflow_datasets import features

        return {"text": features.Text()}

    def example(self, row: int) -> dict[str, Any]:
        data = self.files[row].read_bytes().removeprefix(_BOM)
        _decoded(data)
        return {"text": data}


class _Spans(Rows):
    """Rows that are runs of bytes in files."""

    def __init__(self, source: Path) -> None:
        self.base = source if source.is_dir() else source.parent
        self.files, self.stamps, self.splits = [], [], {}
        self._file, self._start, self._stop, self._line = (array("q") for _ in range(4))
        for split, files in _grouped(source, by_stem=True).items():
            first = len(self._start)
            for path in files:
                self.files.append(path)
                self.stamps.append(stamp(path))
                self._index(path)
            self.splits[split] = range(first, len(self._start))

    def _index(self, path: Path) -> None:
        """Adds the rows of a file."""
        raise NotImplementedError

    def _add(self, start: int, stop: int, line: int) -> None:
        self._file.append(len(self.files) - 1)
        self._start.append(start)
        self._stop.append(stop)
        self._line.append(line)

    def _read(self, row: int) -> bytes:
        with self.files[self._file[row]].open("rb") as file:
            file.seek(self._start[row])
            return file.read(self._stop[row] - self._start[row])

    def where(self, row: int) -> str:
        path = self.files[self._file[row]].relative_to(self.base)
        return f"{path.as_posix()} line {self._line[row]}"


class Lines(_Spans):
    """Text files in UTF-8, each line an example, an empty one too, without its end of line.

    Files, or folders, named train, test, ... are splits.
    """

    def _index(self, path: Path) -> None:
        with path.open("rb") as file:
            start = position = _after_bom(file)
            for number, line in enumerate(file, 1):
                position += len(line)
                self._add(start, position, number)
                start = position

    def check(self, row: int) -> int:
        return len(self.example(row)["text"])

    def features(self, rows: Sequence[int]) -> Mapping[str, Any]:
        from tensorflow_datasets import features

        return {"text": features.Text()}

    def example(self, row: int) -> dict[str, Any]:
        data = self._read(row).removesuffix(b"\n").removesuffix(b"\r")
        _decoded(data)
        return {"text": data}


class Table(_Spans):
    """CSV (.csv) and TSV (.tsv, .tab) files in UTF-8 with a header; blank lines are no rows.

    A column in which every cell is a whole number is int64, every cell a number float32, any other
    text as it stands; digits after a leading 0 are text, as in 007. A number may have spaces around
    it, and be nan or inf. `label` names the column that is a class: its values without the spaces
    around them, in the order of numbers where all are whole numbers. Files, or folders, named
    train, test, ... are splits.
    """

    def __init__(self, source: Path, label: str | None) -> None:
        csv.field_size_limit(2**31 - 1)
        self.columns: list[str] = []
        self._label = label
        self._kinds: list[int | None] = []  # None: empty in every row
        self._broken: dict[int, str] = {}
        self._names = names = set[str]()
        super().__init__(source)
        whole = all(_INTEGER.fullmatch(name) and len(name) <= 20 for name in names)
        self.classes = sorted(names, key=lambda name: (int(name) if whole else 0, name))

    def _index(self, path: Path) -> None:
        rows = self._records(path)
        header = next(rows, None)
        if header is None or header[3] is None:
            raise UserError(f"{path} has no header")
        self._check_header(path, header[3])
        label = self.columns.index(self._label) if self._label is not None else None
        for start, stop, line, cells, problem in rows:
            row = len(self._start)
            self._add(start, stop, line)
            if cells is None:
                self._broken[row] = problem
            elif len(cells) != len(self.columns):
                self._broken[row] = f"has {len(cells)} cells, and the header {len(self.columns)}"
            else:
                self._learn(cells, label)

    def _check_header(self, path: Path, names: list[str]) -> None:
        if any(re.search("[\udc80-\udcff]", name) for name in names):
            raise UserError(f"{path} has a header that is not UTF-8")
        if self.columns and names != self.columns:
            raise UserError(f"{path} has another header than {self.files[0]}: {', '.join(names)}")
        for name in names:
            if not name.strip() or "/" in name or names.count(name) > 1:
                raise UserError(
                    f"{path} has a column {name!r}: names are unique, not blank, without /"
                )
        if self._label is not None:
            require(str(path), names, {"--label": (self._label,)})
        self.columns = names
        self._kinds = self._kinds or [None] * len(names)

    def _learn(self, cells: list[str], label: int | None) -> None:
        for i, cell in enumerate(cells):
            if i == label:
                if _is_name(cell.strip()):
                    self._names.add(cell.strip())
            elif self._kinds[i] != _TEXT and cell.strip():
                self._kinds[i] = max(self._kinds[i] or 0, _kind(cell.strip()))

    def _records(self, path: Path) -> Iterator[tuple[int, int, int, list[str] | None, str]]:
        """(start, stop, line, cells, what is wrong); no cells where it is no row of a table."""
        position, line = 0, 0

        def lines() -> Iterator[str]:
            nonlocal position, line
            with path.open("rb") as file:
                position = _after_bom(file)
                for data in file:
                    position += len(data)
                    line += 1
                    yield data.decode("utf-8", "surrogateescape")

        reader = csv.reader(lines(), delimiter=_delimiter(path), strict=True)
        while True:
            start, first = position, line + 1
            cells: list[str] | None
            try:
                cells, problem = next(reader), ""
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise UserError(
                        f"{path} line {first}: a quote is opened and not closed"
                    ) from None
                cells, problem = None, f"is no row of a table: {error}"
            if cells != []:
                yield start, position, first, cells, problem

    def _cells(self, row: int) -> list[str]:
        if row in self._broken:
            raise BadRow(self._broken[row])
        text = io.StringIO(_decoded(self._read(row)), newline="")
        delimiter = _delimiter(self.files[self._file[row]])
        return next(csv.reader(text, delimiter=delimiter, strict=True))

    def check(self, row: int) -> int:
        self.example(row)
        return self._stop[row] - self._start[row]

    def features(self, rows: Sequence[int]) -> Mapping[str, Any]:
        from tensorflow_datasets import features

        made: dict[str, Any] = {}
        for name, kind in zip(self.columns, self._kinds, strict=True):
            if name == self._label:
                made[name] = features.ClassLabel(names=self.classes)
            elif kind in (None, _TEXT):
                made[name] = features.Text()
            else:
                made[name] = features.Scalar(dtype=np.int64 if kind == _INT64 else np.float32)
        return made

    def example(self, row: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, kind, cell in zip(self.columns, self._kinds, self._cells(row), strict=True):
            value = cell.strip()
            if name == self._label:
                if not _is_name(value):
                    raise BadRow(f"has the label {cell!r}" if value else "has no label")
                made[name] = value
            elif kind in (None, _TEXT):
                made[name] = cell
            elif not value:
                raise BadRow(f"has nothing in column {name}, which holds numbers")
            elif kind == _INT64:
                made[name] = int(value)
            else:
                made[name] = float(value)
                if math.isfinite(made[name]) and abs(made[name]) > _FLOAT32_MAX:
                    raise BadRow(f"has {value} in column {name}: too large for float32")
        return made


_INT64, _FLOAT32, _TEXT = range(3)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def _kind(cell: str) -> int:
    """What a cell, without spaces around it, may be at the least."""
    if _INTEGER.fullmatch(cell):
        # Python reads no number of thousands of digits.
        return _INT64 if len(cell) <= 20 and -(2**63) <= int(cell) < 2**63 else _TEXT
    return _FLOAT32 if _NUMBER.fullmatch(cell.lower()) else _TEXT


def _is_name(name: str) -> bool:
    """Whether TFDS, which keeps names of classes in lines, gives this one back."""
    return name != "" and name == name.strip() and not re.search(r"[\n\r\udc80-\udcff]", name)


def _check_names(names: Sequence[str], root: Path) -> None:
    for name in names:
        if not _is_name(name):
            raise UserError(f"{root} has a class folder {name!r}: TFDS cannot keep that name")


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files in a folder, sorted by name; hidden ones left out."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in inside if path.is_dir()]
    return folders, [path for path in inside if not path.is_dir()]


def _class_folders(root: Path) -> list[str]:
    """Names of the folders in a folder. Raises UserError for an image that lies beside them."""
    from PIL import Image

    folders, files = _listing(root)
    for path in files:
        if path.suffix.lower() in Image.registered_extensions():
            raise UserError(f"{path} is in no class folder")
    return [path.name for path in folders]


def _by_split(root: Path, names: Sequence[str]) -> dict[str, str]:
    """The split that each name is; none where no name is one."""
    found = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    if found and len(found) < len(names):
        other = next(name for name in names if name not in found)
        raise UserError(f"{root} has {next(iter(found))}, a split, beside {other}, which is none")
    if len(set(found.values())) < len(found):
        raise UserError(f"{root} has one split twice: {', '.join(found)}")
    return found


def _grouped(source: Path, by_stem: bool) -> dict[str, list[Path]]:
    """Files by split: by the folder they are in, or by their names without suffix."""
    if source.is_file():
        return {"": [source]}
    folders, files = _listing(source)
    if folders and files:
        raise UserError(f"{files[0]} lies beside a folder, {folders[0].name}")
    if folders:
        splits = _by_split(source, [path.name for path in folders])
        if not splits:
            raise UserError(f"{folders[0]} is a folder, and its name that of no split")
        found = {}
        for name, split in sorted(splits.items(), key=lambda item: item[1]):
            deeper, found[split] = _listing(source / name)
            if deeper:
                raise UserError(f"{deeper[0]} is a folder in a split")
        return found
    if by_stem:
        stems = {path.stem: path for path in files}
        if len(stems) == len(files):
            splits = _by_split(source, list(stems))
            if splits:
                return {split: [stems[stem]] for stem, split in sorted(splits.items())}
    return {"": files}


def _delimiter(path: Path) -> str:
    try:
        return {".csv": ",", ".tsv": "\t", ".tab": "\t"}[path.suffix.lower()]
    except KeyError:
        raise UserError(f"{path} is neither .csv nor .tsv") from None


def _after_bom(file: io.BufferedReader) -> int:
    """Goes past a byte order mark, as Excel writes it, and says how long it is."""
    length = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(length)
    return length


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8 at its byte {error.start}") from None


def _idx(path: Path, dimensions: Sequence[int]) -> np.ndarray:
    """The array of an IDX file of bytes. Raises UserError where its header does not fit it."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] not in dimensions:
        wanted = " or ".join(map(str, dimensions))
        raise UserError(
            f"{path} does not begin as an IDX file of bytes in {wanted} dimensions does"
        )
    header = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4]) for i in range(4, header, 4)]
    size = header + math.prod(shape)
    if len(data) != size:
        raise UserError(f"{path} has {len(data):,} bytes, and its header asks for {size:,}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _image(data: bytes, decode: bool) -> tuple[Any, bool]:
    """An image as gray, RGB or RGBA, and whether its bytes are to be kept.

    They are kept of a PNG or JPEG whose pixels every reader gives alike: without a palette, and
    without a colour that stands for transparent. decode: see that they are whole. Raises BadRow.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a JPEG with another for the other eye
            raise BadRow(f"has {frames} frames")
        if image.format == "PNG" and data[24] == 16:
            raise BadRow("has 16 bits a channel")
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise BadRow(f"has pixels of mode {image.mode}: not gray, RGB or RGBA of 8 bits")
        clear = image.mode.endswith("A") or "transparency" in image.info
        gray = image.mode in ("1", "L")
        mode = "RGBA" if clear else "L" if gray else "RGB"
        if mode == image.mode and image.format in ("PNG", "JPEG", "MPO"):
            if decode:
                image.load()
            return image, True
        return image.convert(mode), False
    except BadRow:
        raise
    except UnidentifiedImageError:
        raise BadRow("is no image that Pillow can read") from None
    except Exception as error:  # of many kinds, and all of them the file's
        raise BadRow(f"cannot be decoded: {error}") from None


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
