"""Clients that train by themselves: against NumPy, over devices, and in what they send."""

import dataclasses
import functools

import ahead
import jax
import numpy as np
import pytest
import tiny

from research import UserError, compute
from research.data.shares import Shares, deal
from research.local import Local
from research.optim import Optax
from research.parallel import Parallel
from research.setup import prepare

NESTEROV = {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}
DILOCO = Optax("sgd", NESTEROV)


def trained(e, devices, steps=3):
    """The state after some rounds, and their losses."""
    setup = prepare(e, jax.devices()[:devices])
    state, step, losses = setup.initial(), setup.step(), []
    for batch in setup.feed(0, steps):
        state, metrics = step(state, batch, setup.root)
        losses.append(float(metrics["loss"].mean()))
    return jax.device_get(state), losses


def test_a_round_is_that_of_numpy():
    """Of outputs w x, each client by itself, and Nesterov's momentum (Sutskever et al. 2013) around
    them."""
    clients, steps, rate = 2, 4, 0.05
    e = tiny.scale(
        optimizer=tiny.sgd(rate), local=Local(clients=clients, steps=steps, outer=DILOCO)
    )
    setup = prepare(e, tiny.ONE)
    w, velocity = np.full(5, 0.5), np.zeros(5)
    for t in range(3):
        batch = setup.splits["train"].batch(t, 16, e.seed)
        ends = []
        for c in range(clients):
            rows = slice(c * 8, (c + 1) * 8)
            x, y, own = batch["inputs"][rows], batch["targets"][rows], w.copy()
            for i in range(steps):
                a, b = x[i::steps], y[i::steps]
                own -= rate * 2 * np.mean((a * own - b) * a, axis=0) / 5
            ends.append(own)
        change = w - np.mean(ends, axis=0)
        velocity = change + 0.9 * velocity
        w = w - 0.7 * (change + 0.9 * velocity)
    state, _ = trained(e, 1)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)


def test_one_step_of_plain_descent_between_means_is_the_whole_batchs():
    plain = tiny.lines(optimizer=tiny.sgd(0.1))
    (one, alone), (each, parts) = (
        trained(e, 1) for e in (plain, dataclasses.replace(plain, local=Local(clients=4)))
    )
    np.testing.assert_allclose(parts, alone, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), each.params, one.params)


