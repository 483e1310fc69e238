"""The multilayer perceptron against a NumPy forward and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.models.mlp import MLPConfig

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def abstract(config):
    """The module as it is made, with shapes for arrays."""
    return nnx.eval_shape(lambda: config.make(nnx.Rngs(params=jax.random.key(0))))


def count_of(config):
    return sum(p.size for p in jax.tree.leaves(nnx.state(abstract(config))))


def scrambled(config):
    """The module's graph, and normal numbers for every parameter, biases too."""
    graph, params = nnx.split(abstract(config))
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(params)
    return graph, jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.5, p.shape)), params)


@pytest.mark.parametrize(
    ("features", "sizes", "count"),
    [
        (30, (64, 32, 1), (30 + 1) * 64 + (64 + 1) * 32 + (32 + 1)),
        (4, (64, 64, 3), (4 + 1) * 64 + (64 + 1) * 64 + (64 + 1) * 3),
        (5, (2,), 12),
    ],
)
def test_parameter_count(features, sizes, count):
    assert count_of(MLPConfig(features=features, sizes=sizes)) == count


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_numpy(activation):
    graph, params = scrambled(MLPConfig(features=5, sizes=(7, 6, 3), activation=activation))
    x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    y = np.asarray(x, np.float64)
    for i in range(3):
        y = y @ np.asarray(params["layers"][i]["kernel"]) + np.asarray(params["layers"][i]["bias"])
        y = ACTIVATIONS[activation](y) if i < 2 else y
    np.testing.assert_allclose(nnx.jit(nnx.merge(graph, params))(x), y, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean_and_has_the_variance_of_its_masks():
    rate, width, draws = 0.3, 64, 4000
    config = MLPConfig(features=3, sizes=(width, 1), activation="sigmoid", dropout=rate)
    graph, params = scrambled(config)
    x = np.asarray([[0.5, -1.0, 2.0]], np.float32)

    @jax.jit
    def draw(key):
        model = nnx.merge(graph, params, copy=True)
        model.train()
        return model(x, rngs=nnx.Rngs(dropout=key))[0, 0]

    drawn = np.asarray(jax.lax.map(draw, jax.random.split(jax.random.key(1), draws)))
    hidden, output = (jax.tree.map(np.asarray, params["layers"][i]) for i in range(2))
    terms = (
        ACTIVATIONS["sigmoid"](x @ hidden["kernel"] + hidden["bias"])[0] * output["kernel"][:, 0]
    )
    variance = rate / (1 - rate) * np.sum(terms**2)
    assert abs(drawn.mean() - terms.sum() - output["bias"][0]) < 4 * np.sqrt(variance / draws)
    assert drawn.var() == pytest.approx(variance, rel=0.1)


def test_kernels_start_at_he_normal_and_biases_at_zero():
    model = MLPConfig(features=200, sizes=(300, 1)).make(nnx.Rngs(params=jax.random.key(0)))
    assert np.std(model.layers[0].kernel[...]) == pytest.approx((2 / 200) ** 0.5, rel=0.02)
    assert not np.any(model.layers[0].bias[...])


@pytest.mark.parametrize("sizes", [(), (4, 0)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match=r"\Asizes must be one or more widths >= 1, not .*\Z"):
        MLPConfig(features=2, sizes=sizes)
