"""What messages between devices cost: which links they take, and how fast those are.

Devices are near one another at levels: dies of a chip, chips of a TPU's torus or GPUs of a node,
and nodes or slices with a network between them. A collective goes through its levels in turn, the
innermost first, so that what leaves a node is shared among the group's devices in it (Cho et al.,
BlueConnect, 2019). A group is taken to have its links to itself.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from research.compute import chips


class Level(NamedTuple):
    """So many members that are equally near to one another."""

    kind: Literal["chip", "torus", "node", "network"]
    """What they are in: a chip, as its dies; a TPU's slice; a GPU's node; the data centre."""
    size: int
    rings: tuple[int, ...] = ()
    """Sides of the part of a torus, along dimensions that close."""
    lines: tuple[int, ...] = ()
    """Sides along dimensions that do not, or of which this is a part."""

    def __str__(self) -> str:
        sides = [f"ring {n}" for n in self.rings] + [f"line {n}" for n in self.lines]
        return f"{self.kind} {self.size}" + (f" ({' x '.join(sides)})" if sides else "")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication between devices."""

    kind: str
    """As HLO names it; the start and the end of an asynchronous one together."""
    bytes: int
    """Of the whole array on one device: an all-gather's output, a reduce-scatter's input."""
    group_size: int
    """Devices that take part together; the largest group."""
    count: int
    """Executions on one device."""
    axes: tuple[str, ...] | None = None
    """The mesh axes communicated over; None where no mesh was given or none match."""
    span: tuple[Level, ...] | None = None
    """The levels that groups extend over, the innermost first; None where it is not known how the
    devices are connected."""


