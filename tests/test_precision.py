"""bfloat16 computes the products; parameters, norms, softmax and the loss stay float32."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from research import UserError, compute
from research.modules import compute_in
from research.record import read_metrics
from research.setup import prepare
from research.train import train


def rotary(**fields):
    model = dataclasses.replace(tiny.transformer().model, positions="rotary")
    return tiny.transformer(**{"model": model} | fields)


FAMILIES = {
    "mlp": tiny.mlp,
    "lstm": tiny.lstm,
    "transformer": tiny.transformer,
    "rotary": rotary,
    "norm": tiny.norm,
}
SENSITIVE = ("exp", "log", "log1p", "rsqrt", "sqrt", "erf_inv", "reduce_max", "cumsum")


def step(family, **fields):
    setup = prepare(FAMILIES[family](**fields), tiny.ONE)
    return setup.step().trace(*setup.abstract_example())


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for param in jax.tree.leaves(
            eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(param, "jaxpr") or hasattr(param, "eqns"):
                yield from equations(getattr(param, "jaxpr", param))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_product_is_in_bfloat16_and_none_is_lost(family):
    wide, narrow = (
        compute.count(step(family, precision=precision)) for precision in ("float32", "bfloat16")
    )
    assert wide.by_dtype == {"float32": wide.model_flops}
    assert narrow.model_flops == wide.model_flops
    # Attention asks for the algorithm by its name, to have the scores in float32.
    assert all("BF16_BF16_F32" in name for name in narrow.by_dtype.keys() - {"bfloat16"})


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_softmax_and_loss_are_in_float32(family):
    found = [
        eqn
        for eqn in equations(step(family, precision="bfloat16").jaxpr.jaxpr)
        if eqn.primitive.name in SENSITIVE
    ]
    assert found
    for eqn in found:
        assert {v.aval.dtype for v in eqn.invars} & {jnp.dtype("bfloat16")} == set(), eqn


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_is_in_float32(family):
    setup = prepare(FAMILIES[family](precision="bfloat16"), tiny.ONE)
    kept = setup.abstract
    leaves = jax.tree.leaves((kept.params, kept.model_state, kept.opt_state, kept.carry))
    assert {a.dtype for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_what_float32_learns(family, tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = FAMILIES[family](precision=precision, steps=20)
        train(prepare(run, tiny.ONE), tmp_path / precision, quiet=True)
        rows = [r["loss"] for r in read_metrics(tmp_path / precision) if r["split"] == "train"]
        losses[precision] = rows
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"][0] == pytest.approx(losses["float32"][0], rel=0.02)
    assert sum(losses["bfloat16"][-5:]) == pytest.approx(sum(losses["float32"][-5:]), rel=0.05)


def test_a_layers_own_dtype_is_kept():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.own = nnx.Linear(2, 2, dtype=jnp.float16, rngs=rngs)
            self.free = nnx.Linear(2, 2, rngs=rngs)
            self.norm = nnx.LayerNorm(2, rngs=rngs)

    model = Model(nnx.Rngs(0))
    compute_in(model, jnp.bfloat16)
    assert (model.own.dtype, model.free.dtype, model.norm.dtype) == (
        jnp.float16,
        jnp.bfloat16,
        jnp.float32,
    )


def test_a_run_does_not_change_its_precision(tmp_path):
    run = tiny.mlp(steps=2)
    train(prepare(run, tiny.ONE), tmp_path / "run", quiet=True)
    other = dataclasses.replace(run, precision="bfloat16", steps=4)
    with pytest.raises(UserError, match='was trained with precision = "float32"'):
        train(prepare(other, tiny.ONE), tmp_path / "run", quiet=True)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="precision must be"):
        tiny.mlp(precision="float8")
