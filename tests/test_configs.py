"""Every config: one shrunken step of it trains, and its file says what it is."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from made import prepared

from research import command, compute, experiment, init_from, parallel
from research.compute import causes

CONFIGS = sorted(p for p in pathlib.Path("configs").glob("*.py") if p.stem != "__init__")
if not CONFIGS:
    CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("[a-z]*.py"))


def ids(path):
    return path.stem


def rows(e):
    """The fewest that a step of every client is of a row, and 8 at least."""
    return max(8, e.local.clients * e.local.steps)


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
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


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
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
        # Clients' means are written for each device, and so counted.
        counts.append(found.model_flops if whole.local.active else found)
    assert counts == counts[:1] * len(counts)


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_it_survives_json(path):
    whole = command.load(path)
    assert experiment.from_json(json.loads(experiment.dumps(whole))) == whole


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_its_docstring_holds_command_and_result(path):
    text = path.read_text().split('"""')[1]
    assert f"python scripts/train.py configs/{path.name}" in text
    assert re.search(r"\d\.\d+", text), "a measured result"
    assert command.load(path).target is not None
