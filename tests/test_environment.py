"""What a run says it ran on, and from which commit."""

import json
import os
import platform
import shutil
import subprocess

import flax
import jax
import numpy as np
import pytest

from research import environment


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with a copy of the source, as far as `revision` knows."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a hook's GIT_DIR would lead to the real repository
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "checkout" / "research"
    folder.mkdir(parents=True)
    shutil.copy(environment.__file__, folder)
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    return folder


def git(folder, *args):
    command = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@example.com"]
    result = subprocess.run([*command, *args], check=True, capture_output=True, text=True)
    return result.stdout.strip()


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a commit")


def test_environment_goes_into_json():
    found = environment.environment()
    assert json.loads(json.dumps(found)) == found
    ran_on = {"python", "versions", "platform", "processes", "devices", "flags"}
    assert found.keys() == ran_on | {"revision"}
    assert found["flags"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert found["python"] == platform.python_version()
    versions = {"jax": jax.__version__, "flax": flax.__version__, "numpy": np.__version__}
    assert found["versions"].items() >= versions.items()
    assert {"jaxlib", "optax", "orbax-checkpoint", "grain", "ergon"} <= found["versions"].keys()
    assert found["processes"] == 1
    assert found["devices"] == ["cpu: cpu"] * 8


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("jax", "no-such-package"))
    versions = environment.environment()["versions"]
    assert versions == {"jax": jax.__version__, "no-such-package": None}


def test_revision_is_the_commit_and_whether_files_differ(source):
    git(source.parent, "init", "-q")
    commit(source)
    first = git(source, "rev-parse", "HEAD")
    assert len(first) == 40
    assert environment.revision() == first

    (source / "environment.py").write_text("changed")
    assert environment.revision() == first + "+changes"
    commit(source)
    second = environment.revision()
    assert second == git(source, "rev-parse", "HEAD") != first

    (source.parent / "new.py").touch()
    assert environment.revision() == second + "+changes"


def test_no_revision_outside_git(source):
    assert environment.revision() is None


def test_no_revision_before_the_first_commit(source):
    git(source.parent, "init", "-q")
    assert environment.revision() is None


def test_no_revision_without_git(source, monkeypatch):
    git(source.parent, "init", "-q")
    commit(source)
    monkeypatch.setenv("PATH", "")
    assert environment.revision() is None
