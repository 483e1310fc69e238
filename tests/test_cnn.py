"""Convolutional networks against loops in NumPy and parameter counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.models.cnn import CNNConfig, LeNetConfig, _pool


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
    return graph, jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.3, p.shape)), params)


def images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def conv_relu(x, p, pad):
    """Tap by tap; zeros around the image where `pad`."""
    kernel, bias = np.asarray(p["kernel"], np.float64), np.asarray(p["bias"])
    size = kernel.shape[0]
    edge = size // 2 if pad else 0
    x = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    batch, height, width, _ = x.shape
    y = np.zeros((batch, height - size + 1, width - size + 1, len(bias)))
    for b, i, j, n in np.ndindex(y.shape):
        y[b, i, j, n] = bias[n] + np.sum(x[b, i : i + size, j : j + size] * kernel[..., n])
    return np.maximum(y, 0)


def pool(x):
    batch, height, width, channels = x.shape
    y = np.zeros((batch, height // 2, width // 2, channels))
    for b, i, j, n in np.ndindex(y.shape):
        y[b, i, j, n] = max(x[b, 2 * i + di, 2 * j + dj, n] for di in (0, 1) for dj in (0, 1))
    return y


def dense(x, p):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"])


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LeNetConfig(), 61_706),
        (LeNetConfig(image=(28, 28, 1), padding="SAME"), 61_706),
        # 9*32+32, 9*32*64+64, 7*7*64*128+128, 128*10+10
        (CNNConfig(image=(28, 28, 1), classes=10), 320 + 18_496 + 401_536 + 1_290),
    ],
)
def test_parameter_count(config, count):
    assert count_of(config) == count


def test_cnn_equals_loops():
    graph, params = scrambled(CNNConfig(image=(7, 4, 2), classes=3, channels=(3, 4), dense=5))
    x = y = images(2, 7, 4, 2)
    for i in range(2):
        y = pool(conv_relu(y, params["convs"][i], pad=True))
    y = dense(np.maximum(dense(y.reshape(2, -1), params["dense"]), 0), params["head"])
    np.testing.assert_allclose(nnx.merge(graph, params)(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("padding", "image"), [("VALID", (16, 18, 1)), ("SAME", (13, 12, 2))])
def test_lenet_equals_loops(padding, image):
    graph, params = scrambled(LeNetConfig(image=image, padding=padding, classes=3))
    x = images(1, *image)
    y = pool(conv_relu(x, params["conv1"], pad=padding == "SAME"))
    y = pool(conv_relu(y, params["conv2"], pad=False)).reshape(1, -1)
    for name in ("dense1", "dense2"):
        y = np.maximum(dense(y, params[name]), 0)
    y = dense(y, params["head"])
    np.testing.assert_allclose(nnx.merge(graph, params)(x), y, rtol=1e-4, atol=1e-4)


def test_lenet_same_on_28_is_valid_on_that_image_in_a_frame_of_32():
    graph, params = scrambled(LeNetConfig())
    same, _ = scrambled(LeNetConfig(image=(28, 28, 1), padding="SAME"))
    x = images(1, 28, 28, 1)
    framed = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(
        nnx.merge(same, params)(x), nnx.merge(graph, params)(framed), rtol=1e-4, atol=1e-4
    )


def test_pooling_takes_the_largest_of_each_square_and_drops_an_odd_edge():
    x = np.asarray([[1, 2, 9], [3, -4, 9], [-8, -7, 9], [-6, -5, 9]], np.float32)
    assert np.array_equal(_pool(x[None, :, :, None])[0, :, :, 0], [[3], [-5]])


def test_dropout_stands_before_the_dense_layer_and_before_the_classes():
    rate, n = 0.5, 256
    config = CNNConfig(image=(2, 2, 1), classes=n, channels=(n,), dense=n, dropout=rate)
    graph, params = scrambled(config)
    params = jax.tree.map(jnp.zeros_like, params)
    params["convs"][0]["bias"] += 1.0
    params["dense"]["kernel"] = params["head"]["kernel"] = jnp.eye(n)
    model = nnx.merge(graph, params)
    model.train()
    y = np.asarray(model(images(8, 2, 2, 1), rngs=nnx.Rngs(dropout=jax.random.key(1))))
    assert set(np.unique(y)) == {0, 1 / (1 - rate) ** 2}
    assert np.mean(y > 0) == pytest.approx((1 - rate) ** 2, abs=0.04)


def test_kernels_start_at_he_normal():
    config = CNNConfig(image=(4, 4, 16), classes=2, channels=(32,), dense=40)
    model = config.make(nnx.Rngs(params=jax.random.key(0)))
    for kernel, inputs in [(model.convs[0].kernel, 9 * 16), (model.dense.kernel, 2 * 2 * 32)]:
        assert np.std(kernel[...]) == pytest.approx((2 / inputs) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeNetConfig(image=(15, 16, 1)), "too small for LeNet-5"),
        (lambda: LeNetConfig(image=(12, 11, 1), padding="SAME"), "too small for LeNet-5"),
        (lambda: LeNetConfig(image=(32, 32, 0)), "image must be .height, width, channels."),
        (lambda: CNNConfig(image=(0, 8, 1), classes=2), "image must be .height, width, channels."),
        (lambda: CNNConfig(image=(3, 8, 1), classes=2), "cannot be halved 2 times"),
        (lambda: CNNConfig(image=(8, 8, 1), classes=2, channels=()), "channels must be"),
        (lambda: CNNConfig(image=(8, 8, 1), classes=2, channels=(4, 0)), "channels must be"),
    ],
)
def test_impossible_shapes_are_errors_of_one_line(make, message):
    with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        make()


@pytest.mark.parametrize(
    "config",
    [
        LeNetConfig(image=(16, 16, 1)),
        LeNetConfig(image=(12, 12, 1), padding="SAME"),
        CNNConfig(image=(4, 7, 1), classes=2),
    ],
)
def test_the_smallest_image_that_fits_is_taken(config):
    image = jnp.zeros((1, *config.image))
    logits = jax.eval_shape(lambda: config.make(nnx.Rngs(params=jax.random.key(0)))(image))
    assert logits.shape == (1, config.classes)
