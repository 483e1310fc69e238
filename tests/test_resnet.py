"""ResNets against PyTorch's functions; what running statistics and stochastic depth do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from made import assert_kept_alone, images
from torch_reference import close, gradients, leaves

from research import parallel
from research.models.resnet import RESNET18, RESNET50, ResNetConfig
from research.modules import merged, variables
from research.setup import prepare

CIFAR = ResNetConfig(classes=3, channels=2, layers=(1, 2), width=4, stem="cifar")
VARIANTS = {
    "basic, cifar": CIFAR,
    "basic, imagenet": dataclasses.replace(CIFAR, stem="imagenet", layers=(1, 1)),
    "bottleneck, cifar": dataclasses.replace(CIFAR, block="bottleneck"),
    "bottleneck, imagenet": dataclasses.replace(CIFAR, stem="imagenet", block="bottleneck"),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
KEY = jax.random.key(1)


@functools.cache
def abstract(config):
    """The module's graph, and shapes of its parameters and of its running statistics."""
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(params=jax.random.key(0))))
    return nnx.graphdef(model), *variables(model)


def scrambled(config):
    """Parameters and running statistics, none of them at its initial value."""
    rng = np.random.default_rng(0)

    def number(path, leaf):
        name, x = path[-1].key, rng.normal(size=leaf.shape)
        scale = leaf.shape and np.prod(leaf.shape[:-1]) ** -0.5
        made = {"scale": 1 + 0.3 * x, "var": np.exp(0.5 * x), "kernel": 1.4 * scale * x}
        return jnp.float32(made.get(name, 0.3 * x))

    _, params, statistics = abstract(config)
    return jax.tree_util.tree_map_with_path(number, (params, statistics))


@functools.partial(jax.jit, static_argnums=0, static_argnames="training")
def run(config, params, statistics, x, key=None, training=False):
    """Logits, and the running statistics after."""
    with merged(abstract(config)[0], params, statistics, training=training) as model:
        y = model(x, rngs=None if key is None else nnx.Rngs(dropout=key))
    return y, variables(model)[1]


def reference(config, params, statistics, x, training):
    """torchvision's ResNet (`torchvision/models/resnet.py`) by PyTorch's functions.

    Updates the statistics; variances by n, as here, where PyTorch has n - 1.
    """
    import torch
    import torch.nn.functional as F

    def conv(x, p, stride):
        kernel = p["kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x, p, s):
        mean, var = s["mean"].detach().clone(), s["var"].detach().clone()
        n, old = x.numel() // x.shape[1], var * config.momentum
        y = F.batch_norm(x, mean, var, p["scale"], p["bias"], training, 1 - config.momentum)
        if training:
            s["mean"], s["var"] = mean, old + (var - old) * (n - 1) / n
        return y

    def block(x, p, s, stride):
        y, strides = x, {2: (stride, 1), 3: (1, stride, 1)}[len(p["convs"])]
        for i, step in enumerate(strides):
            y = conv(F.relu(y) if i else y, p["convs"][i], step)
            y = norm(y, p["norms"][i], s["norms"][i])
        if "shortcut" in p:
            x = norm(conv(x, p["shortcut"], stride), p["shortcut_norm"], s["shortcut_norm"])
        return F.relu(x + y)

    large = config.stem == "imagenet"
    x = conv(x.permute(0, 3, 1, 2), params["stem"], 2 if large else 1)
    x = F.relu(norm(x, params["stem_norm"], statistics["stem_norm"]))
    if large:
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    firsts = np.cumsum((0, *config.layers))
    for n in range(firsts[-1]):
        stride = 2 if n and n in firsts else 1
        x = block(x, params["blocks"][n], statistics["blocks"][n], stride)
    x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@every_variant
def test_outputs_gradients_and_statistics_are_those_of_pytorch(config, training):
    params, statistics = scrambled(config)
    x, weights = images(5, 17, 14, 2), images(5, 3, seed=2)

    def loss(params, x):
        y, after = run(config, params, statistics, x, training=training)
        return jnp.sum(y * weights), (y, after)

    grads, (y, after) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    given = leaves((params, x))
    kept = leaves(statistics)
    expected = reference(config, given[0], kept, given[1], training)
    (expected * expected.new_tensor(weights)).sum().backward()
    close(y, expected)
    close(grads, gradients(given))
    close(after, kept)


@pytest.mark.parametrize(("config", "count"), [(RESNET18, 11_689_512), (RESNET50, 25_557_032)])
def test_published_parameter_counts(config, count):
    _, params, statistics = abstract(config)
    assert sum(p.size for p in jax.tree.leaves(params)) == count
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(statistics)}
    assert names == {"mean", "var"}


