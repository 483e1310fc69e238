"""The Vision Transformer against PyTorch's functions, in torchvision's layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from made import abstract, assert_kept_alone, images, scrambled
from torch_reference import close, gradients, leaves

from research import compute
from research.models.vit import VIT_B16, VIT_S16, VIT_TINY, ViTConfig

VIT = ViTConfig(image=(6, 9, 2), classes=3, patch=3, layers=2, heads=2, width=8)
VARIANTS = {
    "class token": VIT,
    "mean": dataclasses.replace(VIT, pooling="mean"),
    "scanned": dataclasses.replace(VIT, scan=True, remat="full"),
}
KEY = jax.random.key(1)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, x, key=None):
    """Logits; the training mode's with a key."""
    model = nnx.merge(nnx.graphdef(abstract(config)), params)
    if key is None:
        model.eval()
        return model(x)
    model.train()
    return model(x, rngs=nnx.Rngs(dropout=key))


def reference(config, params, x):
    """torchvision's VisionTransformer (`torchvision/models/vision_transformer.py`)."""
    import torch
    import torch.nn.functional as F

    def norm(x, p):
        return F.layer_norm(x, (config.width,), p["scale"], p["bias"], eps=1e-6)

    def attention(x, p):
        # A head holds its query, key and value here; all queries come first in PyTorch.
        kernel = p["qkv"]["kernel"].permute(2, 1, 3, 0).reshape(3 * config.width, config.width)
        bias = p["qkv"]["bias"].permute(1, 0, 2).reshape(-1)
        x = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            x, x, x, config.width, config.heads, kernel, bias, None, None, False, 0.0,
            p["out"]["kernel"].T, p["out"]["bias"],
        )  # fmt: skip
        return y.transpose(0, 1)

    def mlp(x, p):
        x = F.gelu(F.linear(x, p["up"]["kernel"].T, p["up"]["bias"]))
        return F.linear(x, p["down"]["kernel"].T, p["down"]["bias"])

    kernel = params["patches"]["kernel"].permute(3, 2, 0, 1)
    x = F.conv2d(x.permute(0, 3, 1, 2), kernel, params["patches"]["bias"], stride=config.patch)
    x = x.flatten(2).permute(0, 2, 1)
    if config.pooling == "cls":
        x = torch.cat([params["token"].expand(len(x), 1, -1), x], dim=1)
    x = x + params["positions"]["embedding"]
    for n in range(config.layers):
        p = layer_of(params["layers"], n) if config.scan else params["layers"][n]
        x = x + attention(norm(x, p["attention_norm"]), p["attention"])
        x = x + mlp(norm(x, p["mlp_norm"]), p["mlp"])
    x = norm(x, params["norm"])
    x = x[:, 0] if config.pooling == "cls" else x.mean(dim=1)
    return F.linear(x, params["head"]["kernel"].T, params["head"]["bias"])


def layer_of(stack, n):
    return jax.tree.map(lambda x: x[n], stack)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_are_those_of_pytorch(config):
    params, x, weights = scrambled(config), images(2, *VIT.image), images(2, 3, seed=2)

    def loss(params, x):
        y = run(config, params, x)
        return jnp.sum(y * weights), y

    grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    given = leaves((params, x))
    expected = reference(config, *given)
    (expected * expected.new_tensor(weights)).sum().backward()
    close(y, expected)
    close(grads, gradients(given))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (VIT_S16, 22_050_664),
        (VIT_B16, 86_567_656),
        (dataclasses.replace(VIT_B16, pooling="mean"), 86_567_656 - 2 * 768),
        (VIT_TINY, 2_693_578),
    ],
)
def test_published_parameter_counts(config, count):
    assert sum(p.size for p in jax.tree.leaves(nnx.state(abstract(config)))) == count


@pytest.mark.parametrize("pooling", ["cls", "mean", "attention"])
def test_every_pixel_matters_and_so_does_the_order_of_patches(pooling):
    config = dataclasses.replace(VIT, pooling=pooling)
    params, x = scrambled(config), images(1, *VIT.image)
    grads = jax.jit(jax.grad(lambda x: run(config, params, x)[0, 0]))(x)
    assert np.all(grads != 0)
    swapped = np.concatenate([x[:, 3:], x[:, :3]], axis=1)
    assert np.all(run(config, params, swapped) != run(config, params, x))
    params["positions"]["embedding"] *= 0
    close(run(config, params, swapped), run(config, params, x))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_branches_are_dropped_by_example_at_a_rate_that_rises_to_the_last(scan):
    rate = 0.8
    config = dataclasses.replace(VIT, stochastic_depth=rate, scan=scan)
    params = jax.tree.map(jnp.zeros_like, scrambled(dataclasses.replace(VIT, scan=False)))
    for n in range(2):  # layer 0 adds 1 and 10 to the stream, layer 1 adds 100 and 1000
        params["layers"][n]["attention"]["out"]["bias"] += 100.0**n
        params["layers"][n]["mlp"]["down"]["bias"] += 10 * 100.0**n
    if scan:
        each = [layer for _, layer in sorted(params["layers"].items())]
        params["layers"] = jax.tree.map(lambda *p: jnp.stack(p), *each)

    @jax.jit
    def draw(key):
        model = nnx.merge(nnx.graphdef(abstract(config)), params)
        model.train()
        return model._layers(jnp.zeros((4096, 2, 8)), nnx.Rngs(dropout=key))

    y = np.asarray(draw(KEY))
    assert np.all(y == y[:, :1, :1])  # an example's branch is kept whole or dropped whole
    keep = 1 - rate * np.array([0.5, 0.5, 1, 1])
    assert_kept_alone(y[:, 0, 0], keep)
    np.testing.assert_allclose(y.mean() / 1111, 1, atol=0.1)


def test_a_rate_of_0_and_evaluation_drop_nothing():
    deep = dataclasses.replace(VIT, stochastic_depth=0.8)
    params, x = scrambled(VIT), images(2, *VIT.image)
    np.testing.assert_array_equal(run(deep, params, x), run(VIT, params, x))
    np.testing.assert_array_equal(run(VIT, params, x, KEY), run(VIT, params, x))
    assert np.all(run(deep, params, x, KEY) != run(VIT, params, x))


def test_scanned_layers_compute_what_the_unrolled_ones_do():
    config = dataclasses.replace(VIT, stochastic_depth=0.5, dropout=0.3)
    params, x = scrambled(config), images(4, *VIT.image)
    each = [layer for _, layer in sorted(params["layers"].items())]
    stacked = params | {"layers": jax.tree.map(lambda *p: jnp.stack(p), *each)}
    scanned = run(dataclasses.replace(config, scan=True), stacked, x, KEY)
    close(scanned, run(config, params, x, KEY))


def test_attention_is_marked_causal_nowhere():
    params = nnx.to_pure_dict(nnx.state(abstract(VIT)))
    x = jax.ShapeDtypeStruct((1, *VIT.image), jnp.float32)
    assert compute.count(functools.partial(run, VIT), params, x).causal_flops is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 4}, r"image \(6, 9, 2\) does not divide into patches of 4"),
        ({"image": (6, 9, 0)}, "image must be .height, width, channels., each >= 1, not .*"),
        ({"heads": 3}, "width 8 does not divide into 3 heads"),
    ],
)
def test_impossible_shapes_are_errors_of_one_line(fields, message):
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        dataclasses.replace(VIT, **fields)
