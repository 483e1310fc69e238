"""Every config: one shrunken step of it trains, and its file says what it is."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from made import large, prepared

from research import command, compute, experiment, init_from, parallel
from research.compute import causes
from research.data.outline import outlined
from research.setup import prepare

CONFIGS = sorted(p for p in pathlib.Path("configs").glob("*.py") if p.stem != "__init__")
if not CONFIGS:
    CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("[a-z]*.py"))


PLANNED = {
    # Of GPT-2's 124,439,808 the embedding has 47 rows more.
    "gpt2_124m": 124_439_808 + 47 * 768,
    "transformer_1b": 1_345_423_360,
    "transformer_7b": 6_738_415_616,
    "resnet50_imagenet": 25_557_032,
    # An embedding, two layers of four gates with a bias each, and logits with theirs.
    "lstm_1b": 2**15 * 1024 + 4 * (8192 * (1024 + 3 * 8192) + 2 * 8192) + 2**15 * (8192 + 1),
}
"""Configs for larger machines, and their parameters, by papers and architectures."""


def ids(path):
    return path.stem


def rows(e):
    """The fewest that a step of every client is of a row, and 8 at least of each part."""
    return max(8 * e.accumulate, e.local.clients * e.local.steps)


def but(*slow):
    """Every config; those of the names only with --slow, for they take long to no new end."""
    return [
        pytest.param(path, marks=pytest.mark.slow) if path.stem in slow else path
        for path in CONFIGS
    ]


# Of what is planned one does, in bfloat16, scanned and recomputed.
@pytest.mark.parametrize("path", but(*PLANNED.keys() - {"transformer_1b"}), ids=ids)
def test_one_shrunken_step(path):
    whole = command.load(path)
    size = rows(whole)
    setup = prepared(dataclasses.replace(whole, steps=1, batch_size=size), jax.devices()[:1])
    state = setup.initial()
    before = jax.device_get(state.params)
    batch = parallel.put(setup.splits["train"].batch(0, size, 0), setup.mesh)
    state, metrics = setup.step()(state, batch, setup.root)
    assert math.isfinite(metrics["loss"].total)
    # A warm-up may begin at a rate of zero: the second step moves every parameter then.
    state, _ = setup.step()(state, batch, setup.root)
    after, frozen = jax.device_get(state.params), whole.optimizer.frozen
    for name, value in init_from.flat(before).items():
        assert np.any(value != init_from.flat(after)[name]) != frozen(name), name


# What never runs here is compiled for where it is planned to: test_ahead.py.
@pytest.mark.parametrize("path", but(*PLANNED), ids=ids)
def test_every_flop_of_its_step_is_accounted_for(path):
    setup = prepared(command.load(path), jax.devices()[:1])
    found = compute.report(setup.step().trace(*setup.abstract_example()))
    assert found.count.exact
    assert found.program.exact
    named = [d for d in found.differences if d.cause != causes.UNEXPLAINED]
    executed = found.count.model_flops + sum(d.flops for d in named)
    assert executed == pytest.approx(found.program.matmul_flops, rel=0.01)
    named = [d for d in found.xla_differences if d.cause != causes.UNEXPLAINED]
    reported = found.program.matmul_flops + sum(d.flops for d in named)
    assert reported == pytest.approx(found.xla_flops, rel=0.01)
    memory = found.program.memory
    assert memory.arguments == sum(memory.arguments_by.values())
    assert memory.arguments_by["state.params"] == 4 * setup.parameters


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_its_model_flops_are_the_same_on_every_mesh(path):
    whole = command.load(path)
    whole = dataclasses.replace(whole, batch_size=rows(whole), eval_batch_size=None)
    counts = []
    # A device has whole clients.
    split = () if whole.local.active else ((4, 8), (8, 8))
    for fsdp, devices in ((1, 1), (1, 8), *split):
        spread = dataclasses.replace(whole, parallel=parallel.Parallel(fsdp=fsdp))
        setup = prepared(spread, jax.devices()[:devices])
        found = compute.count(setup.step().trace(*setup.abstract_example()))
        # Clients' means, and sums over parts, are written for each device, and so counted.
        apart = whole.local.active or whole.accumulate > 1
        counts.append(found.matmul if apart else found)
    assert counts == counts[:1] * len(counts)


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_it_survives_json(path):
    whole = command.load(path)
    assert experiment.from_json(json.loads(experiment.dumps(whole))) == whole


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_its_docstring_holds_command_and_result(path):
    text, e = path.read_text().split('"""')[1], command.load(path)
    assert f"python scripts/train.py configs/{path.name}" in text
    assert ("planned, never trained here" in text) == large(e)
    if large(e):
        assert "https://" in text, "where its sizes are from"
    else:
        assert re.search(r"\d\.\d+", text), "a measured result"
        assert e.target is not None


def test_what_is_planned_is_prepared_at_its_size_and_without_its_data(monkeypatch):
    monkeypatch.delenv("ERGON_DATA")
    planned = [path for path in CONFIGS if large(command.load(path))]
    assert {path.stem for path in planned} == PLANNED.keys()
    for path in planned:
        e = command.load(path)
        setup = prepare(outlined(e), jax.devices())
        assert setup.parameters == PLANNED[path.stem], path
        assert setup.mesh.shape["fsdp"] == e.parallel.fsdp
        assert len(setup.first["inputs"]) == e.batch_size
        with pytest.raises(experiment.UserError, match=r"no data at|no folder"):
            prepare(e, jax.devices())
