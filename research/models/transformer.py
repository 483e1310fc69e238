"""Transformer decoder language model. Shapes: B batch, T time, V vocabulary."""

import dataclasses
from typing import Annotated

import jax
from annotated_types import Ge
from flax import nnx

from research.models.layers import Layers, LayersConfig, init


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(LayersConfig):
    """A pre-norm decoder. The defaults, at 12 layers, 12 heads and width 768, are GPT-2 124M."""

    vocab: Annotated[int, Ge(1)]
    context: Annotated[int, Ge(1)]
    """The longest sequence."""
    tied: bool = True
    """The output layer is the embedding, transposed."""

    def make(self, rngs: nnx.Rngs) -> "Transformer":
        return Transformer(self, rngs)


class Transformer(Layers):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        self.context = config.context
        self.embed = nnx.Embed(config.vocab, config.width, embedding_init=init(config), rngs=rngs)
        super().__init__(config, config.context, causal=True, rngs=rngs)
        self.output = (
            None
            if config.tied
            else nnx.Linear(
                config.width, config.vocab, use_bias=False, kernel_init=init(config), rngs=rngs
            )
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """[B, T] -> logits [B, T, V]; T is at most `context`.

        segments [B, T]: numbers of the documents that tokens are of, none of which sees another
        (one document a row, without it); positions [B, T]: places of tokens in their documents.
        """
        if tokens_BT.shape[1] > self.context:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens exceed the model's context of {self.context}"
            )
        # Padding is a segment too, so that every step has something to attend to.
        documents = None if segments is None else (segments, segments)
        x = self._encode(self.embed(tokens_BT), rngs, documents, positions)
        if self.output is not None:
            return self.output(x)
        with jax.named_scope("output"):
            return self.embed.attend(x)
