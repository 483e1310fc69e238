"""What one machine measured, as one JSON: every figure with how it was got, checked when read.

A file that another program wrote, that was cut short, or that claims what cannot be is refused in
one line that names the file and the field.
"""

import dataclasses
import datetime
import json
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt

from research import UserError
from research import experiment as experiments
from research.compute import peaks
from research.compute.peaks import Peaks

KIND = "ergon benchmark"
VERSION = 1
"""Of the suite: raised where its models, its settings or the meaning of a figure change."""
Qualifier = Literal["exact", "lower bound", "upper bound", "estimated", "measured", "unavailable"]


class Kind(NamedTuple):
    """What a figure is."""

    unit: str
    words: str
    low: float = 0.0
    high: float = float("inf")
    zero: bool = False
    """Whether it may be `low` itself."""


FIGURES = {
    "parameters": Kind("", "parameters"),
    "model_flops": Kind("FLOP", "model FLOPs of a step: 2 a multiply-add, forward and backward"),
    "executed_flops": Kind("FLOP", "FLOPs of the products that the compiled step executes"),
    "moved_bytes": Kind("B", "bytes of main memory that a step moves, at fusions' boundaries"),
    "step_seconds": Kind("s", "a step, batches on the device, nothing fetched"),
    "step_p50": Kind("s", "median of steps each waited for"),
    "step_p95": Kind("s", "95th percentile of steps each waited for"),
    "spread": Kind("share", "interquartile range of the rounds over their median", zero=True),
    "others": Kind("share", "of the host's CPU, taken by other programs meanwhile", 0, 1, True),
    "examples_per_second": Kind("1/s", "examples trained on, batches on the device"),
    "input_wait": Kind("share", "share of a step spent waiting for its batch", -1, 1),
    "mfu": Kind("share", "model FLOPs over time and the datasheet's peak", 0, 1, True),
    "mfu_causal": Kind("share", "the same, causally masked products halved", 0, 1, True),
    "hfu": Kind("share", "executed FLOPs over time and the datasheet's peak", 0, 1, True),
    "mfu_measured": Kind("share", "model FLOPs over time and the peak measured here", 0, 1, True),
    "mfu_causal_measured": Kind("share", "the same, causally masked products halved", 0, 1, True),
    "hfu_measured": Kind("share", "executed FLOPs over time and that peak", 0, 1, True),
    "memory": Kind("B", "a device's memory, by the compiler's account"),
    "memory_peak": Kind("B", "the most that the device has held"),
    "compile_seconds": Kind("s", "lowering and compiling the step"),
    "first_step_seconds": Kind("s", "from the experiment to the end of its first step"),
    "joules_per_step": Kind("J", "energy of a step"),
    "target_reached": Kind("", "the target metric, where it was first met", float("-inf")),
    "target_steps": Kind("", "steps to the first evaluation that met the target"),
    "target_seconds": Kind("s", "seconds in steps to the target"),
    "target_joules": Kind("J", "energy of the steps to the target"),
    "target_money": Kind("USD", "money for the steps to the target"),
}
"""Of every row, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A number and how it was got, or why there is none."""

    value: float | None
    qualifier: Qualifier
    how: str
    """How it was got and by what convention; where it is unavailable, the reason."""
    low: float | None = None
    high: float | None = None
    """The ends of an interval, which `how` says the meaning of."""

    def __post_init__(self) -> None:
        if (self.value is None) != (self.qualifier == "unavailable"):
            raise UserError(f"value is {self.value} and qualifier {self.qualifier!r}")
        if not self.how:
            raise UserError("how is empty: nothing says where the figure is from")
        if (self.low is None) != (self.high is None):
            raise UserError("low and high must come together")
        if self.low is None or self.high is None:
            return
        if self.value is None or not self.low <= self.value <= self.high:
            raise UserError(f"{self.value} is not within {self.low} to {self.high}")


