"""Clients that train by themselves, and every so often put together what each has learnt.

Local SGD (Stich 2019), federated averaging (McMahan et al. 2017), DiLoCo (Douillard et al. 2023).
Written for one device with `shard_map`: what is sent between devices is what `psum` says, once a
round.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge
from jax.sharding import PartitionSpec as P

from research import draws, gradient, parallel
from research.optim import Optax, Update

if TYPE_CHECKING:
    from research.setup import Setup
    from research.train import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """A round, which is a step of the run: every client starts from the same parameters and makes
    `steps` of its own with the experiment's optimizer, on its own share of the batch; then the
    mean of their changes is a gradient for `outer`.

    With the outer optimizer's default, one step by their whole length, the parameters after a round
    are the mean of the clients': federated averaging. DiLoCo's is sgd of learning_rate 0.7,
    momentum 0.9 and nesterov, around AdamW.
    """

    clients: Annotated[int, Ge(1)] = 1
    """1: there are none, and every step is of the whole batch."""
    steps: Annotated[int, Ge(1)] = 1
    """Of a client in a round; a batch is of all steps of all clients. Steps that a learning rate's
    schedule speaks of are these."""
    outer: Update = Optax("sgd", {"learning_rate": 1.0})

    @property
    def active(self) -> bool:
        return self.clients > 1


def start(setup: "Setup", params: Any) -> Any:
    """Every client's optimizer state, on a new first axis."""
    n = setup.experiment.local.clients
    state = setup.experiment.optimizer.make().init(params)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), state)


def together(setup: "Setup", state: "State", batch: Any, key: jax.Array) -> Any:
    """One round: (parameters before it less the mean of the clients' after it, the clients'
    optimizer states, (the round's metrics, model state, carry)).

    The model's other variables, such as running statistics, become the mean of the clients' too.
    """
    n, steps = setup.experiment.local.clients, setup.experiment.local.steps
    axes = parallel.row_axes(setup.mesh)
    here = n // parallel.copies(setup.mesh.shape)
    rows = setup.batch_size // n // steps
    optimizer = setup.experiment.optimizer.make()
    grad: Any = jax.grad(gradient.loss_of(setup, None, weighted=False), has_aux=True)

    def client(
        learnt: Any, key: jax.Array, opt_state: Any, carry: Any, batch: Any, first: jax.Array
    ) -> Any:
        """The steps of one client; first: its first row in a step's rows of all clients."""

        def step(so_far: Any, part: Any) -> Any:
            (params, model_state), opt_state = so_far
            batch, carry, key = part
            key = draws.of_rows(key, first, rows)
            grads, (metrics, model_state, carry) = grad(params, model_state, carry, batch, key)
            with jax.named_scope("optimizer"):
                updates, opt_state = optimizer.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
            return ((params, model_state), opt_state), (metrics, carry)

        given = *gradient.parts((batch, carry), steps), jax.random.split(key, steps)
        (learnt, opt_state), (metrics, carry) = jax.lax.scan(step, (learnt, opt_state), given)
        metrics = jax.tree.map(lambda x: x.sum(0), metrics)
        return (learnt, metrics), (opt_state, gradient.whole(carry))

    def device(before: Any, key: jax.Array, clients: Any, carry: Any, batch: Any) -> Any:
        """The clients of one device, one beside the other, and what all devices' come to."""
        place = jax.lax.axis_index(axes) if axes else 0
        first = (place * here + jnp.arange(here)) * rows
        own = jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:]), (carry, batch))
        each: Any = jax.vmap(client, in_axes=(None, None, 0, 0, 0, 0))
        found, (clients, carry) = each(before, key, clients, *own, first)
        sums = jax.tree.map(lambda x: x.sum(0), found)
        sums = jax.lax.psum(sums, axes) if axes else sums
        return sums, clients, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)

    same, split = P(), P(axes)
    over_devices: Any = jax.shard_map(
        device,
        mesh=setup.mesh,
        in_specs=(same, same, split, split, split),
        out_specs=(same, split, split),
        check_vma=False,  # a model may start a loop from zeros, which this would ask to be marked
    )
    before = state.params, state.model_state
    found = over_devices(before, key, state.clients, state.carry, batch)
    (learnt, metrics), clients, carry = found
    params, model_state = jax.tree.map(lambda x: (x / n).astype(x.dtype), learnt)
    change = jax.tree.map(jnp.subtract, state.params, params)
    return change, clients, (metrics, model_state, carry)
