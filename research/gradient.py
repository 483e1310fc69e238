"""The gradient of a batch: of its loss, or of its parts one after another."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research import draws, modules, parallel
from research.modules import merged, variables
from research.tasks import skipped

if TYPE_CHECKING:
    from research.setup import Setup
    from research.train import State


def loss_of(setup: "Setup", settle: modules.Settle | None, weighted: bool) -> Any:
    """(params, model state, carry, batch, key) -> (loss, (metrics, model state, carry)).

    settle: as `modules.merged` has it. weighted: a loss is a mean over its batch; multiply it by
    its weight, that those of parts can be added.
    """
    e = setup.experiment

    def loss(params: Any, model_state: Any, carry: Any, batch: Any, key: jax.Array) -> Any:
        params = e.optimizer.held(params)
        with merged(
            setup.graph,
            params,
            model_state,
            training=True,
            frozen=e.optimizer.frozen,
            settle=settle,
        ) as model:
            loss, (metrics, carry) = e.task(model, batch, nnx.Rngs(dropout=key), carry)
        _, model_state = variables(model)
        metrics = metrics | skipped(batch)
        loss += e.optimizer.penalty(params)
        return loss * metrics["loss"].weight if weighted else loss, (metrics, model_state, carry)

    # Layers that are recomputed gather anew by that. Around them this policy would replace theirs,
    # as JAX has it of one within another, and all that they leave out would be kept.
    recomputed = getattr(setup.model, "remat", "none") != "none"
    if setup.mesh.shape["fsdp"] > 1 and not recomputed:
        return jax.checkpoint(loss, policy=modules.keep)
    return loss


def gradients(setup: "Setup", state: "State", params: Any, batch: Any, key: jax.Array) -> Any:
    """The gradient at `params`, and (metrics, model state, carry) after the batch."""
    e = setup.experiment
    axes = setup.axes_apart
    if setup.in_turn:
        batch, order = parallel.in_order(batch, setup.mesh)
        key = draws.of_steps(key, order.tolist())
    settle = parallel.settled(setup.mesh, axes, e.parallel.parts)

    given = params, state.model_state, state.carry, batch, key
    if e.accumulate == 1:
        return jax.grad(loss_of(setup, settle, weighted=False), has_aux=True)(*given)

    def grad(*given: Any) -> Any:
        grads, rest = jax.grad(loss_of(setup, settle, weighted=True), has_aux=True)(*given)
        # A sum over parts would otherwise be placed anew for each.
        return parallel.constrained(grads, setup.shardings.params, axes), rest

    summed = functools.partial(accumulated, grad, e.accumulate)
    if axes:
        rows = setup.batch_size // parallel.copies(setup.mesh.shape) // e.accumulate
        summed = apart(summed, setup.mesh, axes, rows)
    (total, metrics), model_state, carry = summed(*given)
    weight = jnp.maximum(metrics["loss"].weight, 1e-9)
    grads = jax.tree.map(lambda t, p: (t / weight).astype(p.dtype), total, params)
    return grads, (metrics, model_state, carry)


def accumulated(
    grad: Any, n: int, params: Any, model_state: Any, carry: Any, batch: Any, key: jax.Array
) -> Any:
    """Sums over n parts of a batch, (gradients, metrics), and the model state and carry after."""

    def zeros(p: jax.Array) -> jax.Array:
        return jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))

    def add(so_far: Any, part: Any) -> Any:
        total, model_state = so_far
        batch, carry, key = part
        grads, (metrics, model_state, carry) = grad(params, model_state, carry, batch, key)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
        return (total, model_state), (metrics, carry)

    given = *parts((batch, carry), n), jax.random.split(key, n)
    before = jax.tree.map(zeros, params), model_state
    (total, model_state), (metrics, carry) = jax.lax.scan(add, before, given)
    return (total, jax.tree.map(lambda x: x.sum(0), metrics)), model_state, whole(carry)


def parts(tree: Any, n: int) -> Any:
    """Arrays of rows in n parts, on a new first axis: part i has rows i, i + n, ..., so that each
    device keeps to the rows that it has."""
    return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), tree)


def whole(tree: Any) -> Any:
    """The inverse of `parts`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def apart(summed: Any, mesh: Mesh, axes: tuple[str, ...], rows: int) -> Any:
    """`accumulated` on each device by itself, of its own rows, and one sum over devices at the end.

    Written for all devices as one, the sum over them is in the loop: XLA for CPU, TPU and CUDA
    leaves it there, once a part. rows: of a part, on one device.
    """

    def alone(params: Any, model_state: Any, carry: Any, batch: Any, key: jax.Array) -> Any:
        first = jax.lax.axis_index(axes) * rows
        key = draws.of_rows(key, first, rows)
        sums, model_state, carry = summed(params, model_state, carry, batch, key)
        return jax.lax.psum(sums, axes), model_state, carry

    split, same = P(axes), P()
    return jax.shard_map(
        alone,
        mesh=mesh,
        in_specs=(same, same, split, split, same),
        out_specs=(same, same, split),
        axis_names=set(axes),
        # A model may start a loop from zeros, which this would ask to be marked.
        check_vma=False,
    )
