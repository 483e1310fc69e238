"""Recurrent networks: stacked LSTM, GRU or tanh RNN, one- or bidirectional, with attention.

Shapes: B batch, T time, D inputs of a layer, H width, G = 4, 3 or 1 gates, V outputs, F = H or, of
both directions, 2H.
"""

import dataclasses
import functools
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Interval
from flax import nnx

State = tuple[jax.Array, ...]
"""What one layer passes from step to step, each [B, H], the hidden state last."""
Carry = tuple[State, ...]
"""The state of each layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """Stacked recurrent layers over tokens or vectors, with dropout between layers (Zaremba et
    al. 2014)."""

    cell: Literal["lstm", "gru", "rnn"]
    """lstm: Hochreiter and Schmidhuber 1997, with forget gates; gru: Cho et al. 2014, as cuDNN has
    it; rnn: tanh (Elman 1990)."""
    outputs: Annotated[int, Ge(1)]
    """Logits, or regressed values."""
    vocab: Annotated[int, Ge(1)] | None = None
    """Number of tokens; None: inputs are vectors of `features`."""
    features: Annotated[int, Ge(1)] | None = None
    """Size of an input vector, or of a token's embedding (None: the width)."""
    width: Annotated[int, Ge(1)] = 128
    """Of a layer's hidden state, in each direction."""
    layers: Annotated[int, Ge(1)] = 1
    bidirectional: bool = False
    """Each layer reads forward and backward, and gives both (Schuster and Paliwal 1997)."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Before each layer and before the outputs, never from step to step."""
    head: Literal["steps", "sequence"] = "steps"
    """steps: an output at every time step (language models, regression); sequence: one, from the
    state after the last step within `lengths` (classification)."""
    attention: Literal["none", "additive", "dot"] = "none"
    """What a sequence's output reads beside the last state: a mean of all steps, weighted by
    additive (Bahdanau et al. 2015) or scaled dot-product attention of the last state."""

    uniform: Annotated[float, Gt(0)] | None = None
    """Draw every initial parameter, biases too, between plus and minus this (Zaremba et al.: 0.1);
    None: normal embeddings, orthogonal hidden kernels, LeCun's otherwise, and forget biases 1."""

    def __post_init__(self) -> None:
        if self.vocab is None and self.features is None:
            raise ValueError("give vocab (inputs are tokens) or features (inputs are vectors)")
        if self.attention != "none" and self.head == "steps":
            raise ValueError("attention is of a sequence's last state: it needs head sequence")

    def make(self, rngs: nnx.Rngs) -> "Recurrent":
        model = Recurrent(self, rngs)
        if self.uniform is not None:
            _draw(model, self.uniform, rngs)
        return model


class Layer(nnx.Module):
    """One layer in one direction; a cell is a subclass.

    The inputs' half of the gates is one matrix product over all steps; only the hidden state's
    half is left in the loop.
    """

    gates: ClassVar[int]
    states: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs, reverse: bool = False) -> None:
        self.width, self.reverse = width, reverse
        gates = (self.gates, width)
        self.input = nnx.LinearGeneral(inputs, gates, bias_init=self.input_bias, rngs=rngs)
        self.hidden = nnx.LinearGeneral(
            width, gates, use_bias=False, kernel_init=_orthogonal_gates, rngs=rngs
        )

    @staticmethod
    def input_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros(shape, dtype)

    def initial(self, batch: int) -> State:
        return (jnp.zeros((batch, self.width)),) * self.states

    def cell(self, input_BGH: jax.Array, hidden_BGH: jax.Array, state: State) -> State:
        """The next state, from both halves of the gates."""
        raise NotImplementedError

    def __call__(
        self, x_BTD: jax.Array, state: State, valid_TB: jax.Array | None
    ) -> tuple[jax.Array, State]:
        """The hidden state after each step [B, T, H], and the last state.

        A step that is not valid gives 0 and leaves the state as it is, so that a backward layer
        begins at each row's last valid step.
        """

        def step(state: State, given: Any) -> tuple[State, jax.Array]:
            gates_BGH, valid_B = given
            after = self.cell(gates_BGH, self.hidden(state[-1]), state)
            if valid_B is None:
                return after, after[-1]
            valid_B1 = valid_B[:, None]
            after = tuple(jnp.where(valid_B1, a, b) for a, b in zip(after, state, strict=True))
            return after, jnp.where(valid_B1, after[-1], 0)

        gates_TBGH = self.input(x_BTD).swapaxes(0, 1)
        state, y_TBH = jax.lax.scan(step, state, (gates_TBGH, valid_TB), reverse=self.reverse)
        return y_TBH.swapaxes(0, 1), state


