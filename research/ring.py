"""Attention over a sequence that devices share: keys and values go round them in a ring.

Liu et al. 2023, "Ring Attention with Blockwise Transformers"; the parts of a softmax are added up
as in Rabe and Staats 2021, and its gradient is recomputed as in Dao et al. 2022.

Causal attention asks nothing of later keys, so that the devices with a sequence's beginning would
wait for those with its end. Each therefore has two stretches, one from the beginning and one from
the end (`order`): of the four pairs of its stretches and those that have come round to it, two are
needed whichever they are, and on its own three.

Shapes: B batch, T time, H a stretch of it, K key heads, G queries a key head, N = K x G, h head
width. A device's arrays have its two stretches as their first axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

AXIS = "context"


def order(time: int, devices: int) -> np.ndarray:
    """Places in a sequence, as devices have them in turn: the i-th of n has stretches i and
    2n - 1 - i of 2n. [time] integers; 2n divides time."""
    stretches = np.arange(time).reshape(2 * devices, -1)
    return np.stack([stretches[:devices], stretches[devices:][::-1]], axis=1).reshape(-1)


class Ring(NamedTuple):
    """What `models.layers.attention` computes, of arrays whose time is split over the axis
    `context`: in the `order` above where it is causal."""

    mesh: Mesh
    rows: tuple[str, ...]
    """The axes over which rows are split; heads are, over `tensor`."""

    def __call__(
        self,
        q_BTNh: jax.Array,
        k_BTKh: jax.Array,
        v_BTKh: jax.Array,
        segments: tuple[jax.Array, jax.Array] | None = None,
        causal: bool = False,
    ) -> jax.Array:
        if segments is not None:
            first, second = (jnp.broadcast_to(x, k_BTKh.shape[:2]) for x in segments)
            segments = first.astype(jnp.int32), second.astype(jnp.int32)
        q_BTKGh = q_BTNh.reshape(*k_BTKh.shape[:3], -1, q_BTNh.shape[-1])
        out_BTKGh = _attention(q_BTKGh, k_BTKh, v_BTKh, segments, self, causal)
        return out_BTKGh.reshape(q_BTNh.shape)

    def split(self, part: Callable, heads: str) -> Callable:
        """`part` on every device, of its stretches; heads: which of its arguments have heads, and,
        after ">", which of its results, as in "110>1"."""
        spec = {"1": P(self.rows, AXIS, "tensor"), "0": P(self.rows, AXIS)}
        given, found = (tuple(spec[kind] for kind in kinds) for kinds in heads.split(">"))

        def halved(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(len(x), 2, -1, *x.shape[2:]), 1, 0)

        def joined(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

        def device(*arrays: Any) -> Any:
            return jax.tree.map(joined, part(*jax.tree.map(halved, arrays), self.mesh.shape[AXIS]))

        return jax.shard_map(
            device, mesh=self.mesh, in_specs=given, out_specs=found, check_vma=False
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Any, k: Any, v: Any, segments: Any, ring: Ring, causal: bool) -> jax.Array:
    return _forward(q, k, v, segments, ring, causal)[0]


def _forward(q: Any, k: Any, v: Any, segments: Any, ring: Ring, causal: bool) -> Any:
    part = ring.split(functools.partial(_values, causal), "1110>11")
    out, total = part(q, k, v, segments)
    return out, (q, k, v, segments, out, total)


def _backward(ring: Ring, causal: bool, kept: Any, g: jax.Array) -> Any:
    part = ring.split(functools.partial(_gradients, causal), "1110111>111")
    return *part(*kept, g), None


_attention.defvjp(_forward, _backward)


def _values(causal: bool, q: Any, k: Any, v: Any, segments: Any, size: int) -> Any:
    """A device's outputs [2, B, H, K, G, h], and logarithms of the sums of exponentials of scores
    [2, B, H, K, G]."""

    def add(so_far: Any, keys: Any, pair: _Pair) -> Any:
        k, v, segments_k = _at(keys, pair.keys)
        old, most, total = _at(so_far, pair.queries)
        q_, segments_q = _at((q, segments and segments[0]), pair.queries)
        scores = _scores(q_, k, segments_q, segments_k, pair)
        largest = jnp.maximum(most, scores.max(-1))
        weights, scale = jnp.exp(scores - largest[..., None]), jnp.exp(most - largest)
        weights_ = weights.astype(v.dtype)
        new = jnp.einsum("bqkgs,bskh->bqkgh", weights_, v, preferred_element_type=old.dtype)
        found = old * scale[..., None] + new, largest, total * scale + weights.sum(-1)
        return _with(so_far, pair.queries, found)

    wide = jnp.promote_types(q.dtype, jnp.float32)
    none = jnp.zeros(q.shape[:-1], wide)
    so_far = jnp.zeros(q.shape, wide), none - FAR, none

    def at(step: Any, so_far: Any, keys: Any) -> Any:
        for pair in _pairs(causal, step):
            so_far = add(so_far, keys, pair)
        return so_far

    def turn(step: Any, both: Any) -> Any:
        so_far, keys = both
        return at(step, so_far, keys), _next(keys, size)

    keys = k, v, None if segments is None else segments[1]
    # The next keys are on their way while these are computed with.
    both = jax.lax.fori_loop(1, size - 1, turn, turn(0, (so_far, keys)))
    out, largest, total = at(size - 1, *both)
    return (out / total[..., None]).astype(q.dtype), largest + jnp.log(total)


def _gradients(
    causal: bool, q: Any, k: Any, v: Any, segments: Any, out: Any, total: Any, g: Any, size: int
) -> Any:
    """A device's gradients of q, k and v; those of k and v go round with them, and come home."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    g = g.astype(wide)
    inner = jnp.sum(g * out.astype(wide), -1)

    def add(dq: Any, keys: Any, grads: Any, pair: _Pair) -> Any:
        k, v, segments_k = _at(keys, pair.keys)
        of_queries = q, segments and segments[0], total, inner, g
        q_, segments_q, total_, inner_, g_ = _at(of_queries, pair.queries)
        scores = _scores(q_, k, segments_q, segments_k, pair)
        weights = jnp.exp(scores - total_[..., None])
        dv = jnp.einsum("bqkgs,bqkgh->bskh", weights, g_)
        dweights = jnp.einsum("bqkgh,bskh->bqkgs", g_, v.astype(wide))
        dscores = weights * (dweights - inner_[..., None]) * q.shape[-1] ** -0.5
        dk = jnp.einsum("bqkgs,bqkgh->bskh", dscores, q_.astype(wide))
        more = jnp.einsum("bqkgs,bskh->bqkgh", dscores, k.astype(wide))
        dq = _with(dq, pair.queries, _at(dq, pair.queries) + more)
        summed = jax.tree.map(jnp.add, _at(grads, pair.keys), (dk, dv))
        return dq, _with(grads, pair.keys, summed)

    def turn(step: Any, all_: Any) -> Any:
        dq, keys, grads = all_
        for pair in _pairs(causal, step):
            dq, grads = add(dq, keys, grads, pair)
        return dq, keys, _next(grads, size)

    def moved(step: Any, all_: Any) -> Any:
        dq, keys, grads = all_
        return turn(step, (dq, _next(keys, size), grads))

    keys = k, v, None if segments is None else segments[1]
    zeros = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    first = turn(0, (zeros[0], keys, zeros[1:]))
    dq, _, (dk, dv) = jax.lax.fori_loop(1, size, moved, first)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


