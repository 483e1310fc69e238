"""Plans: steps compiled for accelerators that are not there, each target a row."""

import dataclasses
import json
import subprocess
import sys

import ahead
import jax
import jax.numpy as jnp
import pytest
import tiny

from research import UserError, compute
from research.bench import plan, planning
from research.compute import chips, prices, targets
from research.data.outline import outlined
from research.models.lstm import LSTMConfig
from research.setup import prepare


def test_every_target_is_a_chip_that_is_known():
    assert len(targets.TARGETS) >= 10
    for text in planning.ALL:
        where = targets.place(text)
        target = targets.TARGETS[where.kind]
        if where.kind == "cpu" or not targets.installed(where.kind):
            continue
        (kind,) = {d.device_kind for d in targets.devices(where)}
        chip = chips.match(kind, target.platform, None)
        assert chip is not None, kind
        assert len(targets.devices(where)) == where.chips * chip.devices_per_chip
        if isinstance(target, targets.GPU):
            assert target.memory == pytest.approx(chip.memory_bytes, rel=0.08)
            assert target.bandwidth == pytest.approx(chip.memory_bandwidth, rel=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9", r"no target 'v9'; there are v2, v3, .*cpu$"),
        ("v5e:6", r"v5e:6: chips are a power of 2 up to 256, or sides, not 6"),
        ("v5e:512", "up to 256, or sides, not 512"),
        ("v5e:2x2x1", "v5e:2x2x1: v5e has 2 sides"),
        ("v5e:3x4", "so that these sides are even"),
        ("v5e:0", "a target is KIND, KIND:CHIPS or"),
        ("h100:", "a target is KIND, KIND:CHIPS or"),
        ("h100:2x4", "h100:2x4: h100 has a number of chips"),
        ("h100:12", "h100:12: h100 come up to 8, or in hosts of 8, not 12"),
    ],
)
def test_what_is_no_target_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        planning.place(text)


def test_a_place_is_printed_as_it_is_asked_for():
    for text in ("v5e:4x4", "v5p:64", "h100:8"):
        assert str(targets.place(text)) == text
    assert targets.place("h100") == targets.Place("h100", (1,))
    assert targets.place("v5p:2x4x4").chips == 32


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_a_row_is_of_the_program_that_is_compiled(target):
    ahead.devices(target)  # skips
    where = targets.place({"tpu": "v6e:4", "cuda": "a100:4"}[target])
    e = tiny.mlp()
    row = plan.answer(e, where, tries=0)
    alone = prepare(e, jax.devices()[:1])
    count = compute.count(alone.step().trace(*alone.abstract_example()))
    assert (row.status, row.chips, row.mesh) == ("ok", 4, {"data": 4})
    assert row.model_flops == count.model_flops == 4 * row.flops
    assert row.state == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(alone.abstract))
    # An all-reduce of gradients, and what the step returns.
    parameters = 4 * alone.parameters
    assert parameters <= sum(c["bytes"] * c["count"] for c in row.collectives) <= parameters + 24
    assert {c["axes"] for c in row.collectives} == {("data",)}
    assert 0 < row.memory.needed < row.memory.usable
    step, bounds = row.step_seconds, row.bounds
    assert bounds["at_least"] <= step["low"] <= step["value"] <= step["high"]
    found = row.json()
    assert found["examples_per_second"] == pytest.approx(row.examples / step["value"])
    assert found["tokens_per_second"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) is not None


def test_a_chip_whose_links_are_not_known_has_no_time():
    ahead.devices("tpu")  # skips
    row = plan.answer(tiny.mlp(), targets.place("v2:4"), tries=0)
    assert (row.status, row.step_seconds, row.mfu) == ("ok", None, None)
    assert "rate of links is known" in row.reason
    assert row.bounds["compute"] > 0
    assert row.json()["examples_per_second"] is None


def too_large(elements):
    """A program that keeps several arrays of so many elements."""

    def f(x):
        y = jnp.outer(x, x)
        return jnp.sort(y, axis=0) @ jnp.sort(y, axis=1)

    return f, jax.ShapeDtypeStruct((elements,), jnp.float32)


