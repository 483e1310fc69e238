"""Accelerators to compile for that are not there: the compilers for TPU and CUDA need none."""

import contextlib
import functools
import os
from collections.abc import Iterator
from importlib import util
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Target(NamedTuple):
    """A kind of accelerator, as its compiler is told of it."""

    platform: str
    """What `lower(lowering_platforms=...)` is given: tpu or cuda."""
    package: str
    """The module that holds the compiler."""
    torus: int
    """Dimensions of a TPU's network; 0: hosts of 8."""
    most: int
    """Chips of a TPU's slice whose sides are powers of 2; 0: as many hosts as are asked for."""
    topology: str
    """A TPU's name, or a GPU's description, as XLA prints it (`gpu_device_info`)."""


TARGETS = {
    # TPU v5e: up to 16 x 16 chips; v5p: a three-dimensional torus, up to 16 x 16 x 24
    # (cloud.google.com/tpu/docs/v5e, /v5p; read 2026-11).
    "v5e": Target("tpu", "libtpu", 2, 256, "v5e"),
    "v5p": Target("tpu", "libtpu", 3, 4096, "v5p"),
    # As XLA prints it of one NVIDIA H100 80GB HBM3 (SXM).
    "h100": Target(
        "cuda",
        "jax_cuda13_plugin",
        0,
        0,
        """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
    ),
}
_HOST = {
    # Beside another process that has it loaded.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # What it would ask a TPU's host for, and complain of not being told.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def installed(kind: str) -> bool:
    """Whether the compiler for a kind of accelerator is there: libtpu, or jax-cuda13-plugin."""
    return util.find_spec(TARGETS[kind].package) is not None


def devices(kind: str, count: int) -> list[jax.Device]:
    """So many devices of a kind of `TARGETS`, of one slice or of hosts of 8, to compile for: no
    array can be put on them.

    Raises ValueError for a number that no slice, or no hosts, have.
    """
    target = TARGETS[kind]
    if target.torus:
        if count < 1 or count & (count - 1) or count > target.most:
            raise ValueError(f"{kind}: devices are a power of 2 up to {target.most}, not {count}")
        found = _topology(kind, "x".join(map(str, _sides(max(count, 4), target.torus))))
    else:
        if count < 1 or (count > 8 and count % 8):
            raise ValueError(f"{kind}: devices are up to 8, or hosts of 8, not {count}")
        found = _topology(kind, f"{max(count // 8, 1)}x1x{min(count, 8)}")
    return list(found.devices)[:count]


def slices(kind: str, count: int, number: int) -> list[jax.Device]:
    """A number of slices of `count` TPU chips each, between which there is a slower network."""
    shape = "x".join(map(str, _sides(count, TARGETS[kind].torus)))
    return list(_topology(kind, shape, number).devices)


def _sides(chips: int, dimensions: int) -> list[int]:
    """Powers of 2, as equal as they can be, the smallest first but for 1."""
    power = chips.bit_length() - 1
    sides = sorted(2 ** ((power + i) // dimensions) for i in range(dimensions))
    return sorted(sides, key=lambda side: side == 1)


@functools.cache
def _topology(kind: str, shape: str, slices: int = 1) -> Any:
    target = TARGETS[kind]
    with _environment(_HOST if target.platform == "tpu" else {}):
        if target.platform == "tpu":
            name = f"{target.topology}:{shape}"
            return topologies.get_topology_desc(name, "tpu", num_slices=slices)
        return topologies.get_topology_desc(
            platform="cuda", target_config=target.topology, topology=shape
        )


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