class LSTMLayer(Layer):
    """Gates: input, forget, candidate, output. State: (cell, hidden)."""

    gates = 4
    states = 2

    @staticmethod
    def input_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """1 for the forget gate, 0 for the others (Gers et al. 2000; Jozefowicz et al. 2015)."""
        width = shape[0] // 4
        return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)

    def cell(self, input_BGH: jax.Array, hidden_BGH: jax.Array, state: State) -> State:
        cell_BH, _ = state
        i, f, g, o = jnp.unstack(input_BGH + hidden_BGH, axis=1)
        cell_BH = jax.nn.sigmoid(f) * cell_BH + jax.nn.sigmoid(i) * jnp.tanh(g)
        return cell_BH, jax.nn.sigmoid(o) * jnp.tanh(cell_BH)


class GRULayer(Layer):
    """Gates: reset, update, candidate. State: (hidden,).

    As in cuDNN and PyTorch, whose weights fit: the reset gate multiplies the candidate's hidden
    half after its product, where Cho et al. multiply the hidden state before it. That half has a
    bias of its own, `bias`; the other gates' two biases would be one.
    """

    gates = 3

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs, reverse: bool = False) -> None:
        super().__init__(inputs, width, rngs, reverse)
        self.bias = nnx.Param(jnp.zeros(width))

    def cell(self, input_BGH: jax.Array, hidden_BGH: jax.Array, state: State) -> State:
        (hidden_BH,) = state
        reset_i, update_i, candidate_i = jnp.unstack(input_BGH, axis=1)
        reset_h, update_h, candidate_h = jnp.unstack(hidden_BGH, axis=1)
        reset = jax.nn.sigmoid(reset_i + reset_h)
        update = jax.nn.sigmoid(update_i + update_h)
        candidate = jnp.tanh(candidate_i + reset * (candidate_h + self.bias[None]))
        return ((1 - update) * candidate + update * hidden_BH,)


class RNNLayer(Layer):
    """State: (hidden,)."""

    gates = 1

    def cell(self, input_BGH: jax.Array, hidden_BGH: jax.Array, state: State) -> State:
        return (jnp.tanh(input_BGH + hidden_BGH)[:, 0],)


class Bidirectional(nnx.Module):
    """A layer forward and one backward, side by side; state: forward's, then backward's."""

    def __init__(self, layer: type[Layer], inputs: int, width: int, rngs: nnx.Rngs) -> None:
        self.forward = layer(inputs, width, rngs)
        self.backward = layer(inputs, width, rngs, reverse=True)

    def initial(self, batch: int) -> State:
        return self.forward.initial(batch) + self.backward.initial(batch)

    def __call__(
        self, x_BTD: jax.Array, state: State, valid_TB: jax.Array | None
    ) -> tuple[jax.Array, State]:
        half = len(state) // 2
        forward_BTH, first = self.forward(x_BTD, state[:half], valid_TB)
        backward_BTH, second = self.backward(x_BTD, state[half:], valid_TB)
        return jnp.concatenate([forward_BTH, backward_BTH], axis=-1), first + second


