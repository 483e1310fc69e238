"""One run, whole: what is trained, on what, how, and how it is judged. Frozen, typed, and JSON."""

import dataclasses
import difflib
import hashlib
import importlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import typeguard
from annotated_types import Ge, Interval
from flax import nnx

from research import UserError
from research.init_from import InitFrom
from research.local import Local
from research.optim import Optimizer
from research.parallel import Parallel

PACKAGES = ("research", "configs")
"""Packages whose classes a config.json may name; others are named by `--allow`."""

RUNNING = (
    "steps",
    "parallel",
    "target",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "tracker",
    "workers",
    "data.data_dir",
    "data.path",
    "data.threads",
)
"""Fields that leave the mathematics of a step alone, so that a continued run may change them. Where
the data lies is one: what it holds is told by its fingerprint."""


AVERAGED = "_ema"
"""What the name of a split ends in where the moving average of the parameters is meant."""


@runtime_checkable
class Model(Protocol):
    """A frozen dataclass that makes a Flax NNX module."""

    def make(self, rngs: nnx.Rngs) -> nnx.Module: ...


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass that turns a model and a batch into a loss; see `research.tasks`."""

    def rows_apart(self) -> bool: ...

    def __call__(self, model: Any, batch: Any, rngs: nnx.Rngs | None, carry: Any) -> Any: ...

    def outputs(self, model: Any, batch: Any, rngs: nnx.Rngs | None, carry: Any) -> Any: ...

    def score(self, outputs: Any, batch: Any) -> dict[str, Any]: ...

    def check(self, outputs: Any, arrays: Mapping[str, np.ndarray]) -> None: ...

    def summary(self, means: dict[str, float]) -> dict[str, float]: ...

    def gather(self, outputs: Any, batch: Any) -> dict[str, Any]: ...

    def gathered(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]: ...

    def tables(self, arrays: Mapping[str, np.ndarray]) -> dict[str, list[Any]]: ...


@runtime_checkable
class Source(Protocol):
    """A frozen dataclass that reads a data set; see `research.data`."""

    def load(self) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What the finished run must reach."""

    metric: str
    """A metric of the task, such as accuracy."""
    value: float
    split: str
    """A split of the data, such as test; test_ema: of the moving average of the parameters."""
    goal: Literal["max", "min"] = "max"
    """max: at least `value`; min: at most."""

    def met(self, value: float) -> bool:
        return value >= self.value if self.goal == "max" else value <= self.value

    def __str__(self) -> str:
        sign = ">=" if self.goal == "max" else "<="
        return f"{self.split} {self.metric} {sign} {self.value:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Stop when a metric of `eval_split` has not improved for `patience` evaluations."""

    patience: Annotated[int, Ge(1)] | None = None
    """Evaluations without improvement that are borne; None: never stop early."""
    metric: str = "loss"
    goal: Literal["max", "min"] = "min"
    ema: bool = False
    """Watch the metric of the moving average of the parameters."""
    keep_best: bool = False
    """Keep the checkpoint of the best evaluation too, and judge the finished run by it."""

    @property
    def watches(self) -> bool:
        return self.patience is not None or self.keep_best

    def start(self) -> dict[str, Any]:
        """What early stopping remembers, as arrays: the best value, turned so that less is better,
        its step, and the evaluations since."""
        return {"best": jnp.float32(jnp.inf), "step": jnp.int32(0), "stale": jnp.int32(0)}

    def after(self, seen: Mapping[str, Any], value: float, step: int) -> dict[str, Any]:
        turned = np.float32(value * (1 if self.goal == "min" else -1))
        if turned < seen["best"]:
            return {"best": turned, "step": np.int32(step), "stale": np.int32(0)}
        return {**seen, "stale": np.int32(seen["stale"] + 1)}

    def over(self, seen: Mapping[str, Any] | None) -> bool:
        return seen is not None and self.patience is not None and seen["stale"] >= self.patience

    def best(self, seen: Mapping[str, Any] | None) -> int | None:
        """The step whose checkpoint is to be kept; None: none was asked for, or evaluated."""
        return int(seen["step"]) or None if seen is not None and self.keep_best else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The whole of one run.

    Raises UserError, naming the field by its dotted path, where a field anywhere in the tree has
    the wrong type or a value out of the range that its annotation declares.
    """

    model: Model
    task: Task
    data: Source
    optimizer: Optimizer
    steps: Annotated[int, Ge(1)]
    """Parameter updates."""
    batch_size: Annotated[int, Ge(1)] | None
    """Examples an update, over all devices; None: the whole training split."""
    accumulate: Annotated[int, Ge(1)] = 1
    """Parts that a batch is gone through in, their gradients added up: the same update in less
    memory. Batch statistics are those of a part, and dropout draws anew for each."""
    local: Local = Local()
    """Clients that make steps by themselves between two updates."""
    seed: Annotated[int, Interval(ge=0, lt=2**31)] = 0
    """Decides the initial parameters, the order of the data and dropout."""
    init_from: InitFrom = InitFrom()
    precision: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in. Parameters, norms, softmax and the loss are float32 in both."""
    attention: Literal["xla", "flash"] = "xla"
    """Transformers': as XLA compiles it, which writes its scores to memory, or by kernels that do
    not, in bfloat16: cuDNN's on NVIDIA GPUs, JAX's (splash) on TPUs."""
    parallel: Parallel = Parallel()
    ema: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Decay of a moving average of the parameters, evaluated beside them; None: no average."""
    early_stop: EarlyStop = EarlyStop()
    eval_split: str = "validation"
    """The split that is evaluated during training."""
    eval_every: Annotated[int, Ge(1)] | None = None
    """Steps between evaluations; None: only at the end."""
    eval_batch_size: Annotated[int, Ge(1)] | None = None
    """Examples that are evaluated at once, over all devices; None: as many as are trained on. A
    text whose state is carried is read as so many streams, each of which starts from nothing."""
    target: Target | None = None
    log_every: Annotated[int, Ge(1)] = 10
    """Steps between logged rows."""
    save_every: Annotated[int, Ge(1)] | None = None
    """Steps between checkpoints; None: only at the end."""
    keep: Annotated[int, Ge(1)] = 2
    """Checkpoints kept, the newest."""
    workers: Annotated[int, Ge(0)] = 0
    """Processes that make batches ahead, for data whose making holds Python's lock; 0: this one.
    Changes no number."""
    tracker: Literal["wandb", "trackio"] | None = None
    """Also log to this experiment tracker, offline unless its own settings say otherwise."""

    def __post_init__(self) -> None:
        check(self)
        if self.early_stop.patience is not None and self.eval_every is None:
            raise UserError("early_stop.patience needs eval_every: it counts evaluations")
        if self.early_stop.keep_best and self.eval_every is None:
            raise UserError("early_stop.keep_best needs eval_every: it compares evaluations")
        if self.local.steps > 1 and not self.local.active:
            raise UserError("local.steps needs local.clients of 2 or more, that make them")
        if self.local.active and (self.accumulate > 1 or self.optimizer.sam_rho is not None):
            field = "accumulate" if self.accumulate > 1 else "optimizer.sam_rho"
            raise UserError(f"local.clients and {field} cannot be combined")
        if self.ema is None:
            if self.early_stop.ema:
                raise UserError("early_stop.ema needs ema: no moving average is kept")
            if self.target is not None and self.target.split.endswith(AVERAGED):
                raise UserError(
                    f"target.split = {self.target.split!r} needs ema: no moving average is kept"
                )

    @property
    def outer(self) -> Optimizer:
        """What updates the parameters of the run; clients of their own use `optimizer`."""
        return Optimizer(update=self.local.outer) if self.local.active else self.optimizer

    @property
    def final_splits(self) -> list[str]:
        """The splits that the finished run is evaluated on."""
        asked = [self.target.split.removesuffix(AVERAGED)] if self.target else []
        return list(dict.fromkeys([self.eval_split, *asked]))

    @property
    def watched(self) -> dict[str, str]:
        """Metrics that a field names: dotted path of the field -> metric."""
        named = {} if self.target is None else {"target.metric": self.target.metric}
        return named | {"early_stop.metric": self.early_stop.metric}


def value(rows: Mapping[str, Mapping[str, float]], row: str, metric: str, field: str) -> float:
    """The metric that a field names, of a split that was evaluated.

    Raises UserError where the split leaves it undefined.
    """
    if metric not in rows[row]:
        raise UserError(f"{field}: {metric} is undefined on {row}")
    return rows[row][metric]


def check(config: Any, path: str = "") -> None:
    """Checks every field of a dataclass tree against its annotation: the type, then the range."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    check_fields(type(config), values, path)


