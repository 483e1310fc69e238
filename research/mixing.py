"""Examples mixed with one another: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

An example's partner is the one at its place counted from the batch's end: batches are shuffled, so
that this is a random pairing, and devices exchange their rows without gathering them.
"""

import jax
import jax.numpy as jnp


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


def _mixup(
    x: jax.Array, other: jax.Array, alone: jax.Array, key: jax.Array, a: float
) -> tuple[jax.Array, jax.Array]:
    share = jnp.where(alone, 1.0, jax.random.beta(key, a, a, dtype=jnp.float32))
    own = _wide(share, x).astype(x.dtype)
    return jnp.where(_wide(alone, x), x, own * x + (1 - own) * other), share


def _cutmix(
    x: jax.Array, other: jax.Array, alone: jax.Array, key: jax.Array, place: jax.Array, a: float
) -> tuple[jax.Array, jax.Array]:
    """x [B, H, W, ...]: a box of the partner's pixels, cut at the image's edges."""
    size = jnp.sqrt(1 - jax.random.beta(key, a, a, dtype=jnp.float32))
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
