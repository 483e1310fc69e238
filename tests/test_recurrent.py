"""Recurrent cells against NumPy and PyTorch; what padding, carries and resets must leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from made import abstract, initial, normal

from research import UserError, compute
from research.data.splits import Examples
from research.experiment import Target
from research.models.lstm import LSTMConfig
from research.models.recurrent import RecurrentConfig
from research.setup import prepare
from research.tasks import Classify, NextToken, Regress
from research.train import train

VECTORS = LSTMConfig(features=3, width=4, layers=2, outputs=2)
INITIAL = LSTMConfig(features=2, width=16, layers=2, outputs=2)
TOKENS = LSTMConfig(vocab=5, features=3, width=4, layers=2, outputs=5)
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
LENGTHS = np.asarray([2, 5, 1], np.int32)

every_cell = pytest.mark.parametrize("cell", GATES)
either_way = pytest.mark.parametrize("bidirectional", [False, True])


def recurrent(cell, **fields):
    return RecurrentConfig(**{"cell": cell, "features": 3, "width": 4, "outputs": 2} | fields)


def scrambled(config):
    """The module's graph, and normal numbers for every parameter, biases too."""
    graph, params = nnx.split(abstract(config))
    return graph, normal(nnx.to_pure_dict(params), scale=0.7)


