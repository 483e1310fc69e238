"""Every field of every config is read: another value of it changes the data, the placement, a
traced program, or what a short run leaves behind.

Fields, and other values for them, are found by reflection: a new config or a new field needs no
line here, unless it acts only beside another (`BESIDE`, `TOGETHER`), or no annotation can tell a
value that fits it (`VALUES`, `MADE`).
"""

import atexit
import dataclasses
import functools
import hashlib
import importlib
import itertools
import os
import pathlib
import pkgutil
import shutil
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import annotated_types
import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest
import tiny
from flax import nnx

import research.data
import research.models
from research import (
    UserError,
    checkpoint,
    command,
    evaluate,
    experiment,
    init_from,
    optim,
    parallel,
)
from research import tasks as task_module
from research import train as training
from research.augment import Augment
from research.data import bundled, tfds
from research.data import tokens as tokenizers
from research.data.arrays import Arrays
from research.data.bad import Bad
from research.data.bundled import PythonReference
from research.data.cells import Cells
from research.data.outline import Outline
from research.data.packed import Packed
from research.data.shares import Dealt, Shares
from research.data.splits import Examples, Lazy, Streams, Windows
from research.data.table import Table
from research.data.text import LabelledText, Text
from research.data.transform import Category, Number, Transform
from research.experiment import EarlyStop, Experiment, Target
from research.init_from import InitFrom, Name
from research.local import Local
from research.models.cnn import CNNConfig
from research.models.encoder import EncoderConfig
from research.models.mlp import MLPConfig
from research.models.recurrent import RecurrentConfig
from research.models.resnet import ResNetConfig
from research.models.transformer import TransformerConfig
from research.optim import Group, Optax, Update
from research.setup import Setup, prepare
from research.tasks import Classify, Mean, Task

