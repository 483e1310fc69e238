"""The optimizers that are compared: what each run of them is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from research.bench import optimizers
from research.bench.methods import METHODS, PLAIN, Method, planned
from research.optim import Optax, Optimizer, path_of
from research.setup import prepare


def rates(name, steps):
    e = planned(tiny.mlp(), METHODS[name], 0.5, steps, 0)
    return [float(e.optimizer.learning_rate(i)) for i in range(steps)]


@pytest.mark.parametrize("name", METHODS)
def test_a_rate_rises_for_a_twentieth_and_falls_but_for_schedule_free(name):
    found = rates(name, 100)
    assert found[:6] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    rest = (1 + np.cos(np.pi * np.arange(95) / 95)) / 4
    free = name.startswith("schedule-free")
    assert found[5:] == pytest.approx([0.5] * 95 if free else rest, abs=1e-6)
    assert rates(name, 19)[0] == 0.5, "too few steps for a warm-up"


def test_what_is_not_the_optimizers_is_the_configs():
    base = tiny.mlp(optimizer=dataclasses.replace(tiny.ADAMW, clip_norm=0.7, no_decay="kernel"))
    for name, method in METHODS.items():
        e = planned(base, method, 0.5, 40, 7)
        assert (e.seed, e.steps, e.log_every) == (7, 40, 2)
        assert (e.optimizer.clip_norm, e.optimizer.no_decay) == (0.7, "kernel")
        assert (e.model, e.task, e.data) == (base.model, base.task, base.data)
        sizes = {"sgd, full batch": 64, "sgd, single example": 1}
        assert e.batch_size == sizes.get(name, 16)


def test_decoupled_weight_decay_is_the_configs():
    decayed = set()
    params = {"layers": {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones(3)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name, method in METHODS.items():
        for decay in (0.1, 0.0):
            update = Optax("adamw", {"learning_rate": 1.0, "weight_decay": decay})
            base = tiny.mlp(optimizer=Optimizer(update=update))
            tx = planned(base, method, 0.5, 10, 0).optimizer.make()
            step, _ = tx.update(zeros, tx.init(params), params)
            assert not np.any(step["layers"]["bias"])
            if np.any(step["layers"]["kernel"]):
                assert decay
                decayed.add(name)
    assert decayed == {"adamw", "lamb", "lion", "muon", "schedule-free adamw"}


@pytest.mark.parametrize("model", optimizers.CONFIGS)
def test_muon_takes_the_hidden_matrices_of_each_model(model):
    base = optimizers.base(model, 300)
    setup = prepare(planned(base, METHODS["muon"], 0.01, 300, 0), tiny.ONE)
    state = setup.abstract.opt_state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    # Adam's second moments are those of everything that is not Muon's.
    left = {path_of(p).split("/nu/")[1] for p, _ in leaves if "/nu/" in path_of(p)}
    paths = [path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(setup.abstract.params)]
    ends = ("embed", "head", "output")
    assert left == {p for p in paths if "kernel" not in p or p.startswith(ends)}
    assert optimizers.flops(setup.experiment) > optimizers.flops(planned(base, PLAIN, 1, 300, 0))


def test_a_whole_batch_of_text_is_one_pass():
    for family in (tiny.lstm, tiny.transformer):
        base = family(data=tiny.Words(stream=family is tiny.lstm))
        assert planned(base, METHODS["sgd, full batch"], 0.1, 1, 0).batch_size == 599 // 8


def test_the_customary_rates_are_of_methods():
    assert all(isinstance(m, Method) and m.rate > 0 for m in METHODS.values())