def vectors(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def side_by_side(kernel):
    """[D, G, H] -> [D, G x H]."""
    return np.reshape(kernel, (len(kernel), -1))


def numpy_step(p, x, state):
    """One step of one row, x [D]; the parameters tell the cell."""
    gates = p["input"]["bias"].shape[0]
    w, u = (np.asarray(side_by_side(p[half]["kernel"]), float) for half in ("input", "hidden"))
    b, hidden = np.ravel(p["input"]["bias"]), state[-1]
    if gates == 1:
        return (np.tanh(x @ w + b + hidden @ u),)
    if gates == 4:
        i, f, g, o = np.split(x @ w + b + hidden @ u, 4)
        cell = sigmoid(f) * state[0] + sigmoid(i) * np.tanh(g)
        return cell, sigmoid(o) * np.tanh(cell)
    (wr, wz, wn), (br, bz, bn) = np.split(w, 3, axis=1), np.split(b, 3)
    ur, uz, un = np.split(u, 3, axis=1)
    r = sigmoid(x @ wr + br + hidden @ ur)
    z = sigmoid(x @ wz + bz + hidden @ uz)
    n = np.tanh(x @ wn + bn + r * (hidden @ un + np.asarray(p["bias"])))
    return ((1 - z) * n + z * hidden,)


def numpy_direction(p, x, lengths, backward):
    """x [B, T, D] -> hidden states [B, T, H], 0 at padding, and each row's last state."""
    _, gates, width = p["hidden"]["kernel"].shape
    y, last = np.zeros((*x.shape[:2], width)), []
    for b, length in enumerate(lengths):
        state = (np.zeros(width),) * (2 if gates == 4 else 1)
        for t in reversed(range(length)) if backward else range(length):
            state = numpy_step(p, x[b, t], state)
            y[b, t] = state[-1]
        last.append(state)
    return y, tuple(map(np.stack, zip(*last, strict=True)))


def numpy_layers(params, x, lengths=None, masks=None):
    """x [B, T, D] -> the last layer's hidden states [B, T, F], and each layer's last state."""
    lengths = [x.shape[1]] * len(x) if lengths is None else lengths
    states = []
    for n, p in sorted(params["layers"].items()):
        x = x if masks is None else x * masks[n]
        both = [p["forward"], p["backward"]] if "forward" in p else [p]
        found = [numpy_direction(q, x, lengths, i == 1) for i, q in enumerate(both)]
        x = np.concatenate([y for y, _ in found], axis=-1)
        states.append(sum((state for _, state in found), ()))
    return x, states


def outputs_of(params, hidden):
    return hidden @ np.asarray(params["output"]["kernel"]) + np.asarray(params["output"]["bias"])


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, inputs, **kwargs):
    return nnx.merge(graph, params)(inputs, **kwargs)


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@every_cell
@either_way
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
def test_equals_numpy_over_vectors(cell, bidirectional, lengths):
    config = recurrent(cell, layers=2, bidirectional=bidirectional)
    graph, params = scrambled(config)
    x = vectors(3, 5, 3)
    hidden, states = numpy_layers(params, x, lengths)
    close(run(graph, params, x, lengths=lengths), outputs_of(params, hidden))
    top = states[-1]
    ends = [top[len(top) // 2 - 1], top[-1]] if bidirectional else [top[-1]]
    graph = nnx.graphdef(abstract(dataclasses.replace(config, head="sequence")))
    expected = outputs_of(params, np.concatenate(ends, axis=-1))
    close(run(graph, params, x, lengths=lengths), expected)


@pytest.mark.parametrize("features", [None, 3])
def test_equals_numpy_over_tokens(features):
    config = LSTMConfig(vocab=5, features=features, width=4, outputs=5)
    graph, params = scrambled(config)
    tokens = np.asarray([[0, 4, 2, 2], [1, 3, 3, 0]], np.int32)
    x = np.asarray(params["embed"]["embedding"])[tokens]
    expected = outputs_of(params, numpy_layers(params, x)[0])
    close(run(graph, params, tokens), expected)


def test_the_sequence_head_reads_the_state_after_the_last_step_that_counts():
    graph, params = scrambled(LSTMConfig(features=3, width=4, outputs=2, head="sequence"))
    x = vectors(3, 5, 3)
    hidden, _ = numpy_layers(params, x)
    expected = outputs_of(params, hidden[[0, 1, 2], LENGTHS - 1])
    close(run(graph, params, x, lengths=LENGTHS), expected)
    close(run(graph, params, x), outputs_of(params, hidden[:, -1]))


@pytest.mark.parametrize(
    ("cell", "bidirectional"), [("lstm", False), ("gru", False), ("rnn", False), ("rnn", True)]
)
def test_dropout_stands_before_each_layer_and_the_outputs_and_never_between_steps(
    cell, bidirectional
):
    rate, key = 0.4, jax.random.key(2)
    config = recurrent(cell, layers=2, bidirectional=bidirectional, dropout=rate)
    graph, params = scrambled(config)
    x = vectors(2, 5, 3)
    after = 8 if bidirectional else 4

    @jax.jit
    def drawn():
        rngs = nnx.Rngs(dropout=key)
        return [nnx.Dropout(rate)(jnp.ones((2, 5, n)), rngs=rngs) for n in (3, after, after)]

    masks = list(map(np.asarray, drawn()))
    expected = outputs_of(params, numpy_layers(params, x, masks=masks)[0] * masks[2])
    close(run(graph, params, x, rngs=nnx.Rngs(dropout=key)), expected)


@either_way
@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
def test_attention_equals_a_loop_over_rows_and_steps(bidirectional, attention, lengths):
    config = recurrent("gru", bidirectional=bidirectional, head="sequence", attention=attention)
    graph, params = scrambled(config)
    x = vectors(3, 5, 3)
    steps, states = numpy_layers(params, x, lengths)
    last = np.concatenate(states[-1], axis=-1)
    kernels = {k: np.asarray(v["kernel"]) for k, v in params.get("attention", {}).items()}
    counts, both = [5] * 3 if lengths is None else lengths, []
    for row, query, length in zip(steps, last, counts, strict=True):
        scores = []
        for step in row[:length]:
            if attention == "dot":
                scores.append(query @ step / np.sqrt(len(step)))
            else:
                mixed = np.tanh(query @ kernels["query"] + step @ kernels["key"])
                scores.append((mixed @ kernels["score"])[0])
        weights = np.exp(scores) / np.sum(np.exp(scores))
        context = sum(w * step for w, step in zip(weights, row[:length], strict=True))
        both.append(np.concatenate([query, context]))
    close(run(graph, params, x, lengths=lengths), outputs_of(params, np.stack(both)))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (VECTORS, 4 * 4 * (3 + 4 + 1) + 4 * 4 * (4 + 4 + 1) + (4 + 1) * 2),
        (TOKENS, 5 * 3 + 4 * 4 * (3 + 4 + 1) + 4 * 4 * (4 + 4 + 1) + (4 + 1) * 5),
        (LSTMConfig(vocab=5, width=4, outputs=1), 5 * 4 + 4 * 4 * (4 + 4 + 1) + (4 + 1)),
        (recurrent("gru"), 3 * 4 * (3 + 4 + 1) + 4 + (4 + 1) * 2),
        (recurrent("rnn"), 4 * (3 + 4 + 1) + (4 + 1) * 2),
        (
            recurrent("rnn", layers=2, bidirectional=True),
            2 * 4 * (3 + 4 + 1) + 2 * 4 * (8 + 4 + 1) + (8 + 1) * 2,
        ),
        (
            recurrent("rnn", head="sequence", attention="additive"),
            4 * (3 + 4 + 1) + 2 * 4 * 4 + 4 + (8 + 1) * 2,
        ),
        (
            recurrent("rnn", head="sequence", attention="dot"),
            4 * (3 + 4 + 1) + (8 + 1) * 2,
        ),
    ],
)
def test_parameter_count(config, count):
    assert sum(p.size for p in jax.tree.leaves(nnx.state(abstract(config)))) == count


