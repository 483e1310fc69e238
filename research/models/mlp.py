"""Multilayer perceptron. Shapes: B batch, F features."""

import dataclasses
import itertools
from typing import Annotated, Literal

import jax
from annotated_types import Ge, Interval
from flax import nnx

Activation = Literal["relu", "gelu", "silu", "tanh", "sigmoid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Dense layers with an activation and dropout between them; the last gives logits.

    `sizes=(64, 32, 1)` under `BinaryClassify` is 64-32-1 with a sigmoid output; `sizes=(64, 64,
    classes)` under `Classify` is 64-64-softmax.
    """

    features: Annotated[int, Ge(1)]
    sizes: tuple[Annotated[int, Ge(1)], ...]
    """Widths of the layers, the output's last."""
    activation: Activation = "relu"
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes must be one or more widths >= 1, not {self.sizes}")

    def make(self, rngs: nnx.Rngs) -> "MLP":
        return MLP(self, rngs)


class MLP(nnx.Module):
    def __init__(self, config: MLPConfig, rngs: nnx.Rngs) -> None:
        widths = (config.features, *config.sizes)
        init = nnx.initializers.he_normal()
        self.layers = nnx.List(
            nnx.Linear(m, n, kernel_init=init, rngs=rngs) for m, n in itertools.pairwise(widths)
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.activation = config.activation

    def __call__(self, x_BF: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, features] -> logits [B, sizes[-1]]."""
        x = x_BF
        for layer in self.layers[:-1]:
            x = getattr(jax.nn, self.activation)(layer(x))
            x = self.dropout(x, rngs=rngs)
        return self.layers[-1](x)