class Attention(nnx.Module):
    """A mean of the steps, weighted by a softmax of their scores against the last state."""

    def __init__(self, config: RecurrentConfig, features: int, rngs: nnx.Rngs) -> None:
        width = config.width
        self.scale = features**-0.5
        self.additive = config.attention == "additive"
        if self.additive:
            self.query = nnx.Linear(features, width, use_bias=False, rngs=rngs)
            self.key = nnx.Linear(features, width, use_bias=False, rngs=rngs)
            self.score = nnx.Linear(width, 1, use_bias=False, rngs=rngs)

    def __call__(
        self, last_BF: jax.Array, steps_BTF: jax.Array, valid_BT: jax.Array | None
    ) -> jax.Array:
        if self.additive:
            mixed_BTH = jnp.tanh(self.query(last_BF)[:, None] + self.key(steps_BTF))
            scores_BT = self.score(mixed_BTH)[..., 0]
        else:
            scores_BT = self.scale * jnp.einsum("BF,BTF->BT", last_BF, steps_BTF)
        if valid_BT is not None:
            # Not -inf: a row without any step would be NaN, and its steps are 0 as it is.
            scores_BT = jnp.where(valid_BT, scores_BT, jnp.finfo(scores_BT.dtype).min)
        return jnp.einsum("BT,BTF->BF", jax.nn.softmax(scores_BT), steps_BTF)


LAYERS: dict[str, type[Layer]] = {"lstm": LSTMLayer, "gru": GRULayer, "rnn": RNNLayer}


class Recurrent(nnx.Module):
    def __init__(self, config: RecurrentConfig, rngs: nnx.Rngs) -> None:
        inputs = config.features or config.width
        features = config.width * (2 if config.bidirectional else 1)
        self.head = config.head
        self.bidirectional = config.bidirectional
        init = nnx.initializers.normal(1.0)
        self.embed = (
            None
            if config.vocab is None
            else nnx.Embed(config.vocab, inputs, embedding_init=init, rngs=rngs)
        )
        layer: Any = LAYERS[config.cell]
        if config.bidirectional:
            layer = functools.partial(Bidirectional, layer)
        self.layers = nnx.List(
            layer(features if i else inputs, config.width, rngs) for i in range(config.layers)
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.attention = None if config.attention == "none" else Attention(config, features, rngs)
        read = features if self.attention is None else 2 * features
        self.output = nnx.Linear(read, config.outputs, rngs=rngs)

    def initial_carry(self, batch: int) -> Carry:
        return tuple(layer.initial(batch) for layer in self.layers)

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        carry: Carry | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Tokens [B, T] or vectors [B, T, features] -> [B, T, V], or [B, V] for a sequence.

        lengths [B]: steps of each row that count (all, without it); later ones change nothing.
        With a carry the result is (outputs, the carry after the last step that counts).
        """
        if carry is not None and self.bidirectional:
            raise ValueError("a bidirectional model cannot carry its state from batch to batch")
        x = inputs if self.embed is None else self.embed(inputs)
        batch, time = x.shape[:2]
        valid_BT = None if lengths is None else jnp.arange(time)[None] < lengths[:, None]
        valid_TB = None if valid_BT is None else valid_BT.T
        states = self.initial_carry(batch) if carry is None else carry
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(self.dropout(x, rngs=rngs), state, valid_TB)
            after.append(state)
        if self.head == "sequence":
            x = self._summary(x, after[-1], valid_BT)
        x = self.output(self.dropout(x, rngs=rngs))
        return x if carry is None else (x, tuple(after))

    def _summary(self, steps_BTF: jax.Array, state: State, valid_BT: jax.Array | None) -> jax.Array:
        """What a sequence's output reads: the last hidden state of each direction, and what the
        attention finds."""
        directions = 2 if self.bidirectional else 1
        size = len(state) // directions
        last_BF = jnp.concatenate(state[size - 1 :: size], axis=-1)
        if self.attention is None:
            return last_BF
        return jnp.concatenate([last_BF, self.attention(last_BF, steps_BTF, valid_BT)], axis=-1)


def _draw(model: nnx.Module, limit: float, rngs: nnx.Rngs) -> None:
    """Draws every parameter anew, uniformly between plus and minus the limit."""
    state = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(rngs.params(), len(leaves))
    drawn = [
        jax.random.uniform(key, leaf.shape, leaf.dtype, -limit, limit)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(tree, drawn))


def _orthogonal_gates(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """[H, G x H]: an orthogonal matrix for each gate (Saxe et al. 2014)."""
    width, gates = shape[0], shape[1] // shape[0]
    matrices = [
        nnx.initializers.orthogonal()(k, (width, width), dtype)
        for k in jax.random.split(key, gates)
    ]
    return jnp.concatenate(matrices, axis=1)
