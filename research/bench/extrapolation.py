"""More devices than are compiled for: fewer copies of the model, each with as many rows.

A device's program is then the same but for how many exchange gradients, so that its work and its
memory are those of the program compiled, and its messages have larger groups.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from research import compute
from research.compute import targets
from research.compute.links import Collective
from research.compute.report import Report
from research.experiment import Experiment
from research.parallel import Parallel
from research.setup import Setup

MOST = 16_384
"""Chips that are compiled for; more are extrapolated to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fewer:
    """What to compile in place of an experiment on a target."""

    experiment: Experiment
    place: targets.Place
    times: int = 1
    """Devices asked for, of one compiled for."""
    axis: str = "data"
    """Of the mesh, that is so many times as long."""

    def sizes(self, mesh: jax.sharding.Mesh) -> dict[str, int]:
        """Of the mesh that was asked for."""
        return {k: n * self.times if k == self.axis else n for k, n in mesh.shape.items()}

    def grown(self, found: Report, setup: Setup) -> Report:
        """What was compiled, of all devices: model FLOPs counted anew, of the whole batch."""
        if self.times == 1:
            return found
        alone = setup.scaled(Parallel(), setup.mesh.devices.reshape(-1)[:1].tolist(), self.times)
        count = compute.count(alone.reference() or alone.step().trace(*alone.abstract_example()))
        program = found.program and dataclasses.replace(
            found.program,
            devices=found.program.devices * self.times,
            collectives=[self._collective(c) for c in found.program.collectives],
        )
        return dataclasses.replace(found, count=count, program=program)

    def _collective(self, c: Collective) -> Collective:
        within = c.span is not None and all(level.kind != "network" for level in c.span)
        if within or (c.axes is not None and self.axis not in c.axes):
            return c
        grown: dict[str, Any] = {"group_size": c.group_size * self.times}
        if c.kind == "all-gather":
            grown["bytes"] = c.bytes * self.times
        if c.span and c.span[-1].kind == "network":
            *near, network = c.span
            grown["span"] = (*near, network._replace(size=network.size * self.times))
        return dataclasses.replace(c, **grown)


def fewer(e: Experiment, where: targets.Place) -> Fewer:
    """The same where there are no more than `MOST` chips, or where neither the copies of the model
    nor the rows divide so that two copies are left to exchange gradients."""
    whole = Fewer(experiment=e, place=where)
    if where.chips <= MOST or e.batch_size is None:
        return whole
    devices = where.chips * getattr(targets.TARGETS[where.kind], "per_chip", 1)
    for place in _parts(where):
        times = where.chips // place.chips
        for axis in ("replica", "data"):
            parallel = _shorter(e.parallel, axis, times, devices)
            if parallel is not None and e.batch_size % times == 0:
                rows = e.batch_size // times
                small = dataclasses.replace(
                    e, parallel=parallel, batch_size=rows, eval_batch_size=None
                )
                return Fewer(experiment=small, place=place, times=times, axis=axis)
    return whole


def _parts(where: targets.Place) -> Iterator[targets.Place]:
    """Fewer slices, two first; of GPUs fewer nodes, those that are compiled for whole first."""
    if where.slices > 1:
        for n in range(2, where.slices):
            if where.slices % n == 0:
                yield where._replace(slices=n)
        return
    host = getattr(targets.TARGETS[where.kind], "host", 1)
    for n in range(MOST // host, 1, -1):
        if where.chips % (n * host) == 0:
            yield where._replace(sides=(n * host,))


def _shorter(parallel: Parallel, axis: str, times: int, devices: int) -> Parallel | None:
    """The mesh with an axis of so many times fewer; None where that does not divide, or leaves
    one."""
    given = getattr(parallel, axis)
    others = math.prod(n or 1 for name, n in parallel.axes.items() if name != axis)
    size = given or devices // others
    if size % times or size == times:
        return None
    shorter: dict[str, Any] = {axis: given and given // times}
    return dataclasses.replace(parallel, **shorter)