def unavailable(reason: str) -> Figure:
    return Figure(value=None, qualifier="unavailable", how=reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one machine."""

    name: str
    """The family: mlp, cnn, ..."""
    config: str
    """The config that it comes from; what differs from it is in `experiment`."""
    experiment: dict[str, Any]
    """All settings, as a run's config.json."""
    data: str
    """SHA-256 of the data; texts differ with the Python that ships them."""
    target: str
    """In words."""
    intensity: Annotated[float, Gt(0)] | None
    """FLOPs executed a byte of main memory; None where nothing says."""
    binds: str
    """The resource that takes longest by the roofline; empty where it is not known."""
    rounds: tuple[Annotated[float, Gt(0)], ...]
    """Seconds of a step, a mean over each round; what step_seconds is the median of."""
    figures: dict[str, Figure]
    """By the names of FIGURES, all of them."""
    failed: str = ""
    """Why there are no figures; empty where there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roof:
    """What a device does a second, by one source."""

    source: str
    """datasheet or measured, with its date."""
    flops: Annotated[float, Gt(0)]
    """FLOP/s of float32 products at default precision, as they run."""
    bandwidth: Annotated[float, Gt(0)]
    """Bytes/s of main memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured."""

    device: str
    """jax.Device.device_kind; of a CPU, its model and the cores in use."""
    platform: str
    devices: Annotated[int, Ge(1)]
    """Used by every row."""
    host: str
    """The CPU and the cores in use."""
    driver: str
    """What the device's runtime and driver say of themselves; empty: nothing."""
    load: Annotated[float, Ge(0)] | None
    """Processes that ran on the host on average, in the minute before; None: it does not tell."""
    memory: Annotated[int, Gt(0)] | None
    """Bytes that a program may use of the device; None: it does not tell."""
    price: Annotated[float, Gt(0)] | None
    """USD an hour, as given; None: not given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One file."""

    suite: Annotated[int, Ge(1)]
    date: str
    """UTC, ISO 8601."""
    machine: Machine
    environment: dict[str, Any]
    """As a run's environment.json."""
    noise: Annotated[float, Gt(0)]
    """The spread above which times are not reported."""
    peaks: Peaks | None
    """Measured, as scripts/benchmark.py peaks keeps them."""
    roofs: tuple[Roof, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        try:
            datetime.datetime.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"date must be ISO 8601, not {self.date!r}") from None
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise UserError("rows must have names of their own")

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


def to_json(result: Result) -> dict[str, Any]:
    return {"kind": KIND} | dataclasses.asdict(result)


def from_json(data: Any) -> Result:
    """The inverse of `to_json`. Raises UserError, naming the field, for what it cannot have given.

    A file of another version may lack figures, which are then unavailable, and have others, which
    are left out.
    """
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UserError(f'not a benchmark: it has no "kind": "{KIND}"')
    found = _decode(Result, {k: v for k, v in data.items() if k != "kind"}, "")
    rows = tuple(_complete(row, f"rows.{row.name}.", found.suite) for row in found.rows)
    return dataclasses.replace(found, rows=rows)


def read(path: pathlib.Path) -> Any:
    """A file's JSON. Raises UserError, naming the file, where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not whole JSON, cut short or damaged: {error}") from None


def _complete(row: Row, path: str, suite: int) -> Row:
    """A row with exactly the figures of FIGURES, each within its range."""
    if row.failed:
        return row
    found = {}
    for name, kind in FIGURES.items():
        if name not in row.figures:
            if suite == VERSION:
                raise UserError(f"{path}figures has no {name}")
            found[name] = unavailable(f"version {suite} of the suite does not have it")
            continue
        figure = found[name] = row.figures[name]
        for end in ("value", "low", "high"):
            number = getattr(figure, end)
            if number is not None and not _possible(number, kind):
                raise UserError(
                    f"{path}figures.{name}.{end} = {number:g} is impossible: it is from "
                    f"{kind.low:g} to {kind.high:g}"
                    + ("" if kind.zero else f", {kind.low:g} left out")
                )
    if suite == VERSION and (unknown := row.figures.keys() - FIGURES.keys()):
        name = min(unknown)
        raise UserError(
            f"{path}figures has an unknown {name}{experiments.did_you_mean(name, list(FIGURES))}"
        )
    slow, fast = found["step_p95"].value, found["step_p50"].value
    if slow is not None and fast is not None and slow < fast:
        raise UserError(f"{path}figures.step_p95 = {slow:g} is below step_p50 = {fast:g}")
    if found["step_seconds"].value is not None and not row.rounds:
        raise UserError(f"{path}rounds is empty, and step_seconds is their median")
    return dataclasses.replace(row, figures=found)


def _possible(number: float, kind: Kind) -> bool:
    above = number >= kind.low if kind.zero else number > kind.low
    return above and number <= kind.high


def _decode(hint: Any, value: Any, path: str) -> Any:
    """JSON values as what a field's hint says; experiment.check_fields then checks all of them."""
    if typing.get_origin(hint) is Annotated:
        return _decode(typing.get_args(hint)[0], value, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if Peaks in args and value is not None:
        try:
            return peaks.from_json(value)
        except ValueError as error:
            raise UserError(f"{path.rstrip('.')}: {error}") from None
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(args[0], v, f"{path}{_named(v, i)}.") for i, v in enumerate(value))
    if origin is dict and args[1] is not Any and isinstance(value, dict):
        return {k: _decode(args[1], v, f"{path}{k}.") for k, v in value.items()}
    return value


def _named(value: Any, index: int) -> str:
    """A row of a list by its name, where it has one."""
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else str(index)


def _dataclass(cls: type, value: Any, path: str) -> Any:
    where = path.rstrip(".") or "the file"
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, not {type(value).__name__}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: Sequence[dataclasses.Field[Any]] = dataclasses.fields(cls)
    if unknown := [name for name in value if name not in hints]:
        raise UserError(
            f"{where} has an unknown {unknown[0]}"
            f"{experiments.did_you_mean(unknown[0], list(hints))}"
        )
    for field in fields:
        if field.name not in value and field.default is dataclasses.MISSING:
            raise UserError(f"{where} has no {field.name}")
    found: Mapping[str, Any] = {
        name: _decode(hints[name], item, f"{path}{name}.") for name, item in value.items()
    }
    experiments.check_fields(cls, found, path)
    try:
        return cls(**found)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
