import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research import compute
from research.models.lstm import LSTMConfig
from research.models.transformer import TransformerConfig
from research.modules import merged, scopes, variables


def flops(model, *args):
    graph, _, _ = nnx.split(model, nnx.Param, ...)
    params, rest = variables(model)

    def loss(params):
        with merged(graph, params, rest, training=False) as module:
            return module(*args).sum()

    return compute.count(jax.value_and_grad(loss), params).by_module


def transformer(**fields):
    given = {"vocab": 11, "context": 4, "layers": 3, "heads": 2, "width": 8, "bias": False}
    return TransformerConfig(**given | fields).make(nnx.Rngs(0))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_are_named_by_their_path_however_they_are_run(scan, remat):
    tokens = jnp.zeros((2, 4), jnp.int32)
    found = flops(transformer(scan=scan, remat=remat), tokens)
    once = 2 * (2 * 4) * 3  # 2 a multiply-add, 8 tokens, 3 layers
    passes = 4 if remat == "full" else 3  # forward, backward twice, recompute
    assert found["layers.attention.qkv"] == passes * once * 8 * 24
    assert found["layers.mlp.up"] == passes * once * 8 * 32
    assert found["output"] == 3 * 2 * 8 * 8 * 11
    assert "" not in found


def test_lists_of_modules_are_named_by_their_index():
    found = flops(
        LSTMConfig(vocab=5, outputs=3, width=4, layers=2).make(nnx.Rngs(0)),
        jnp.zeros((2, 6), jnp.int32),
    )
    step = 2 * (2 * 6) * 4 * 16
    assert found["layers.1.hidden"] == found["layers.1.input"] == 3 * step
    assert found["output"] == 3 * 2 * (2 * 6) * 4 * 3


class Block(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class Wider(Block):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Shared(nnx.Module):
    """One module called twice, and one by inheritance."""

    def __init__(self, rngs):
        self.first = Block(rngs)
        self.second = Wider(rngs)

    def __call__(self, x):
        return self.second(self.first(self.first(x)))


def test_shared_and_inherited_modules():
    found = flops(Shared(nnx.Rngs(0)), jnp.ones((3, 4)))
    product = 2 * 3 * 4 * 4
    assert found == {"first.inner": 5 * product, "second.inner": 3 * product}


def test_names_change_no_number_and_leave_no_trace():
    model = transformer(dropout=0.0)
    tokens = jnp.arange(4)[None]
    before = Block.__call__, nnx.Linear.__call__
    plain = model(tokens)
    with scopes(model):
        assert nnx.Linear.__call__ is not before[1]
        named = model(tokens)
    assert (Block.__call__, nnx.Linear.__call__) == before
    np.testing.assert_array_equal(plain, named)


def test_an_error_inside_restores_the_classes():
    before = nnx.Linear.__call__
    with pytest.raises(ZeroDivisionError), scopes(transformer()):
        raise ZeroDivisionError
    assert nnx.Linear.__call__ is before


def test_merged_is_a_copy_in_the_form_asked_for():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(model)
    params, rest = variables(model)
    with merged(graph, params, rest, training=True) as module:
        module(jnp.ones((2, 3)))
        assert variables(module)[1]["mean"][0] > 0
    assert rest["mean"][0] == 0
    with merged(graph, params, rest, training=False) as module:
        module(jnp.ones((2, 3)))
        assert variables(module)[1]["mean"][0] == 0
