"""The Transformer against a NumPy one, and what scanning and rematerialising must leave alone."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from made import abstract, initial, scrambled

from research.models.layers import _rotate
from research.models.transformer import TransformerConfig

GPT2 = TransformerConfig(vocab=11, context=6, layers=2, heads=4, width=16)
LLAMA = dataclasses.replace(
    GPT2,
    kv_heads=2,
    feed_forward=24,
    norm="rms",
    positions="rotary",
    mlp="swiglu",
    bias=False,
    tied=False,
)
VARIANTS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "one key head, learned, untied": dataclasses.replace(
        GPT2, kv_heads=1, tied=False, mlp="swiglu"
    ),
    "rotary, layer norm, no bias, tied": dataclasses.replace(GPT2, positions="rotary", bias=False),
    "rms norm, bias": dataclasses.replace(GPT2, norm="rms", kv_heads=2),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
TOKENS = np.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, key=None):
    """Logits; the training mode's with a key."""
    model = nnx.merge(nnx.graphdef(abstract(config)), params)
    if key is None:
        model.eval()
        return model(tokens)
    model.train()
    return model(tokens, rngs=nnx.Rngs(dropout=key))


def loss(config, params, tokens, key=None):
    logits = run(config, params, tokens, key)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean(), logits


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, params, tokens, key=None):
    """((loss, logits), gradients)."""
    return jax.value_and_grad(loss, argnums=1, has_aux=True)(config, params, tokens, key)


def stacked(params):
    """An unrolled model's parameters as a scanned one holds them."""
    layers = [layer for _, layer in sorted(params["layers"].items())]
    return params | {"layers": jax.tree.map(lambda *p: np.stack(p), *layers)}


