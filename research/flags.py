"""Flags of the compilers by which devices compute while they exchange, where none is a default.

What the scripts set before a backend starts, and environment.json says. A flag that the user's own
variable names is left as it is there. Of jax 0.10 and 0.12, libtpu 0.0.42; found by compiling for
4 H100 and 4 TPU v5e without them, and not yet timed on either.
"""

import pathlib
from collections.abc import MutableMapping

VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

CUDA = {
    # Of layers in a scan, gathers the next one's parameters over `fsdp` while this one computes;
    # by default a layer waits for its own. docs/GPU_performance.md, "Optimization level", in
    # github.com/NVIDIA/JAX-Toolbox. Left out: xla_gpu_enable_latency_hiding_scheduler, for the
    # program is the same with it as without, and collectives overlap; and those that pipeline
    # reductions, for gradients are reduced and scattered beside products without them.
    "--xla_gpu_enable_pipelined_all_gather": "true",
}
"""TPU: none. What is recommended (xla_tpu_enable_async_collective_fusion, its fuse_all_gather and
multiple_steps, xla_tpu_overlap_compute_collective_tc, xla_enable_async_all_gather and
xla_enable_async_collective_permute) is on: the program is another only where they are set to
false. CPU: none."""


def apply(environment: MutableMapping[str, str], dev: pathlib.Path = pathlib.Path("/dev")) -> None:
    """Sets the flags where there is a GPU of NVIDIA's: a jaxlib that does not know one ends."""
    if not any(next(dev.glob(pattern), None) for pattern in ("nvidia[0-9]*", "dxg")):
        return
    given = environment.get("XLA_FLAGS", "").split()
    named = {flag.partition("=")[0] for flag in given}
    more = [f"{name}={value}" for name, value in CUDA.items() if name not in named]
    environment["XLA_FLAGS"] = " ".join([*given, *more])
