"""docs/extending.md, done: its files written to a folder elsewhere, its commands run there."""

import concurrent.futures
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_optim import bits

from research import checkpoint, command, optim, record
from research.modules import merged
from research.setup import prepare

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), re.M | re.S)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
FILES = {m[1]: text for text in PYTHON if (m := re.match(r"# (mine/\w+\.py)\n", text))}
(CONFIG,) = (path for path, text in FILES.items() if "def config()" in text)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def shell(line, folder):
    env = os.environ | {"XLA_FLAGS": tiny.flags(), "ERGON": str(ROOT), "PYTHONPATH": str(ROOT)}
    # What one of them compiled, the next need not.
    env |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env["PATH"] = f"{pathlib.Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder after the page's commands, what each of them printed, and what evaluating the run
    without --allow ends in."""
    folder = tmp_path_factory.mktemp("elsewhere")
    assert ROOT not in folder.parents
    (folder / "mine").mkdir()
    for path, text in FILES.items():
        (folder / path).write_text(text)

    def printed(line):
        result = shell(line, folder)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        return result.stdout

    first = [printed(line) for line in COMMANDS[:2]]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # these need only that the run is there
        (line,) = (line for line in COMMANDS if "evaluate.py" in line)
        refused = pool.submit(shell, line.replace(" --allow mine", ""), folder)
        return folder, first + list(pool.map(printed, COMMANDS[2:])), refused.result()


@pytest.fixture
def here(done, monkeypatch):
    """The same folder, as the current one: its `mine` can be imported until the test ends."""
    folder, *_ = done
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def read(path):
    return json.loads(path.read_text())


def classes(tree):
    """The modules of all classes that a config.json names."""
    if isinstance(tree, dict):
        own = {tree["class"].partition(":")[0]} if "class" in tree else set()
        return own.union(*map(classes, tree.values()))
    return set().union(*map(classes, tree)) if isinstance(tree, list) else set()


def test_the_page_has_no_file_that_is_not_used_and_no_command_that_is_not_run(done):
    folder, printed, _ = done
    modules = {path.removesuffix(".py").replace("/", ".") for path in FILES}
    used = {m for m in classes(read(folder / "runs/ssm/config.json")) if m.startswith("mine")}
    assert len(used) == 4  # a model, an optimizer, a task and a data set
    assert modules == used | {CONFIG.removesuffix(".py").replace("/", ".")}
    scripts = [re.search(r"scripts/(\w+)\.py", line)[1] for line in COMMANDS]
    assert set(scripts) == {"train", "evaluate", "plot", "compute"}
    assert len(printed) == len(scripts)


def test_what_the_page_shows_of_groups_fits_a_model():
    (text,) = (text for text in PYTHON if text not in FILES.values())
    found = eval(text, vars(optim).copy())
    assert [group.frozen for group in found.groups] == [False, True, False]
    prepare(tiny.transformer(optimizer=found), tiny.ONE)


def test_it_trains_to_its_target(done):
    folder, printed, _ = done
    assert "MISSED" in printed[0]
    assert printed[1].startswith("continued with steps = 600, before 300\n")
    summary = read(folder / "runs/ssm/summary.json")
    assert (summary["step"], summary["met"], summary["data"]) == (600, True, "Adding")
    assert summary["reached"] == summary["metrics"]["validation"]["within"] >= 0.9
    rows = [r for r in record.read_metrics(folder / "runs/ssm") if r["split"] == "train"]
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    for row in rows:  # the schedule of the optimizer, cosine after 20 steps of warmup
        now = row["step"] - 1
        cosine = 0.01 * (1 + np.cos(np.pi * (now - 20) / 580))
        assert row["learning_rate"] == pytest.approx(cosine, rel=1e-3, abs=1e-7)


def test_its_optimizer_masks_multiplies_and_is_cautious(here):
    own = importlib.import_module("mine.cautious").CautiousAdamW(
        learning_rate=0.1, weight_decay=0.5
    )
    groups = (optim.Group(match="^b", multiplier=2.0),)
    tx = optim.Optimizer(update=own, groups=groups, no_decay="bias").make()
    params = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}

    def step(g, state):
        updates, state = tx.update(jax.tree.map(lambda p: g * p, params), state, params)
        return [updates["a"]["kernel"], updates["b"]["kernel"], updates["a"]["bias"]], state

    found, state = step(1.0, tx.init(params))
    np.testing.assert_allclose(found, [[-0.15] * 2, [-0.3] * 2, [-0.1] * 2], rtol=1e-5)
    found, _ = step(-0.1, state)  # which the moment is against: the decay alone is left
    np.testing.assert_allclose(found, [[-0.05] * 2, [-0.1] * 2, [0.0] * 2], rtol=1e-5)


@pytest.mark.parametrize("field", [{"precision": "bfloat16"}, {"accumulate": 4}, {"ema": 0.9}])
def test_it_goes_with_what_every_run_may_have(here, field):
    e = dataclasses.replace(command.load(here / CONFIG), **field)
    setup = prepare(e, tiny.ONE)
    jax.eval_shape(setup.step(), *setup.abstract_example())


def products(layers):
    """2 FLOPs a multiply-add of 64 sequences of 32 steps, of 2 features, 16 wide, with 16 states.
    Backward is twice as much, but for the inputs of the model, which need no gradient."""
    steps = 64 * 32
    modules = {"embed": 2 * 2 * steps * 2 * 16, "head": 3 * 2 * 64 * 16 * 1}
    for i in range(layers):
        modules |= {f"layers.{i}.{name}": 3 * 2 * steps * 16 * 16 for name in ("enter", "leave")}
    return modules


def test_the_ledger_counts_the_model_exactly_by_its_modules(done):
    folder, printed, _ = done
    for path, layers in (("runs/ssm/compute.json", 1), ("cost.json", 2)):
        cost = read(folder / path)
        assert cost["qualifier"] == "exact"
        assert cost["by_module"] == products(layers)
        assert cost["model_flops"] == sum(products(layers).values())
        assert cost["elementwise_flops"] > 0
    assert re.search(r"layers .*\n +0 .*\n +enter .*\n +leave ", printed[4])


def states(folder):
    for name in ("ssm", "again"):
        run = folder / "runs" / name
        setup = prepare(command.load(run, ["mine"]), tiny.ONE)
        saved = run / "checkpoints"
        yield setup, checkpoint.read(saved, None, setup.abstract, setup.shardings)[1]


def test_stopped_half_way_it_is_the_same_to_the_bit_as_from_its_json_in_one_go(here):
    (_, resumed), (_, whole) = states(here)
    assert bits(resumed) == bits(whole)
    rows = [
        {r["step"]: r for r in tiny.rows(here / "runs" / name) if r["split"] == "train"}
        for name in ("ssm", "again")
    ]
    assert rows[0] == rows[1]
    assert list(rows[0]) == list(range(50, 601, 50))


def test_evaluate_prints_the_metrics_of_the_task(here, done):
    _, printed, _ = done
    found = json.loads(printed[2])
    assert (found["step"], found["split"]) == (600, "validation")
    assert list(found["metrics"]) == ["loss", "within", "p95"]
    assert read(here / "found.json")["metrics"] == found["metrics"]
    (setup, state), _ = states(here)
    rows = setup.splits["validation"].rows
    assert len(rows["inputs"]) % setup.batch_size  # the last batch is padded
    with merged(setup.graph, state.params, state.model_state, training=False) as model:
        outputs = jax.jit(model.__call__)(rows["inputs"])
    errors = np.abs(rows["targets"] - np.asarray(outputs))
    want = {"loss": errors.mean() / 2, "within": np.mean(errors <= 0.04)}
    assert found["metrics"] == pytest.approx(
        want | {"p95": np.quantile(errors, 0.95)}, rel=1e-4, abs=1e-5
    )


def test_the_plot_is_written(done):
    folder, printed, _ = done
    assert printed[3].strip() == "ssm.png"
    assert (folder / "ssm.png").read_bytes().startswith(b"\x89PNG")


def test_its_json_is_not_read_without_leave(done):
    *_, result = done
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"error: \S+: model names the class mine\.ssm:SSMConfig, and only research, configs may be "
        r"imported; pass --allow mine if you trust it\n",
        result.stderr,
    )


def test_its_fields_are_the_command_lines(here, capsys):
    def parsed(*argv):
        return command.parse(command.Options, "", [CONFIG, *argv]).experiment

    peak = "--optimizer.learning_rate.peak_value"
    e = parsed("--optimizer.b1", "0.8", peak, "0.001", "--task.quantile", "0.9")
    assert (e.optimizer.update.b1, e.task.quantile) == (0.8, 0.9)
    assert e.optimizer.update.learning_rate.kwargs["peak_value"] == 0.001
    for argv, message in [
        (["--model.states", "0"], "model.states must be >= 1, not 0"),
        (["--optimizer.b1", "1"], "optimizer.b1 must be >= 0 and < 1, not 1.0"),
        (["--data.lenght", "9"], "unknown field --data.lenght; did you mean --data.length?"),
    ]:
        with pytest.raises(SystemExit):
            parsed(*argv)
        assert capsys.readouterr().err == f"error: {message}\n"