def reference(config, params, tokens):
    """Logits in NumPy, one head at a time, each key head repeated for its group of queries."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    heads, kv_heads = config.heads, config.kv_heads or config.heads
    head, group, time = config.width // heads, heads // kv_heads, tokens.shape[1]

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        scaled = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * p["scale"]
        return scaled + p.get("bias", 0)

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    def turn(x):
        if config.positions != "rotary":
            return x
        z = x[..., : head // 2] + 1j * x[..., head // 2 :]
        frequency = 10_000.0 ** (-2 * np.arange(head // 2) / head)
        z = z * np.exp(1j * np.arange(time)[:, None] * frequency)
        return np.concatenate([z.real, z.imag], axis=-1)

    def attention(x, p):
        qkv = np.einsum("btd,dkch->btkch", x, p["qkv"]["kernel"]) + p["qkv"].get("bias", 0)
        found = []
        for n in range(heads):
            k, g = divmod(n, group)
            query, key, value = turn(qkv[:, :, k, g]), turn(qkv[:, :, k, -2]), qkv[:, :, k, -1]
            scores = query @ key.swapaxes(1, 2) / np.sqrt(head)
            scores = np.exp(np.where(np.tri(time), scores, -np.inf))
            found.append(scores / scores.sum(-1, keepdims=True) @ value)
        return dense(np.concatenate(found, axis=-1), p["out"])

    def mlp(x, p):
        up = dense(x, p["up"])
        if config.mlp == "swiglu":
            gate = dense(x, p["gate"])
            return dense(gate / (1 + np.exp(-gate)) * up, p["down"])
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        return dense(gelu, p["down"])

    x = params["embed"]["embedding"][tokens]
    if config.positions == "learned":
        x = x + params["positions"]["embedding"][:time]
    for _, p in sorted(params["layers"].items()):
        x = x + attention(norm(x, p["attention_norm"]), p["attention"])
        x = x + mlp(norm(x, p["mlp_norm"]), p["mlp"])
    x = norm(x, params["norm"])
    return x @ (params["embed"]["embedding"].T if config.tied else params["output"]["kernel"])


@pytest.mark.parametrize("start", [initial, scrambled])  # epsilon shows at initial, small values
@every_variant
def test_equals_numpy(config, start):
    params = start(config)
    expected = reference(config, params, TOKENS)
    close(run(config, params, TOKENS), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("scan", [False, True])
def test_gpt2_has_124_439_808_parameters(scan):
    config = TransformerConfig(
        vocab=50_257, context=1024, layers=12, heads=12, width=768, scan=scan
    )
    params = nnx.state(abstract(config))
    assert sum(p.size for p in jax.tree.leaves(params)) == 124_439_808


def test_llama_parameter_count():
    embed, norm, qkv, out, mlp = 11 * 16, 16, 16 * (4 + 2 + 2) * 4, 16 * 16, 3 * 16 * 24
    expected = 2 * embed + 2 * (2 * norm + qkv + out + mlp) + norm
    assert sum(p.size for p in jax.tree.leaves(nnx.state(abstract(LLAMA)))) == expected


@every_variant
def test_there_are_biases_where_they_are_asked_for(config):
    paths = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(abstract(config))))
    assert any("bias" in jax.tree_util.keystr(path) for path, _ in paths) == config.bias


class Given(nnx.Module):
    """An embedding whose vectors are given, so that one can differentiate by them."""

    def __init__(self, embed, vectors):
        self.embed, self.vectors = embed, vectors

    def __call__(self, tokens):
        return self.vectors

    def attend(self, x):
        return self.embed.attend(x)


@every_variant
def test_a_step_depends_on_every_step_up_to_its_own_and_on_none_after(config):
    config = dataclasses.replace(config, layers=1)

    def logits(vectors):
        model = nnx.merge(nnx.graphdef(abstract(config)), scrambled(config))
        model.embed = Given(model.embed, vectors)
        return model(TOKENS[:1])[0].sum(axis=-1)

    vectors = np.random.default_rng(1).normal(size=(1, 6, 16)).astype(np.float32)
    jacobian = jax.jit(jax.jacrev(logits))(vectors)
    depends = np.abs(jacobian).sum(axis=(1, 3)) != 0
    assert np.array_equal(depends, np.tri(6, dtype=bool))


DROPPED = dataclasses.replace(LLAMA, dropout=0.3)
KEY = jax.random.key(1)


def test_scanned_layers_start_as_the_unrolled_ones():
    scanned = initial(dataclasses.replace(GPT2, scan=True))
    jax.tree.map(np.testing.assert_array_equal, scanned, stacked(initial(GPT2)))


@pytest.mark.parametrize(
    ("config", "key"), [(GPT2, None), (DROPPED, KEY)], ids=["evaluation", "training"]
)
def test_scanned_layers_compute_what_the_unrolled_ones_do(config, key):
    params = initial(dataclasses.replace(config, dropout=0.0))
    (_, logits), grads = gradients(config, params, TOKENS, key)
    scan = dataclasses.replace(config, scan=True)
    (_, scanned_logits), scanned_grads = gradients(scan, stacked(params), TOKENS, key)
    close(scanned_logits, logits)
    jax.tree.map(close, scanned_grads, stacked(grads))


@pytest.mark.parametrize(
    ("remat", "scan", "config", "key"),
    [
        ("full", False, GPT2, None),
        ("full", True, DROPPED, KEY),
        ("dots", True, GPT2, None),
    ],
)
def test_rematerialising_changes_no_number(remat, scan, config, key):
    params = initial(dataclasses.replace(config, dropout=0.0))
    params = stacked(params) if scan else params
    expected = gradients(dataclasses.replace(config, scan=scan), params, TOKENS, key)
    again = dataclasses.replace(config, scan=scan, remat=remat)
    jax.tree.map(close, gradients(again, params, TOKENS, key), expected)


def count(jaxpr, primitive):
    """How often a primitive occurs, in the jaxprs inside too."""
    inner = [jax.tree.leaves(e.params, is_leaf=lambda p: hasattr(p, "eqns")) for e in jaxpr.eqns]
    nested = [p for params in inner for p in params if hasattr(p, "eqns")]
    own = sum(e.primitive.name == primitive for e in jaxpr.eqns)
    return own + sum(count(p, primitive) for p in nested)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_rematerialising_recomputes_all_or_all_but_matrix_products(scan):
    products, tanhs = {}, {}
    for remat in ("none", "full", "dots"):
        config = dataclasses.replace(GPT2, scan=scan, remat=remat)
        shapes = nnx.to_pure_dict(nnx.state(abstract(config)))
        jaxpr = jax.make_jaxpr(gradients, static_argnums=0)(config, shapes, TOKENS)
        products[remat], tanhs[remat] = count(jaxpr, "dot_general"), count(jaxpr, "tanh")
    assert products["none"] == products["dots"] < products["full"]
    assert tanhs["none"] < tanhs["dots"] == tanhs["full"]


def test_grouped_keys_are_plain_ones_with_each_key_head_repeated():
    plain = dataclasses.replace(LLAMA, kv_heads=None)
    params = scrambled(LLAMA)

    def repeat(kernel):
        q, k, v = jnp.split(kernel, [2, 3], axis=-2)  # [D, K, G, h], [D, K, 1, h] twice
        return jnp.concatenate(
            [q.reshape(16, 4, 1, 4), *(jnp.repeat(x, 2, axis=1) for x in (k, v))], axis=-2
        )

    plain_params = jax.tree_util.tree_map_with_path(
        lambda path, p: repeat(p) if "qkv" in jax.tree_util.keystr(path) else p, params
    )
    expected = run(plain, plain_params, TOKENS)
    close(run(LLAMA, params, TOKENS), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_as_many_key_heads_as_heads_is_plain_attention():
    config = dataclasses.replace(GPT2, kv_heads=4)
    jax.tree.map(np.testing.assert_array_equal, initial(config), initial(GPT2))
    params = scrambled(GPT2)
    np.testing.assert_array_equal(run(config, params, TOKENS), run(GPT2, params, TOKENS))


def test_rotated_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    turned = [_rotate(jnp.broadcast_to(x, (1, 7, 1, 8)))[0, :, 0] for x in (q, k)]
    products = np.asarray(turned[0] @ turned[1].T)
    for distance in range(-6, 7):
        diagonal = np.diagonal(products, distance)
        close(diagonal, np.full_like(diagonal, diagonal[0]), atol=1e-5)
    assert len(np.unique(np.round([*products[0], *products[1:, 0]], 3))) == 13
    assert products[0, 0] == pytest.approx(q @ k, rel=1e-5)


def test_rotating_keeps_lengths_and_leaves_the_first_position():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    turned = np.asarray(_rotate(x))
    close(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def zeros_of(module):
    return jax.tree.map(lambda p: jnp.zeros(p.shape), nnx.to_pure_dict(nnx.state(module)))


def test_each_branch_of_each_layer_is_dropped_by_a_mask_of_its_own():
    config = dataclasses.replace(GPT2, dropout=0.5)
    params = zeros_of(abstract(config))
    for n in range(2):  # layer 0 adds 1 and 10 to the stream, layer 1 adds 100 and 1000
        params["layers"][n]["attention"]["out"]["bias"] += 100.0**n
        params["layers"][n]["mlp"]["down"]["bias"] += 10 * 100.0**n

    @jax.jit
    def draw():
        model = nnx.merge(nnx.graphdef(abstract(config)), params)
        model.train()
        return model._layers(jnp.zeros((32, 16, 16)), nnx.Rngs(dropout=KEY))

    values, counts = np.unique(draw(), return_counts=True)
    subsets = itertools.product([0, 2000], [0, 200], [0, 20], [0, 2])
    assert values.tolist() == [sum(kept) for kept in subsets]
    np.testing.assert_allclose(counts / counts.sum(), 1 / 16, atol=0.015)


def test_the_embedding_is_dropped():
    config = dataclasses.replace(LLAMA, vocab=16, dropout=0.5, layers=1)
    params = zeros_of(abstract(config))
    params["embed"]["embedding"] += 1
    params["norm"]["scale"] += 1
    params["output"]["kernel"] = jnp.eye(16)
    logits = run(config, params, TOKENS, KEY)
    assert np.mean(logits == 0) == pytest.approx(0.5, abs=0.12)


@every_variant
def test_the_initial_loss_is_that_of_a_uniform_guess(config):
    assert loss(config, initial(config), TOKENS)[0] == pytest.approx(np.log(11), abs=0.06)


def test_kernels_start_as_in_gpt2():
    params = initial(GPT2)
    layers = stacked(params)["layers"]
    kernels = {k: v["kernel"] for k, v in (layers["attention"] | layers["mlp"]).items()}
    small = 0.02 / (2 * GPT2.layers) ** 0.5
    for name, deviation in {"qkv": 0.02, "out": small, "up": 0.02, "down": small}.items():
        assert np.std(kernels[name]) == pytest.approx(deviation, rel=0.1)
    for name in ("embed", "positions"):
        assert np.std(params[name]["embedding"]) == pytest.approx(0.02, rel=0.15)


def test_a_sequence_longer_than_the_context_is_an_error_of_one_line():
    with pytest.raises(ValueError, match=r"\A7 tokens exceed the model's context of 6(\n-+\n|\Z)"):
        jax.eval_shape(
            lambda: GPT2.make(nnx.Rngs(params=jax.random.key(0)))(jnp.zeros((1, 7), int))
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 18}, "width 18 does not divide into 4 heads"),
        ({"kv_heads": 3}, "4 heads do not divide over 3 kv_heads"),
        ({"kv_heads": 8}, "4 heads do not divide over 8 kv_heads"),
        ({"width": 12, "positions": "rotary"}, "rotary positions need an even head, not 3"),
    ],
)
def test_heads_must_divide(fields, message):
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        dataclasses.replace(GPT2, **fields)