def test_biases_start_at_one_for_the_forget_gate_and_zero_elsewhere():
    for layer in initial(INITIAL)["layers"].values():
        i, f, g, o = np.split(layer["input"]["bias"], 4)
        assert np.all(f == 1)
        assert not np.any([i, g, o])


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_biases_of_the_other_cells_start_at_zero(cell):
    for layer in initial(recurrent(cell))["layers"].values():
        assert not np.any(layer["input"]["bias"])
        assert not np.any(layer.get("bias", 0))


@every_cell
def test_each_gate_starts_with_an_orthogonal_matrix_of_its_own(cell):
    for layer in initial(recurrent(cell, width=16, layers=2))["layers"].values():
        gates = np.unstack(layer["hidden"]["kernel"], axis=1)
        assert len(gates) == GATES[cell]
        for n, gate in enumerate(gates):
            np.testing.assert_allclose(gate.T @ gate, np.eye(16), atol=1e-5)
            assert all(np.max(np.abs(gate - other)) > 0.1 for other in gates[:n])


def test_embeddings_start_at_unit_deviation():
    params = initial(LSTMConfig(vocab=200, width=16, outputs=2))
    assert np.std(params["embed"]["embedding"]) == pytest.approx(1, rel=0.05)


@every_cell
@either_way
def test_an_output_depends_on_every_step_up_to_its_own_and_on_none_after(cell, bidirectional):
    graph, params = scrambled(recurrent(cell, layers=2, bidirectional=bidirectional))
    jacobian = jax.jit(jax.jacrev(lambda x: run(graph, params, x[None])[0]))(vectors(6, 3))
    depends = np.abs(jacobian).sum(axis=(1, 3)) != 0
    assert np.array_equal(depends, np.ones((6, 6)) if bidirectional else np.tri(6, dtype=bool))


@pytest.mark.parametrize(
    "config",
    [
        LSTMConfig(features=3, width=4, layers=2, outputs=2, head="sequence"),
        LSTMConfig(vocab=5, features=3, width=4, layers=2, outputs=5, head="sequence"),
        recurrent("gru", layers=2, bidirectional=True),
        recurrent("lstm", layers=2, bidirectional=True, head="sequence"),
        recurrent("gru", vocab=5, bidirectional=True, head="sequence", attention="additive"),
        recurrent("rnn", layers=2, bidirectional=True, head="sequence", attention="dot"),
        recurrent("rnn", head="sequence", attention="additive"),
    ],
)
def test_padding_changes_neither_outputs_nor_gradients(config):
    graph, params = scrambled(config)
    padding = np.arange(5)[None] >= LENGTHS[:, None]
    if config.vocab:
        inputs = np.random.default_rng(1).integers(0, 5, (3, 5))
        other = np.where(padding, (inputs + 1) % 5, inputs)
    else:
        inputs = vectors(3, 5, 3)
        other = np.where(padding[..., None], 100 * vectors(3, 5, 3, seed=2), inputs)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params, inputs):
        outputs = run(graph, params, inputs, lengths=LENGTHS)
        return jnp.sum(jnp.sin(outputs)), outputs

    expected = gradients(params, inputs)
    jax.tree.map(np.testing.assert_array_equal, gradients(params, other), expected)
    if config.head == "sequence":  # a step less of padding is no padding at all
        shorter = run(graph, params, inputs[:1, :2], lengths=LENGTHS[:1])
        close(shorter, expected[1][:1])
        close(run(graph, params, inputs[:1, :2]), shorter)