def test_the_compilers_own_refusal_says_by_how_much():
    (device,) = ahead.devices("tpu", 1)
    f, x = too_large(2**16)
    one = jax.sharding.SingleDeviceSharding(device)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(f, in_shardings=one, out_shardings=one).lower(x).compile()
    memory = plan.exhausted(str(refused.value))
    assert memory.usable == pytest.approx(15.75 * 2**30, rel=0.01)
    assert memory.needed > 2 * 4 * 2**32  # at least both sorted, of 2^32 elements
    assert memory.over == memory.needed - memory.usable


def test_what_is_no_refusal_is_none():
    assert plan.exhausted("INTERNAL: no tiles") is None
    assert plan.exhausted("RESOURCE_EXHAUSTED: otherwise put").over is None


# JAX keeps programs for devices that are not there, and cannot read them when they come again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_what_would_fit_is_found_by_trying(monkeypatch):
    """Of a GPU that has two thirds of what the step asks for besides its state."""
    given = ahead.devices("cuda", 2)
    monkeypatch.setattr(targets, "devices", lambda _: given)
    model = LSTMConfig(vocab=7, outputs=7, width=64)
    e = tiny.lstm(model=model, data=tiny.Words(), batch_size=4096)
    where = targets.place("h100:2")
    row = plan.answer(e, where, tries=0)
    memory = row.state + (row.memory.needed - row.state) * 2 // 3
    kind = dataclasses.replace(targets.TARGETS["h100"], memory=int(memory / plan.USABLE))
    monkeypatch.setattr(targets, "TARGETS", dict(targets.TARGETS) | {"h100": kind})
    row = plan.answer(e, where, tries=3)
    assert row.status == "does not fit"
    assert row.memory.over == row.memory.needed - row.memory.usable > 0
    found = plan.compiled(plan.changed(outlined(e), row.fits_with), where)
    assert (found.status, found.model_flops) == ("ok", row.model_flops)
    assert row.fits_with == {"accumulate": 2}
    best = plan.answer(e, where, tries=3, search=3)
    assert best.status == "ok"
    assert best.step_seconds["value"] <= found.step_seconds["value"]
    assert plan.compiled(plan.changed(outlined(e), best.settings), where).memory == best.memory


def test_changes_reach_inner_fields():
    e = plan.changed(tiny.mlp(), {"parallel.fsdp": 4, "accumulate": 2, "parallel.data": 1})
    assert (e.parallel.fsdp, e.parallel.data, e.accumulate) == (4, 1, 2)


def python(code):
    """A command that runs code, which sees the target as its argument."""
    return [sys.executable, "-c", code]


def one(code, seconds=60.0):
    (row,) = planning.rows(python(code), [targets.Place("cpu", (2,))], seconds, 1, lambda _: None)
    return row


def test_what_happens_in_a_targets_process_is_its_row():
    found = one("import sys, json; print('noise'); print(json.dumps({'status': sys.argv[1]}))")
    assert found == {"status": "cpu:2"}
    found = one("import os; print('{\"status\": \"%s\"}' % os.environ['XLA_FLAGS'][-2:])")
    assert found["status"] == "=2"
    failed = one("import sys; sys.exit('error: parallel: no such mesh')")
    assert (failed["status"], failed["reason"]) == ("failed", "parallel: no such mesh")
    assert one("import os; os.kill(os.getpid(), 9)")["reason"].startswith("killed by signal 9")
    assert one("import time; time.sleep(60)", 0.5)["reason"] == "took more than 0 s to compile"


def test_a_compiler_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(targets, "installed", lambda kind: False)
    found = one("raise SystemExit('not reached')")
    assert found["status"] == "not installed"
    assert "pip install" in found["reason"]


