"""Weak scaling: what a device does and sends, by how many there are, at as many rows of each.

Of programs compiled for so many devices, which need not be there. No time is measured.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from research import UserError, compute
from research.compute import targets
from research.data.outline import outlined
from research.experiment import Experiment
from research.parallel import Parallel
from research.setup import Setup, prepare

Axis = Literal["replica", "data", "fsdp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Of one device, in one step."""

    devices: int
    flops: int
    """Executed, of matrix products and convolutions."""
    memory: int | None
    """Bytes, where the compiler says."""
    sent: int
    """Bytes of the arrays that are exchanged, each counted as `compute.Collective` says."""
    messages: int
    """Collectives executed."""
    kinds: dict[str, int]
    """`sent`, by kind of collective."""
    qualifier: str


def measure(e: Experiment, kind: str, counts: Sequence[int], axis: Axis) -> Iterator[Row]:
    """A row for each number of devices: the mesh grows along one axis, and the batch with it.

    Raises UserError where the compiler is not installed, or no slice has so many devices.
    """
    if not targets.installed(kind):
        package = targets.TARGETS[kind].package
        raise UserError(f"--kind {kind}: its compiler, {package}, is not installed")
    spread = dataclasses.replace(e.parallel, **{"data": 1, axis: 1})
    fixed = math.prod(size or 1 for size in spread.axes.values())
    for count in counts:
        if count % fixed:
            raise UserError(f"--devices {count} does not divide by the other axes' {fixed}")
    alone = dataclasses.replace(e, parallel=Parallel(data=1))
    base: Setup | None = None
    for count in counts:
        try:
            devices = targets.devices(targets.place(f"{kind}:{count}"))
        except ValueError as error:
            raise UserError(f"--devices: {error}") from None
        base = base or prepare(outlined(alone), devices[:1])
        grown = dataclasses.replace(spread, **{axis: count // fixed})
        yield _row(base.scaled(grown, devices, count // fixed), kind)


def _row(setup: Setup, kind: str) -> Row:
    traced = setup.step().trace(*setup.abstract_example())
    platforms = (targets.TARGETS[kind].platform,)
    compiled = traced.lower(lowering_platforms=platforms).compile()
    program = compute.program(compiled, setup.mesh)
    kinds: dict[str, int] = {}
    for each in program.collectives:
        kinds[each.kind] = kinds.get(each.kind, 0) + each.bytes * each.count
    return Row(
        devices=setup.mesh.size,
        flops=program.matmul_flops,
        memory=program.memory.total if program.memory else None,
        sent=sum(kinds.values()),
        messages=sum(each.count for each in program.collectives),
        kinds=kinds,
        qualifier="exact" if program.exact else "estimated",
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'devices':>8}{'FLOPs':>26}{'memory, MB':>12}{'sent, bytes':>18}{'messages':>10}  "
        "of which sent by"
    ]
    for row in rows:
        memory = "-" if row.memory is None else f"{row.memory / 1e6:.1f}"
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(row.kinds.items())) or "-"
        lines.append(
            f"{row.devices:8,}{row.flops:26,}{memory:>12}{row.sent:18,}"
            f"{row.messages:10,}  {kinds}  {row.qualifier}"
        )
    return "\n".join(lines)
