"""Where a run's parameters start: at those of another run, or of a safetensors file."""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import safetensors
from annotated_types import Ge

from research import UserError, checkpoint
from research.optim import Optimizer, path_of, some

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Name:
    """A step from the source's names to the model's: `re.sub(match, to, name)`.

    Raises ValueError, in one line, for a regex or a pattern that is none.
    """

    match: str
    """Regex, searched in names such as "layer1/0/conv1/weight"; dots are slashes."""
    to: str
    r"""What stands in its place; \1 is the first group."""
    axes: str | None = None
    """How arrays with such a name are turned, as einops writes it: "out in -> in out"."""

    def __post_init__(self) -> None:
        try:
            re.sub(self.match, self.to, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"{self.match!r} to {self.to!r} is no replacement: {error}") from error
        if self.axes is not None and self.axes.count("->") != 1:
            raise ValueError(f"axes must be as 'out in -> in out', not {self.axes!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """The arrays that a new run starts from; a continued run has its own.

    Every parameter and running statistic of the model must be there, in its shape, but for those
    that `fresh` names. What the source has beside them is not used, and is reported.
    """

    path: str | None = None
    """A run directory, or a file .safetensors; None: start from the model's own initial values."""
    step: Annotated[int, Ge(0)] | None = None
    """Of a run: the checkpoint's step; None: the newest."""
    best: bool = False
    """Of a run: the checkpoint of its best evaluation."""
    ema: bool = False
    """Of a run: the moving average of its parameters."""
    names: tuple[Name, ...] = ()
    """From the source's names to the model's, each applied in turn; see `research.published`."""
    fresh: str | None = None
    """Regex on the paths of what is left at its initial value, such as "^head"."""

    def __post_init__(self) -> None:
        for field in ("step", "best", "ema", "names", "fresh"):
            value = getattr(self, field)
            if self.path is None and value is not None and value not in (False, ()):
                raise ValueError(f"init_from.{field} does nothing without init_from.path")
        try:
            re.compile(self.fresh or "")
        except re.error as error:
            raise ValueError(f"fresh is not a regular expression: {error}") from error


class Row(NamedTuple):
    """One array of the model."""

    name: str
    shape: Shape
    source: str | None
    """Its name in the source; None: it keeps its initial value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was read, and the report of it."""

    path: str
    step: int | None
    """Of the run; None: of a file."""
    arrays: Mapping[str, np.ndarray]
    """By path in the model."""
    rows: tuple[Row, ...]
    unused: tuple[str, ...]
    """Names in the source that nothing was read from."""

    def line(self) -> str:
        """The report in one line."""
        numbers = [math.prod(row.shape) for row in self.rows]
        read = [n for n, row in zip(numbers, self.rows, strict=True) if row.source is not None]
        at = "" if self.step is None else f" at step {self.step}"
        fresh = [row.name for row in self.rows if row.source is None]
        return (
            f"init_from {self.path}{at}: {len(read)} of {len(numbers)} arrays, "
            f"{sum(read):,} of {sum(numbers):,} numbers; "
            f"fresh: {', '.join(fresh) or 'none'}; not used: {some(self.unused)}"
        )

    def json(self) -> dict[str, Any]:
        """The report, array by array, with the SHA-256 of what was read."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name}:{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        return {
            "path": self.path,
            "step": self.step,
            "sha256": digest.hexdigest(),
            "arrays": [row._asdict() for row in self.rows],
            "unused": list(self.unused),
        }


def load(config: InitFrom, params: Any, model_state: Any) -> Loaded | None:
    """What `config` names, for a model whose arrays have these shapes; None where it names nothing.

    Arrays come in the model's dtypes. All names and shapes are checked before any array is read.

    Raises UserError, naming the array, where the source does not fit the model.
    """
    if config.path is None:
        return None
    path = pathlib.Path(config.path)
    source: _File | _Run
    if path.suffix == ".safetensors":
        if config.step is not None or config.best or config.ema:
            raise UserError(f"init_from: {path} is a file: step, best and ema are of runs")
        source = _File(path)
    else:
        source = _Run(path, config)
    wanted = flat(params) | flat(model_state)
    renamed = _renamed(config.names, source.shapes)
    fresh = {name for name in wanted if config.fresh and re.search(config.fresh, name)}
    if config.fresh and not fresh:
        raise UserError(f"init_from.fresh: {config.fresh!r} matches nothing of {some(wanted)}")
    # Keys and counters of random streams are no weights, and a file has none.
    fresh |= {name for name, x in wanted.items() if not jnp.issubdtype(x.dtype, jnp.inexact)}
    missing = [name for name in wanted if name not in fresh and name not in renamed]
    if missing:
        raise UserError(
            f"init_from: {path} has no {some(missing)}; it has {some(renamed)}. Give "
            "init_from.names, or leave what is missing at its initial value by init_from.fresh"
        )
    chosen = {name: renamed[name] for name in wanted if name not in fresh}
    for name, (old, axes) in chosen.items():
        there, here = source.shapes[old], wanted[name].shape
        if _turned(there, axes, here) != here:
            turned = f" turned by {axes!r}" if axes else ""
            raise UserError(
                f"init_from: {name} is {list(here)}, and {old} of {path} is {list(there)}{turned}; "
                f"init_from.fresh leaves it at its initial value"
            )
    with _readable(path):
        read = source.read([old for old, _ in chosen.values()])
    arrays = {}
    for name, (old, axes) in chosen.items():
        array = read[old]
        here = wanted[name].dtype
        kind = jnp.inexact if jnp.issubdtype(here, jnp.complexfloating) else jnp.floating
        if not jnp.issubdtype(array.dtype, kind):
            raise UserError(f"init_from: {old} of {path} is {array.dtype}, and {name} is {here}")
        if axes is not None:
            array = einops.rearrange(array, axes, **_lengths(axes, wanted[name].shape))
        arrays[name] = array.astype(here)
        if not np.all(np.isfinite(arrays[name])):
            raise UserError(f"init_from: {old} of {path} holds a number that is not finite")
    rows = [
        Row(name, leaf.shape, chosen[name][0] if name in chosen else None)
        for name, leaf in wanted.items()
    ]
    used = set(read)
    return Loaded(
        path=str(path),
        step=source.step,
        arrays=arrays,
        rows=tuple(rows),
        unused=tuple(name for name in source.shapes if name not in used),
    )


def replaced(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """The tree with the arrays that are given by path in place of its own."""

    def leaf(key_path: Any, own: Any) -> Any:
        return arrays.get(path_of(key_path), own)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _renamed(names: Iterable[Name], shapes: Mapping[str, Shape]) -> dict[str, tuple[str, Any]]:
    """New name -> (the source's name, how its axes are turned)."""
    found: dict[str, tuple[str, str | None]] = {name: (name, None) for name in shapes}
    for name in names:
        if not any(re.search(name.match, new) for new in found):
            raise UserError(f"init_from.names: {name.match!r} is found in none of {some(found)}")
        after: dict[str, tuple[str, str | None]] = {}
        for new, (old, axes) in found.items():
            to, count = re.subn(name.match, name.to, new)
            if count and name.axes and axes:
                raise UserError(f"init_from.names: two turn the axes of {old}")
            if to in after:
                raise UserError(f"init_from.names: {after[to][0]} and {old} both become {to}")
            after[to] = old, (name.axes if count and name.axes else axes)
        found = after
    return found


def _lengths(axes: str, shape: Shape) -> dict[str, int]:
    """The lengths of the axes of the result that stand by themselves: einops needs them where the
    source holds several in one."""
    result = axes.split("->")[1].split()
    if len(result) != len(shape) or any(c in axes.split("->")[1] for c in "()."):
        return {}
    return {name: n for name, n in zip(result, shape, strict=True) if name.isidentifier()}


def _turned(there: Shape, axes: str | None, here: Shape) -> Shape | None:
    """The shape after turning, found without an array of that size; None: it cannot be turned."""
    if axes is None:
        return there
    try:
        empty = np.broadcast_to(np.zeros((), np.bool_), there)
        return einops.rearrange(empty, axes, **_lengths(axes, here)).shape
    except (einops.EinopsError, TypeError):  # TypeError: an axis is called as an argument is
        return None


class _File:
    """A safetensors file; only what is asked for is read."""

    step: int | None = None

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        with _readable(path), safetensors.safe_open(path, framework="np") as file:
            names = list(file.keys())
            self.original = {name.replace(".", "/"): name for name in names}
            shapes = {k: file.get_slice(v).get_shape() for k, v in self.original.items()}
        if len(shapes) < len(names):
            raise UserError(f"init_from: {path} has names that differ in dots and slashes alone")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        with safetensors.safe_open(self.path, framework="np") as file:
            return {name: file.get_tensor(self.original[name]) for name in names}


class _Run:
    """A checkpoint of a run; only what is asked for is read. Nothing of its config is imported."""

    def __init__(self, path: pathlib.Path, config: InitFrom) -> None:
        if not (path / "config.json").is_file():
            raise UserError(f"init_from: {path} is neither a run directory nor a file .safetensors")
        if config.best and config.step is not None:
            raise UserError("init_from: step and best are two checkpoints: give one of them")
        self.saved = path / "checkpoints"
        step = checkpoint.find(self.saved, _best(path) if config.best else config.step)
        self.step: int | None = step
        with _readable(path):
            self.tree = checkpoint.outline(self.saved, step)
        self.parts = ("ema" if config.ema else "params", "model_state")
        if not self.tree[self.parts[0]]:
            raise UserError(f"init_from.ema: {path} kept no moving average")
        both = (item for part in self.parts for item in flat(self.tree[part]).items())
        self.shapes = {name: leaf.shape for name, leaf in both}

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        wanted = {part: self.tree[part] for part in self.parts}
        # A schedule-free method is judged by an average, and not where it takes gradients.
        if "params" in wanted and _schedule_free(self.tree["opt_state"]):
            wanted["opt_state"] = self.tree["opt_state"]
        assert self.step is not None
        found = checkpoint.arrays(self.saved, self.step, wanted)
        nodes = _schedule_free(found.get("opt_state"))
        states = [optax.contrib.ScheduleFreeState(**node) for node in nodes]
        first, rest = (found[part] for part in self.parts)
        arrays = flat(Optimizer.eval_params(states, first)) | flat(rest)
        return {name: np.asarray(arrays[name]) for name in names}


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """What is damaged, or of a kind that its reader does not know, in one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"init_from: cannot read {path}: {reason}") from error


def _best(path: pathlib.Path) -> int:
    if not (path / "summary.json").is_file():
        raise UserError(f"init_from.best: {path} has not finished: it has no summary.json")
    with _readable(path):
        found = dict(json.loads((path / "summary.json").read_text())).get("best")
    if found is None:
        raise UserError(f"init_from.best: {path} has no best checkpoint: see early_stop.keep_best")
    return int(found)


def _schedule_free(node: Any) -> list[dict[str, Any]]:
    """The states of schedule-free methods in an optimizer's state, as Orbax gives it back."""
    if isinstance(node, Mapping):
        if set(optax.contrib.ScheduleFreeState._fields) <= node.keys():
            return [dict(node)]
        node = list(node.values())
    children = node if isinstance(node, list | tuple) else ()
    return [state for child in children for state in _schedule_free(child)]


def flat(tree: Any) -> dict[str, Any]:
    """The leaves by path, "layers/0/kernel"."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