@pytest.mark.parametrize("attention", ["none", "additive", "dot"])
def test_a_row_without_any_step_is_finite_and_reads_nothing(attention):
    config = recurrent("gru", head="sequence", bidirectional=True, attention=attention)
    graph, params = scrambled(config)
    lengths = np.asarray([0, 3], np.int32)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def gradients(params, x):
        return jnp.sum(jnp.sin(run(graph, params, x, lengths=lengths)))

    value, (by_params, by_x) = gradients(params, vectors(2, 4, 3))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((value, by_params)))
    assert not np.any(by_x[0])
    assert np.any(by_x[1, :3])
    assert not np.any(by_x[1, 3])


@every_cell
def test_a_sequence_gives_the_same_in_two_halves_with_the_carry_passed(cell):
    config = recurrent(cell, layers=2)
    graph, params = scrambled(config)
    x = vectors(2, 6, 3)
    first, carry = run(graph, params, x[:, :3], carry=abstract(config).initial_carry(2))
    second, carry = run(graph, params, x[:, 3:], carry=carry)
    close(np.concatenate([first, second], axis=1), run(graph, params, x))
    jax.tree.map(close, carry, tuple(numpy_layers(params, x)[1]))


@every_cell
def test_the_carry_is_the_state_after_the_last_step_that_counts(cell):
    config = recurrent(cell, layers=2)
    graph, params = scrambled(config)
    x = vectors(3, 5, 3)
    carry = abstract(config).initial_carry(3)
    _, carry = run(graph, params, x, lengths=LENGTHS, carry=carry)
    jax.tree.map(close, carry, tuple(numpy_layers(params, x, LENGTHS)[1]))


def test_the_task_starts_reset_rows_afresh_and_continues_the_others():
    graph, params = scrambled(VECTORS)
    model, x = nnx.merge(graph, params), vectors(3, 6, 3)
    reset = np.asarray([True, False, True])
    batch = {"inputs": x[:, 3:], "reset": reset}
    _, carry = run(graph, params, x[:, :3], carry=model.initial_carry(3))
    outputs, carry = jax.jit(lambda c: Regress().outputs(model, batch, None, c))(carry)
    fresh, fresh_states = numpy_layers(params, x[:, 3:])
    whole, whole_states = numpy_layers(params, x)
    close(outputs, outputs_of(params, np.where(reset[:, None, None], fresh, whole[:, 3:])))
    expected = jax.tree.map(lambda a, b: np.where(reset[:, None], a, b), fresh_states, whole_states)
    jax.tree.map(close, carry, tuple(expected))


def test_inputs_must_be_tokens_or_vectors():
    with pytest.raises(ValueError, match=r"\Agive vocab [^\n]*\Z"):
        LSTMConfig(outputs=2)


@every_cell
def test_uniform_draws_every_parameter_between_its_limits(cell):
    """Zaremba et al.: embeddings, kernels and biases alike; the seed decides them."""
    fields = {"vocab": 99, "features": None, "width": 32, "layers": 2, "attention": "additive"}
    config = recurrent(cell, **fields, head="sequence", bidirectional=True, uniform=0.1)
    drawn = jax.tree.leaves(initial(config))
    assert [p.shape for p in drawn] == [
        p.shape for p in jax.tree.leaves(nnx.state(abstract(config)))
    ]
    for p in drawn:
        assert np.abs(p).max() <= 0.1
        assert p.size < 30 or np.abs(p).max() > 0.08
        assert p.size < 999 or np.std(p) == pytest.approx(0.1 / 3**0.5, rel=0.05)
    first = [p.ravel()[0] for p in drawn]
    assert len(set(map(float, first))) == len(first)
    other = jax.tree.leaves(nnx.state(config.make(nnx.Rngs(params=jax.random.key(1)))))
    assert all(np.any(a != b) for a, b in zip(drawn, other, strict=True))


def test_attention_needs_a_last_state():
    with pytest.raises(ValueError, match=r"\Aattention is of a sequence's [^\n]*\Z"):
        recurrent("gru", attention="dot")


