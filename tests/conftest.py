"""Eight CPU devices, strict shapes, warnings as errors, and real data, before jax is imported."""

import gc
import importlib.metadata
import os
import pathlib
import sys

# Most of the time goes into compiling programs that run for a moment: LLVM is asked for little, in
# one piece, and jax 0.10, the last that can be, for the fusions of XLA that compile in half the
# time. Scripts that tests start as a user does are compiled as a user's are.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" * (importlib.metadata.version("jaxlib") < "0.11"),
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Where it is absent, tests of what needs it skip.
os.environ.setdefault("ERGON_DATA", str(pathlib.Path(__file__).parents[2] / "shared" / "data"))

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

jax.config.update("jax_numpy_rank_promotion", "raise")
# An eighth of the time: tracing makes many objects that live, which Python searches for those that
# do not, and notes for each operation the lines of code that led to it.
gc.set_threshold(200_000, 50, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also what takes long to no new end")


def pytest_collection_modifyitems(config, items):
    skip = pytest.mark.skip(reason="only with --slow")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _no_peaks(tmp_path_factory):
    """What was measured on this machine is not known to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERGON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """A program that several tests compile is compiled once a session."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    """Configs are found as configs/x.py, as a user gives them."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def strict_dtypes():
    """Around our own fp32 code: optax and flax raise under it elsewhere."""
    with jax.numpy_dtype_promotion("strict"):
        yield
