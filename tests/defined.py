"""What is compared with, written by its definition."""

import jax
import jax.numpy as jnp


def attention(q_BTNh, k_BSKh, v_BSKh, mask=None, is_causal=False):
    """With the arguments of JAX's, whose softmax is in single precision whatever it is given.

    mask, broadcast to [B, N, T, S]: True where a query sees a key.
    """
    groups = q_BTNh.shape[2] // k_BSKh.shape[2]
    k_BSNh, v_BSNh = (jnp.repeat(x, groups, axis=2) for x in (k_BSKh, v_BSKh))
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNh, k_BSNh) / q_BTNh.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores_BNTS.shape[-2:], bool)) | (not is_causal)
    seen = causal[None, None] if mask is None else causal[None, None] & mask
    weights_BNTS = jax.nn.softmax(jnp.where(seen, scores_BNTS, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNh)
