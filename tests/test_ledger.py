"""The ledger's truths against compute.count; its table, with and without the other tools."""

import dataclasses
import pathlib
import sys
import types

import jax
import pytest

from research import command
from research.bench import jax_models, ledger, metering
from research.compute import count

ROWS = {row.name: row for row in ledger.rows()}


def parameters(row):
    return sum(leaf.size for leaf in jax.tree.leaves(row.args[0]))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_ours_is_the_truth(row):
    found = count(row.fn, *row.args)
    assert found.exact
    assert found.unknown == {}
    assert found.matmul_flops == row.truth
    assert found.dense_flops == (row.dense or row.truth)
    remat = "remat" in row.name
    model = ROWS["Transformer, scanned, forward + backward"].truth if remat else row.truth
    assert found.model_flops == model


def test_a_truth_by_hand():
    """Four inputs and a 3-tap kernel padded by one: 2 + 3 + 3 + 2 taps, or 2 + 3 with stride 2."""
    assert [jax_models.taps(4, 3, stride, False) for stride in (1, 2)] == [10, 5]
    assert [jax_models.taps(4, 3, stride, True) for stride in (1, 2)] == [12, 6]


def test_gpt2_is_gpt2():
    assert parameters(ROWS["GPT-2 124M, forward"]) == 124_439_808


def test_others_count_a_loop_once():
    row = ROWS["LSTM of 100 steps, forward"]
    for column in ("XLA", "roofline flops", "roofline unfused"):
        assert 0.01 <= ledger.COLUMNS[column](row) / row.truth < 0.02
    row = ROWS["MLP, forward + backward"]
    for column in ("XLA", "roofline flops", "roofline unfused"):
        assert 1 <= ledger.COLUMNS[column](row) / row.truth < 1.01


def test_table():
    def broken(row):
        raise RuntimeError("no\n such thing")

    row = ROWS["CNN, forward"]
    columns = {
        "ours": lambda row: row.truth,
        "tool cpu": lambda row: row.truth // 2,
        "broken": broken,
        "DeepSpeed": lambda row: ledger.NO_BACKWARD if row.backward else row.dense + 1,
        "fvcore": lambda _: ledger.NOT_INSTALLED,
    }
    lines = [line for line in ledger.measure(columns) if line.row.model == "cnn"]
    text = ledger.table(lines).splitlines()
    assert [" ".join(line.split()) for line in text[:4]] == [
        "truth ours tool broken DeepSpeed fvcore",
        "GFLOP cpu",
        "CNN, forward 0.06975 1 0.500 failed 1.124 not installed",
        "CNN, forward + backward 0.2025 1 0.500 failed - not installed",
    ]
    assert "broken, CNN, forward: failed: RuntimeError: no such thing" in text
    assert f"CNN, forward {row.dense / row.truth:.3f}" in ledger.table(lines)
    assert len({len(line) for line in text[2:4]}) == 1
    assert lines[0].to_json()["reports"]["tool cpu"] == row.truth // 2


@pytest.mark.parametrize("column", ["torch cpu", "torch meta", "DeepSpeed", "fvcore"])
def test_without_torch(column, monkeypatch):
    monkeypatch.delitem(sys.modules, "research.bench.torch_models", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    for row in ROWS.values():
        assert ledger.COLUMNS[column](row) == ledger.NOT_INSTALLED


def test_without_one_tool(monkeypatch):
    def missing(name):
        def counter(row):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return counter

    stub = types.ModuleType("research.bench.torch_models")
    stub.COUNTERS = {"DeepSpeed": missing("deepspeed"), "fvcore": missing("iopath")}
    monkeypatch.setitem(sys.modules, "research.bench.torch_models", stub)
    row = ROWS["MLP, forward + backward"]
    assert ledger.COLUMNS["DeepSpeed"](row) == ledger.NOT_INSTALLED
    with pytest.raises(ModuleNotFoundError, match="iopath"):
        ledger.COLUMNS["fvcore"](row)


def test_versions():
    assert ledger.versions()["jax"] == jax.__version__


def test_torch_has_the_same_parameters_and_outputs():
    pytest.importorskip("torch")
    from research.bench import torch_models

    for row in ROWS.values():
        model, inputs = torch_models.build(row, "meta")
        assert sum(p.numel() for p in model.parameters()) == parameters(row)
        assert tuple(inputs.shape) == row.args[1].shape
        shape = jax.eval_shape(row.forward, *row.args).shape
        if row.model.startswith("lstm"):  # a scan gives its steps first
            shape = shape[1], shape[0], *shape[2:]
        assert tuple(model(inputs).shape) == shape


# ---- what the ledger costs


def test_verdict():
    cost = metering.Cost(trace=1, lower=1, compile=2, count=0.2, report=0.5)
    assert (cost.share, cost.within) == (0.25, True)
    slow = dataclasses.replace(cost, compile=9, report=0.51)
    costly = dataclasses.replace(cost, compile=1.9)
    assert not slow.within
    assert not costly.within
    text = metering.table({"a": cost, "b": slow}).splitlines()
    assert text[1].endswith("25.0%  within")
    assert text[2].endswith("5.7%  over")


def test_compiles_anew():
    """The session's cache, which keeps every program, is neither read nor written."""
    kept = pathlib.Path(jax.config.jax_compilation_cache_dir)
    jax.jit(lambda x: x * 3)(1.0)
    before = set(kept.iterdir())
    assert before
    cost = metering.cost(command.load("configs/mlp_cancer.py"), rounds=1)
    assert all(seconds > 0 for seconds in dataclasses.asdict(cost).values())
    assert not [p for p in set(kept.iterdir()) - before if "train_step" in p.name]
    # Nor is it lost to what comes after.
    jax.jit(lambda x: x * 5 + 4)(1.0)
    assert set(kept.iterdir()) - before


def test_metering_a_step_is_short():
    assert 0 < metering.per_step(rounds=1, steps=3) < metering.STEP
