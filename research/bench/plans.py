"""Plans for hardware that is not there, read as scripts/plan.py --json writes them."""

import dataclasses
import math
import pathlib
import typing
from typing import Any

from research import UserError
from research.bench.result import Figure, Qualifier, unavailable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A config on a target."""

    config: str
    target: str
    """Such as h100:8."""
    chips: int | None
    model_flops: int | None
    step_seconds: Figure
    examples_per_second: Figure
    mfu: Figure
    hours: Figure
    """Of the run that was planned."""
    kwh: Figure
    """Energy of the run, its data centre's share included."""
    money: Figure
    """USD for the run."""
    warnings: tuple[str, ...]


def is_plan(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("targets"), list) and "config" in data


def from_json(data: Any) -> list[Planned]:
    """Raises UserError, naming the field, for what no plan can say."""
    config = data["config"]
    if not isinstance(config, str):
        raise UserError(f"config must be the name of one, not {config!r:.60}")
    return [_planned(config, row, f"targets.{i}.") for i, row in enumerate(data["targets"])]


def _planned(config: str, row: Any, path: str) -> Planned:
    if not isinstance(row, dict) or not isinstance(row.get("target"), str):
        raise UserError(f"{path}target must be the name of one")
    path = f"targets.{row['target']}."
    reason = str(row.get("reason") or "")
    absent = "" if row.get("status") == "ok" else f"{row.get('status')}: {reason}".strip(": ")
    found = {
        name: unavailable(absent) if absent else _figure(row.get(name), f"{path}{name}", high)
        for name, high in (("step_seconds", None), ("examples_per_second", None), ("mfu", 1.0))
    }
    run = row.get("run")
    run = run if isinstance(run, dict) else {}
    of_run = {
        field: unavailable(absent) if absent else _figure(run.get(name), f"{path}run.{name}", None)
        for field, name in (("hours", "hours"), ("kwh", "energy"), ("money", "money"))
    }
    return Planned(
        warnings=tuple(str(line) for line in run.get("warnings") or ()),
        config=pathlib.Path(config).stem,
        target=row["target"],
        chips=_whole(row.get("chips"), f"{path}chips"),
        model_flops=_whole(row.get("model_flops"), f"{path}model_flops"),
        **found,
        **of_run,
    )


def _figure(given: Any, path: str, most: float | None) -> Figure:
    """A plan's figure: an object with its interval and qualifier, or a number, an estimate."""
    if not isinstance(given, dict):
        given = {"value": given}
    value, basis = given.get("value"), str(given.get("basis") or "")
    if value is None:
        return unavailable(basis or "the plan has none")
    ends = {name: given.get(name) for name in ("low", "high")}
    if None in ends.values():
        ends = {"low": None, "high": None}
    for name, number in {"value": value, **ends}.items():
        if number is not None and not _positive(number, most):
            raise UserError(f"{path}.{name} = {number!r:.60} is impossible")
    qualifier = given.get("qualifier", "estimated")
    if qualifier not in typing.get_args(Qualifier) or qualifier == "unavailable":
        raise UserError(f"{path}.qualifier = {qualifier!r:.60} is none of a figure with a value")
    try:
        how = f"by scripts/plan.py{': ' * bool(basis)}{basis}"
        return Figure(value=value, qualifier=qualifier, how=how, **ends)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _positive(number: Any, most: float | None) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return math.isfinite(number) and 0 < number <= (most or math.inf)


def _whole(given: Any, path: str) -> int | None:
    if isinstance(given, dict):
        given = given.get("value")
    if given is not None and not (_positive(given, None) and given == int(given)):
        raise UserError(f"{path} = {given!r:.60} is not a whole number above 0")
    return None if given is None else int(given)
