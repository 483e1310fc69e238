"""How fast a program could run on a device, which resource binds it, and what it reaches of it.

After Williams, Waterman and Patterson, Roofline, CACM 2009: a step takes at least the time of its
products at their peak, of its bytes at the bandwidth of main memory, and of its messages at that of
the links.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from research.compute import chips, links, peaks
from research.compute.links import Collective, Links
from research.compute.program import MASKED, Program

_ON_CHIP = 256 * 2**20
"""Bytes that may stay on the chip from step to step: MI300X's Infinity Cache, the largest there is
in chips.toml's chips."""

_ON_GPU, _ON_TPU = 3.4e-6, 1e-6
"""Seconds that a kernel usually takes: of a short one in a CUDA graph on a V100, 2.9 us of it its
own (NVIDIA, Getting Started with CUDA Graphs, 2019,
https://developer.nvidia.com/blog/cuda-graphs); on a TPU, whose program runs without a host, by
assumption."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device does a second, by its vendor or as measured."""

    device: str
    source: str
    """datasheet or measured, and the date."""
    peak: Callable[[str], tuple[float, str] | None] = dataclasses.field(repr=False)
    """FLOP/s of products, by dtype and precision as `Count.by_dtype` spells them, and how they
    run; None where no figure exists."""
    bandwidth: Callable[[int], float] = dataclasses.field(repr=False)
    """Bytes/s of memory, by the bytes that a program goes through."""
    links: Links | None
    """To other devices; None where their rates are not known."""
    on_chip: int = 0
    """Bytes that may have stayed on the chip since the step before."""
    kernel: float = 0.0
    """Seconds that a kernel usually takes, however little it does: estimated."""


def datasheet(device: Any) -> Rates | None:
    """By the table of chips; None for a jax.Device that is not in it."""
    try:
        memory = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # a device that is described, and not there, has none
        memory = None
    chip = chips.match(device.device_kind, device.platform, memory)
    return None if chip is None else of_chip(chip)


def of_chip(chip: chips.Chip) -> Rates:
    return Rates(
        chip.name,
        f"datasheet, {chip.date}",
        _slowest(lambda dtype: chips.peak(chip, *dtype.split(":"))),
        lambda _: chip.memory_bandwidth,
        links.of_chip(chip),
        _ON_CHIP,
        _ON_TPU if chip.vendor == "Google" else _ON_GPU,
    )


def measured(device: Any) -> Rates | None:
    """By scripts/benchmark.py peaks on this machine; None where it has not run."""
    found = peaks.load(device)
    return None if found is None else of_peaks(found)


def of_peaks(found: peaks.Peaks) -> Rates:
    def peak(dtype: str) -> tuple[float, str] | None:
        # Asked for as an algorithm, bfloat16 that adds up in float32 is what was measured.
        asked = r".*:(BF16|BFLOAT16)_\1_F(LOAT)?32(_X1)?"
        name = "bfloat16" if re.fullmatch(asked, dtype.upper()) else dtype
        return (found.matmul[name], name) if name in found.matmul else None

    return Rates(found.device, f"measured, {found.date}", _slowest(peak), found.bandwidth_at, None)


