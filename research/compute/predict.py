"""Seconds that a step will take: by a calibration of the device, or by its rates alone.

A calibrated device's time is a sum of terms, each the seconds that one kind of work takes at the
rates that scripts/benchmark.py peaks measured, times a factor fitted to measured steps: products
that reach a third of the peak have the factor 3. Of a device that was never timed the roofline says
between what times a step lies, and the utilizations that others have published where between.
"""

import dataclasses
import datetime
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research.compute import kept, peaks, roofline
from research.compute.program import Program

TERMS = {
    "step": "calls of the program",
    "kernel": "kernels",
    "dot": "FLOPs of matrix products, at the peak",
    "convolution": "FLOPs of convolutions, at the peak",
    "patches": "elements that convolutions lay out for products, at the peak of float32",
    "memory": "bytes of kernels outside of loops, at the bandwidth of all that the program holds",
    "loops": "bytes of kernels in loops, at the bandwidth of what each goes through",
    "elementwise": "operations on elements, at the peak of float32",
    "singly": "those of them in windows and scatters",
    "transcendental": "transcendental functions of elements, at the peak of float32",
    "links": "bytes that collectives send around rings, at the rate of the links",
}
"""What a step's time is made of."""
NUMBERS = ("step", "kernel")
"""Terms that are numbers, and their factors seconds; of the others it is the other way round."""
USUAL, POOR = 0.4, 0.2
"""Shares of peak of a device that was never timed: large models' training has published 21% (GPT-3)
to 46% (PaLM) of the peak of products (Chowdhery et al., PaLM, 2022, Table 3)."""
LAUNCH = 20e-6
"""Seconds of a kernel that does nothing, at most: of an elementwise kernel of PyTorch on a V100
(NVIDIA's Nsight Systems guide)."""
BAND = 0.9
"""Share of the programs calibrated on that a calibration's band holds, each foretold by others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one step on one device; always estimated."""

    seconds: float
    low: float
    high: float
    """Between which it lies: of a calibrated device in 9 of 10 cases, of another by assumption."""
    at_least: float
    """The roofline's lower bound, by the same rates."""
    basis: str
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """`seconds` by the names of TERMS; empty where no calibration was."""

    def __str__(self) -> str:
        low, middle, high = (_seconds(s) for s in (self.low, self.seconds, self.high))
        return f"{middle} ({low} to {high}), estimated: {self.basis}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of one device. Raises ValueError for figures that are negative or not finite."""

    factors: Mapping[str, float] = dataclasses.field(hash=False)
    """By the names of TERMS."""
    ratios: tuple[float, ...]
    """Measured over predicted seconds of each program calibrated on, by what the others give."""
    peaks: peaks.Peaks
    """The rates that the factors refer to."""
    date: str

    def __post_init__(self) -> None:
        values = [*self.factors.values(), *self.ratios]
        if set(self.factors) != set(TERMS) or not self.ratios:
            raise ValueError("a calibration needs a factor for each term, and ratios")
        if not all(math.isfinite(v) and v >= 0 for v in values) or not all(self.ratios):
            raise ValueError("a calibration's figures must be positive and finite")

    @property
    def error(self) -> float:
        """The median over programs of |predicted / measured - 1|."""
        return float(np.median([abs(1 / ratio - 1) for ratio in self.ratios]))

    @property
    def band(self) -> tuple[float, float]:
        """What a predicted time is multiplied by for its ends."""
        low = np.quantile(self.ratios, (1 - BAND) / 2, method="lower")
        high = np.quantile(self.ratios, (1 + BAND) / 2, method="higher")
        return min(float(low), 1.0), max(float(high), 1.0)


def work(program: Program, rates: roofline.Rates) -> dict[str, float]:
    """The terms of a program on one device, by the names of TERMS.

    Raises ValueError where the device has no rate for something that the program does.
    """
    found = dict.fromkeys(TERMS, 0.0)
    found["step"] = 1.0
    vector = _peak(rates, "float32")
    held = program.memory.total if program.memory else 0
    for kernel, times in program.kernels.items():
        found["kernel"] += times
        through = kernel.bytes if kernel.looped else max(held, kernel.bytes)
        found["loops" if kernel.looped else "memory"] += (
            times * kernel.bytes / rates.bandwidth(through)
        )
        found["elementwise"] += times * kernel.elementwise / vector
        found["singly"] += times * kernel.singly / vector
        found["patches"] += times * kernel.patches / vector
        found["transcendental"] += times * kernel.transcendentals / vector
        if kernel.flops:
            kind = "convolution" if "conv" in kernel.kind else "dot"
            found[kind] += times * kernel.flops / _peak(rates, kernel.dtype)
    links = roofline.roofline(program, rates).communication
    if links is None:
        raise ValueError(f"the rate of links is not known of {rates.device} ({rates.source})")
    return found | {"links": links}


