"""Transformer encoders that classify. Shapes: B batch, T time, D width."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge
from flax import nnx

from research.models.layers import Layers, LayersConfig, init


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(LayersConfig):
    """What encoders of every kind of input have."""

    classes: Annotated[int, Ge(2)]
    pooling: Literal["mean", "cls", "attention"] = "mean"
    """What is classified: the mean over positions, the state of a class token put before them
    (Devlin et al. 2019), or a mean with learned weights, a softmax over positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ClassifierConfig):
    """A pre-norm encoder of tokens."""

    vocab: Annotated[int, Ge(1)]
    context: Annotated[int, Ge(1)]
    """The longest sequence, the class token left out."""

    def make(self, rngs: nnx.Rngs) -> "Encoder":
        return Encoder(self, rngs)


class Classifier(Layers):
    """Layers in which every position attends to every other, pooled and classified."""

    def __init__(self, config: ClassifierConfig, length: int, rngs: nnx.Rngs) -> None:
        token = config.pooling == "cls"
        self.token = nnx.Param(jnp.zeros(config.width)) if token else None
        super().__init__(config, length + token, causal=False, rngs=rngs)
        self.score = (
            nnx.Linear(config.width, 1, use_bias=False, kernel_init=init(config), rngs=rngs)
            if config.pooling == "attention"
            else None
        )
        self.head = nnx.Linear(config.width, config.classes, kernel_init=init(config), rngs=rngs)

    def _classify(
        self, x_BTD: jax.Array, mask_BT: jax.Array | None, rngs: nnx.Rngs | None
    ) -> jax.Array:
        """mask_BT: True for the positions that count (all, without it)."""
        if self.token is not None:
            token_B1D = jnp.broadcast_to(self.token[...], (x_BTD.shape[0], 1, x_BTD.shape[2]))
            x_BTD = jnp.concatenate([token_B1D, x_BTD], axis=1)
            if mask_BT is not None:
                mask_BT = jnp.pad(mask_BT, ((0, 0), (1, 0)), constant_values=True)
        # Whatever a query is: one that does not count is not looked at.
        counted = None if mask_BT is None else (jnp.ones((1, 1), bool), mask_BT)
        return self.head(self._pool(self._encode(x_BTD, rngs, counted), mask_BT))

    def _pool(self, x_BTD: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
        if self.token is not None:
            return x_BTD[:, 0]
        counted_BT1 = (
            jnp.ones((*x_BTD.shape[:2], 1), bool) if mask_BT is None else mask_BT[..., None]
        )
        if self.score is None:
            total_BD = jnp.sum(x_BTD, axis=1, where=counted_BT1)
            return total_BD / jnp.maximum(jnp.sum(counted_BT1, axis=1), 1)
        score_BT1 = self.score(x_BTD)
        score_BT1 = jnp.where(counted_BT1, score_BT1, jnp.finfo(score_BT1.dtype).min)
        # Zeros once more, for a row that has no position: it pads a batch.
        weight_BT1 = jnp.where(counted_BT1, jax.nn.softmax(score_BT1, axis=1), 0)
        return jnp.sum(weight_BT1 * x_BTD, axis=1)


class Encoder(Classifier):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs) -> None:
        self.context = config.context
        self.embed = nnx.Embed(config.vocab, config.width, embedding_init=init(config), rngs=rngs)
        super().__init__(config, config.context, rngs)

    def __call__(
        self,
        tokens_BT: jax.Array,
        lengths: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """[B, T] -> logits [B, classes]; T is at most `context`.

        lengths [B]: tokens of each row that count (all, without it); later ones change nothing.
        """
        time = tokens_BT.shape[1]
        if time > self.context:
            raise ValueError(f"{time} tokens exceed the model's context of {self.context}")
        mask_BT = None if lengths is None else jnp.arange(time)[None] < lengths[:, None]
        return self._classify(self.embed(tokens_BT), mask_BT, rngs)
