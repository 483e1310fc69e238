"""Plans for several targets, each compiled in a process of its own: what fails there is a row."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research import UserError
from research.bench.plan import tokens
from research.compute import energy, links, prices, targets
from research.data.outline import outlined
from research.experiment import Experiment

ALL = (
    *("v2:4", "v3:4", "v4:4", "v5e:4", "v5p:4", "v6e:4", "tpu7x:4"),
    *("a100:8", "h100:8", "h200:8", "b200:8", "rtx4090:1", "cpu:1"),
)
"""A host of each kind."""

Json = dict[str, Any]


def place(text: str) -> targets.Place:
    """Raises UserError for a target that is not known."""
    try:
        return targets.place(text)
    except ValueError as error:
        raise UserError(f"--target {error}") from None


def rows(
    argv: Sequence[str],
    places: Sequence[targets.Place],
    seconds: float,
    workers: int,
    done: Callable[[str], None],
) -> list[Json]:
    """Of all targets, in their order.

    argv: a command that prints the row of the target that follows it. seconds: that one may take.
    """
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def one(where: targets.Place) -> Json:
            found = _row(argv, where, seconds)
            done(f"{where}: {found['status']}")
            return found

        return list(pool.map(one, places))


def _row(argv: Sequence[str], where: targets.Place, seconds: float) -> Json:
    target = targets.TARGETS[where.kind]
    empty: Json = {"target": str(where), "chips": where.chips}
    if not targets.installed(where.kind):
        reason = f"its compiler, {target.package}, is not there: pip install 'ergon[plan]'"
        return empty | {"status": "not installed", "reason": reason}
    try:
        ran = subprocess.run(
            [*argv, str(where)],
            env=environment(os.environ, where),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return empty | {"status": "failed", "reason": f"took more than {seconds:.0f} s to compile"}
    if ran.returncode == 0:
        found: Json = json.loads(ran.stdout.splitlines()[-1])
        return found
    return empty | {"status": "failed", "reason": _said(ran)}


def environment(given: Mapping[str, str], where: targets.Place) -> dict[str, str]:
    """Of the process that compiles: on the CPU's JAX, as so many devices where they are its."""
    found = {**given, "JAX_PLATFORMS": "cpu"}
    if where.kind == "cpu":
        flag = f"--xla_force_host_platform_device_count={where.chips}"
        found["XLA_FLAGS"] = f"{given.get('XLA_FLAGS', '')} {flag}".strip()
    return found


def _said(ran: "subprocess.CompletedProcess[str]") -> str:
    """The last line that a process wrote before it failed, or how it was killed."""
    if ran.returncode < 0:
        return (
            f"killed by signal {-ran.returncode}: did the compiler need more memory than there is?"
        )
    lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
    said = lines[-1] if lines else f"ended with status {ran.returncode}"
    return said.removeprefix("error: ")[:400]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """How long a run is: of one of them, or of the experiment's steps."""

    tokens: float | None = None
    epochs: float | None = None

    def steps(self, e: Experiment) -> float:
        """Raises UserError where both are given, where there are no tokens, and where the data
        that an epoch is of is not there."""
        if self.tokens is not None and self.epochs is not None:
            raise UserError("--tokens and --epochs each say how long the run is: give one")
        if self.tokens is None and self.epochs is None:
            return float(e.steps)
        source = e.data if self.epochs is not None else outlined(e).data
        train = source.load()["train"]
        batch = train.batch(0, e.batch_size or len(train), e.seed)
        if self.epochs is not None:
            # Of a text, predicted tokens; of other data, rows.
            return self.epochs * len(train) / int(batch["weights"].size)
        read = tokens(batch["inputs"])
        if read is None:
            raise UserError(f"--tokens: {type(e.data).__name__} gives no tokens; give --epochs")
        assert self.tokens is not None
        return self.tokens / read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """By whose prices, and on whose electricity, runs are."""

    prices: prices.Prices
    provider: str | None
    grid: str

    @classmethod
    def of(cls, path: pathlib.Path | None, provider: str | None, grid: str) -> "Costs":
        """Raises UserError for a file that is not of prices, and a provider, or a grid, that it
        lacks."""
        try:
            found = prices.published() if path is None else prices.load(path)
            energy.cost("h100-sxm", 1, 0.0, prices=found, provider=provider, grid=grid)
        except ValueError as error:
            raise UserError(str(error)) from None
        return cls(prices=found, provider=provider, grid=grid)

    def of_run(self, row: Json, steps: float) -> Json | None:
        """Of so many steps on a row's target; None where the time of one is not known."""
        seconds, chip = row.get("step_seconds"), row.get("chip")
        if seconds is None or chip is None:
            return None
        ends = {end: self._cost(row, seconds[end] * steps) for end in ("value", "low", "high")}
        found = ends["value"]
        parts = {
            field.name: dataclasses.asdict(getattr(found, field.name))
            | {end: getattr(ends[end], field.name).value for end in ("low", "high")}
            for field in dataclasses.fields(found)
            if field.name != "warnings"
        }
        return {"steps": steps, "warnings": list(found.warnings)} | parts

    def _cost(self, row: Json, seconds: float) -> energy.Cost:
        chip, chips = row["chip"], row["chips"]
        return energy.cost(
            chip, chips, seconds, prices=self.prices, provider=self.provider, grid=self.grid
        )


