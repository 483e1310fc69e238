"""Stacked LSTM. Shapes: B batch, T time, D inputs of a layer, H width, G = 4H gates, V outputs."""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Interval
from flax import nnx

Carry = tuple[tuple[jax.Array, jax.Array], ...]
"""(cell, hidden) of each layer, each [B, H]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """Stacked LSTM over tokens or vectors, with dropout between layers (Zaremba et al. 2014)."""

    outputs: Annotated[int, Ge(1)]
    """Logits, or regressed values."""
    vocab: Annotated[int, Ge(1)] | None = None
    """Number of tokens; None: inputs are vectors of `features`."""
    features: Annotated[int, Ge(1)] | None = None
    """Size of an input vector, or of a token's embedding (None: the width)."""
    width: Annotated[int, Ge(1)] = 128
    layers: Annotated[int, Ge(1)] = 1
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Before each layer and before the outputs, never from step to step."""
    head: Literal["steps", "sequence"] = "steps"
    """steps: an output at every time step (language models, regression); sequence: one, from the
    state after the last step within `lengths` (classification)."""

    def __post_init__(self) -> None:
        if self.vocab is None and self.features is None:
            raise ValueError("give vocab (inputs are tokens) or features (inputs are vectors)")

    def make(self, rngs: nnx.Rngs) -> "LSTM":
        return LSTM(self, rngs)


class LSTMLayer(nnx.Module):
    """One layer, gates in the order input, forget, candidate, output.

    The inputs' half of the gates is one matrix product over all steps; only the hidden state's
    half is left in the loop.
    """

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs) -> None:
        self.width = width
        self.input = nnx.Linear(inputs, 4 * width, bias_init=_forget_bias, rngs=rngs)
        self.hidden = nnx.Linear(
            width, 4 * width, use_bias=False, kernel_init=_orthogonal_gates, rngs=rngs
        )

    def __call__(
        self, x_BTD: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def step(
            carry: tuple[jax.Array, jax.Array], gates_BG: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            cell_BH, hidden_BH = carry
            i, f, g, o = jnp.split(gates_BG + self.hidden(hidden_BH), 4, axis=-1)
            cell_BH = jax.nn.sigmoid(f) * cell_BH + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden_BH = jax.nn.sigmoid(o) * jnp.tanh(cell_BH)
            return (cell_BH, hidden_BH), hidden_BH

        gates_TBG = self.input(x_BTD).swapaxes(0, 1)
        carry, y_TBH = jax.lax.scan(step, carry, gates_TBG)
        return y_TBH.swapaxes(0, 1), carry


class LSTM(nnx.Module):
    def __init__(self, config: LSTMConfig, rngs: nnx.Rngs) -> None:
        inputs = config.features or config.width
        self.head = config.head
        self.width = config.width
        init = nnx.initializers.normal(1.0)
        self.embed = (
            None
            if config.vocab is None
            else nnx.Embed(config.vocab, inputs, embedding_init=init, rngs=rngs)
        )
        self.layers = nnx.List(
            LSTMLayer(config.width if i else inputs, config.width, rngs)
            for i in range(config.layers)
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.output = nnx.Linear(config.width, config.outputs, rngs=rngs)

    def initial_carry(self, batch: int) -> Carry:
        zeros = jnp.zeros((batch, self.width))
        return tuple((zeros, zeros) for _ in self.layers)

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        carry: Carry | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Tokens [B, T] or vectors [B, T, features] -> [B, T, V], or [B, V] for a sequence.

        lengths [B]: steps of each row that count (all, without it); later ones change nothing.
        With a carry the result is (outputs, the carry after the last step).
        """
        x = inputs if self.embed is None else self.embed(inputs)
        states = self.initial_carry(x.shape[0]) if carry is None else carry
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(self.dropout(x, rngs=rngs), state)
            after.append(state)
        if self.head == "sequence":
            last = jnp.full(x.shape[0], x.shape[1] - 1) if lengths is None else lengths - 1
            x = jnp.take_along_axis(x, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
        x = self.output(self.dropout(x, rngs=rngs))
        return x if carry is None else (x, tuple(after))


def _forget_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """1 for the forget gate, 0 for the others (Gers et al. 2000; Jozefowicz et al. 2015)."""
    width = shape[0] // 4
    return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)


def _orthogonal_gates(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An orthogonal matrix for each gate (Saxe et al. 2014)."""
    width = shape[0]
    gates = [
        nnx.initializers.orthogonal()(k, (width, width), dtype) for k in jax.random.split(key, 4)
    ]
    return jnp.concatenate(gates, axis=1)