FAR = 1e30
"""Below every score, and finite, so that a difference of two such is no NaN."""


class _Pair(NamedTuple):
    """A stretch of a device's queries and one of the keys that have come round to it: 0 or 1."""

    queries: Any
    keys: Any
    diagonal: bool = False
    """Whether they are of the same places, so that causal attention sees half."""


def _pairs(causal: bool, step: Any) -> list[_Pair]:
    """What a device computes after so many steps of keys round the ring: integer 0, or traced."""
    if not causal:
        return [_Pair(queries, keys) for queries in (0, 1) for keys in (0, 1)]
    if isinstance(step, int) and step == 0:
        return [_Pair(0, 0, True), _Pair(1, 0), _Pair(1, 1, True)]
    # The keys of an earlier device, or, round the end, of a later one. An earlier one's first
    # stretch is before both of ours; both of a later one's are before our second.
    same = jnp.where(step <= jax.lax.axis_index(AXIS), 0, 1)
    return [_Pair(1, 0), _Pair(same, same)]


def _at(tree: Any, i: Any) -> Any:
    """One stretch of each array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _with(tree: Any, i: Any, parts: Any) -> Any:
    """The arrays, with others in the place of one stretch."""

    def put(x: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(x, part, i, axis=0)

    return jax.tree.map(put, tree, parts)


def _scores(q: Any, k: Any, segments_q: Any, segments_k: Any, pair: _Pair) -> jax.Array:
    """[B, H, K, G, keys]: far below all others where they are not to be seen."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqkgh,bskh->bqkgs", q, k, preferred_element_type=wide)
    scores *= q.shape[-1] ** -0.5
    if pair.diagonal:
        seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        scores = jnp.where(seen[None, :, None, None], scores, -FAR)
    if segments_q is not None:
        seen = segments_q[:, :, None] == segments_k[:, None, :]
        scores = jnp.where(seen[:, :, None, None], scores, -FAR)
    return scores


def _next(x: Any, size: int) -> Any:
    """From every device to the one after it."""
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)])
