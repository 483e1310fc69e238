"""The encoder: what attends to what, and that padding is nothing, beside PyTorch's attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from made import abstract, normal, scrambled
from torch_reference import close, gradients, leaves

from research import compute
from research.models.encoder import EncoderConfig
from research.models.layers import Attention
from research.tasks import Classify

MEAN = EncoderConfig(vocab=11, context=6, classes=3, layers=2, heads=4, width=16)
VARIANTS = {
    "mean": MEAN,
    "class token": dataclasses.replace(MEAN, pooling="cls"),
    "attention": dataclasses.replace(MEAN, pooling="attention"),
    "class token, rotary, scanned": dataclasses.replace(
        MEAN, pooling="cls", positions="rotary", scan=True, kv_heads=2, mlp="swiglu", norm="rms"
    ),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
TOKENS = np.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3]], np.int32)
LENGTHS = np.asarray([4, 6, 1], np.int32)
COUNTED = np.arange(6) < LENGTHS[:, None]


def attention(causal):
    """The graph of one, and normal numbers for its parameters."""
    made = nnx.eval_shape(lambda: Attention(MEAN, causal, nnx.Rngs(params=jax.random.key(0))))
    graph, params = nnx.split(made)
    return graph, normal(nnx.to_pure_dict(params))


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, lengths=None):
    model = nnx.merge(nnx.graphdef(abstract(config)), params)
    model.eval()
    return model(tokens, lengths=lengths)


class Given(nnx.Module):
    """Vectors for an embedding, so that one can differentiate by them."""

    def __init__(self, vectors):
        self.vectors = vectors

    def __call__(self, tokens):
        return self.vectors


@every_variant
def test_a_row_depends_on_all_its_tokens_and_on_no_padding(config):
    params = scrambled(config)

    def logits(vectors):
        model = nnx.merge(nnx.graphdef(abstract(config)), params)
        model.embed = Given(vectors)
        return model(TOKENS, lengths=LENGTHS)

    vectors = np.random.default_rng(1).normal(size=(3, 6, 16)).astype(np.float32)
    jacobian = jax.jit(jax.jacrev(logits))(vectors)  # [row, class, row, time, width]
    depends = np.any(jacobian != 0, axis=(1, 4))
    assert np.array_equal(depends, np.eye(3, dtype=bool)[..., None] & COUNTED)


@every_variant
def test_padding_changes_nothing_and_no_padding_is_full_length(config):
    params = scrambled(config)
    expected = run(config, params, TOKENS, LENGTHS)
    other = np.where(COUNTED, TOKENS, 10)
    np.testing.assert_array_equal(run(config, params, other, LENGTHS), expected)
    for row, length in enumerate(LENGTHS):
        close(run(config, params, TOKENS[row : row + 1, :length])[0], expected[row])


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
def test_a_row_of_no_tokens_is_finite_and_reads_none(pooling):
    """Such rows fill the last batch of an evaluation, with weight zero."""
    config = dataclasses.replace(MEAN, pooling=pooling)
    params, none = scrambled(config), np.zeros(3, np.int32)
    logits = run(config, params, TOKENS, none)
    grads = jax.grad(lambda p: run(config, p, TOKENS, none).sum())(params)
    assert all(np.all(np.isfinite(x)) for x in (logits, *jax.tree.leaves(grads)))
    assert np.all(logits == logits[:1])


@pytest.mark.parametrize("causal", [False, True])
def test_every_position_attends_to_every_other_or_to_those_before(causal):
    graph, params = attention(causal)
    x = np.random.default_rng(1).normal(size=(1, 6, 16)).astype(np.float32)
    jacobian = jax.jit(jax.jacrev(lambda x: nnx.merge(graph, params)(x).sum(axis=-1)))(x)
    depends = np.any(jacobian != 0, axis=(0, 2, 4))
    assert np.array_equal(depends, np.tri(6, dtype=bool) if causal else np.ones((6, 6), bool))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_padding_is_that_of_pytorch(causal):
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F

    graph, params = attention(causal)
    x, weights = np.random.default_rng(1).normal(size=(2, 3, 6, 16)).astype(np.float32)
    weights = weights * COUNTED[..., None]  # what padding itself becomes is of no account

    def loss(params, x):
        y = nnx.merge(graph, params)(x, (np.ones((1, 1), bool), COUNTED))
        return jnp.sum(y * weights), y

    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    given = leaves((params, x))
    p, vectors = given
    kernel = p["qkv"]["kernel"].permute(2, 1, 3, 0).reshape(3 * 16, 16)
    bias = p["qkv"]["bias"].permute(1, 0, 2).reshape(-1)
    vectors = vectors.transpose(0, 1)
    future = ~torch.tril(torch.ones(6, 6, dtype=bool)) if causal else None
    expected, _ = F.multi_head_attention_forward(
        vectors, vectors, vectors, 16, 4, kernel, bias, None, None, False, 0.0,
        p["out"]["kernel"].T, p["out"]["bias"],
        key_padding_mask=torch.tensor(~COUNTED), attn_mask=future,
    )  # fmt: skip
    expected = expected.transpose(0, 1)
    (expected * torch.tensor(weights)).sum().backward()
    close(y[COUNTED], expected[torch.tensor(COUNTED)])
    close(grads, gradients(given))


def test_attention_weights_of_pooling_are_a_softmax_over_tokens():
    config = dataclasses.replace(MEAN, pooling="attention")
    params = scrambled(config)
    model = nnx.merge(nnx.graphdef(abstract(config)), params)
    x = np.random.default_rng(1).normal(size=(3, 6, 16)).astype(np.float32)
    scores = np.exp(x @ np.asarray(params["score"]["kernel"])) * COUNTED[..., None]
    expected = (scores * x).sum(1) / scores.sum(1)
    close(model._pool(jnp.asarray(x), jnp.asarray(COUNTED)), expected)
    params["score"]["kernel"] *= 0
    mean = run(MEAN, {k: v for k, v in params.items() if k != "score"}, TOKENS, LENGTHS)
    close(run(config, params, TOKENS, LENGTHS), mean)


def test_a_task_gives_it_lengths():
    params = scrambled(MEAN)
    model = nnx.merge(nnx.graphdef(abstract(MEAN)), params)
    model.eval()
    batch = {
        "inputs": TOKENS,
        "lengths": LENGTHS,
        "targets": np.zeros(3, np.int32),
        "weights": np.ones(3, np.float32),
    }
    outputs, _ = Classify().outputs(model, batch, None, None)
    close(outputs, run(MEAN, params, TOKENS, LENGTHS))


def test_its_products_by_hand():
    """Per token Q, K, V and output, 4 D^2, and feed-forward, 8 D^2; scores and sums of every pair;
    a class token is one more position. No product is marked causal."""
    for pooling, time in (("mean", 6), ("cls", 7), ("attention", 6)):
        config = dataclasses.replace(MEAN, pooling=pooling)
        params = nnx.to_pure_dict(nnx.state(abstract(config)))
        shape = jax.ShapeDtypeStruct((3, 6), jnp.int32)
        found = compute.count(functools.partial(run, config), params, shape)
        layer = time * 12 * 16**2 + 2 * time**2 * 16
        pool = time * 16 if pooling == "attention" else 0
        assert found.exact
        assert found.matmul_flops == 2 * 3 * (2 * layer + pool + 16 * 3)
        assert found.causal_flops is None


def test_a_sequence_longer_than_the_context_is_an_error_of_one_line():
    with pytest.raises(ValueError, match=r"\A7 tokens exceed the model's context of 6(\n-+\n|\Z)"):
        jax.eval_shape(lambda: run(MEAN, scrambled(MEAN), jnp.zeros((1, 7), int)))