def predict(
    program: Program, rates: roofline.Rates, calibration: Calibration | None = None
) -> Prediction:
    """Of one step. A calibration is of the device that `rates` are of; its own rates then count.

    Raises ValueError where a rate is not known.
    """
    if calibration is None:
        return _by_roofline(program, rates)
    rates = roofline.of_peaks(calibration.peaks)
    terms = work(program, rates)
    parts = {name: terms[name] * factor for name, factor in calibration.factors.items()}
    seconds, (low, high) = sum(parts.values()), calibration.band
    bounds = roofline.roofline(program, rates)
    return Prediction(
        seconds=max(seconds, bounds.at_least),
        low=max(seconds * low, bounds.at_least),
        high=max(seconds * high, bounds.at_least),
        at_least=bounds.at_least,
        basis=f"calibrated on {len(calibration.ratios)} programs, {calibration.date}, "
        f"median error {100 * calibration.error:.0f}%",
        parts=parts,
    )


def _by_roofline(program: Program, rates: roofline.Rates) -> Prediction:
    bounds = roofline.roofline(program, rates)
    if bounds.compute is None or bounds.communication is None:
        what = "peak" if bounds.compute is None else "rate of links"
        raise ValueError(f"no {what} is known of {rates.device} for this program ({rates.source})")
    kernels = program.kernels.total()
    return Prediction(
        seconds=max(bounds.overlapped / USUAL + kernels * rates.kernel, bounds.at_least),
        low=bounds.at_least,
        high=bounds.serial / POOR + kernels * LAUNCH,
        at_least=bounds.at_least,
        basis=f"not calibrated: {100 * USUAL:.0f}% of the roofline of {rates.device} "
        f"({rates.source}), and {1e6 * rates.kernel:g} us for each of {kernels:,} kernels; from "
        f"the lower bound to {100 * POOR:.0f}% with nothing overlapped, and {1e6 * LAUNCH:.0f} us "
        "a kernel",
    )


def calibrate(
    steps: Sequence[tuple[Program, float]], found: peaks.Peaks, date: str | None = None
) -> Calibration:
    """Fits the factors to programs and the seconds measured of each, on the device of `found`.

    Raises ValueError for fewer than two programs, and where a rate is not known.
    """
    if len(steps) < 2:
        raise ValueError("a calibration needs two programs or more")
    rates = roofline.of_peaks(found)
    rows = [work(program, rates) for program, _ in steps]
    terms = np.array([[row[name] for name in TERMS] for row in rows])
    seconds = np.array([measured for _, measured in steps])
    ratios = []
    for i in range(len(steps)):
        others = np.arange(len(steps)) != i
        factors = _fit(terms[others], seconds[others])
        ratios.append(float(seconds[i] / (terms[i] @ factors)))
    return Calibration(
        factors=dict(zip(TERMS, _fit(terms, seconds).tolist(), strict=True)),
        ratios=tuple(ratios),
        peaks=found,
        date=date or datetime.date.today().isoformat(),
    )


def _fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The factors, none negative, with the least sum of squared relative errors.

    Where some factors are 0 the others solve ordinary least squares, so that the best of all
    choices of these whose solution is positive is the least of all (Karush, Kuhn and Tucker).
    """
    relative = terms / seconds[:, None]
    scale = np.abs(relative).max(0)
    used = np.flatnonzero(scale)
    a, one = relative[:, used] / scale[used], np.ones(len(seconds))
    best, least = np.zeros(len(used)), float(len(seconds))
    for size in range(1, len(used) + 1):
        for chosen in map(list, itertools.combinations(range(len(used)), size)):
            x = np.linalg.lstsq(a[:, chosen], one, rcond=None)[0]
            residual = float(((a[:, chosen] @ x - one) ** 2).sum())
            if (x >= 0).all() and residual < least:
                best, least = np.zeros(len(used)), residual
                best[chosen] = x
    factors = np.zeros(terms.shape[1])
    factors[used] = best / scale[used]
    return factors


def _peak(rates: roofline.Rates, dtype: str) -> float:
    if (found := rates.peak(dtype)) is None:
        raise ValueError(f"no peak for {dtype} on {rates.device} ({rates.source})")
    return found[0]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def to_json(calibration: Calibration) -> dict[str, Any]:
    return dataclasses.asdict(calibration) | {"peaks": peaks.to_json(calibration.peaks)}


def from_json(data: Any) -> Calibration:
    """Raises ValueError for what `to_json` did not give."""
    try:
        return Calibration(
            factors={str(name): float(factor) for name, factor in data["factors"].items()},
            ratios=tuple(float(ratio) for ratio in data["ratios"]),
            peaks=peaks.from_json(data["peaks"]),
            date=datetime.date.fromisoformat(data["date"]).isoformat(),
        )
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a calibration: {type(error).__name__}: {error}") from error


def save(calibration: Calibration) -> pathlib.Path:
    """Writes the file that `load` reads, beside the peaks, and returns its path; OSError where it
    cannot."""
    return kept.write("calibration", calibration.peaks.key, to_json(calibration))


def load(device: jax.Device | None = None) -> Calibration | None:
    """What was saved of this device, by default this process's first, under these versions of jax
    and jaxlib; None where nothing was, or where it cannot be read."""
    key = peaks.key_of(device or jax.local_devices()[0])
    try:
        found = from_json(kept.read("calibration", key))
    except (OSError, ValueError):
        return None
    return found if found.peaks.key == key else None