def check_fields(cls: type, values: Mapping[str, Any], path: str) -> None:
    """Checks values for fields of a dataclass, before one is made of them or after."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, value in values.items():
        hint, where = hints[name], plain(f"{path}{name}")
        try:
            typeguard.check_type(
                value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS
            )
            if isinstance(value, bool) and bool not in (hint, *typing.get_args(hint)):
                raise typeguard.TypeCheckError("Python takes True for an int")
        except typeguard.TypeCheckError:
            raise UserError(f"{where} must be {_words(hint)}, not {value!r}") from None
        items = value if isinstance(value, tuple) else (value,)
        numbers = [item for item in items if isinstance(item, int | float)]
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"{where} must be finite, not {value!r}")
        for bound in _bounds(hint):
            if not all(_holds(bound, number) for number in numbers):
                raise UserError(f"{where} must be {_range(bound)}, not {value!r}")
        if dataclasses.is_dataclass(value):
            check(value, f"{path}{name}.")
        for i, item in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(item):
                check(item, f"{path}{name}.{i}.")


def plain(path: str) -> str:
    """A field's path as the command line spells it."""
    return re.sub(r"\.(update|kwargs)\b", "", path)


def _bounds(hint: Any) -> Iterator[Any]:
    """The range declared by a hint, of a tuple's items too: `Annotated[int, Ge(1)] | None` declares
    `Ge(1)`."""
    if typing.get_origin(hint) is Annotated:
        yield from (m for m in hint.__metadata__ if _limits(m))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        for arg in typing.get_args(hint):
            yield from _bounds(arg)