def _slowest(peak: Callable[[str], tuple[float, str] | None]) -> Callable[[str], Any]:
    """`peak`, for products of two dtypes too: they run as the slower of the two, to which XLA
    converts the other (TPUs round the float32 of float32*bfloat16, at default precision)."""

    def slowest(dtype: str) -> tuple[float, str] | None:
        names, colon, precision = dtype.partition(":")
        each = [peak(name + colon + precision) for name in names.split("*")]
        known = [found for found in each if found]
        return min(known) if len(known) == len(each) else None

    return slowest


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number, or why there is none."""

    value: float | None
    reason: str = ""

    def __str__(self) -> str:
        return f"unavailable: {self.reason}" if self.value is None else f"{100 * self.value:.1f}%"


def utilization(
    by_dtype: Mapping[str, int], seconds: float, devices: int, rates: Rates | None
) -> Figure:
    """FLOPs over seconds x devices x the peak of the precision executed, as a fraction: MFU of
    model FLOPs, HFU of executed ones. by_dtype: of one step on all devices; seconds: of one step.

    Where precisions mix, each has its own peak: the sum of FLOPs / peak is the time that the step
    would take at peak. Above 1, a chip or a peak that is not known, and no time at all are refused.
    """
    if reason := refused(seconds):
        return Figure(None, reason)
    if rates is None:
        return Figure(None, "no peak is known for this device; scripts/benchmark.py peaks measures")
    ideal = compute_seconds(by_dtype, rates)
    if ideal is None:
        missing = [d for d in by_dtype if rates.peak(d) is None]
        return Figure(None, f"no peak for {', '.join(missing)} on {rates.device} ({rates.source})")
    found = ideal / (seconds * devices)
    if found > 1:
        return Figure(
            None,
            f"{100 * found:.0f}% of the peak of {rates.device} ({rates.source}): the step was not "
            "waited for, the device is another, or its peak is higher",
        )
    return Figure(found)


def refused(seconds: float) -> str:
    """Why a step cannot have taken so long; empty where it can."""
    valid = math.isfinite(seconds) and seconds > 0
    return "" if valid else f"a step cannot take {seconds} seconds"


def compute_seconds(by_dtype: Mapping[str, int], rates: Rates) -> float | None:
    """Seconds that products take one device at peak; None where a peak is not known."""
    total = 0.0
    for dtype, flops in by_dtype.items():
        if (peak := rates.peak(dtype)) is None:
            return None
        total += flops / peak[0]
    return total


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Times in seconds of one step on one device; None where a rate is not known."""

    compute: float | None
    """Of the products executed, at the peaks of their precisions."""
    memory: float
    """Of the bytes at the boundaries of fusions; an estimate, for caches may spare some."""
    communication: float | None
    """Of the collectives, by rings at the full rate of the links that each takes; an estimate."""
    at_least: float
    """A lower bound: products, the bytes that no fusion spares, and messages that no algorithm
    spares, all at once."""
    intensity: float | None
    """FLOPs executed a byte of main memory."""

    @property
    def times(self) -> dict[str, float]:
        named = {"compute": self.compute, "memory": self.memory, "links": self.communication}
        return {name: seconds for name, seconds in named.items() if seconds is not None}

    @property
    def binds(self) -> str:
        """Which takes longest."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def overlapped(self) -> float:
        """All at once, perfectly."""
        return max(self.times.values())

    @property
    def serial(self) -> float:
        """One after the other."""
        return sum(self.times.values())


def roofline(program: Program, rates: Rates) -> Roofline:
    moved = program.bytes_by_space.get(0, 0)
    compute = compute_seconds(program.by_dtype, rates)
    resident = max(program.compulsory - rates.on_chip, 0)
    known = rates.links
    rings = _messages(program.collectives, known.by_rings if known else None)
    least = _messages(program.collectives, known.at_least if known else None)
    # Of branches that differ the dearest counted, of an unknown number of trips one.
    certain = not {*program.reasons} - {MASKED}
    sure = compute_seconds(_sure(program), rates)
    return Roofline(
        compute=compute,
        memory=moved / rates.bandwidth(moved) if moved else 0.0,
        communication=rings,
        at_least=max(
            sure if sure and certain else 0.0,
            resident / rates.bandwidth(program.compulsory) if resident else 0.0,
            least if least and certain else 0.0,
        ),
        intensity=program.matmul_flops / moved if moved else None,
    )


def _sure(program: Program) -> dict[str, int]:
    """FLOPs by dtype, of attention that is masked in part half."""
    found = dict(program.by_dtype)
    if MASKED in program.reasons:
        for product, flops in program.products.items():
            if product.flash:
                found[product.dtype] -= flops // 2
    return found


def _messages(
    collectives: Iterable[Collective], seconds: Callable[[Collective], float] | None
) -> float | None:
    """Of all of them; None where a rate is not known."""
    sent = [c for c in collectives if c.bytes and c.group_size != 1]
    if seconds is None:
        return None if sent else 0.0
    total = sum(seconds(c) * c.count for c in sent)
    return None if math.isnan(total) else total