def table(found: Sequence[Json]) -> str:
    """A line a target, and below it what is to be known of some."""
    lines = [
        f"{'target':12}{'memory, GB':>16}{'executed':>10}{'binds':>9}{'step, s':>11}"
        f"{'low .. high':>20}{'MFU':>7}{'per second':>13}{'hours':>10}{'kWh':>10}{'USD':>12}"
    ]
    lines += [_line(row) for row in found]
    lines += _exchanged(found)
    notes = [note for row in found if (note := _note(row))]
    models = {row["model_flops"] for row in found if "model_flops" in row}
    what = [f"model FLOPs a step: {n:,}" for n in sorted(models)]
    stale = dict.fromkeys(
        line for row in found for line in (row.get("run") or {}).get("warnings", [])
    )
    return "\n".join([*what, "", *lines, *([""] if notes else []), *notes, *stale])


def _line(row: Json) -> str:
    if "model_flops" not in row:
        return f"{row['target']:12}  {row['status']}"
    memory, step = row["memory"] or {}, row["step_seconds"]
    held = " / ".join(
        "-" if n is None else f"{n / 1e9:.1f}" for n in map(memory.get, ("needed", "usable"))
    )
    over = "" if row["status"] == "ok" else " !"
    executed = row["flops"] and row["flops"] * row["devices"] / max(row["model_flops"], 1)
    cells = [
        f"{row['target']:12}{held + over:>16}",
        f"{_shown(executed, '.3f'):>10}{row['binds'] or '-':>9}",
        f"{_shown(step and step['value'], '.3g'):>11}",
        f"{(step and '{low:.2g} .. {high:.2g}'.format(**step)) or '-':>20}",
        f"{_shown(row['mfu'], '.0%'):>7}",
        f"{_shown(row['tokens_per_second'] or row['examples_per_second'], ',.0f'):>13}",
    ]
    run = row.get("run") or {}
    for name, width in (("hours", 10), ("energy", 10), ("money", 12)):
        cells.append(f"{_shown((run.get(name) or {}).get('value'), ',.4g'):>{width}}")
    return "".join(cells)


def _exchanged(found: Sequence[Json]) -> list[str]:
    """Of each target a line for each axis that a device sends over, and kind of links that it
    takes, as those do that take most of the time."""
    sent: dict[tuple[str, ...], list[Json]] = {}
    for row in found:
        for c in row.get("collectives") or ():
            if c["bytes"] and c["group_size"] != 1:
                kinds = (level.split()[0] for level in c["span"] or ())
                key = row["target"], " x ".join(c["axes"] or ("not known",)), *kinds
                sent.setdefault(key, []).append(c)
    lines = []
    for (target, axes, *_), each in sent.items():
        moved, messages, seconds = links.together(each)
        longest = max(each, key=lambda c: (c["seconds"] or 0.0, c["bytes"] * c["count"]))
        lines.append(
            f"{target:16}{axes:>20}{moved / 1e9:>14.4g}{messages:>10,}{_shown(seconds, '.3g'):>10}"
            f"  {' + '.join(longest['span'] or ('not known',))}"
        )
    head = (
        f"{'target':16}{'sent over':>20}{'GB a device':>14}{'messages':>10}{'step, s':>10}  links"
    )
    return ["", head, *lines] if lines else []


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _note(row: Json) -> str:
    """Why a target has no answer, or does not fit and what would."""
    where, reason = row["target"], row.get("reason", "")
    if row["status"] != "does not fit":
        settings = ", ".join(f"--{k} {v}" for k, v in (row.get("settings") or {}).items())
        fewer = row.get("extrapolated")
        said = [settings or reason, f"extrapolated from {fewer}" if fewer else ""]
        return f"{where}: {'; '.join(filter(None, said))}" if any(said) else ""
    over = (row["memory"] or {}).get("over")
    changes = ", ".join(f"--{name} {value}" for name, value in row["fits_with"].items())
    missing = f"{over / 1e9:.2f} GB too many" if over else "does not fit"
    return f"{where}: {missing}, {reason}; fits with {changes or 'nothing that was tried'}"