def _limits(bound: Any) -> list[tuple[str, str, Any]]:
    names = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    return [(k, s, getattr(bound, k)) for k, s in names if getattr(bound, k, None) is not None]


def _holds(bound: Any, value: Any) -> bool:
    tests = {
        "gt": lambda limit: value > limit,
        "ge": lambda limit: value >= limit,
        "lt": lambda limit: value < limit,
        "le": lambda limit: value <= limit,
    }
    return all(tests[kind](limit) for kind, _, limit in _limits(bound))


def _range(bound: Any) -> str:
    return " and ".join(f"{sign} {limit}" for _, sign, limit in _limits(bound))


def _words(hint: Any) -> str:
    """A hint as a person would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _words(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)


def to_json(config: Any) -> Any:
    """A dataclass tree as JSON values; a dataclass becomes its fields beside "class".

    Of an array no more than its outline and SHA-256 are written: it cannot be read back.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"class": f"{type(config).__module__}:{type(config).__qualname__}"} | fields
    if isinstance(config, Mapping):
        return {k: to_json(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(v) for v in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    if isinstance(config, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(config).data).hexdigest()
        kind, shape = str(config.dtype), list(config.shape)
        return {"array": {"dtype": kind, "shape": shape, "sha256": digest}}
    raise UserError(f"a config holds {config!r}, which JSON cannot")


def from_json(value: Any, allow: Sequence[str] = (), path: str = "", hint: Any = None) -> Any:
    """The inverse of `to_json`.

    Raises UserError, naming the place, for a class outside `PACKAGES` and `allow`, a class that
    is not a dataclass, and a missing or an unknown field.
    """
    if isinstance(value, dict) and "class" in value:
        cls = _import(value["class"], allow, path)
        hints = typing.get_type_hints(cls)
        given = {k: v for k, v in value.items() if k != "class"}
        for name in given:
            if name not in hints:
                known = [f.name for f in dataclasses.fields(cls)]
                raise UserError(f"unknown field {path}{name}{did_you_mean(name, known)}")
        fields = {k: from_json(v, allow, f"{path}{k}.", hints[k]) for k, v in given.items()}
        check_fields(cls, fields, path)
        try:
            return cls(**fields)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"{path.rstrip('.') or 'experiment'}: {error}") from None
    if isinstance(value, dict) and value.keys() == {"array"}:
        raise UserError(
            f"{path.rstrip('.')} was an array in memory, which is not stored: train and evaluate "
            "where it was made, or save it with numpy and read that file in a data set of your own"
        )
    if isinstance(value, dict):
        return {k: from_json(v, allow, f"{path}{k}.") for k, v in value.items()}
    if isinstance(value, list):
        items = [from_json(v, allow, path) for v in value]
        return items if hint is None or typing.get_origin(hint) is list else tuple(items)
    return value


def _import(name: str, allow: Sequence[str], path: str) -> type:
    module, _, qualname = str(name).partition(":")
    package = module.partition(".")[0]
    where = path.rstrip(".") or "experiment"
    if package not in (*PACKAGES, *allow):
        allowed = ", ".join((*PACKAGES, *allow))
        raise UserError(
            f"{where} names the class {name}, and only {allowed} may be imported; "
            f"pass --allow {package} if you trust it"
        )
    try:
        found = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where} names the class {name}, which cannot be found: {error}") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(f"{where} names {name}, which is not a dataclass")
    if found.__module__.partition(".")[0] not in (*PACKAGES, *allow):
        raise UserError(f"{where} names {name}, which is {found.__module__}'s and not allowed")
    return found


def did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def dumps(experiment: Experiment) -> str:
    return json.dumps(to_json(experiment), indent=2, allow_nan=False) + "\n"


def completed(stored: Any, config: Any) -> Any:
    """A stored tree with the fields that its classes have got since, at their defaults."""
    tree = to_json(config)
    if not (isinstance(stored, dict) and "class" in stored and isinstance(tree, dict)):
        return stored
    if stored["class"] != tree.get("class"):
        return stored
    found = dict(stored)
    for field in dataclasses.fields(config):
        if field.name in stored:
            found[field.name] = completed(stored[field.name], getattr(config, field.name))
        elif field.default is not dataclasses.MISSING:
            found[field.name] = to_json(field.default)
    return found


def changes(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves at which two `to_json` trees differ: dotted path -> (old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in old | new:
            found |= changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if old == new else {path: (old, new)}


def refusals(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Those `changes` that would make a continued run something else than one run."""
    free = set(RUNNING)
    if new["early_stop"]["patience"] is not None or new["early_stop"]["keep_best"]:
        free.discard("eval_every")
    return {k: v for k, v in changes(old, new).items() if free.isdisjoint((k, k.split(".")[0]))}
