"""Stochastic depth (Huang et al. 2016), for every network of residual branches."""

import jax
import jax.numpy as jnp
from flax import nnx


class StochasticDepth(nnx.Module):
    """Drops a residual branch for some examples of a batch, and scales it up for the others.

    The rate rises linearly over the network, to `rate` in its last branch. It is an argument of
    the call, not of the module, because scanned layers are one module.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.deterministic = False

    def __call__(
        self, branch: jax.Array, depth: jax.Array | float | None, rngs: nnx.Rngs | None
    ) -> jax.Array:
        """branch [B, ...]; depth: how far up the network it is, in (0, 1]."""
        if self.rate == 0 or self.deterministic:
            return branch
        if rngs is None or depth is None:
            raise ValueError("stochastic depth draws from rngs in training, and none were given")
        keep = 1 - self.rate * depth
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        kept = jax.random.bernoulli(rngs.dropout(), keep, shape)
        return jnp.where(kept, branch / keep, 0)
