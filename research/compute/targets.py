"""Accelerators to compile for that are not there: the compilers for TPU and CUDA need none."""

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from importlib import util
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True, kw_only=True)
class TPU:
    """A generation, as libtpu knows it."""

    topology: str
    dimensions: int
    """Of the network between chips."""
    most: int
    """Chips of the largest slice whose sides are powers of 2."""
    per_chip: int = 1
    """JAX devices on a chip."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    platform: str = "tpu"
    """What `lower(lowering_platforms=...)` is given."""
    package: str = "libtpu"
    """The module that holds the compiler."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU by what XLA asks the driver of one."""

    name: str
    """As the driver gives it."""
    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    units: int
    """Of float32, in a core."""
    threads: int
    """In flight on a core."""
    clock: float
    """GHz."""
    memory: int
    bandwidth: int
    cache: int
    """Bytes; bytes/s; bytes of the second-level cache."""
    shared: int
    """Bytes of shared memory in a core, of which a block has all but 1 KiB at most."""
    host: int = 8
    """GPUs of a host, between which links are fast."""
    platform: str = "cuda"
    package: str = "jax_cuda13_plugin"

    @property
    def description(self) -> str:
        """XLA's GpuTargetConfigProto, as text."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared} shared_memory_per_block_optin: {self.shared - 1024}
  threads_per_core_limit: {self.threads} core_count: {self.cores} fpus_per_core: {self.units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


@dataclasses.dataclass(frozen=True)
class CPU:
    """This machine's, as so many devices."""

    platform: str = "cpu"
    package: str = "jax"


