"""What a run ran on: versions, devices, the source's revision."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
from typing import Any

import jax

from research import flags

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ergon")


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "platform": platform.platform(),
        "processes": jax.process_count(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "flags": {name: os.environ.get(name) for name in flags.VARIABLES},
        "revision": revision(),
    }


def versions(*more: str) -> dict[str, str | None]:
    """Of the packages that numbers depend on; None: it is not installed."""
    return {name: _version(name) for name in (*PACKAGES, *more)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """The commit of this source, with "+changes" where files differ from it; None without git."""
    if not shutil.which("git"):
        return None
    here = pathlib.Path(__file__).parent

    def git(*args: str) -> str:
        result = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if git("status", "--porcelain") else "")
