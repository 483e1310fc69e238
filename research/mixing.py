"""Examples mixed with one another: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

An example's partner is the one at its place counted from the batch's end: batches are shuffled, so
that this is a random pairing, and devices exchange their rows without gathering them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def mixed(
    inputs: jax.Array, weights: jax.Array, key: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Inputs [B, ...] mixed with their partners', and the share [B] that is an example's own.

    mixup, cutmix: Beta(a, a) of the share, one draw a batch; 0: not used. With both, each batch is
    mixed by either with equal chance. An example whose partner has weight 0 stays as it is.
    """
    choose, draw, place = jax.random.split(key, 3)
    alone = weights[::-1] == 0
    pairs = inputs, inputs[::-1]
    if not cutmix:
        return _mixup(*pairs, alone, draw, mixup)
    if not mixup:
        return _cutmix(*pairs, alone, draw, place, cutmix)
    either = jax.random.bernoulli(choose)
    both = _mixup(*pairs, alone, draw, mixup), _cutmix(*pairs, alone, draw, place, cutmix)
    x, share = jax.tree.map(lambda a, b: jnp.where(either, a, b), *both)
    return x, share


QUANTILES = 1 << 14


@functools.lru_cache
def _quantiles(a: float) -> np.ndarray:
    """Beta(a, a)'s quantiles at equal steps from 0 to 1, float32."""
    from scipy.special import betaincinv

    return betaincinv(a, a, np.linspace(0, 1, QUANTILES + 1)).astype(np.float32)


def _beta(key: jax.Array, a: float) -> jax.Array:
    """A draw from Beta(a, a), from a table of its quantiles, linear between them.

    jax.random.beta draws until it accepts: how often, and so a step's work, no compiler can tell.
    """
    place = jax.random.uniform(key) * QUANTILES
    below = jnp.minimum(place.astype(jnp.int32), QUANTILES - 1)
    table = jnp.asarray(_quantiles(a))
    low, high = table[below], table[below + 1]
    return low + (high - low) * (place - below.astype(jnp.float32))


def _mixup(
    x: jax.Array, other: jax.Array, alone: jax.Array, key: jax.Array, a: float
) -> tuple[jax.Array, jax.Array]:
    share = jnp.where(alone, 1.0, _beta(key, a))
    own = _wide(share, x).astype(x.dtype)
    return jnp.where(_wide(alone, x), x, own * x + (1 - own) * other), share


def _cutmix(
    x: jax.Array, other: jax.Array, alone: jax.Array, key: jax.Array, place: jax.Array, a: float
) -> tuple[jax.Array, jax.Array]:
    """x [B, H, W, ...]: a box of the partner's pixels, cut at the image's edges."""
    size = jnp.sqrt(1 - _beta(key, a))
    inside = []
    for length, k in zip(x.shape[1:3], jax.random.split(place), strict=True):
        half = jnp.floor(length * size).astype(jnp.int32) // 2
        centre = jax.random.randint(k, (), 0, length)
        at = jnp.arange(length)
        inside.append((at >= centre - half) & (at < centre + half))
    box = (inside[0][:, None] & inside[1][None, :])[None]
    share = jnp.where(alone, 1.0, 1 - jnp.mean(box, dtype=jnp.float32))
    return jnp.where(_wide(box & ~alone[:, None, None], x), other, x), share


def _wide(values: jax.Array, like: jax.Array) -> jax.Array:
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
