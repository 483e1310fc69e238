"""The LSTM against a plain NumPy one; what padding, carries and resets must leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from research.models.lstm import LSTMConfig
from research.tasks import Classify, NextToken, Regress

VECTORS = LSTMConfig(features=3, width=4, layers=2, outputs=2)
INITIAL = LSTMConfig(features=2, width=16, layers=2, outputs=2)
TOKENS = LSTMConfig(vocab=5, features=3, width=4, layers=2, outputs=5)


def abstract(config):
    """The module as it is made, with shapes for arrays."""
    return nnx.eval_shape(lambda: config.make(nnx.Rngs(params=jax.random.key(0))))


@functools.cache
def initial(config):
    return nnx.to_pure_dict(nnx.state(config.make(nnx.Rngs(params=jax.random.key(0)))))


def scrambled(config):
    """The module's graph, and normal numbers for every parameter, biases too."""
    graph, params = nnx.split(abstract(config))
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(params)
    return graph, jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.7, p.shape)), params)


def vectors(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def numpy_lstm(params, x, masks=None):
    """x [B, T, D] -> the last layer's hidden states [B, T, H], and each layer's last state."""
    states = []
    for n, p in sorted(params["layers"].items()):
        w, b = np.asarray(p["input"]["kernel"], np.float64), np.asarray(p["input"]["bias"])
        u = np.asarray(p["hidden"]["kernel"], np.float64)
        x = x if masks is None else x * masks[n]
        cell = hidden = np.zeros((len(x), u.shape[0]))
        after = []
        for t in range(x.shape[1]):
            i, f, g, o = np.split(x[:, t] @ w + b + hidden @ u, 4, axis=-1)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            after.append(hidden)
        x = np.stack(after, axis=1)
        states.append((cell, hidden))
    return x, states


def outputs_of(params, hidden):
    return hidden @ np.asarray(params["output"]["kernel"]) + np.asarray(params["output"]["bias"])


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, inputs, **kwargs):
    return nnx.merge(graph, params)(inputs, **kwargs)


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_equals_numpy_over_vectors(layers):
    graph, params = scrambled(LSTMConfig(features=3, width=4, layers=layers, outputs=2))
    x = vectors(2, 5, 3)
    expected = outputs_of(params, numpy_lstm(params, x)[0])
    close(run(graph, params, x), expected)


@pytest.mark.parametrize("features", [None, 3])
def test_equals_numpy_over_tokens(features):
    config = LSTMConfig(vocab=5, features=features, width=4, outputs=5)
    graph, params = scrambled(config)
    tokens = np.asarray([[0, 4, 2, 2], [1, 3, 3, 0]], np.int32)
    x = np.asarray(params["embed"]["embedding"])[tokens]
    expected = outputs_of(params, numpy_lstm(params, x)[0])
    close(run(graph, params, tokens), expected)


def test_the_sequence_head_reads_the_state_after_the_last_step_that_counts():
    graph, params = scrambled(LSTMConfig(features=3, width=4, outputs=2, head="sequence"))
    x = vectors(3, 5, 3)
    hidden, _ = numpy_lstm(params, x)
    lengths = np.asarray([5, 1, 3], np.int32)
    expected = outputs_of(params, hidden[[0, 1, 2], lengths - 1])
    close(run(graph, params, x, lengths=lengths), expected)
    close(run(graph, params, x), outputs_of(params, hidden[:, -1]))


