"""Draws of a device's rows are those rows of the draws of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import draws

DRAWS = {
    "bits": lambda key, rows: jax.random.bits(key, (rows, 3)),
    "bytes": lambda key, rows: jax.random.bits(key, (rows, 3), "uint8"),
    "bernoulli": lambda key, rows: jax.random.bernoulli(key, 0.3, (rows, 4, 5)),
    "normal": lambda key, rows: jax.random.normal(key, (rows,)),
    "randint": lambda key, rows: jax.random.randint(key, (rows, 1), -4, 5),
    "derived": lambda key, rows: jax.random.uniform(jax.random.fold_in(key, 7), (rows, 2)),
    "split": lambda key, rows: jax.vmap(lambda k: jax.random.uniform(k, (rows,)), out_axes=1)(
        jax.random.split(key, 4)
    ),
}


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_devices_draws_are_its_rows_of_all(draw, first):
    key = jax.random.fold_in(jax.random.key(3), 1)
    whole = draw(key, 13)

    @jax.jit
    def part(first):
        return draw(draws.of_rows(key, first, 6), 6)

    np.testing.assert_array_equal(part(jnp.int32(first)), whole[first : first + 6])


def test_in_double_precision():
    with jax.enable_x64(True):
        key = jax.random.key(3)
        whole = jax.random.normal(key, (8, 3), float)
        part = jax.random.normal(draws.of_rows(key, jnp.int32(2), 4), (4, 3), float)
        np.testing.assert_array_equal(part, whole[2:6])


def test_what_is_not_of_rows_is_the_same_everywhere():
    key = jax.random.key(3)
    ours = draws.of_rows(key, jnp.int32(5), 6)
    for shape in ((), (7, 6), (5,)):
        np.testing.assert_array_equal(jax.random.bits(ours, shape), jax.random.bits(key, shape))


@pytest.mark.parametrize("a", [0, 1, 3, 65_535, 65_536, 99_999, (1 << 31) - 1])
@pytest.mark.parametrize("b", [0, 1, 65_535, 65_537, 123_456_789, (1 << 32) - 1])
def test_places_beyond_32_bits(a, b):
    high, low = draws._product(jnp.uint32(a), b)
    assert (int(high) << 32) + int(low) == a * b


def test_the_kind_of_key_that_it_extends_is_the_default():
    # Its bits are made here as JAX makes them: another default, or another way, would change what
    # is drawn on several devices alone.
    assert jax.config.jax_default_prng_impl == "threefry2x32"
    assert jax.config.jax_threefry_partitionable
