"""The compilers for TPU and CUDA, which need no such device, as tests call them."""

import contextlib

import jax
import pytest

from research.compute import targets

TARGETS = ("tpu", "cuda")
KINDS = {"tpu": "v5e", "cuda": "h100"}


def devices(target, count=4):
    """TPU v5e or H100; skips the test where the compiler is not installed."""
    kind = KINDS[target]
    if not targets.installed(kind):
        pytest.skip(f"{targets.TARGETS[kind].package}, the compiler, is not installed")
    return targets.devices(targets.place(f"{kind}:{count}"))


def compile(traced, target):
    with little_effort(target):
        return traced.lower(lowering_platforms=(target,)).compile()


@contextlib.contextmanager
def little_effort(target):
    """How a product is scheduled is of no matter here, and XLA for TPU would search for long."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1" if target == "tpu" else before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)
