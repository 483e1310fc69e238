"""Published times of a step beside the least that it can take: compiled for those accelerators.

Of runs whose source says how the devices share the model, or a log how many rows they have. Theirs
have flash attention, and so have these where it is there. On GPUs no layer is recomputed, and that
it fits is not asked. XLA for TPU compiles what fits alone: there layers are recomputed where they
must, and the bound is of the products that are made for the first time.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from research.bench import plan, throughput
from research.bench.throughput import Run
from research.compute import targets
from research.data.outline import outlined
from research.parallel import Parallel

KINDS = {"a100-sxm4-80gb": "a100", "h100-sxm": "h100", "tpu-v5p": "v5p", "tpu-v6e": "v6e"}
"""Targets, by the keys of chips.toml."""


@dataclasses.dataclass(frozen=True)
class Row:
    run: Run
    planned: plan.Row

    @property
    def seconds(self) -> throughput.Span:
        """Of a step, as published: the least and the greatest that its last digit allows."""
        low, high = self.run.rate
        each = self.run.rows * self.run.context
        return each / high, each / low

    @property
    def bound(self) -> float | None:
        """Seconds; None: the compiler gave no program."""
        row = self.planned
        if row.qualifier != "exact" or not row.recomputed or not row.flops:
            return row.bounds.get("at_least")
        compute = row.bounds.get("compute")
        return compute and compute * (1 - row.recomputed / row.flops)

    @property
    def over(self) -> float | None:
        """The published time over the bound."""
        return self.seconds[0] / self.bound if self.bound else None

    def to_json(self) -> dict[str, Any]:
        return {
            "published": dataclasses.asdict(self.run),
            "seconds": self.seconds,
            "bound": self.bound,
            "over_bound": self.over,
            "planned": self.planned.json(),
        }


def measure() -> Iterator[Row]:
    for run in throughput.runs():
        if run.rows and targets.installed(KINDS[run.chip]):
            yield Row(run, _compiled(run))


def _compiled(run: Run) -> plan.Row:
    model = throughput.model(run.model, run.context)
    e = throughput.experiment(model, run.rows * run.devices)
    fsdp = run.devices // run.replica if run.replica else 1
    e = dataclasses.replace(
        e,
        parallel=Parallel(replica=max(run.replica, 1), fsdp=fsdp),
        accumulate=run.accumulate,
        precision="bfloat16",
        attention="flash",
    )
    row = plan.compiled(outlined(e), _place(run))
    # Of a device's rows as many at once as fit, the fewer parts the fewer gathers.
    rows = run.rows // run.accumulate
    for parts in (n for n in range(1, rows + 1) if rows % n == 0):
        if row.bounds:
            break
        less = {"model.remat": "full", "accumulate": run.accumulate * parts}
        row = plan.compiled(outlined(plan.changed(e, less)), _place(run))
    return row


def _place(run: Run) -> targets.Place:
    several = f":{run.slices}" if run.slices > 1 else ""
    return targets.place(f"{KINDS[run.chip]}:{run.devices // run.slices}{several}")


def table(rows: Sequence[Row]) -> str:
    head = f"{'model':14}{'target':10}{'rows':>6}{'published, s':>14}{'bound, s':>10}{'binds':>10}"
    lines = [f"{head}{'over it':>9}{'planned, s':>12}{'low .. high':>18}  attention"]
    for row in rows:
        run, planned, step = row.run, row.planned, row.planned.step_seconds
        line = f"{run.model:14}{planned.target:10}{run.rows:>6}{sum(row.seconds) / 2:>14.4g}"
        whole = row.bound == planned.bounds.get("at_least")
        binds = planned.binds or "-" if whole else "products"
        if row.over is None or step is None:
            lines.append(f"{line}  unavailable: {planned.status}, {planned.reason}")
            continue
        lines.append(
            f"{line}{row.bound:>10.4g}{binds:>10}{row.over:>9.2f}"
            f"{step['value']:>12.4g}{step['low']:>9.3g} .. "
            f"{step['high']:<8.3g} {planned.attention}"
        )
    return "\n".join(lines)
