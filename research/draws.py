"""Random draws of a part of a batch, which are that part of the draws of all of it.

Where the compiler divides a program, a draw is the same on any number of devices: a device makes
the numbers of its part. Where a program is written for one device of many (`jax.shard_map`), a
draw is of the device's rows only, and the same key would give every device the same numbers; and
where devices have a sequence's steps in another order, a draw would be in that order. A key made
here knows the places that it draws for.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as extend


def of_rows(key: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """A key whose draws of `count` rows, and what is derived from it, are rows `first` to
    `first + count` of what `key` draws of all rows. Other draws are those of `key`.

    key: of JAX's default kind, threefry; first: int32. Rows are a draw's first axis; an array with
    as many rows that are not the batch's cannot be told apart.
    """
    return _made(key, first, _kind(count, None))


def of_steps(key: jax.Array, order: Sequence[int]) -> jax.Array:
    """The same, where the i-th of a draw's second axis is the `order[i]`-th of what `key` draws,
    in draws of two axes or more whose second is as long."""
    return _made(key, jnp.int32(0), _kind(None, tuple(order)))


def _made(key: jax.Array, first: jax.Array, kind: Any) -> jax.Array:
    data = jnp.concatenate([jax.random.key_data(key), first.astype(jnp.uint32)[None]])
    return jax.random.wrap_key_data(data, impl=kind)


@functools.cache
def _kind(count: int | None, order: tuple[int, ...] | None) -> Any:
    """Keys (k1, k2, first row)."""

    def plain(data: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(data[:2], impl="threefry2x32")

    def with_first(data: jax.Array, keys: jax.Array) -> jax.Array:
        found = jax.random.key_data(keys)
        first = jnp.broadcast_to(data[2], (*found.shape[:-1], 1))
        return jnp.concatenate([found, first], axis=-1)

    def seed(number: jax.Array) -> jax.Array:
        key = jax.random.key_data(jax.random.key(number, impl="threefry2x32"))
        return jnp.concatenate([key, jnp.zeros((1,), jnp.uint32)])

    def split(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return with_first(data, jax.random.split(plain(data), shape))

    def fold_in(data: jax.Array, number: Any) -> jax.Array:
        return with_first(data, jax.random.fold_in(plain(data), number))

    def bits(data: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
        if count is not None and shape[:1] == (count,):
            return _bits(data, width, shape, {})
        if order is not None and shape[1:2] == (len(order),):
            return _bits(data, width, shape, {1: np.array(order, np.uint32)})
        return jax.random.bits(plain(data), shape, jnp.dtype(f"uint{width}"))

    return extend.define_prng_impl(
        key_shape=(3,),
        seed=seed,
        split=split,
        random_bits=bits,
        fold_in=fold_in,
        name="rows" if count is not None else "steps",
        tag="rows" if count is not None else "steps",
    )


def _bits(
    data: jax.Array, width: int, shape: tuple[int, ...], orders: dict[int, np.ndarray]
) -> jax.Array:
    """What `jax.random.bits` draws of all rows, from the first of ours on: threefry's hash of each
    number's place (Salmon et al. 2011), a 64-bit integer in two halves.

    orders: of an axis, the places of what is drawn along it.
    """
    high, low = _product(data[2], math.prod(shape[1:]))
    place = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        along = orders.get(axis, np.arange(length, dtype=np.uint32))
        step = np.uint32(math.prod(shape[axis + 1 :]))
        place += jax.lax.broadcast_in_dim(jnp.asarray(along * step), shape, (axis,))
    places = place + low
    highs = jnp.broadcast_to(high, shape) + (places < place).astype(jnp.uint32)
    one, two = extend.threefry2x32_p.bind(data[0], data[1], highs, places)
    if width == 64:
        return (one.astype(jnp.uint64) << 32) | two.astype(jnp.uint64)
    return (one ^ two).astype(f"uint{width}")


def _product(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """a x b of 32 bits each, in two halves of 32 bits."""
    b_high, b_low = jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    a_high, a_low = a >> 16, a & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    cross = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (cross >> 16), a * jnp.uint32(b)
