"""What accelerators can do, as their vendors publish it: chips.toml, read, matched and asked."""

import dataclasses
import functools
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

_PLATFORMS = {"Google": ("tpu",), "NVIDIA": ("gpu", "cuda"), "AMD": ("gpu", "rocm")}
_BYTES = {"GB": 10**9, "GiB": 2**30}
_SHARED = (
    "memory_bandwidth interconnect_bandwidth host_bandwidth network_bandwidth power_watts".split()
)
# jax.lax.Precision by the names that it takes.
_LEVELS = {
    **dict.fromkeys(("default", "fastest", "bfloat16"), 0),
    **dict.fromkeys(("high", "bfloat16_3x", "tensorfloat32"), 1),
    **dict.fromkeys(("highest", "float32", "f32_f32_f32"), 2),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of JAX device. Every figure is of one device, a part of a chip where it has several;
    None where its vendor publishes none."""

    key: str
    """Of its table in chips.toml."""
    name: str
    vendor: str
    kinds: tuple[str, ...]
    """Regular expressions of the whole jax.Device.device_kind."""
    peaks: Mapping[str, float] = dataclasses.field(hash=False)
    """Dense FLOP/s by dtype; float32, float64 without matrix units, tf32, float32_tensor and
    float64_tensor with them."""
    memory: str
    """A chip's capacity with its unit, as printed."""
    memory_bytes: int
    memory_bandwidth: float
    """Bytes/s."""
    source: str
    date: str
    """Of the source, or of reading it."""
    note: str = ""
    devices_per_chip: int = 1
    interconnect: str | None = None
    interconnect_bandwidth: float | None = None
    """Bytes/s to other chips, both directions together."""
    torus_links: int | None = None
    """Of a chip in a torus, two a dimension, which the interconnect's rate is shared by; None:
    chips are joined otherwise."""
    host: str | None = None
    host_bandwidth: float | None = None
    """Bytes/s to the host, both directions together."""
    network_bandwidth: float | None = None
    """Bytes/s to the data centre's network, in one direction: of GPUs, in their vendor's nodes."""
    power_watts: float | None = None
    """Board power at its highest setting."""
    sparse_bfloat16: float | None = None
    """FLOP/s that the vendor prints with 2:4 sparsity; no program of JAX reaches them."""

    @property
    def chip_peaks(self) -> dict[str, float]:
        """`peaks` of the whole chip."""
        return {dtype: flops * self.devices_per_chip for dtype, flops in self.peaks.items()}


@functools.cache
def chips() -> dict[str, Chip]:
    """Every chip of the table, by its key there."""
    text = pathlib.Path(__file__).with_name("chips.toml").read_text(encoding="utf-8")
    return {key: _chip(key, row) for key, row in tomllib.loads(text).items()}


def _chip(key: str, row: dict[str, Any]) -> Chip:
    devices = row.get("devices_per_chip", 1)
    number, unit = row["memory"].split()
    peaks = {dtype: flops / devices for dtype, flops in row.pop("peaks").items()}
    row |= {figure: row[figure] / devices for figure in _SHARED if figure in row}
    if "sparse_bfloat16" in row:
        row["sparse_bfloat16"] /= devices
    return Chip(
        key=key,
        peaks=peaks,
        kinds=tuple(row.pop("kinds")),
        memory_bytes=int(number) * _BYTES[unit] // devices,
        **row,
    )


def match(
    device_kind: str, platform: str | None = None, memory_bytes: int | None = None
) -> Chip | None:
    """The chip that jax.Device.device_kind names; None unless it is in the table beyond doubt.

    Slices and other memory sizes of a chip are not that chip. `memory_bytes`, where given, is the
    device's memory, or XLA's share of it: under 0.6 or over 1.15 of the published, none matches.
    """
    for chip in chips().values():
        if any(re.fullmatch(kind, device_kind) for kind in chip.kinds):
            if platform is not None and platform.lower() not in _PLATFORMS[chip.vendor]:
                return None
            if memory_bytes is not None and not 0.6 < memory_bytes / chip.memory_bytes < 1.15:
                return None
            return chip
    return None


def peak(chip: Chip, dtype: str, precision: str | None = None) -> tuple[float, str] | None:
    """FLOP/s at which products of `dtype` can run, and how they do; None where unpublished.

    `precision` is a name that jax.default_matmul_precision takes: a jax.lax.Precision or a
    DotAlgorithmPreset. It matters to float32 alone: unless the highest is asked for, XLA multiplies
    float32 in bfloat16 on TPUs, and in TensorFloat-32 on NVIDIA GPUs that have it (XLA's
    GetBlasComputationType; not on AMD's).
    """
    if dtype == "float32":
        return _float32(chip, (precision or "default").lower())
    if dtype == "float64" and "float64_tensor" in chip.peaks:
        return chip.peaks["float64_tensor"], "float64 on matrix units"
    name = "float8" if dtype.startswith("float8_") else dtype.replace("uint8", "int8")
    if name not in ("float64", "bfloat16", "float16", "float8", "int8"):
        return None
    return (chip.peaks[name], name) if name in chip.peaks else None


def _float32(chip: Chip, precision: str) -> tuple[float, str] | None:
    level = _LEVELS.get(precision)
    if level is None:
        short = precision.replace("bfloat16", "bf16").replace("float32", "f32")
        if not (found := re.fullmatch(r"(bf16|tf32)_\1_f32(?:_x(\d))?", short)):
            return None
        if found[1] == "tf32" and chip.vendor != "NVIDIA":
            return None
        return _passes(chip, {"bf16": "bfloat16", "tf32": "tf32"}[found[1]], int(found[2] or 1))
    if chip.vendor == "Google":
        return None if precision == "f32_f32_f32" else _passes(chip, "bfloat16", (1, 3, 6)[level])
    if chip.vendor == "NVIDIA" and level < 2 and "tf32" in chip.peaks:
        return _passes(chip, "tf32", 1)
    if chip.vendor == "AMD" and "float32_tensor" in chip.peaks:
        return chip.peaks["float32_tensor"], "float32 on matrix units"
    if "float32" not in chip.peaks:
        return None
    return chip.peaks["float32"], "float32 without matrix units"


def _passes(chip: Chip, dtype: str, passes: int) -> tuple[float, str] | None:
    if dtype not in chip.peaks:
        return None
    name = "TensorFloat-32" if dtype == "tf32" else dtype
    return chip.peaks[dtype] / passes, f"float32 in {passes} {name} pass{'es' * (passes > 1)}"