def test_a_bidirectional_model_takes_no_carry():
    graph, params = scrambled(recurrent("gru", bidirectional=True))
    carry = nnx.merge(graph, params).initial_carry(2)
    with pytest.raises(ValueError, match="cannot carry its state from batch to batch"):
        run(graph, params, vectors(2, 5, 3), carry=carry)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (True, "cannot: set data.stream to False, or model.bidirectional to False"),
        (False, "a bidirectional model reads the tokens that NextToken asks it to predict"),
    ],
)
def test_a_bidirectional_language_model_is_refused(stream, message):
    model = RecurrentConfig(cell="gru", vocab=7, outputs=7, width=8, bidirectional=True)
    with pytest.raises(UserError, match=message):
        prepare(tiny.lstm(model=model, data=tiny.Words(stream=stream)))


def test_an_lstm_by_its_own_name_is_the_lstm_of_the_family():
    fields = {"features": 3, "width": 4, "layers": 2, "outputs": 2}
    named, cell = initial(LSTMConfig(**fields)), initial(RecurrentConfig(cell="lstm", **fields))
    jax.tree.map(np.testing.assert_array_equal, named, cell)


# ---- what a step costs


def multiply_adds(cell, batch, time, inputs, width):
    """(inputs' half, hidden half) of the gates of one layer in one direction."""
    rows = batch * time * GATES[cell] * width
    return rows * inputs, rows * width


@every_cell
def test_the_ledger_counts_each_cell_exactly(cell):
    """B, T = 3, 7; inputs are data, whose gradient is not asked for."""
    graph, params = scrambled(recurrent(cell, width=4, layers=2))
    x = jax.ShapeDtypeStruct((3, 7, 3), jnp.float32)
    (first, hidden), (second, _) = (multiply_adds(cell, 3, 7, d, 4) for d in (3, 4))
    output = 3 * 7 * 4 * 2
    forward = 2 * (first + second + 2 * hidden + output)
    found = compute.count(lambda p, x: run(graph, p, x), params, x)
    assert found.exact
    assert found.by_phase == {"forward": forward}
    found = compute.count(jax.grad(lambda p, x: jnp.sin(run(graph, p, x)).sum()), params, x)
    assert found.exact
    assert found.by_phase == {"forward": forward, "backward": 2 * forward - 2 * first}


@pytest.mark.parametrize("attention", ["none", "additive", "dot"])
def test_the_ledger_counts_both_directions_and_attention_exactly(attention):
    """B, T, H, F = 3, 7, 4, 8; padded, which saves no product."""
    config = recurrent("gru", bidirectional=True, head="sequence", attention=attention)
    graph, params = scrambled(config)
    x = jax.ShapeDtypeStruct((3, 7, 3), jnp.float32)
    first, hidden = (2 * n for n in multiply_adds("gru", 3, 7, 3, 4))
    scores = {"none": 0, "dot": 3 * 7 * 8, "additive": 3 * 8 * 4 + 3 * 7 * 8 * 4 + 3 * 7 * 4}
    context, seen = (0, 8) if attention == "none" else (3 * 7 * 8, 16)
    forward = 2 * (first + hidden + scores[attention] + context + 3 * seen * 2)

    def loss(params, x):
        return jnp.sin(run(graph, params, x, lengths=LENGTHS)).sum()

    found = compute.count(jax.grad(loss), params, x)
    assert found.exact
    assert found.by_phase == {"forward": forward, "backward": 2 * forward - 2 * first}


# ---- PyTorch, with the same weights


def torch_layers(torch, params, config):
    """torch.nn's layers with the weights of `params`."""
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[config.cell]
    layers = kind(
        config.features,
        config.width,
        config.layers,
        batch_first=True,
        bidirectional=config.bidirectional,
    )
    with torch.no_grad():
        for name, value in torch_names(params, config).items():
            given = getattr(layers, name)
            given.copy_(torch.from_numpy(np.array(value)))
    return layers


def torch_names(params, config):
    """A tree like the parameters, under torch's names. Torch has two biases a gate: where the
    second adds to the first it is 0 here."""
    found = {}
    for n, layer in params["layers"].items():
        ways = {"": layer}
        if config.bidirectional:
            ways = {"": layer["forward"], "_reverse": layer["backward"]}
        for way, p in ways.items():
            bias = np.zeros_like(p["input"]["bias"])
            if config.cell == "gru":
                bias[2] = p["bias"]
            found[f"weight_ih_l{n}{way}"] = side_by_side(p["input"]["kernel"]).T
            found[f"weight_hh_l{n}{way}"] = side_by_side(p["hidden"]["kernel"]).T
            found[f"bias_ih_l{n}{way}"] = np.ravel(p["input"]["bias"])
            found[f"bias_hh_l{n}{way}"] = np.ravel(bias)
    return found


