"""cuDNN's attention: who may have it, what is compiled, and how devices share it."""

import dataclasses

import ahead
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from research import UserError, compute, flash
from research.bench import extrapolation, plan, throughput
from research.compute import causes, targets
from research.data.outline import outlined
from research.models import layers
from research.models.transformer import TransformerConfig
from research.parallel import BATCH, Parallel
from research.setup import prepare

MODEL = TransformerConfig(vocab=7, context=8, layers=2, heads=4, width=32, scan=True)


def asked(**fields):
    given = {"attention": "cudnn", "precision": "bfloat16", "model": MODEL, "batch_size": 16}
    return tiny.transformer(**given | fields)


@pytest.mark.parametrize(
    ("e", "count", "message"),
    [
        (asked(precision="float32"), 1, "it computes in bfloat16: set precision bfloat16"),
        (tiny.mlp(attention="cudnn", precision="bfloat16"), 1, "MLP has no attention"),
        (asked(parallel=Parallel(context=2)), 2, "with parallel.context a ring is in its place"),
        (asked(parallel=Parallel(pipeline=2)), 2, "not with parallel.pipeline"),
        (tiny.packed(attention="cudnn", precision="bfloat16"), 1, "packed documents apart"),
    ],
)
def test_where_it_is_not_it_is_refused(e, count, message):
    with pytest.raises(UserError, match=f"^attention cudnn: .*{message}"):
        prepare(e, ahead.devices("cuda", count))


def test_this_machine_has_none():
    with pytest.raises(UserError, match="it is of NVIDIA GPUs, and the devices are cpu"):
        prepare(asked(), jax.devices()[:1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("spread", "apart"),
    [
        ({}, ()),
        ({"data": 2}, ("data",)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ()),
        ({"data": 2, "tensor": 2}, ("data",)),
        ({"replica": 2, "data": 2, "tensor": 2}, ("replica", "data")),
    ],
)
def test_devices_share_rows_and_heads(monkeypatch, spread, apart, causal):
    """By XLA's attention in place of cuDNN's: what each device is given is its own rows and heads,
    in a program written for all of them and in one that is written for each."""
    parts = []

    def attention(q, k, v, is_causal, implementation):
        assert implementation == "cudnn"
        parts.append(q.shape)
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(flash, "attention", attention)
    sizes = {"data": 1} | spread
    count = int(np.prod(list(sizes.values())))
    mesh = Parallel(**sizes).mesh(16, jax.devices()[:count])
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(8, 6, n, 4)), jnp.float32) for n in (4, 2, 2))
    wanted = layers.attention(q, k, v, causal=causal)
    fn = flash.Flash(mesh, BATCH[0], layers.attention)

    def run(q, k, v):
        return fn(q, k, v, causal=causal)

    if apart:
        run = jax.shard_map(
            run, mesh=mesh, in_specs=P(apart), out_specs=P(apart), axis_names={*apart},
            check_vma=False,
        )  # fmt: skip
    np.testing.assert_allclose(jax.jit(run)(q, k, v), wanted, rtol=1e-5, atol=1e-6)
    rows = 8 // int(np.prod([sizes.get(name, 1) for name in BATCH[0]]))
    assert {*parts} == {(rows, 6, 4 // sizes.get("tensor", 1), 4)}


def test_a_plan_says_whose_attention_stood_in(monkeypatch):
    ahead.devices("cuda")  # skips
    monkeypatch.setattr(flash, "installed", lambda: False)
    row = plan.compiled(asked(), targets.place("h100:2"))
    assert (row.status, row.attention) == ("ok", "XLA")
    assert row.reason == "attention is XLA's, not cuDNN's: pip install nvidia-cudnn-cu13"


def test_a_plan_for_another_kind_has_xlas():
    ahead.devices("tpu")  # skips
    row = plan.compiled(asked(), targets.place("v5e:4"))
    assert (row.status, row.attention) == ("ok", "XLA")
    assert row.reason == "attention is XLA's, not cuDNN's: of NVIDIA GPUs alone"


@pytest.mark.parametrize("spread", [{"data": 2}, {"fsdp": 2, "tensor": 2}])
def test_what_is_compiled(spread):
    """The same model FLOPs, and every FLOP more accounted for."""
    if not flash.installed():
        pytest.skip("nvidia-cudnn-cu13 (extra flash) is not installed")
    model = dataclasses.replace(MODEL, vocab=256, context=256, width=256)
    e = dataclasses.replace(
        throughput.experiment(model, 16), precision="bfloat16", parallel=Parallel(**spread)
    )
    found = {}
    for kind in ("cudnn", "xla"):
        setup = prepare(
            outlined(dataclasses.replace(e, attention=kind)),
            ahead.devices("cuda", 2 * len(spread)),
        )
        traced = setup.step().trace(*setup.abstract_example())
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        found[kind] = compute.report(
            traced, compiled=compiled, mesh=setup.mesh, reference=setup.reference()
        )
    ours, xla = found["cudnn"], found["xla"]
    assert ours.count.model_flops == xla.count.model_flops
    assert any(p.kind.startswith("__cudnn$fmha") for p in ours.program.products)
    assert ours.program.memory.temporaries < xla.program.memory.temporaries
    differences = {d.cause: d.flops for d in ours.differences}
    scores = 2 * model.layers * e.batch_size * 256 * 256 * model.width
    assert differences == {causes.AGAIN: scores}
    assert ours.rooflines()[0][1].at_least > 0


def test_what_is_extrapolated_has_the_same_model_flops(monkeypatch):
    if not flash.installed():
        pytest.skip("nvidia-cudnn-cu13 (extra flash) is not installed")
    ahead.devices("cuda")  # skips
    monkeypatch.setattr(extrapolation, "MOST", 16)
    rows = {
        kind: plan.compiled(asked(attention=kind, batch_size=32), targets.place("h100:32"))
        for kind in ("cudnn", "xla")
    }
    assert rows["cudnn"].extrapolated == rows["xla"].extrapolated == "h100:16"
    assert rows["cudnn"].attention == "cuDNN flash"
    assert rows["cudnn"].model_flops == rows["xla"].model_flops