def test_dropout_stands_before_each_layer_and_the_outputs_and_never_between_steps():
    rate, key = 0.4, jax.random.key(2)
    config = LSTMConfig(features=3, width=4, layers=2, outputs=2, dropout=rate)
    graph, params = scrambled(config)
    x = vectors(2, 5, 3)

    @jax.jit
    def drawn():
        rngs = nnx.Rngs(dropout=key)
        return [nnx.Dropout(rate)(jnp.ones((2, 5, n)), rngs=rngs) for n in (3, 4, 4)]

    masks = list(map(np.asarray, drawn()))
    expected = outputs_of(params, numpy_lstm(params, x, masks)[0] * masks[2])
    close(run(graph, params, x, rngs=nnx.Rngs(dropout=key)), expected)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (VECTORS, 4 * 4 * (3 + 4 + 1) + 4 * 4 * (4 + 4 + 1) + (4 + 1) * 2),
        (TOKENS, 5 * 3 + 4 * 4 * (3 + 4 + 1) + 4 * 4 * (4 + 4 + 1) + (4 + 1) * 5),
        (LSTMConfig(vocab=5, width=4, outputs=1), 5 * 4 + 4 * 4 * (4 + 4 + 1) + (4 + 1)),
    ],
)
def test_parameter_count(config, count):
    assert sum(p.size for p in jax.tree.leaves(nnx.state(abstract(config)))) == count


def test_biases_start_at_one_for_the_forget_gate_and_zero_elsewhere():
    for layer in initial(INITIAL)["layers"].values():
        i, f, g, o = np.split(layer["input"]["bias"], 4)
        assert np.all(f == 1)
        assert not np.any([i, g, o])


def test_each_gate_starts_with_an_orthogonal_matrix_of_its_own():
    for layer in initial(INITIAL)["layers"].values():
        gates = np.split(np.asarray(layer["hidden"]["kernel"]), 4, axis=1)
        for n, gate in enumerate(gates):
            np.testing.assert_allclose(gate.T @ gate, np.eye(16), atol=1e-5)
            assert all(np.max(np.abs(gate - other)) > 0.1 for other in gates[:n])


def test_embeddings_start_at_unit_deviation():
    params = initial(LSTMConfig(vocab=200, width=16, outputs=2))
    assert np.std(params["embed"]["embedding"]) == pytest.approx(1, rel=0.05)


def test_an_output_depends_on_every_step_up_to_its_own_and_on_none_after():
    graph, params = scrambled(VECTORS)
    jacobian = jax.jit(jax.jacrev(lambda x: run(graph, params, x[None])[0]))(vectors(6, 3))
    depends = np.abs(jacobian).sum(axis=(1, 3)) != 0
    assert np.array_equal(depends, np.tri(6, dtype=bool))


@pytest.mark.parametrize("config", [VECTORS, TOKENS])
def test_padding_changes_neither_outputs_nor_gradients(config):
    config = LSTMConfig(**vars(config) | {"head": "sequence"})
    graph, params = scrambled(config)
    lengths = np.asarray([2, 5, 1], np.int32)
    padding = np.arange(5)[None] >= lengths[:, None]
    if config.vocab:
        inputs = np.random.default_rng(1).integers(0, 5, (3, 5))
        other = np.where(padding, (inputs + 1) % 5, inputs)
    else:
        inputs = vectors(3, 5, 3)
        other = np.where(padding[..., None], 100 * vectors(3, 5, 3, seed=2), inputs)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params, inputs):
        outputs = run(graph, params, inputs, lengths=lengths)
        return jnp.sum(jnp.sin(outputs)), outputs

    expected = gradients(params, inputs)
    jax.tree.map(np.testing.assert_array_equal, gradients(params, other), expected)


def test_a_sequence_gives_the_same_in_two_halves_with_the_carry_passed():
    graph, params = scrambled(VECTORS)
    x = vectors(2, 6, 3)
    first, carry = run(graph, params, x[:, :3], carry=abstract(VECTORS).initial_carry(2))
    second, carry = run(graph, params, x[:, 3:], carry=carry)
    close(np.concatenate([first, second], axis=1), run(graph, params, x))
    jax.tree.map(close, carry, tuple(numpy_lstm(params, x)[1]))