def test_every_block_starts_as_its_shortcut_and_kernels_at_he_normal_of_the_outputs():
    config = dataclasses.replace(CIFAR, width=32, layers=(1, 1), block="bottleneck")
    params, _ = variables(config.make(nnx.Rngs(params=jax.random.key(0))))
    for block in params["blocks"].values():
        norms = [*block["norms"].values(), block["shortcut_norm"]]
        assert [np.unique(norm["scale"]).tolist() for norm in norms] == [[1], [1], [0], [1]]
        for conv in (*block["convs"].values(), block["shortcut"]):
            height, width, _, outputs = conv["kernel"].shape
            deviation = (2 / (height * width * outputs)) ** 0.5
            assert np.std(conv["kernel"]) == pytest.approx(deviation, rel=0.1)


def test_statistics_change_in_training_only():
    params, statistics = scrambled(CIFAR)
    x = images(4, 8, 8, 2)
    evaluated, same = run(CIFAR, params, statistics, x)
    jax.tree.map(np.testing.assert_array_equal, same, statistics)
    trained, after = run(CIFAR, params, statistics, x, training=True)
    changed = jax.tree.map(lambda a, b: bool(np.all(a != b)), after, statistics)
    assert all(jax.tree.leaves(changed)), changed
    assert np.any(trained != evaluated)


def test_an_example_depends_on_its_batch_in_training_only():
    params, statistics = scrambled(CIFAR)
    x = images(4, 8, 8, 2)
    other = np.concatenate([x[:1], images(3, 8, 8, 2, seed=3)])
    for training in (False, True):
        a, b = (run(CIFAR, params, statistics, v, training=training)[0][0] for v in (x, other))
        assert np.allclose(a, b, atol=1e-5) == (not training)


def test_a_step_moves_every_parameter_and_statistic():
    setup = prepare(tiny.resnet(optimizer=tiny.sgd(0.1)), tiny.ONE)
    state = setup.initial()
    before = jax.device_get((state.params, state.model_state))
    step = setup.step()
    for n in range(3):  # the last norms start at zero: what is behind them moves after them
        batch = parallel.put(setup.splits["train"].batch(n, 16, 0), setup.mesh)
        state, _ = step(state, batch, setup.root)
    after = jax.device_get((state.params, state.model_state))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert all(jax.tree.leaves(moved)), moved


def test_statistics_are_of_the_whole_batch_on_every_mesh():
    params, statistics = scrambled(CIFAR)
    # Each device's two examples have a mean of their own: its statistics by itself would differ.
    x = images(16, 8, 8, 2) + np.arange(16, dtype=np.float32)[:, None, None, None]
    spread = parallel.put({"inputs": x}, parallel.Parallel().mesh(16))["inputs"]
    assert len(spread.sharding.device_set) == 8
    found = run(CIFAR, params, statistics, spread, training=True)
    close(found, run(CIFAR, params, statistics, x, training=True))


DEEP = dataclasses.replace(CIFAR, layers=(4,), stochastic_depth=0.8)


def test_rate_0_and_evaluation_keep_every_branch():
    params, statistics = scrambled(DEEP)
    x = images(4, 8, 8, 2)
    plain = dataclasses.replace(DEEP, stochastic_depth=0.0)
    expected = run(plain, params, statistics, x)
    jax.tree.map(np.testing.assert_array_equal, run(DEEP, params, statistics, x), expected)
    jax.tree.map(np.testing.assert_array_equal, run(DEEP, params, statistics, x, KEY), expected)
    expected = run(plain, params, statistics, x, training=True)
    found = run(plain, params, statistics, x, KEY, training=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_branches_are_dropped_by_example_at_a_rate_that_rises_to_the_last():
    params, statistics = jax.tree.map(jnp.zeros_like, scrambled(DEEP))
    for n in range(4):  # block n adds 10^n to every channel, and 1 / keep of that in training
        params["blocks"][n]["norms"][1]["bias"] += 10.0**n
    params["head"]["kernel"] += jnp.eye(4, 3)
    y, _ = run(DEEP, params, statistics, images(4096, 2, 2, 2), KEY, training=True)
    keep = 1 - 0.8 * np.arange(1, 5) / 4
    assert_kept_alone(y[:, 0], keep)
    close(y.mean(0) / 1111, np.ones(3), 0.1)
    assert np.all(y == y[:, :1])  # the whole of a branch, or nothing of it


def test_stochastic_depth_without_a_key_is_an_error():
    with pytest.raises(ValueError, match="stochastic depth draws from rngs in training"):
        run(DEEP, *scrambled(DEEP), images(1, 4, 4, 2), training=True)


@pytest.mark.parametrize("layers", [(), (2, 0)])
def test_stages_have_blocks(layers):
    with pytest.raises(ValueError, match=r"\Alayers must be one or more stages of >= 1 blocks"):
        dataclasses.replace(CIFAR, layers=layers)
