"""Runs of several processes, real ones on this machine, against runs of one."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import several
import tiny
import yaml
from jax._src import clusters, distributed

from research import UserError, checkpoint, cluster, flags, hosts
from research.init_from import flat
from research.setup import prepare

ROOT = pathlib.Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
CANCER = ["scripts/train.py", "configs/mlp_cancer.py", "--batch_size", "64", "--eval_every", "100"]
CANCER += ["--log_every", "10", "--save_every", "1000", "--parallel.fsdp", "2", "--steps", "200"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a command in so many processes of 4 devices in all; gives them back."""
    cache, started = tmp_path_factory.mktemp("compiled"), []

    def processes(count, *command, seconds=60, ids=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        told = {
            "PYTHONPATH": PATHS,
            "JAX_NUM_CPU_DEVICES": str(4 // count),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "ERGON_HOSTS_SECONDS": str(seconds),
        }
        env = os.environ | {"XLA_FLAGS": tiny.flags()} | told
        ours = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=env | {"JAX_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in (range(count) if ids is None else ids)
        ]
        started.extend(ours)
        return ours

    yield processes
    for process in started:
        process.kill()
        process.communicate()


def ends(processes):
    """Each one's exit status, and what it printed on stdout (Gloo's lines apart) and on stderr."""
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=200)
        # Its threads may print into one another's lines.
        out = "".join(x for x in out.splitlines(True) if not re.search("Gloo|peer ranks", x))
        found.append((process.returncode, out, errors))
    return found


def ok(processes):
    """Returns what the first process printed; the others print nothing, and all end well."""
    found = ends(processes)
    assert [code for code, _, _ in found] == [0] * len(found), found
    assert [out for _, out, _ in found[1:]] == [""] * (len(found) - 1)
    assert [errors for _, _, errors in found] == [""] * len(found)
    return found[0][1]


def rows(run):
    """Of metrics.jsonl, without the times: places, and numbers."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    places = [(row.pop("step"), row.pop("split")) for row in found]
    return places, [{k: v for k, v in row.items() if k != "seconds"} for row in found]


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def bits(arrays):
    return {k: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for k, x in arrays.items()}


# Training.


@pytest.fixture(scope="module")
def folders(start, tmp_path_factory):
    """Runs of one, two and four processes, each of which has read those of the one before."""
    found = {}
    for count, before in ((1, None), (2, 1), (4, 2)):
        found[count] = tmp_path_factory.mktemp(f"of{count}")
        other = [] if before is None else [found[before]]
        out = ok(start(count, "tests/several.py", "trained", found[count], *other))
        assert "step 8/8  train  loss" in out
    return found


def last(folder, mesh):
    """The last checkpoint's arrays by path, read by this one process onto one device."""
    setup = prepare(several.experiment(mesh, parallel=several.Parallel()), jax.devices()[:1])
    saved = folder / mesh / "checkpoints"
    return flat(checkpoint.read(saved, None, setup.abstract, setup.shardings)[1])


@pytest.mark.parametrize("mesh", several.MESHES)
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one_does(folders, count, mesh):
    """Within rounding: Gloo adds up in another order than one process does."""
    one, more = (rows(folders[n] / mesh) for n in (1, count))
    assert more[0] == one[0]
    jax.tree.map(close, more[1], one[1])
    one, more = (last(folders[n], mesh) for n in (1, count))
    assert more.keys() == one.keys()
    for name, array in one.items():
        close(more[name], array, err_msg=name)
    summaries = [json.loads((folders[n] / mesh / "summary.json").read_text()) for n in (1, count)]
    assert summaries[0]["best"] == summaries[1]["best"]
    assert sorted(os.listdir(folders[count] / mesh)) == sorted(os.listdir(folders[1] / mesh))


@pytest.mark.parametrize("mesh", several.MESHES)
@pytest.mark.parametrize(("wrote", "reads"), [(1, 2), (2, 4)])
def test_a_checkpoint_is_read_by_other_processes_on_another_mesh(folders, wrote, reads, mesh):
    """And `last` reads it by one."""
    there = last(folders[wrote], mesh)
    with np.load(folders[reads] / f"{mesh}_read.npz") as found:
        assert bits(found) == bits(there)
    with np.load(folders[reads] / f"{mesh}_init.npz") as found:
        wanted = {f"params/{name}": array for name, array in found.items()}
    assert bits(wanted) == bits({k: v for k, v in there.items() if k.startswith("params/")})


@pytest.fixture(scope="module")
def cancer(start, tmp_path_factory):
    """Runs of the script: in one process, in two, and in two of which one was stopped."""
    folder = tmp_path_factory.mktemp("cancer")
    outs = [
        ok(start(count, *CANCER, "--workdir", folder / name))
        for count, name in ((1, "one"), (2, "two"))
    ]
    return folder, outs


def test_the_script_trains_and_judges_in_two_processes_as_in_one(cancer):
    folder, outs = cancer
    (places, one), (again, two) = (rows(folder / name) for name in ("one", "two"))
    assert again == places
    jax.tree.map(close, two, one)
    tests = [row for place, row in zip(places, two, strict=True) if place == (200, "test")]
    assert tests[0]["auc"] > 0.9
    shown = [[line for line in out.splitlines() if line.startswith("step ")] for out in outs]
    assert [line.split()[:3] for line in shown[0]] == [line.split()[:3] for line in shown[1]]
    about = json.loads((folder / "two" / "environment.json").read_text())
    assert about["processes"] == 2


def test_the_script_evaluates_in_two_processes(cancer, start):
    folder, _ = cancer
    out = folder / "found.json"
    printed = ok(start(2, "scripts/evaluate.py", folder / "two", "--json", out))
    found = json.loads(out.read_text())
    shown = next(line for line in printed.splitlines() if line.startswith("{"))
    assert json.loads(shown)["metrics"] == found["metrics"]
    summary = json.loads((folder / "two" / "summary.json").read_text())
    assert found["metrics"] == summary["metrics"]["test"]


def test_a_signal_at_one_stops_both_at_one_step_and_the_run_goes_on_to_the_same_end(cancer, start):
    folder, _ = cancer
    command = [*CANCER, "--workdir", folder / "stopped"]
    both = start(2, *command)
    while not both[0].stdout.readline().startswith("step 10/"):
        assert both[0].poll() is None
    both[1].send_signal(signal.SIGTERM)
    found = ends(both)
    assert [code for code, _, _ in found] == [128 + signal.SIGTERM] * 2, found
    assert [errors for _, _, errors in found] == ["", ""]
    (step,) = map(int, os.listdir(folder / "stopped" / "checkpoints"))
    assert f"stopped by signal 15 at step {step}; saved" in found[0][1]
    assert found[1][1] == ""
    assert 10 <= step < 200
    ok(start(2, *command))
    assert rows(folder / "stopped") == rows(folder / "two")
    ended = [folder / name / "checkpoints" / "200" for name in ("stopped", "two")]
    trees = [checkpoint.arrays(x.parent, 200, checkpoint.outline(x.parent, 200)) for x in ended]
    assert bits(flat(trees[0])) == bits(flat(trees[1]))


# Failing.


def test_a_mistake_of_all_is_said_once(start, tmp_path):
    found = ends(start(2, *CANCER, "--batch_size", "63", "--workdir", tmp_path / "run"))
    assert [code for code, _, _ in found] == [2, 2]
    message = "error: batch_size 63 does not divide over 4 devices; nearest that do: 60, 64\n"
    assert [errors for _, _, errors in found] == [message, ""]
    assert not (tmp_path / "run").exists()


def test_a_defect_of_all_is_traced_once(start):
    found = ends(start(2, "tests/several.py", "broken"))
    assert [code for code, _, _ in found] == [1, 1]
    assert found[0][2].endswith("RuntimeError: a defect\n")
    assert found[1][2] == ""


def test_a_loss_that_is_not_finite_ends_both(start, tmp_path):
    found = ends(start(2, "tests/several.py", "diverged", tmp_path))
    assert [code for code, _, _ in found] == [2, 2], found
    assert re.fullmatch(r"error: the loss is (nan|inf) by step \d\n", found[0][2])
    assert found[1][2] == ""
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize(
    ("deed", "said", "codes"),
    [
        ("failing", ["process 1 of 2 has failed: no disk", "no disk"], [1, 2]),
        ("missing_file", ["process 1 of 2 has failed: init_from: ", "neither a run"], [1, 2]),
        ("unshared", ["process 1 of 2 has failed: process 1 does not see", "does not"], [1, 2]),
    ],
)
def test_a_mistake_of_one_ends_both(folders, start, tmp_path, deed, said, codes):
    shutil.copytree(folders[1] / "data", tmp_path / "run")
    given = [] if deed == "failing" else [tmp_path]
    found = ends(start(2, "tests/several.py", deed, *given))
    assert [code for code, _, _ in found] == codes, found
    for (_, _, errors), words in zip(found, said, strict=True):
        assert errors.count("\n") == 1, errors
        assert errors.startswith("error: ")
        assert words in errors
    assert not (tmp_path / "new").exists()


def test_one_that_does_not_come_to_a_meeting_is_named(start):
    began = time.monotonic()
    first, other = start(2, "tests/several.py", "late", seconds=8)
    ((code, _, errors),) = ends([first])
    assert code == 2
    assert errors == "error: process 1 of 2 did not come to a meeting within 8 s\n"
    ((code, _, errors),) = ends([other])
    assert code == 1
    assert errors.startswith("error: process 0 of 2 has failed: process 1 of 2 did not come")
    assert time.monotonic() - began < 40


@pytest.mark.slow  # beside other work Gloo may wait, and jax ends the survivor after 100 s
def test_one_that_was_killed_is_named(start):
    (first, killed) = ends(start(2, "tests/several.py", "killed", seconds=5))
    assert killed[0] == -signal.SIGKILL
    assert first[0] == 2
    assert first[2].startswith("error: process 1 of 2 is no more: ")
    assert first[2].count("\n") == 1


@pytest.mark.parametrize(
    ("absent", "said"),
    [([], None), ([2], "process 2 of 4 is no more"), ([1, 3], "processes 1, 3 of 4 are no more")],
)
def test_those_that_are_gone_are_named(monkeypatch, absent, said):
    monkeypatch.setattr(hosts, "_absent", lambda key, seconds: absent)
    monkeypatch.setattr(hosts, "_gone", [])
    monkeypatch.setattr(hosts, "count", lambda: 4)
    assert hosts.gone() == said


def test_those_that_do_not_start_are_named(start):
    said = {
        (0, 2): "error: processes 1, 3 of 4 did not come to the start within 6 s\n",
        (1,): "error: process 0 of 4 did not come to the start within 6 s\n",
        (0, 1, 1): "error: two processes say that they are process 1\n",
    }
    at_once = {came: start(4, *CANCER, seconds=6, ids=came) for came in said}
    for came, started in at_once.items():
        assert ends(started) == [(2, "", said[came])] * len(came)


# What the environment says.

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
OURS = {
    "JAX_COORDINATOR_ADDRESS": "a:1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, None),  # of a shell that salloc gives
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (OURS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (OURS, ("a:1", 2, 1, None)),
        # The only process of its host has all of its GPUs; one of two has one.
        (SLURM, ("gpu03:61447", 2, 1, None)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x1)"}, ("gpu03:61447", 2, 1, [0])),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "b:2"}, ("b:2", 2, 1, None)),
        (OMPI, ("10.96.0.1:62624", 4, 3, [1])),
    ],
)
def test_several_processes_are_found_in_the_environment(monkeypatch, environment, processes):
    for name, value in environment.items():  # jax reads it itself
        monkeypatch.setenv(name, value)
    assert cluster.found(environment, 1) == processes


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not set"),
        (OURS | {"JAX_COORDINATOR_ADDRESS": "a"}, "must be host:port, not 'a'"),
        (OURS | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID 2 is none of 2 processes"),
        (OURS | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be a number, not '-1'"),
    ],
)
def test_what_is_told_by_halves_is_said(environment, message):
    with pytest.raises(UserError, match=re.escape(message)):
        cluster.found(environment, 1)


def test_what_is_private_to_jax_is_there(monkeypatch):
    """research/hosts.py and research/cluster.py ask these of jax._src."""
    state = distributed.global_state
    assert (state.client, state.process_id, state.num_processes) == (None, 0, 1)
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBER"))]:
        monkeypatch.delenv(name)
    assert detect("a:1", 2, None, None, None, 1) == ("a:1", 2, None, None)
    assert not cluster.cloud_tpu_init.running_in_cloud_tpu_vm
    from jax._src.lib import _jax

    asked = "key_value_set key_value_dir_get blocking_key_value_get wait_at_barrier".split()
    assert all(hasattr(_jax.DistributedRuntimeClient, name) for name in asked)


def test_of_one_process_there_is_nothing_to_wait_for():
    with hosts.session(), hosts.agreement() as agreed:
        hosts.meet("a meeting")
        assert hosts.decided(lambda: (1, 2)) == (1, 2)
        assert agreed(3, 0) == 0
        assert agreed(3, 15) == 15
    assert not jax.distributed.is_initialized()


# Flags and launch files.


def test_flags_are_set_beside_a_gpu_unless_they_are_named(tmp_path):
    environment = {}
    flags.apply(environment, tmp_path)
    assert environment == {}
    (tmp_path / "nvidia0").touch()
    flags.apply(environment, tmp_path)
    assert environment == {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=true"}
    environment["XLA_FLAGS"] = "--a=1 --xla_gpu_enable_pipelined_all_gather=false"
    flags.apply(environment, tmp_path)
    assert environment["XLA_FLAGS"] == "--a=1 --xla_gpu_enable_pipelined_all_gather=false"


LAYERS = """
import ahead, jax, re
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(ahead.devices("cuda"), ("fsdp",))
put = lambda *spec: NamedSharding(mesh, P(*spec))

def layer(x, w):
    return jax.nn.relu(x @ jax.lax.with_sharding_constraint(w, put())), None

shapes = [((1024, 1024), put("fsdp")), ((4, 1024, 1024), put(None, "fsdp"))]
given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape, place in shapes]
text = ahead.compile(jax.jit(lambda x, ws: jax.lax.scan(layer, x, ws)[0]).trace(*given), "cuda")
parts = text.as_text().split("\\n}\\n")
body = next(part for part in parts if "all-gather-start(" in part and "ENTRY" not in part)
between = body.split(" all-gather-start(")[1].split(" all-gather-done(")[0]
print("found", "gemm" in between or "custom-call" in between)
"""


@pytest.mark.parametrize(("given", "overlapped"), [({}, "False"), (flags.CUDA, "True")])
def test_what_the_flags_of_cuda_change(given, overlapped):
    """And that jaxlib knows them."""
    import ahead

    ahead.devices("cuda")
    told = " ".join(f"{name}={value}" for name, value in given.items())
    env = os.environ | {"XLA_FLAGS": told, "PYTHONPATH": PATHS}
    code = "import research" + LAYERS
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert f"found {overlapped}" in done.stdout, done.stderr


def said(folder, name, command, **environment):
    """What a program that a launch file calls is called with, as words, and the environment."""
    program = folder / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@"; env | grep ^JAX_ | sort\n')
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_skypilots_hosts_find_one_another(tmp_path):
    task = yaml.safe_load((ROOT / "scripts" / "launch" / "sky.yaml").read_text())
    hosts = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2"}
    hosts |= {"SKYPILOT_NODE_RANK": "1", "TRAIN": "configs/a.py --model.name 'two words'"}
    words = said(tmp_path, ".venv/bin/python", ["bash", "-c", task["run"]], **hosts)
    assert words[:4] == ["scripts/train.py", "configs/a.py", "--model.name", "two words"]
    told = dict(word.split("=") for word in words[4:])
    assert cluster.found(told, 1.0) == cluster.Cluster("10.0.0.7:8476", 2, 1, None)


def test_xpk_is_given_the_command_whole(tmp_path):
    script = ROOT / "scripts" / "launch" / "xpk.sh"
    given = ["run", "configs/a.py", "--model.name", "two words"]
    words = said(tmp_path, "xpk", ["bash", script, *given], CLUSTER="c", TPU="v5litepod-16")
    options = dict(zip(words[2::2], words[3::2], strict=False))
    assert words[:2] == ["workload", "create"]
    assert options["--workload"] == "run"
    assert options["--command"].split("scripts/train.py ")[1].strip() == (
        r"configs/a.py --model.name two\ words"
    )
    refused = subprocess.run(["bash", script, "run"], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "the name of the cluster" in refused.stderr


@pytest.mark.parametrize("name", ["train.sbatch", "tpu_vm.sh", "xpk.sh"])
def test_launch_files_are_shell(name):
    path = ROOT / "scripts" / "launch" / name
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)
