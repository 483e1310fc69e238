"""Clients at equal samples: what is compared, and on how much."""

import dataclasses

import jax
import pytest
import tiny

from research import UserError
from research.bench import clients
from research.data.shares import Shares
from research.local import Local
from research.setup import prepare


def dealt():
    return tiny.mlp(
        data=Shares(data=tiny.Points(), clients=8, alpha=0.1),
        local=Local(clients=8, steps=2),
        batch_size=32,
        steps=4,
    )


def test_clients_that_meet_seldom_send_less_on_as_many_samples():
    said = []
    rows = list(clients.measure(dealt(), (1, 4), (0, 1), said.append))
    assert [(row.alpha, row.steps) for row in rows] == [(None, 1), (None, 4), (0.1, 1), (0.1, 4)]
    assert len(said) == 8
    setup = prepare(dealt(), jax.devices()[:1])
    for row in rows:
        assert row.sent == 4 * setup.parameters // row.steps
        assert row.spread > 0
    assert len({row.loss for row in rows}) == 4
    assert len(clients.table(rows).splitlines()) == 5


@pytest.mark.parametrize(
    ("fields", "steps", "seeds", "message"),
    [
        ({"local": Local()}, (1,), (0,), "needs a config with local.clients and shares of data"),
        ({"data": tiny.Points()}, (1,), (0,), "needs a config with local.clients and shares"),
        ({}, (1, 3), (0,), "--every 3 does not divide the 8 steps of a client"),
        ({}, (), (0,), "--every needs at least one number"),
        ({}, (1,), (), "--seeds needs at least one number"),
    ],
)
def test_what_cannot_be_compared_is_refused(fields, steps, seeds, message):
    e = dataclasses.replace(dealt(), **fields)
    with pytest.raises(UserError, match=message):
        list(clients.measure(e, steps, seeds, print))