def test_the_task_starts_reset_rows_afresh_and_continues_the_others():
    graph, params = scrambled(VECTORS)
    model, x = nnx.merge(graph, params), vectors(3, 6, 3)
    reset = np.asarray([True, False, True])
    batch = {"inputs": x[:, 3:], "reset": reset}
    _, carry = run(graph, params, x[:, :3], carry=model.initial_carry(3))
    outputs, carry = jax.jit(lambda c: Regress().outputs(model, batch, None, c))(carry)
    fresh, fresh_states = numpy_lstm(params, x[:, 3:])
    whole, whole_states = numpy_lstm(params, x)
    close(outputs, outputs_of(params, np.where(reset[:, None, None], fresh, whole[:, 3:])))
    expected = jax.tree.map(lambda a, b: np.where(reset[:, None], a, b), fresh_states, whole_states)
    jax.tree.map(close, carry, tuple(expected))


def test_inputs_must_be_tokens_or_vectors():
    with pytest.raises(ValueError, match=r"\Agive vocab [^\n]*\Z"):
        LSTMConfig(outputs=2)


def learned(config, task, batch_of, steps=60, rate=0.02):
    """Metrics of the last of the steps of plain Adam, each on a batch never seen before."""
    graph, start = nnx.graphdef(abstract(config)), initial(config)
    adam = optax.adam(rate)

    def loss(params, batch):
        return task(nnx.merge(graph, params, copy=True), batch)

    def step(state, key):
        params, opt_state = state
        grads, (metrics, _) = jax.grad(loss, has_aux=True)(params, batch_of(key))
        updates, opt_state = adam.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), metrics

    @jax.jit
    def fit(keys):
        return jax.lax.scan(step, (start, adam.init(start)), keys)[1]

    metrics = fit(jax.random.split(jax.random.key(3), steps))
    return {name: float(m.total[-1] / m.weight[-1]) for name, m in metrics.items()}


def test_learns_the_next_token_of_a_periodic_sequence():
    def batch_of(key):  # 0 1 0 2 0 1 0 2 ...: what follows a 0 is known from the token before it
        phase = jax.random.randint(key, (16, 1), 0, 4)
        tokens = jnp.asarray([0, 1, 0, 2])[(phase + jnp.arange(11)[None]) % 4]
        weights = jnp.broadcast_to(jnp.arange(10)[None] > 0, (16, 10)).astype(jnp.float32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    metrics = learned(LSTMConfig(vocab=3, width=16, outputs=3), NextToken(), batch_of)
    assert metrics["accuracy"] == 1
    assert metrics["loss"] < 0.1


def test_learns_the_majority_of_a_padded_sequence():
    def batch_of(key):
        keys = jax.random.split(key, 3)
        lengths = 2 * jax.random.randint(keys[0], (64,), 1, 5) + 1
        signs = jax.random.rademacher(keys[1], (64, 9), jnp.float32)
        counts = jnp.arange(9)[None] < lengths[:, None]
        padding = 3 * jax.random.normal(keys[2], (64, 9))
        return {
            "inputs": jnp.where(counts, signs, padding)[..., None],
            "targets": (jnp.sum(signs * counts, axis=1) > 0).astype(jnp.int32),
            "lengths": lengths,
            "weights": jnp.ones(64),
        }

    config = LSTMConfig(features=1, width=16, outputs=2, head="sequence")
    assert learned(config, Classify(), batch_of)["accuracy"] > 0.95


def test_learns_the_running_mean_of_vectors():
    steps = jnp.arange(1, 9, dtype=jnp.float32)[None, :, None]

    def batch_of(key):
        inputs = jax.random.normal(key, (64, 8, 2))
        return {
            "inputs": inputs,
            "targets": jnp.cumsum(inputs, axis=1) / steps,
            "weights": jnp.ones(64),
        }

    config = LSTMConfig(features=2, width=16, outputs=2)
    spread = np.mean(1 / np.arange(1, 9))  # the targets' variance: that of a mean of t normals
    assert learned(config, Regress(), batch_of)["mse"] < 0.15 * spread