# Largest slices: cloud.google.com/tpu/docs/v2 to /v6e and /tpu7x, read 2026-11. GPUs: XLA's own
# descriptions (openxla/xla, xla/backends/gpu/target_config/specs, read 2026-11), the H100's as XLA
# prints it of one; the GeForce's by NVIDIA's Ada whitepaper, V1.1, and CUDA's table of compute
# capability 8.9.
TARGETS: Mapping[str, TPU | GPU | CPU] = {
    "v2": TPU(topology="v2", dimensions=2, most=256, per_chip=2),
    "v3": TPU(topology="v3", dimensions=2, most=1024, per_chip=2),
    "v4": TPU(topology="v4", dimensions=3, most=4096, options={"chip_config_name": "megacore"}),
    "v5e": TPU(topology="v5e", dimensions=2, most=256),
    "v5p": TPU(topology="v5p", dimensions=3, most=4096),
    "v6e": TPU(topology="v6e", dimensions=2, most=256),
    "tpu7x": TPU(topology="tpu7x", dimensions=3, most=4096, per_chip=2),
    "a100": GPU(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        units=64,
        threads=2048,
        clock=1.41,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        cache=41_943_040,
        shared=167_936,
    ),
    "h100": GPU(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        units=128,
        threads=2048,
        clock=1.98,
        memory=84_929_347_584,
        bandwidth=3_352_320_000_000,
        cache=52_428_800,
        shared=233_472,
    ),
    "h200": GPU(
        name="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        units=128,
        threads=2048,
        clock=1.98,
        memory=151_397_597_184,
        bandwidth=4_800_000_000_000,
        cache=52_428_800,
        shared=233_472,
    ),
    "b200": GPU(
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        units=128,
        threads=2048,
        clock=1.965,
        memory=191_514_411_008,
        bandwidth=7_672_320_000_000,
        cache=132_644_864,
        shared=233_472,
    ),
    "rtx4090": GPU(
        name="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        cores=128,
        units=128,
        threads=1536,
        clock=2.52,
        memory=24 * 2**30,
        bandwidth=1_008_000_000_000,
        cache=72 * 2**20,
        shared=102_400,
    ),
    "cpu": CPU(),
}
_VARIABLES = {
    # Beside another process that has it loaded.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # What it would ask a TPU's host for, and complain of not being told.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


_HOST = 4
"""Chips of a TPU's host, at least."""


class Place(NamedTuple):
    """So many chips of a kind of `TARGETS`: "v5e:4x4", "v5p:64", "v5e:16x16:4", "h100:8", or
    "cpu"."""

    kind: str
    sides: tuple[int, ...] = (1,)
    """Of a TPU's slice; or a number of chips alone."""
    slices: int = 1
    """Of a TPU, between which there is the data centre's network."""

    @property
    def chips(self) -> int:
        return math.prod(self.sides) * self.slices

    def __str__(self) -> str:
        several = f":{self.slices}" if self.slices > 1 else ""
        return f"{self.kind}:{'x'.join(map(str, self.sides))}{several}"


def place(text: str) -> Place:
    """Raises ValueError for a kind that is not known and a number that no slice, or hosts, have."""
    kind, colon, rest = text.partition(":")
    if kind not in TARGETS:
        raise ValueError(f"no target {kind!r}; there are {', '.join(TARGETS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*(:[1-9]\d*)?", rest if colon else "1"):
        raise ValueError(
            f"{text}: a target is KIND, KIND:CHIPS or, of TPUs, KIND:4x4 or KIND:4x4:SLICES"
        )
    shape, _, slices = rest.partition(":")
    found = Place(kind, tuple(map(int, (shape or "1").split("x"))), int(slices or 1))
    target, sides = TARGETS[kind], found.sides
    each = math.prod(sides)
    if found.slices > 1 and not (isinstance(target, TPU) and each >= _HOST):
        raise ValueError(f"{text}: slices are of TPUs, and of {_HOST} chips or more")
    if len(sides) > 1 and not (isinstance(target, TPU) and len(sides) == target.dimensions):
        wanted = f"{target.dimensions} sides" if isinstance(target, TPU) else "a number of chips"
        raise ValueError(f"{text}: {kind} has {wanted}")
    if isinstance(target, TPU) and len(sides) > 1:
        if sides[0] % 2 or sides[1] % 2:
            raise ValueError(f"{text}: a TPU's host has 2x2 chips, so that these sides are even")
    elif isinstance(target, TPU) and (each & (each - 1) or each > target.most):
        raise ValueError(
            f"{text}: chips are a power of 2 up to {target.most}, or sides, not {each}"
        )
    elif isinstance(target, GPU) and found.chips > target.host and found.chips % target.host:
        raise ValueError(f"{text}: {kind} come up to 8, or in hosts of 8, not {found.chips}")
    return found


def installed(kind: str) -> bool:
    """Whether the compiler for a kind of accelerator is there: libtpu, or jax-cuda13-plugin."""
    return util.find_spec(TARGETS[kind].package) is not None


def devices(where: Place) -> list[jax.Device]:
    """Of a place, to compile for: no array can be put on them, but on the CPU's."""
    target, chips = TARGETS[where.kind], where.chips
    if isinstance(target, CPU):
        return jax.devices("cpu")[:chips]
    if isinstance(target, GPU):
        shape = f"{max(chips // target.host, 1)}x1x{min(chips, target.host)}"
        return list(_topology(where.kind, shape).devices)
    alone = len(where.sides) == 1
    # The smallest slice is a host's.
    sides = _sides(max(where.sides[0], _HOST), target.dimensions) if alone else where.sides
    found = _topology(where.kind, "x".join(map(str, sides)), where.slices).devices
    return list(found)[: chips * target.per_chip]


def _sides(chips: int, dimensions: int) -> list[int]:
    """Powers of 2, as equal as they can be, the smallest first but for 1."""
    power = chips.bit_length() - 1
    sides = sorted(2 ** ((power + i) // dimensions) for i in range(dimensions))
    return sorted(sides, key=lambda side: side == 1)


@functools.cache
def _topology(kind: str, shape: str, slices: int = 1) -> Any:
    target = TARGETS[kind]
    if isinstance(target, GPU):
        return topologies.get_topology_desc(
            platform="cuda", target_config=target.description, topology=shape
        )
    assert isinstance(target, TPU)
    with _environment(_VARIABLES):
        name = f"{target.topology}:{shape}"
        return topologies.get_topology_desc(name, "tpu", num_slices=slices, **target.options)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that are set within, and are after it as they were before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