@every_cell
@either_way
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "packed"])
def test_equals_torch_in_outputs_states_and_gradients(cell, bidirectional, lengths):
    torch = pytest.importorskip("torch")
    width = 6
    seen = width * (2 if bidirectional else 1)
    config = recurrent(cell, width=width, layers=2, bidirectional=bidirectional, outputs=seen)
    sequence = nnx.graphdef(abstract(dataclasses.replace(config, head="sequence")))
    graph, params = scrambled(config)
    params["output"] = {"kernel": jnp.eye(seen), "bias": jnp.zeros(seen)}
    x = vectors(3, 5, 3)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def ours(params, x):
        steps = run(graph, params, x, lengths=lengths)
        last = run(sequence, params, x, lengths=lengths)
        return jnp.sum(jnp.sin(steps)) + jnp.sum(jnp.cos(last)), (steps, last)

    (by_params, by_x), (steps, last) = ours(params, x)
    layers, given = torch_layers(torch, params, config), torch.from_numpy(x).requires_grad_()
    utils = torch.nn.utils.rnn
    if lengths is None:
        y, state = layers(given)
    else:
        packed = utils.pack_padded_sequence(
            given, torch.from_numpy(lengths), batch_first=True, enforce_sorted=False
        )
        y, state = layers(packed)
        y, _ = utils.pad_packed_sequence(y, batch_first=True)
    hidden = state[0] if cell == "lstm" else state
    end = torch.cat([hidden[-2], hidden[-1]], dim=-1) if bidirectional else hidden[-1]
    (torch.sin(y).sum() + torch.cos(end).sum()).backward()
    close(steps, y.detach())
    close(last, end.detach())
    close(by_x, given.grad)
    for name, value in torch_names(by_params, config).items():
        theirs = getattr(layers, name).grad.numpy()
        if name.startswith("bias_hh"):  # torch's second bias of a gate, which is not ours
            theirs = np.where(value != 0, theirs, 0)
        close(value, theirs)
    if not bidirectional:
        carry = abstract(config).initial_carry(3)
        _, carry = run(graph, params, x, lengths=lengths, carry=carry)
        close(np.stack([state[-1] for state in carry]), hidden.detach())
        if cell == "lstm":
            close(np.stack([state[0] for state in carry]), state[1].detach())


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """Which of two marks, 1 and 2, comes first among other tokens: the first (0) or the second.

    The last token says nothing; padding holds marks too.
    """

    def load(self):
        rng = np.random.default_rng(0)
        rows, time = 1024, 12
        lengths = rng.integers(4, time + 1, rows)
        tokens = rng.integers(3, 6, (rows, time))
        targets = rng.integers(0, 2, rows)
        for row, length, target in zip(tokens, lengths, targets, strict=True):
            a, b = np.sort(rng.choice(length - 1, 2, replace=False))
            row[a], row[b] = 1 + target, 2 - target
            row[length:] = rng.integers(0, 6, time - length)
        arrays = {"inputs": tokens, "targets": targets, "lengths": lengths}
        arrays = {k: v.astype(np.int32) for k, v in arrays.items()}
        return {
            "train": Examples({k: v[:768] for k, v in arrays.items()}),
            "validation": Examples({k: v[768:] for k, v in arrays.items()}),
        }


def test_learns_which_mark_came_first_in_a_padded_sequence(tmp_path):
    experiment = tiny.mlp(
        model=RecurrentConfig(
            cell="gru",
            vocab=6,
            width=16,
            outputs=2,
            bidirectional=True,
            head="sequence",
            attention="additive",
        ),
        data=Order(),
        optimizer=tiny.Optimizer(update=tiny.Optax("adam", {"learning_rate": 0.01})),
        batch_size=64,
        steps=120,
        log_every=40,
        target=Target(metric="accuracy", value=0.98, split="validation"),
    )
    summary = train(prepare(experiment, tiny.ONE), tmp_path, quiet=True)
    assert summary.met, summary