def test_how_long_a_run_is():
    e = tiny.transformer(steps=7)
    batch = prepare(e, jax.devices()[:1]).first["inputs"]
    assert planning.Length().steps(e) == 7
    assert planning.Length(tokens=1e6).steps(e) == 1e6 / batch.size
    rows = tiny.mlp()
    train = rows.data.load()["train"]
    assert planning.Length(epochs=3).steps(rows) == 3 * len(train) / rows.batch_size
    with pytest.raises(UserError, match="gives no tokens; give --epochs"):
        planning.Length(tokens=1e6).steps(rows)
    with pytest.raises(UserError, match="give one"):
        planning.Length(tokens=1.0, epochs=1.0).steps(rows)


def row(**fields):
    seconds = {"value": 0.5, "low": 0.25, "high": 1.0, "qualifier": "estimated", "basis": ""}
    return {"chip": "h100-sxm", "chips": 8, "step_seconds": seconds} | fields


def test_a_runs_costs_have_the_band_of_its_steps():
    costs = planning.Costs.of(None, None, "world")
    found = costs.of_run(row(), 7200)
    assert [found["hours"][end] for end in ("low", "value", "high")] == [0.5, 1.0, 2.0]
    assert found["chip_hours"]["value"] == 8
    price = prices.published().of("h100-sxm").usd
    assert found["money"]["value"] == pytest.approx(8 * price)
    assert found["money"]["high"] == pytest.approx(16 * price)
    assert costs.of_run(row(step_seconds=None), 10) is None
    with pytest.raises(UserError, match="no provider 'Nobody'"):
        planning.Costs.of(None, "Nobody", "world")


def test_what_a_device_sends_is_said_by_axis_and_links():
    fields = {"kind": "all-reduce", "bytes": 2 * 10**9, "group_size": 16, "count": 3}
    wide = fields | {"axes": ["data"], "span": ["node 8", "network 2"], "seconds": 0.5}
    narrow = wide | {"bytes": 10**9, "span": ["node 4", "network 4"], "seconds": 0.25}
    near = fields | {"axes": ["fsdp"], "span": ["node 8"], "seconds": None}
    alone = wide | {"group_size": 1}
    found = [{"target": "h100:16", "collectives": [narrow, wide, near, alone]}]
    _, _, first, second = planning._exchanged(found)
    assert first.split() == ["h100:16", "data", "9", "6", "0.75", *"node 8 + network 2".split()]
    assert second.split() == ["h100:16", "fsdp", "6", "3", "-", "node", "8"]
    assert planning._exchanged([{"target": "cpu:1", "collectives": []}]) == []


def test_the_command_plans_and_writes(tmp_path):
    out = tmp_path / "plan.json"
    command = [sys.executable, "scripts/plan.py", "configs/mlp_cancer.py", "--target", "cpu"]
    installed = targets.installed("h100")
    command += ["--target", "h100:2", "--epochs", "10", "--json", str(out)]
    command += ["--html", str(tmp_path / "plan.html")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert found["config"] == "configs/mlp_cancer.py"
    assert found["versions"]["jax"] == jax.__version__
    page = (tmp_path / "plan.html").read_text()
    assert "mlp_cancer" in page
    assert "h100:2" in page
    assert "src=" not in page
    cpu, gpu = found["targets"]
    assert (cpu["target"], cpu["status"], cpu["chip"]) == ("cpu:1", "ok", None)
    assert gpu["status"] == ("ok" if installed else "not installed")
    if installed:
        assert gpu["model_flops"] == cpu["model_flops"]
        assert gpu["run"]["money"]["value"] > 0
        assert gpu["run"]["steps"] == pytest.approx(10 * 398 / 32)
        assert f"model FLOPs a step: {cpu['model_flops']:,}" in ran.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to plan for"),
        (["--target", "v9"], "no target 'v9'"),
        (["--target", "h100:8", "--grid", "moon"], "moon"),
        (["--target", "h100:8", "--tokens", "5"], "gives no tokens"),
        (["--target", "h100:8", "--batch_size", "0"], "batch_size must be"),
        (["--target", "h100:8", "--json", "no/where.json"], "there is no folder no"),
    ],
)
def test_a_mistake_is_one_line(given, message):
    command = [sys.executable, "scripts/plan.py", "configs/mlp_cancer.py", *given]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