CONFIGS = [
    path
    for path in sorted((pathlib.Path(__file__).parents[1] / "configs").glob("[a-z]*.py"))
    if type(command.load(path).data).__module__ == bundled.__name__
]
"""On data that is always there; the sources of the others are in `BASES`, on files made here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anything(Task):
    """Takes outputs of any shape, where each of the others fits one."""

    def score(self, outputs, batch):
        return {"loss": Mean(jnp.sum(jnp.square(outputs)), jnp.float32(outputs.size))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reshaped:
    """Another source's targets, beside inputs of a given shape."""

    source: Any
    shape: tuple[int, ...]

    def load(self):
        def filled(split):
            shape = (len(split), *self.shape)
            return Examples({**split.rows, "inputs": np.zeros(shape, np.float32)})

        return {name: filled(split) for name, split in self.source.load().items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyWidth:
    """A model for inputs of any width, as a table's columns change it."""

    def make(self, rngs):
        return Sums()


class Sums(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.arange(3.0))

    def __call__(self, x_BF, rngs=None):
        return jnp.sum(x_BF, axis=-1, keepdims=True) * self.w[None]


def _files() -> str:
    """A folder of small texts, of which `bad` has a row that cannot be read and others that can."""
    folder = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    for name in ("train", "other", "bad"):
        lines = [" ".join(rng.choice(["to", "be", "or", "Not", "not"], 5)) for _ in range(150)]
        bad = b"to \xff be\n" if name == "bad" else b""
        new = "or bé\n" if name == "bad" else ""
        (folder / f"{name}.txt").write_bytes(bad + "\n".join([*lines, new]).encode())
        cells = (f"{i % 2}\t{i // 2 % 2}\t{line}\t{line[::-1]}" for i, line in enumerate(lines))
        rows = "\n".join(("label\tkind\ttext\ttitle", *cells, ""))
        (folder / f"{name}.tsv").write_bytes(rows.encode() + bad)
    return str(folder)


FILES = _files()

SMALLER: dict[type, dict[str, Any]] = {
    Experiment: {
        "steps": 4,
        "batch_size": 16,
        "log_every": 1,
        "eval_every": 2,
        "save_every": None,
        "init_from": InitFrom(),
    },
    CNNConfig: {"channels": (4, 8), "dense": 8},
    RecurrentConfig: {"width": 8, "features": 4, "layers": 1},
    ResNetConfig: {"layers": (1,), "width": 4},
    EncoderConfig: {"layers": 1, "heads": 2, "width": 8, "feed_forward": 16},
    TransformerConfig: {"layers": 1, "heads": 2, "width": 8, "feed_forward": 16},
}
"""What makes a config quick, by class. A field whose value is None keeps it."""

ENCODER = EncoderConfig(classes=3, vocab=7, context=8, layers=1, heads=2, width=8)
GROUP = Group(match="layers/0", multiplier=0.5, update=Optax("sgd", {"learning_rate": 0.1}))
POINTS = {name: dict(split.rows) for name, split in tiny.Points().load().items()}
CHANGED = Classify(augment=Augment(crop=1, flip=True, operations=1, cutout=3))
CLIENTS = Local(clients=8, steps=2)
SHARES = Shares(data=tiny.Points(), clients=2, alpha=0.5)
FOLDER = tempfile.mkdtemp()
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
for seed, name in enumerate(("ergon_images", "ergon_others")):
    made.unprepared(pathlib.Path(FOLDER), name, seed)
IMAGES = tfds.TFDS(name="ergon_images", data_dir=FOLDER, inputs="image", targets="label")
TFDS_TEXT = {
    "data.tfds": "ergon_images",
    "data.data_dir": FOLDER,
    "data.feature": "text",
    "data.train": "train",
    "data.validation": "test",
}
TFDS_ROWS = {**TFDS_TEXT, "data.text": "text", "data.label": "label", "task": Anything()}
del TFDS_ROWS["data.feature"]
PACKS = TransformerConfig(vocab=300, context=4, layers=1, heads=1, width=4)
TABLE = Table(path="tests/table.csv", target="label")
BASES: dict[str, tuple[Experiment, str]] = {
    "encoder": (tiny.mlp(model=ENCODER, data=tiny.Sequences()), "model"),
    "vit": (tiny.vit(model=dataclasses.replace(tiny.vit().model, layers=1)), "model"),
    "regress": (tiny.lines(), "task"),
    "names": (
        tiny.mlp(init_from=InitFrom(path="absent", names=(Name(match="^", to=""),))),
        "init_from",
    ),
    "arrays": (tiny.mlp(data=Arrays(**POINTS)), "data"),
    "augment": (tiny.resnet(task=CHANGED), "task.augment"),
    "tfds": (tiny.resnet(data=IMAGES, eval_split="test"), "data"),
    "table": (tiny.mlp(data=TABLE, model=AnyWidth()), "data"),
    "text": (
        tiny.lstm(
            model=RecurrentConfig(cell="rnn", vocab=300, outputs=300, width=8),
            data=Text(train=f"{FILES}/train.txt", tokens="words", length=4),
        ),
        "data",
    ),
    "labelled text": (
        tiny.mlp(
            model=dataclasses.replace(ENCODER, vocab=99),
            data=LabelledText(train=f"{FILES}/train.tsv", length=4),
        ),
        "data",
    ),
    "local": (tiny.mlp(batch_size=32, local=CLIENTS), "local"),
    "shares": (tiny.mlp(data=SHARES), "data"),
    "groups": (tiny.mlp(optimizer=dataclasses.replace(tiny.ADAMW, groups=(GROUP,))), "optimizer"),
}
"""For fields that no config has: an experiment, and the part of it that is gone through."""

WORDS = ("train", "validation", "loss", "accuracy", "mse", "perplexity", "kernel", "embedding")
"""Splits, metrics and regexes, for fields that are strings."""
NAMES = ("lion", "rmsprop", "adam", "sgd", "cosine_onecycle_schedule")
"""Optimizers and schedules, for the name of one that takes the same arguments."""
ONECYCLE = Optax("linear_onecycle_schedule", {"transition_steps": 9, "peak_value": 0.1})

WATCHED = {"ema": 0.5, "eval_every": 2, "early_stop": EarlyStop(patience=1)}


def classes(e: Experiment) -> int:
    """As many as the model has logits, and two under a sigmoid."""
    named = (getattr(e.model, name, None) for name in ("classes", "outputs", "vocab"))
    return next(filter(None, named), 2)


def like_the_inputs(shape: Callable[[Any], tuple[int, ...]]) -> Callable[[Experiment], Any]:
    return lambda e: {"data": Reshaped(source=e.data, shape=shape(e.model))}


# What the tables are keyed by is class.field, a subclass's own first. A function is called with the
# experiment (MADE's too), and in BESIDE with the path of the field's owner.


@functools.cache
def written(name: str, text: str) -> str:
    """A file of data."""
    path = pathlib.Path(tempfile.mkdtemp(dir=os.environ["ERGON_CACHE"]), name)
    path.write_text(text)
    return str(path)


def table(start: int = 0, stop: int | None = None) -> str:
    """Rows of the table, as another file."""
    header, *rows = pathlib.Path(TABLE.path).read_text().splitlines()
    return written("table.csv", "\n".join([header, *rows[start:stop]]))


TWICE = "label,a;label;z,b\n" + "".join(
    f"{'uvw'[i % 3]},{i};{'xyz'[i % 3]};2,{i % 5}\n" for i in range(60)
)
"""A table, whether a comma stands between its cells or a semicolon."""
ANY_TABLE = {"target": None, "task": Anything(), "model": AnyWidth()}
TFDS_TABLE = {
    **ANY_TABLE,
    "data.tfds": "ergon_images",
    "data.data_dir": FOLDER,
    "data.path": "train",
    "data.ignore": ("image", "other", "x", "text"),
    "data.missing_values": ("nan",),
}


MADE: dict[type, Callable[[Experiment], Any]] = {
    Target: lambda e: Target(metric="loss", value=1.0, split=e.eval_split),
    Group: lambda e: Group(match=".", multiplier=0.5),
    Augment: lambda e: CHANGED.augment,
    Update: lambda e: Optax("sgd", {"learning_rate": 0.5}),
}
"""One of each class that a field may hold instead of None, or add to a tuple."""

VALUES: dict[str, Callable[[Experiment], Any]] = {
    "Local.clients": lambda e: [8, 16],
    "Local.steps": lambda e: [4],
    "Experiment.eval_batch_size": lambda e: [8],
    "TFDS.name": lambda e: ["ergon_others"],
    "TFDS.data_dir": lambda e: ["nowhere"],
    "TFDS.train": lambda e: ["train[:32]"],
    "TFDS.validation": lambda e: ["train[:32]"],
    "TFDS.test": lambda e: ["test[:32]"],
    "TFDS.inputs": lambda e: ["other"],
    "TFDS.targets": lambda e: ["kind"],
    "TFDS.size": lambda e: [(4, 4)],
    "TFDS.cache_gb": lambda e: [1e-9],
    # As many as there are classes.
    "_Classes.class_weights": lambda e: [(2.0,) + (1.0,) * (classes(e) - 1)],
    # Beyond what any run reaches, on either side.
    "Target.value": lambda e: [1e9, -1e9],
    # What a source has; where its names are turned into others the run says what it lacks.
    "InitFrom.path": lambda e: [source(e)],
    "InitFrom.step": lambda e: [1],
    # Fewer than there are, and enough for a batch.
    "Digits.train": lambda e: [30],
    "InitFrom.fresh": lambda e: ["kernel"],
    # Fewer rows.
    **{
        f"Arrays.{f.name}": lambda e: [{k: v[1:] for k, v in POINTS["train"].items()}]
        for f in dataclasses.fields(Arrays)
    },
    # Files of rows, columns of theirs, and cells.
    "Table.path": lambda e: [table(stop=40)],
    "Table.test": lambda e: [table(start=40)],
    "Table.target": lambda e: ["code"],
    "Table.classes": lambda e: [("b", "a")],
    "Table.ignore": lambda e: [("age",)],
    "Table.categories": lambda e: [("code",)],
    "Table.numbers": lambda e: [("mixed",)],
    "Table.missing_values": lambda e: [("Bern",)],
    "Table.indicators": lambda e: [("age",)],
    "Table.separator": lambda e: [";"],
    # Fewer than there are, or more.
    "Table.min_count": lambda e: [9],
    "Table.max_categories": lambda e: [1],
    "InitFrom.names": lambda e: [(Name(match="^", to="other/"),)],
    "Name.axes": lambda e: ["a b -> b a"],
    # Of which the tests have a stand-in.
    "Experiment.tracker": lambda e: ["trackio"],
    "Optax.name": lambda e: NAMES,
    **{
        f"{cls}.{name}": lambda e, end=end: [f"{FILES}/other.{end}"]
        for cls, end in (("Text", "txt"), ("LabelledText", "tsv"))
        for name in ("train", "validation", "test")
    },
    "Text.vocab": lambda e: [4],
    "FilesOrTFDS.tfds": lambda e: ["ergon_others"],
    "FilesOrTFDS.data_dir": lambda e: ["nowhere"],
    "Text.feature": lambda e: ["title"],
    "LabelledText.vocab": lambda e: [4],
    "LabelledText.min_count": lambda e: [150],
    "LabelledText.text": lambda e: ["title"],
    "LabelledText.label": lambda e: ["kind"],
    # Fewer than there are.
    "Checked.max_bad": lambda e: [0],
}
"""Other values, where those that the annotation gives do not fit."""

BESIDE: dict[str, Any] = {
    # Focal loss and label smoothing exclude each other.
    "Classify.gamma": {"task.label_smoothing": 0.0},
    # The target's metric has the unit in its name.
    "NextToken.unit": {"target": None},
    # Reading backward would give away the next token, and leaves nothing to carry.
    "RecurrentConfig.bidirectional": lambda e, at: {
        "target": None,
        "task": Classify(),
        **{
            f"data.{name}": alone
            for name, alone in (("stream", False), ("rows", "windows"))
            if name in fields(e.data)
        },
    },
    # No other task takes both an output a step and one a sequence.
    "RecurrentConfig.head": {
        "target": None,
        "early_stop": EarlyStop(),
        "task": Anything(),
        "model.attention": "none",
    },
    "RecurrentConfig.attention": {
        "target": None,
        "early_stop": EarlyStop(),
        "task": Anything(),
        "model.head": "sequence",
    },
    # The only cell of its own class: its parent has the others.
    "LSTMConfig.cell": lambda e, at: {"model": RecurrentConfig(**vars(e.model))},
    # Only a model with a carry takes streams.
    "PythonReference.stream": {
        "model": RecurrentConfig(cell="rnn", vocab=999, outputs=999, width=8)
    },
    "Text.tfds": TFDS_TEXT,
    "Text.data_dir": TFDS_TEXT,
    "Text.feature": TFDS_TEXT,
    "LabelledText.tfds": TFDS_ROWS,
    "LabelledText.data_dir": TFDS_ROWS,
    "Text.documents": {"data.rows": "packed", "model": PACKS},
    "Text.rows": {"model": RecurrentConfig(cell="rnn", vocab=999, outputs=999, width=8)},
    # Where there is no file of their own.
    "Text.validation_share": {"data.validation": None},
    "LabelledText.validation_share": {"data.validation": None},
    "LabelledText.split": {"data.validation": None},
    # As many tokens as there are bytes; each kind has its own options.
    "Text.tokens": {"data.vocab": None, "data.tokens": "bytes", "model.vocab": 300},
    "Text.vocab": {"data.tokens": "words", "data.vocab": 5},
    "Text.unknown": {
        "data.vocab": None,
        "data.tokens": "characters",
        "data.on_bad": "skip",
        "data.validation": f"{FILES}/bad.txt",
    },
    "Text.max_bad": {"data.on_bad": "skip", "data.validation": f"{FILES}/bad.txt"},
    "LabelledText.max_bad": {"data.on_bad": "skip", "data.validation": f"{FILES}/bad.tsv"},
    # Rotary positions have no table, and the context is then no more than a limit.
    "TransformerConfig.context": {"model.positions": "learned"},
    # A target that is not finite in one row.
    "TFDS.max_bad": {"data.on_bad": "skip", "data.targets": "y", "task": Anything()},
    # Columns of any number; what may be classes and numbers; words among numbers, more of them than
    # are borne; a file that is a table either way.
    **{f"Table.{f.name}": ANY_TABLE for f in dataclasses.fields(Table)},
    "Table.tfds": TFDS_TABLE,
    "Table.data_dir": TFDS_TABLE,
    "Table.kind": {**ANY_TABLE, "data.target": "code"},
    "Table.numbers": {**ANY_TABLE, "data.on_bad": "skip"},
    "Table.max_bad": {**ANY_TABLE, "data.on_bad": "skip", "data.numbers": ("mixed",)},
    "Table.separator": lambda e, at: ANY_TABLE | {"data.path": written("table.csv", TWICE)},
    # Something has to decay.
    "Optimizer.no_decay": {"optimizer.l2": 0.1},
    # Of schedules only these two take the same arguments.
    "Optax.name": lambda e, at: {at: ONECYCLE} if "schedule" in get(e, at).name else {},
    # There must be more checkpoints than are kept.
    "Experiment.keep": {"save_every": 1},
    # Early stopping watches nothing unless it is to stop, or to keep the best. A loss that falls is
    # never the greatest, so that the run stops once patience is over.
    "EarlyStop.patience": {**WATCHED, "eval_every": 1, "early_stop.goal": "max"},
    **{f"EarlyStop.{name}": WATCHED for name in ("metric", "goal", "ema", "keep_best")},
    # There must be something to start from, and of one kind.
    "InitFrom.path": {"init_from.fresh": None},
    **dict.fromkeys(
        [
            *(f"InitFrom.{f}" for f in ("step", "best", "ema", "fresh", "names")),
            *(f"Name.{f.name}" for f in dataclasses.fields(Name)),
        ],
        lambda e, at: {"init_from.path": source(e), "init_from.fresh": None},
    ),
    # A group is frozen or trained otherwise, not both.
    **dict.fromkeys(
        ["Group.frozen", "Group.multiplier", "Group.update"],
        lambda e, at: {at: Group(match=get(e, at).match)},
    ),
}
"""What a field needs beside it in order to act: set before and after the change."""

TOGETHER: dict[str, tuple[str, Callable[[Experiment], dict[str, Any]]]] = {
    "MLPConfig.features": ("init", like_the_inputs(lambda m: (m.features,))),
    "CNNConfig.image": ("init", like_the_inputs(lambda m: m.image)),
    "LeNetConfig.image": ("init", like_the_inputs(lambda m: m.image)),
    "ViTConfig.image": ("init", like_the_inputs(lambda m: m.image)),
    "ResNetConfig.channels": ("init", like_the_inputs(lambda m: (8, 8, m.channels))),
    "Digits.upscale": ("data", lambda e: _image_of(e)),
}
"""What has to change along with a field, for data and model have to fit: given the changed
experiment. What then counts is named too: something that only the field has a hand in."""

SPEED = {"Experiment.workers", "TFDS.threads"}
"""Fields that change how fast data is made, and none of it: see test_tfds."""
REFUSES = {
    "Experiment.attention",  # test_flash.py compiles with it
    "Parallel.data",
    "Parallel.context",
    "Parallel.pipeline",
    "Parallel.microbatches",
    "TFDS.data_dir",
    "FilesOrTFDS.data_dir",
    "Table.max_categories",
    "Checked.max_bad",
}
"""Fields that choose nothing: they say what a run needs, and refuse a machine or data without
it, or models that cannot; or how much of the data may be odd."""


def _image_of(e: Experiment) -> dict[str, Any]:
    side = 8 * typing.cast(Any, e.data).upscale
    return {"model.image": (side, side, 1)} if hasattr(e.model, "image") else {}


def get(config: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        if isinstance(config, dict):
            config = config[name]
        else:
            config = config[int(name)] if name.isdigit() else getattr(config, name)
    return config


def put(config: Any, path: str, value: Any) -> Any:
    """A copy of a tree with a value at a path."""
    if not path:
        return value
    name, _, rest = path.partition(".")
    below = put(get(config, name), rest, value)
    if isinstance(config, dict):
        return {**config, name: below}
    if isinstance(config, tuple):
        return (*config[: int(name)], below, *config[int(name) + 1 :])
    return dataclasses.replace(config, **{name: below})


def put_all(e: Experiment, values: dict[str, Any]) -> Experiment:
    return functools.reduce(lambda e, item: put(e, *item), values.items(), e)


def fields(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all fields below a value, those of what they hold among them."""
    items: Any = ()
    if dataclasses.is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, tuple):
        items = [(str(i), v) for i, v in enumerate(value) if dataclasses.is_dataclass(v)]
    for name, below in items:
        inner = f"{path}.{name}" if path else name
        if not isinstance(value, tuple):
            yield inner
        yield from fields(below, inner)


def owner(e: Experiment, path: str) -> tuple[str, Any, str]:
    """Path and value of the dataclass that a field is of, and the field's name."""
    at, _, name = path.rpartition(".")
    if isinstance(get(e, at), dict):
        at = at.rpartition(".")[0]
    return at, get(e, at), name


def keys(e: Experiment, path: str) -> list[str]:
    _, config, name = owner(e, path)
    return [f"{cls.__name__}.{name}" for cls in type(config).__mro__]


def entry(table: dict[str, Any], e: Experiment, path: str) -> Any:
    return next((table[key] for key in keys(e, path) if key in table), None)


def others(hint: Any, value: Any, e: Experiment) -> Iterator[Any]:
    """Values of an annotated type, `value` perhaps among them; of which some may be refused."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from others(args[0], value, e)
    elif origin in (typing.Union, types.UnionType):
        yield from itertools.chain(*(others(arg, value, e) for arg in args))
    elif origin is Literal:
        yield from args
    elif hint is type(None):
        yield None
    elif hint is bool:
        yield from (True, False)
    elif hint is int:
        n = 1 if value is None else value
        yield from (2 * n, n + 1, n // 2, n - 1, 1)
    elif hint is float:
        x = 1.0 if value is None else value
        yield from (2 * x, x / 2, 0.5, 0.25)
    elif hint is str:
        yield from WORDS
    elif origin is tuple:
        items, many = tuple(value or ()), args[-1] is Ellipsis
        hints = args[:1] * len(items) if many else args
        for i, (item, of) in enumerate(zip(items, hints, strict=False)):
            yield from ((*items[:i], other, *items[i + 1 :]) for other in others(of, item, e))
        if many:
            yield from ((*items, other) for other in others(args[0], None, e))
            yield items[:-1]
    elif hint in MADE:
        yield MADE[hint](e)


def candidates(e: Experiment, path: str) -> list[Any]:
    at, config, name = owner(e, path)
    value, given = get(e, path), entry(VALUES, e, path)
    if given is not None:
        found = given(e)
    elif path == f"{at}.{name}".lstrip("."):
        hint = typing.get_type_hints(type(config), include_extras=True)[name]
        found = others(hint, value, e)
    elif isinstance(value, Optax):  # read where its own arguments are
        found = ()
    else:  # an argument of optax's
        items = isinstance(value, list) and tuple[type(value[0]), ...]
        found = others(items or type(value), value, e)
    return [v for v in found if v != value]


@functools.lru_cache(maxsize=8)
def prepared(e: Experiment) -> Setup:
    return prepare(e)


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def arrays(tree: Any) -> list[Any]:
    return [(a.dtype, a.shape, a.tobytes()) for a in map(np.asarray, jax.tree.leaves(tree))]


@functools.cache
def data(e: Experiment) -> str:
    setup = prepared(e)
    batches = [setup.splits["train"].batch(i, setup.batch_size, e.seed) for i in range(2)]
    return digest(setup.fingerprint, arrays(batches))


@functools.cache
def mesh(e: Experiment) -> str:
    setup = prepared(e)
    return digest(setup.mesh.shape, [s.spec for s in jax.tree.leaves(setup.shardings)])


# Programs are compared as StableHLO: it holds constants and placements, and no name of a scope.
@functools.cache
def init(e: Experiment) -> str:
    setup = prepared(e)
    traced = jax.jit(functools.partial(training.init, setup), out_shardings=setup.shardings)
    return digest(traced.lower(setup.abstract_example()[2], {}).as_text())


@functools.cache
def step(e: Experiment) -> str:
    setup = prepared(e)
    return digest(setup.step().lower(*setup.abstract_example()).as_text())


@functools.cache
def evaluation(e: Experiment) -> str:
    setup = prepared(e)
    state, size = setup.abstract, setup.eval_batch_size
    batch = setup.splits["train"].evaluation(size)[0]
    carry = setup.eval_carry
    evaluator = evaluate.Evaluator(setup.graph, e.task, setup.mesh).step
    return digest(evaluator.lower(state.params, state.model_state, carry, batch).as_text())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OneDevice(Setup):
    """A setup with the programs and the initial state of another, made once for many runs."""

    like: Any

    @functools.cached_property
    def programs(self):
        return super().initial(), super().step(), super()._evaluator

    def initial(self, loaded=None):
        assert loaded is None  # `start` looks at those that are
        return jax.tree.map(jnp.copy, self.like.programs[0])  # a run donates its own

    def step(self):
        return self.like.programs[1]

    @property
    def _evaluator(self):
        return self.like.programs[2]


@functools.cache
def first(e: Experiment, *state: bool) -> list[OneDevice]:
    """Room for the first setup of an experiment, whatever its `LATE` parts are."""
    return []


@functools.cache
def run(e: Experiment) -> str:
    """What a run on one device leaves, but for times and for what only repeats the config."""
    found = prepared(e)
    given = {f.name: getattr(found, f.name) for f in dataclasses.fields(Setup)}
    given["mesh"] = parallel.Parallel().mesh(found.batch_size, tiny.ONE)
    late = {f.name: f.default for f in dataclasses.fields(e) if f.name in LATE - {"steps"}}
    same = first(dataclasses.replace(e, steps=1, **late), e.early_stop.watches)
    if not same:
        same.append(OneDevice(**given, like=None))
        object.__setattr__(same[0], "like", same[0])
    setup = OneDevice(**given, like=same[0])
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        summary = dataclasses.asdict(training.train(setup, workdir, quiet=True))
        for key in ("seconds", "steps_per_second", "apart", "mfu", "mfu_of", "target"):
            del summary[key]
        saved = workdir / "checkpoints"
        _, state = checkpoint.read(saved, None, setup.abstract, setup.shardings)
        files = sorted(path.name for path in (*workdir.iterdir(), *saved.iterdir()))
        return digest(tiny.rows(workdir), summary, files, arrays(state))


@functools.cache
def source(e: Experiment) -> str:
    """A run directory to start from, its best checkpoint not its newest."""
    rising = EarlyStop(keep_best=True, goal="max")
    kept = {"ema": 0.5, "early_stop": rising, "eval_every": 1, "save_every": 1, "keep": 9}
    plain = dataclasses.replace(e, **kept, seed=7, steps=3, init_from=InitFrom())
    folder = tempfile.mkdtemp(dir=os.environ["ERGON_CACHE"])
    training.train(prepare(plain, tiny.ONE), pathlib.Path(folder, "run"), quiet=True)
    return f"{folder}/run"


@functools.cache
def start(e: Experiment) -> str:
    """The state before the first step, or the line that a run ends with instead."""
    setup = prepare(e, tiny.ONE)
    try:
        return digest(arrays(setup.initial(setup.load())))
    except UserError as error:
        return str(error)


LOOKS = {look.__name__: look for look in (data, mesh, step, init, evaluation, run, start)}
"""All that a field may change; those first that take the least time and change most often."""
LATE = {*experiment.RUNNING, "early_stop", "eval_split"} - {"parallel"}
"""Parts of an experiment that only a run shows: looked for there at once."""


def finding(e: Experiment, path: str) -> str | None:
    """What is wrong with a field, in a line; None: it is read."""
    beside = entry(BESIDE, e, path) or {}
    e = put_all(e, beside(e, owner(e, path)[0]) if callable(beside) else beside)
    if path.startswith("local.") and path != "local.clients":
        e = put_all(e, {"local.clients": 8, "batch_size": 32})
    prepared(e)
    kind, along = entry(TOGETHER, e, path) or (None, lambda changed: {})
    if kind is None and path.split(".")[0] in LATE:
        kind = "run"
    if kind is None and path.startswith("init_from"):
        kind = "start"
    looks = [look for name, look in LOOKS.items() if kind in (None, name)]
    refused, accepted = None, []
    for value in candidates(e, path):
        try:
            changed = put(e, path, value)
            changed = put_all(changed, along(changed))
            prepared(changed)
            accepted.append(changed)
            if any(look(e) != look(changed) for look in looks if kind or look not in (run, start)):
                return None
        except ValueError as error:  # of which UserError is one
            refused = refused or error
        except Exception as error:
            return f"{path} = {value!r} is not refused in a line: {error!r}"
    # Runs come last, for they take the longest.
    if kind is None and any(run(e) != run(changed) for changed in accepted):
        return None
    if accepted:
        return f"{path} has no effect"
    if isinstance(refused, UserError) and any(key in REFUSES for key in keys(e, path)):
        return None
    if refused is not None:
        return f"{path}: every other value is refused, see BESIDE and TOGETHER: {refused}"
    below = any(True for _ in fields(get(e, path)))  # a field is read where those below it are
    return None if below else f"{path}: no other value is known: give one in VALUES or MADE"


def findings(e: Experiment, paths: Iterable[str]) -> list[str]:
    paths = [path for path in paths if not SPEED & {*keys(e, path)}]
    return [found for path in paths if (found := finding(e, path))]


def within(e: Experiment, part: str) -> list[str]:
    return [path for path in fields(e) if path.startswith(part)]


@functools.cache
def shares() -> dict[pathlib.Path, tuple[Experiment, list[str]]]:
    """By config, the fields that are looked at in it: a class's field in the first that has it.

    What only a run shows, `train` does with any experiment, and runs take the longest: two configs
    have that share.
    """
    found, seen = {}, set()
    for path in CONFIGS:
        e = smaller(command.load(path))
        late = () if path.stem in ("mlp_cancer", "lstm_text") else {*LATE, "init_from"}
        paths = [field for field in fields(e) if field.split(".")[0] not in late]
        mine = {field: keys(e, field)[0] for field in paths if keys(e, field)[0] not in seen}
        seen |= {*mine.values()}
        found[path] = e, list(mine)
    return found


def smaller(e: Experiment) -> Experiment:
    for at in ("", "model"):
        for cls, values in SMALLER.items():
            config = get(e, at)
            if isinstance(config, cls):
                kept = {k: v for k, v in values.items() if getattr(config, k) is not None}
                e = put(e, at, dataclasses.replace(config, **kept))
    return e


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """A shorter text, and a stand-in for a tracker."""
    text, tracker = PythonReference.text()[:4000], types.ModuleType("trackio")
    logged = types.SimpleNamespace(name="run", log=lambda scalars, step: None)
    vars(tracker).update(init=lambda **given: logged, finish=lambda: None)
    optimized = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PythonReference, "text", staticmethod(lambda: text))
        patch.setitem(sys.modules, "trackio", tracker)
        patch.setenv("TRACKIO_DIR", "unused")
        yield
    jax.config.update("jax_disable_most_optimizations", optimized)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_field_of_every_config_is_read(path):
    found = findings(*shares()[path])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", BASES)
def test_fields_that_no_config_has_are_read(name):
    e, part = BASES[name]
    found = findings(e, within(e, part))
    assert not found, "\n".join(found)


HELD = {
    Lazy,
    Dealt,
    Examples,
    Windows,
    Streams,
    Packed,
    Outline,
    init_from.Loaded,
    Bad,
    Cells,
    Transform,
    Number,
    Category,
    tfds.Features,
    tfds.Decoded,
    parallel.Block,
    parallel.Settled,
    *tokenizers.KINDS.values(),
}
"""Dataclasses that hold data, and are made in reading it: not configuration."""


def public_configs() -> Iterator[type]:
    modules = [optim, parallel, experiment, task_module, init_from]
    for package in (research.models, research.data):
        names = [info.name for info in pkgutil.iter_modules(package.__path__)]
        names = [name for name in names if name not in ("prepare", "raw")]  # those of a script
        modules += [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    for module in modules:
        for name, cls in vars(module).items():
            ours = (
                isinstance(cls, type)
                and dataclasses.is_dataclass(cls)
                and cls.__module__ == module.__name__
            )
            if ours and not name.startswith("_") and cls not in HELD:
                yield cls


def test_no_field_of_research_is_left_out():
    looked = [*shares().values(), *((e, within(e, part)) for e, part in BASES.values())]
    read = {key for e, paths in looked for path in paths for key in keys(e, path)}
    every = {
        f"{cls.__name__}.{f.name}" for cls in public_configs() for f in dataclasses.fields(cls)
    }
    left = sorted(every - read)
    assert not left, f"no config has them, add an experiment to BASES: {', '.join(left)}"
    assert len(every) > 80


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faulty(MLPConfig):
    """What the test is there to find."""

    dead: int = 1
    choice: Literal["a", "b"] = "a"
    odd: None = None
    fixed: Annotated[int, annotated_types.Interval(ge=3, le=3)] = 3


def test_a_field_that_nothing_reads_is_found_by_name():
    e = tiny.mlp(model=Faulty(features=5, sizes=(8, 3), dropout=0.3), steps=2)
    dead, choice, odd, fixed = findings(e, within(e, "model."))
    assert dead == "model.dead has no effect"
    assert choice == "model.choice has no effect"
    assert odd == "model.odd: no other value is known: give one in VALUES or MADE"
    assert fixed.startswith("model.fixed: every other value is refused")
    assert fixed.endswith("model.fixed must be >= 3 and <= 3, not 6")


@pytest.mark.parametrize("family", [tiny.mlp, tiny.lstm])
def test_nothing_differs_where_nothing_was_changed(family):
    e = family(steps=2)
    before = [look(e) for look in LOOKS.values()]
    for look in (prepared, first, *LOOKS.values()):
        look.cache_clear()
    assert before == [look(e) for look in LOOKS.values()]