FAMILIES = {
    "mlp": tiny.mlp,
    "norm": tiny.norm,
    "lstm": tiny.lstm,
    "transformer": tiny.transformer,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_clients_are_the_same_on_one_device_and_on_several(name):
    rate = {"optimizer": tiny.sgd(0.1), "batch_size": 32}
    e = FAMILIES[name](**rate, local=Local(clients=4, steps=2, outer=DILOCO))
    one, alone = trained(e, 1)
    for devices in (2, 4):
        spread = dataclasses.replace(e, parallel=Parallel(replica=2, data=devices // 2))
        several, losses = trained(spread, devices)
        np.testing.assert_allclose(losses, alone, rtol=1e-5)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        for part in ("params", "model_state", "clients", "carry"):
            jax.tree.map(close, getattr(several, part), getattr(one, part))


def test_clients_keep_their_optimizers_states():
    state, _ = trained(tiny.mlp(batch_size=32, local=Local(clients=4, steps=2)), 2)
    adam = state.clients[0][0]
    np.testing.assert_array_equal(adam.count, [6] * 4)
    moments = jax.tree.leaves(adam.mu)
    assert all(len(m) == 4 and np.any(m[0] != m[1]) for m in moments)


def test_resumed_equals_uninterrupted(tmp_path):
    fields = {"batch_size": 32, "local": Local(clients=4, steps=2, outer=DILOCO)}
    whole = tiny.final_state(tiny.mlp(steps=6, **fields), tmp_path / "whole")
    tiny.final_state(tiny.mlp(steps=3, **fields), tmp_path / "parts")
    parts = tiny.final_state(tiny.mlp(steps=6, **fields), tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_what_is_sent_in_a_round_is_one_copy_of_the_parameters(target):
    """However many steps it has: for each of them the less."""
    sent, work = {}, {}
    for steps in (1, 4):
        e = tiny.mlp(batch_size=16 * steps, local=Local(clients=4, steps=steps))
        setup = prepare(e, ahead.devices(target))
        traced = setup.step().trace(*setup.abstract_example())
        program = ahead.compile(traced, target)
        found = compute.report(traced, compiled=program, mesh=setup.mesh)
        assert {each.kind for each in found.program.collectives} == {"all-reduce"}
        sent[steps] = sum(each.bytes * each.count for each in found.program.collectives)
        work[steps] = found.count.model_flops
    scalars = 2 * 2 * 4  # totals and weights of a loss and of an accuracy
    parameters = sum(x.size * 4 for x in jax.tree.leaves(setup.abstract.params))
    assert parameters <= sent[1] == sent[4] <= parameters + scalars
    assert work[4] == 4 * work[1]


@pytest.mark.parametrize(
    ("fields", "devices", "message"),
    [
        ({"local": Local(clients=3)}, 2, "local.clients 3 does not divide over 2 devices"),
        (
            {"local": Local(clients=4, steps=3)},
            1,
            "batch_size 16 does not divide into 3 steps of 4 clients; nearest that does: 12",
        ),
        (
            {"local": Local(clients=2), "parallel": Parallel(fsdp=2)},
            2,
            "parallel.fsdp 2: a device has whole clients",
        ),
    ],
)
def test_what_does_not_divide_is_refused(fields, devices, message):
    with pytest.raises(UserError, match=message):
        prepare(tiny.mlp(**fields), jax.devices()[:devices])


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(UserError, match=r"local\.steps needs local\.clients of 2 or more"):
        tiny.mlp(local=Local(steps=2))
    with pytest.raises(UserError, match=r"local\.clients and accumulate cannot be combined"):
        tiny.mlp(local=Local(clients=2), accumulate=2)


@pytest.mark.parametrize("alpha", [None, 100.0, 0.1])
def test_every_row_is_dealt_once(alpha):
    classes = np.arange(1000) % 10
    shares = deal(classes, 8, alpha, seed=0)
    assert sorted(np.concatenate(shares)) == list(range(1000))
    # The share of the commonest class in a client's: a tenth where they are alike.
    most = np.mean([np.bincount(classes[share]).max() / len(share) for share in shares])
    assert most < 0.25 if alpha != 0.1 else most > 0.4


def test_a_part_of_a_batch_is_of_one_share():
    dealt = Shares(data=tiny.Points(), clients=4).load()["train"]
    for step in range(20):
        rows = dealt.batch(step, 16, seed=3)["inputs"]
        for i, share in enumerate(dealt.shares):
            own = dealt.rows["inputs"][share]
            for row in rows[4 * i : 4 * i + 4]:
                assert (own == row).all(1).any()
    half = dealt.batch(5, 16, 3, slice(8, 16))["inputs"]
    np.testing.assert_array_equal(half, dealt.batch(5, 16, 3)["inputs"][8:])


def test_no_client_is_left_without_examples():
    assert min(map(len, deal(np.zeros(9, int), 8, 0.01, seed=1))) >= 1
    with pytest.raises(UserError, match="exceeds the 7 training examples"):
        deal(np.zeros(7, int), 8, None, seed=0)


def test_as_many_shares_as_clients():
    e = tiny.mlp(data=Shares(data=tiny.Points(), clients=2), local=Local(clients=4))
    with pytest.raises(UserError, match=r"local\.clients 4 is not data\.clients 2: every client"):
        prepare(e, tiny.ONE)


def test_shares_of_texts_are_refused():
    with pytest.raises(UserError, match="shares are of examples in memory"):
        Shares(data=tiny.Words(), clients=2).load()
    with pytest.raises(UserError, match=r"data\.alpha: only classes are dealt unevenly"):
        Shares(data=tiny.Lines(), clients=2, alpha=0.5).load()