class Wiring:
    """How the devices of a mesh are connected, where the table of chips has theirs."""

    def __init__(self, devices: Sequence[Any]) -> None:
        chip = chips.match(devices[0].device_kind, devices[0].platform)
        self.kind: Literal["torus", "node"] | None = None
        if chip is None:
            return
        self.kind = "torus" if chip.torus_links else "node"
        self.nodes = np.array([_node(device) for device in devices])
        if self.kind == "torus":
            self.dies = np.array([device.core_on_chip for device in devices])
            self.coords = np.array([device.coords for device in devices])
            self.sides = self.coords.max(0) - self.coords.min(0) + 1
            self.closes = _closes(self.sides, (chip.torus_links or 0) // 2)

    def span(self, groups: Sequence[Sequence[int]]) -> tuple[Level, ...] | None:
        """The levels of the group that extends furthest; groups: places among the devices."""
        if self.kind is None:
            return None
        return max(map(self._levels, groups), key=_reach, default=())

    def _levels(self, group: Sequence[int]) -> tuple[Level, ...]:
        members = list(group)
        nodes = _distinct(self.nodes[members])
        found: list[Level] = []
        if self.kind == "torus":
            found.append(Level("chip", _distinct(self.dies[members])))
            coords = self.coords[members]
            extent = [_distinct(coords[:, d]) for d in range(coords.shape[1])]
            rings = self.closes & (np.array(extent) == self.sides)
            sides = [(n, r) for n, r in zip(extent, rings, strict=True) if n > 1]
            found.append(
                Level(
                    "torus",
                    len(np.unique(coords, axis=0)),
                    tuple(n for n, closed in sides if closed),
                    tuple(n for n, closed in sides if not closed),
                )
            )
        else:
            found.append(Level("node", max(len(members) // nodes, 1)))
        found.append(Level("network", nodes))
        return tuple(level for level in found if level.size > 1)


def _node(device: Any) -> int:
    """Of GPUs that NVLink joins, or of a slice. A process has all GPUs of a node where the device
    is described and not there; JAX tells the nodes of those that are."""
    described = device.client.runtime_type == "compile_only_runtime"
    field = "process_index" if device.platform != "tpu" and described else "slice_index"
    return getattr(device, field, None) or 0


def _closes(sides: np.ndarray, dimensions: int) -> np.ndarray:
    """Which dimensions of a slice close: of two, those of a whole pod, 16; of three, all where
    the slice is of whole cubes of 4 x 4 x 4, and none otherwise (Google's pages on TPU v4 and
    v5e; Austin et al., How to Scale Your Model, 2025)."""
    if dimensions == 2:
        return sides % 16 == 0
    return np.full(len(sides), bool((sides % 4 == 0).all()))


def _distinct(values: np.ndarray) -> int:
    return len(np.unique(values))


def _reach(span: tuple[Level, ...]) -> list[tuple[bool, int]]:
    """In order of the outermost level, and its size."""
    sizes = {level.kind: level.size for level in span}
    return [(kind in sizes, sizes.get(kind, 1)) for kind in ("network", "node", "torus", "chip")]


_EXCHANGES = ("all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Links:
    """Bytes/s that one device sends, while it receives as many."""

    every: float
    """Over all its links to near devices at once."""
    torus: float | None = None
    """Over one link of a torus, which has one each way along a dimension."""
    network: float | None = None
    """Its share of what its node, or its host, has to the others."""

    def rate(self, level: Level) -> float:
        """Over all of a device's links at a level, of which the end of a line has one; NaN where
        it is not known."""
        if level.kind == "network":
            return math.nan if self.network is None else self.network
        if level.kind == "torus" and self.torus is not None:
            return self.torus * (2 * len(level.rings) + len(level.lines))
        return self.every

    def by_rings(self, c: Collective) -> float:
        """Seconds of one execution by rings at each level (Patarasuk and Yuan, 2009), at the full
        rate of its links: an estimate. NaN where the rate of a level is not known."""
        span = _span(c)
        if c.kind == "collective-permute":
            # All wait for the messages that have furthest to go, each of which has one way.
            torus = self.torus if span[-1].kind == "torus" else None
            return c.bytes / (torus or self.rate(span[-1]))
        if c.kind in _EXCHANGES:
            return sum(self._exchange(level, c.bytes) for level in span)
        seconds, held = 0.0, float(c.bytes)
        for level in span:
            seconds += held * (1 - 1 / level.size) / self.rate(level)
            held /= level.size
        return seconds * (2 if c.kind == "all-reduce" else 1)

    def _exchange(self, level: Level, held: int) -> float:
        """Seconds in which each member sends all others a part of its own."""
        if level.kind == "torus" and self.torus is not None:
            # Half of all crosses the middle of each dimension, by 2 links or, of a line, by 1.
            widths = [(n, 2) for n in level.rings] + [(n, 1) for n in level.lines]
            return max(held * n / 4 / (width * self.torus) for n, width in widths)
        return held * (1 - 1 / level.size) / self.rate(level)

    def at_least(self, c: Collective) -> float:
        """Seconds that no algorithm spares: what a device sends over all that it has, and what
        leaves a node over its network. An all-reduce's sum may form on the way."""
        whole = c.kind == "collective-permute"
        sent = c.bytes * (1 if whole else 1 - 1 / max(c.group_size, 1))
        nodes = math.prod(level.size for level in _span(c) if level.kind == "network")
        if nodes == 1:
            return sent / self.every
        if self.network is None:
            return math.nan
        leaves = 0.0 if whole else c.bytes * (1 - 1 / nodes)
        near = 1 if c.kind in _EXCHANGES else c.group_size / nodes
        return max(sent / (self.every + self.network), leaves / near / self.network)


def to_json(c: Collective, links: Links | None) -> dict[str, Any]:
    """A collective with the levels that it goes through and, where the links are known, the
    seconds of all its executions, an estimate."""
    seconds = math.nan if links is None else c.count * links.by_rings(c)
    found = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    span = None if c.span is None else [str(level) for level in c.span]
    return found | {"span": span, "seconds": None if math.isnan(seconds) else seconds}


def together(sent: Sequence[Mapping[str, Any]]) -> tuple[int, int, float | None]:
    """Bytes, messages and seconds of several, as `to_json` has them; None where one's time is not
    known."""
    each = [c["seconds"] for c in sent]
    moved = sum(c["bytes"] * c["count"] for c in sent)
    return moved, sum(c["count"] for c in sent), None if None in each else sum(each)


def _span(c: Collective) -> tuple[Level, ...]:
    """Of a group whose devices are not known, or of one, a level at which all links serve."""
    return c.span or (Level("node", max(c.group_size, 1)),)


def of_chip(chip: chips.Chip) -> Links | None:
    """By the table of chips; None where no rate is published. GPUs without links of their own
    reach one another through the host."""
    both = chip.interconnect_bandwidth
    if both is None and chip.vendor != "Google":
        both = chip.host_bandwidth
    if both is None:
        return None
    torus = both / 2 / chip.torus_links if chip.torus_links else None
    return Links(every=both / 2, torus=torus, network=chip.network_bandwidth)
