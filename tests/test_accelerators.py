"""When jax is kept to the CPU: by what a machine shows, and in real processes."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from research import accelerators

BOTH = {"libtpu", "jax_plugins.xla_cuda13"}


def fake(folder, *devices):
    for name in devices:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "devices",
    [
        [],
        ["null", "nvram", "kvm", "dri/renderD128", "vfio/vfio"],
        # An NPU's folder, and the processor's own graphics: no package here is for them.
        ["accel/accel0", "kfd"],
    ],
)
def test_alone_without_an_accelerator(tmp_path, devices):
    assert accelerators.alone(fake(tmp_path, *devices), {"PATH": "/bin"})


@pytest.mark.parametrize(
    "device",
    ["nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-caps/nvidia-cap1", "dxg", "accel0", "vfio/0"],
)
def test_not_alone_beside_a_device(tmp_path, device):
    assert not accelerators.alone(fake(tmp_path, "null", device), {})


def test_alone_where_there_is_no_dev(tmp_path):
    assert accelerators.alone(tmp_path / "absent", {})


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        # The user's choice stands, also that of everything, which is an empty one.
        ({"JAX_PLATFORMS": "cuda"}, False),
        ({"JAX_PLATFORMS": ""}, False),
        ({"PJRT_NAMES_AND_LIBRARY_PATHS": "mine:/opt/mine.so"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.2"}, False),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-4"}, False),
        # Of jax's and libtpu's own making.
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "/lib/libtpu.so"}, True),
        ({"TPU_WORKER_ID": "WARNING: could not determine TPU worker number"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, True),
    ],
)
def test_what_the_environment_says(tmp_path, environment, alone):
    assert accelerators.alone(tmp_path, environment) == alone


@pytest.mark.parametrize(
    ("plugins", "idle"),
    [
        (set(), False),
        (BOTH, True),
        ({"libtpu"}, True),
        ({"jax_plugins.xla_cuda12"}, True),
        (BOTH | {"jax_plugins.xla_rocm7"}, False),
        ({"jax_plugins.metal_plugin"}, False),
    ],
)
def test_other_plugins_go_on_working(plugins, idle):
    assert accelerators.idle(plugins) == idle


def test_plugins_are_found_as_packages_and_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "jax_plugins" / "one").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "one" / "__init__.py").touch()
    (tmp_path / "libtpu.py").touch()
    about = tmp_path / "two-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: two\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[jax_plugins]\ntwo = elsewhere.two\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert accelerators.plugins() >= {"jax_plugins.one", "elsewhere.two", "libtpu"}


@pytest.mark.parametrize(
    ("devices", "plugins", "platforms", "updates"),
    [
        ([], BOTH, None, [("jax_platforms", "cpu")]),
        (["nvidia0"], BOTH, None, []),
        ([], set(), None, []),
        # Set in Python, or by jax itself, which looks on the PCI bus for a TPU.
        ([], BOTH, "tpu,cpu", []),
    ],
)
def test_jax_is_told_once_all_is_asked(tmp_path, monkeypatch, devices, plugins, platforms, updates):
    told = []
    config = SimpleNamespace(jax_platforms=platforms, update=lambda *a: told.append(a))
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(accelerators, "DEV", fake(tmp_path, *devices))
    monkeypatch.setattr(accelerators, "plugins", lambda: plugins)
    for name in unsaid():
        monkeypatch.delenv(name)
    accelerators.cpu_where_alone()
    assert told == updates


# In real processes, whose environment says as little as a user's.


def unsaid():
    """What this session's environment says of platforms."""
    return [n for n in os.environ if n in CHOSEN or n.startswith("TPU_")]


CHOSEN = ("JAX_PLATFORMS", "XLA_FLAGS", "PJRT_NAMES_AND_LIBRARY_PATHS")


def run(*arguments):
    env = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    env["PYTHONPATH"] = os.pathsep.join((".", "tests"))
    result = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.fixture
def compilers_alone():
    if not accelerators.plugins() >= BOTH:
        pytest.skip("the compilers for TPU and CUDA, the extra plan, are not both installed")
    if not accelerators.idle(accelerators.plugins()):
        pytest.skip("another plugin of jax's is installed")
    said = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    if not accelerators.alone(accelerators.DEV, said):
        pytest.skip("this machine has an accelerator")


@pytest.mark.parametrize("imports", ["import research; import jax", "import jax; import research"])
def test_a_process_starts_on_the_cpu_in_silence(compilers_alone, imports):
    assert run("-c", f"{imports}; print(jax.devices())") == ("[CpuDevice(id=0)]\n", "")


def test_a_script_runs_in_silence(compilers_alone):
    out, err = run("scripts/compute.py", "configs/mlp_cancer.py")
    assert "645,120" in out
    assert err == ""


def test_the_compilers_still_answer(compilers_alone):
    code = "import research, ahead; print([len(ahead.devices(t)) for t in ahead.TARGETS])"
    assert run("-c", code) == ("[4, 4]\n", "")
