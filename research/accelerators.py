"""Keeps jax to the CPU where the compilers for TPU and CUDA are installed and neither is attached.

With the extra `plan` jax would try to start both, and print what it lacks for each.
"""

import os
import pathlib
import pkgutil
from collections.abc import Mapping
from importlib import metadata, util
from typing import Any

DEV = pathlib.Path("/dev")
COMPILERS = {"libtpu", "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"}
# An NVIDIA GPU, one under WSL, a TPU to v4, a TPU since. /dev/accel is a folder of other makers'.
_DEVICES = ("nvidia*", "dxg", "accel[0-9]*", "vfio/[0-9]*")
# Set by jax and by libtpu themselves, wherever they are.
_OWN = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}
# The user's choice of platforms, and plugins that are not installed as packages.
_CHOSEN = {"JAX_PLATFORMS", "PJRT_NAMES_AND_LIBRARY_PATHS"}


def cpu_where_alone() -> None:
    """Sets jax_platforms to cpu where `alone` says so; in time before jax starts a backend."""
    if not alone(DEV, os.environ) or not idle(plugins()):
        return
    import jax  # late: nothing of the above needs it

    config: Any = jax.config
    # Not None: the user's choice, or jax has found a TPU on the PCI bus.
    if config.jax_platforms is None:
        config.update("jax_platforms", "cpu")


def alone(dev: pathlib.Path, environment: Mapping[str, str]) -> bool:
    """Whether nothing says that a GPU of NVIDIA's or a TPU may be here, nor which to use."""
    if any(next(dev.glob(pattern), None) for pattern in _DEVICES):
        return False
    # libtpu sets what it could not find out to a warning, and a child process inherits that.
    said = {name for name, value in environment.items() if not value.startswith("WARNING")}
    tpu = {name for name in said if name.startswith("TPU_")} - _OWN
    return not (tpu or said & _CHOSEN)


def idle(found: set[str]) -> bool:
    """Whether these plugins are of use only with what `alone` looks for; not so Metal's, ROCm's."""
    return bool(found) and found <= COMPILERS


def plugins() -> set[str]:
    """The modules of the plugins installed, found as jax finds them."""
    found = {entry.value for entry in metadata.entry_points(group="jax_plugins")}
    if package := util.find_spec("jax_plugins"):
        modules = pkgutil.iter_modules(package.submodule_search_locations, "jax_plugins.")
        found |= {module.name for module in modules}
    return found | ({"libtpu"} if util.find_spec("libtpu") else set())
