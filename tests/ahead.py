"""The compilers for TPU and CUDA, which need no such device, as tests call them."""

import functools
from importlib import util

import jax
import pytest
from jax.experimental import topologies

TARGETS = ("tpu", "cuda")

LIBTPU = {
    # Beside another process that has it loaded.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # What it would ask a TPU's host for, and complain of not being told.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
H100 = """
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
"""


@functools.cache
def topology(target):
    """Four TPU v5e or four H100; skips the test where the compiler is not installed."""
    if target == "tpu":
        if not util.find_spec("libtpu"):
            pytest.skip("libtpu, the compiler for TPU, is not installed")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in LIBTPU.items():
                patch.setenv(name, value)
            return topologies.get_topology_desc("v5e:2x2", "tpu")
    if not util.find_spec("jax_cuda13_plugin"):
        pytest.skip("jax-cuda13-plugin, the compiler for CUDA, is not installed")
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x4")


def compile(traced, target):
    """With little effort: how a product is scheduled is of no matter here, and XLA for TPU would
    search for long."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1" if target == "tpu" else before)
    try:
        return traced.lower(lowering_platforms=(target,)).compile()
    finally:
        jax.config.update("jax_optimization_level", before)
