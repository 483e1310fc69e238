"""Flash attention: who may have it, what is compiled, and how devices share it."""

import dataclasses
import functools
import re
from importlib import util

import ahead
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from research import compute, flash
from research.bench import extrapolation, plan, throughput
from research.compute import causes, targets
from research.data.outline import outlined
from research.models import layers
from research.models.encoder import EncoderConfig
from research.models.transformer import TransformerConfig
from research.parallel import BATCH, Parallel
from research.setup import prepare

MODEL = TransformerConfig(vocab=7, context=8, layers=2, heads=4, width=32, scan=True)
LONG = dataclasses.replace(MODEL, vocab=256, context=256, width=256)
PLATFORMS = {"cuda": "h100", "tpu": "v5e"}


def asked(**fields):
    given = {"attention": "flash", "precision": "bfloat16", "model": MODEL, "batch_size": 16}
    return tiny.transformer(**given | fields)


def devices(platform, count=1):
    """Skips where there is no compiler, or no cuDNN beside it."""
    found = ahead.devices(platform, count)
    if platform == "cuda" and util.find_spec("nvidia.cudnn") is None:
        pytest.skip("nvidia-cudnn-cu13 (extra flash) is not installed")
    return found


@pytest.mark.parametrize(
    ("platform", "e", "count", "message"),
    [
        ("cuda", asked(precision="float32"), 1, "it computes in bfloat16: set precision bfloat16"),
        ("tpu", tiny.mlp(attention="flash", precision="bfloat16"), 1, "MLP has no attention"),
        ("tpu", asked(parallel=Parallel(context=2)), 2, "context a ring is in its place"),
        ("cuda", asked(parallel=Parallel(pipeline=2)), 2, "not with parallel.pipeline"),
        (
            "tpu",
            asked(model=dataclasses.replace(LONG, context=8, remat="dots")),
            1,
            "its own products are none that model.remat dots keeps: set none or full",
        ),
        (
            "cuda",
            tiny.packed(attention="flash", precision="bfloat16"),
            1,
            "cuDNN's cannot tell packed documents, or padding, apart",
        ),
        ("tpu", asked(), 1, "TPU's is of rows of a multiple of 128 tokens, these have 8"),
    ],
)
def test_where_it_is_not_it_is_refused(platform, e, count, message):
    with pytest.raises(flash.Unsuited, match=f"^attention flash: .*{message}"):
        prepare(e, ahead.devices(platform, count))


def test_this_machine_has_none():
    with pytest.raises(flash.Unsuited, match="GPUs and TPUs have it, and the devices are cpu"):
        prepare(asked(), jax.devices()[:1])


def random(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def documents(batch, time):
    """Segments of random lengths, as packed rows have them."""
    starts = np.random.default_rng(1).random((batch, time)) < 4 / time
    ids = jnp.asarray(starts.cumsum(axis=1), jnp.int32)
    return ids, ids


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("time", [128, 384])
def test_a_tpus_kernel_computes_attention_and_its_gradients(time, causal, packed):
    """As JAX interprets it; queries share key heads."""
    given = random((2, time, 4, 64), (2, time, 2, 64), (2, time, 2, 64))
    (weights,) = random((2, time, 4, 64))
    segments = documents(2, time) if packed else None
    kernel = functools.partial(flash.KERNELS["tpu"], interpret=True)

    def found(fn):
        def loss(*given):
            y = fn(*given, segments, causal)
            return (y * weights).sum(), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*given)

    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    wanted = found(layers.attention)
    jax.tree.map(near, found(kernel), wanted)
    given = [x.astype(jnp.bfloat16) for x in given]
    kinds = found(kernel), found(layers.attention), wanted
    for ours, xla, exact in zip(*map(jax.tree.leaves, kinds), strict=True):
        assert ours.dtype == xla.dtype == jnp.bfloat16
        apart, as_xla = (np.abs(y.astype(jnp.float32) - exact).max() for y in (ours, xla))
        assert apart < 2 * as_xla


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
@pytest.mark.parametrize("packed", [True, False])
def test_devices_share_rows_and_heads(spread, apart, causal, packed):
    """By XLA's attention in place of a kernel's: what each device is given is its own rows and
    heads, in a program written for all of them and in one that is written for each."""
    parts = []

    def kernel(q, k, v, segments, causal):
        parts.append(q.shape)
        return layers.attention(q, k, v, segments, causal)

    sizes = {"data": 1} | spread
    count = int(np.prod(list(sizes.values())))
    mesh = Parallel(**sizes).mesh(16, jax.devices()[:count])
    q, k, v = random(*((8, 6, n, 4) for n in (4, 2, 2)))
    segments = documents(8, 6) if packed else None
    wanted = layers.attention(q, k, v, segments, causal)
    fn = flash.Flash(kernel, mesh, BATCH[0], layers.attention)

    def run(*given):
        return fn(*given, causal)

    if apart:
        run = jax.shard_map(
            run, mesh=mesh, in_specs=P(apart), out_specs=P(apart), axis_names={*apart},
            check_vma=False,
        )  # fmt: skip
    np.testing.assert_allclose(jax.jit(run)(q, k, v, segments), wanted, rtol=1e-5, atol=1e-6)
    rows = 8 // int(np.prod([sizes.get(name, 1) for name in BATCH[0]]))
    assert {*parts} == {(rows, 6, 4 // sizes.get("tensor", 1), 4)}


def test_cudnns_is_asked_for(monkeypatch):
    def library(q, k, v, is_causal, implementation):
        return q, is_causal, implementation

    monkeypatch.setattr(flash, "library", library)
    assert flash.KERNELS["cuda"](1, 2, 3, None, True) == (1, True, "cudnn")


@pytest.mark.parametrize(
    ("e", "target", "reason"),
    [
        (asked(), "h100:2", r"attention flash: .*nvidia-cudnn-cu13"),
        (asked(), "v5e:4", "attention flash: TPU's is of rows of a multiple of 128 tokens"),
        (asked(), "cpu:1", "attention flash: GPUs and TPUs have it, and the devices are cpu"),
    ],
)
def test_a_plan_says_whose_attention_stood_in(e, target, reason, monkeypatch):
    def none(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(flash, "library", none)
    place = targets.place(target)
    if not targets.installed(place.kind):
        pytest.skip("its compiler is not installed")
    row = plan.compiled(e, place)
    assert (row.status, row.attention) == ("ok", "XLA")
    assert re.match(f"XLA's stands in: {reason}", row.reason)


def both(e, platform, count):
    """What the ledger says of a step by the kernels and by XLA's attention."""
    found = {}
    for kind in ("flash", "xla"):
        setup = prepare(outlined(dataclasses.replace(e, attention=kind)), devices(platform, count))
        traced = setup.step().trace(*setup.abstract_example())
        compiled = ahead.compile(traced, platform)
        found[kind] = compute.report(
            traced, compiled=compiled, mesh=setup.mesh, reference=setup.reference()
        )
    return found["flash"], found["xla"]


@pytest.mark.parametrize("spread", [{"data": 2}, {"fsdp": 2, "tensor": 2}])
def test_what_is_compiled_for_gpus(spread):
    """The same model FLOPs, and every FLOP more accounted for."""
    e = throughput.experiment(LONG, 16)
    e = dataclasses.replace(e, precision="bfloat16", parallel=Parallel(**spread))
    ours, xla = both(e, "cuda", 2 * len(spread))
    assert ours.count.model_flops == xla.count.model_flops
    assert any(p.kind.startswith("__cudnn$fmha") for p in ours.program.products)
    assert ours.program.memory.temporaries < xla.program.memory.temporaries
    scores = 2 * LONG.layers * 16 * 256 * 256 * LONG.width
    assert {d.cause: d.flops for d in ours.differences} == {causes.AGAIN: scores}
    assert ours.rooflines()[0][1].at_least > 0


@pytest.mark.parametrize(
    ("spread", "remat"), [({"data": 4}, "none"), ({"fsdp": 2, "tensor": 2}, "full")]
)
def test_what_is_compiled_for_tpus(spread, remat):
    """The same model FLOPs, and every other FLOP accounted for: of blocks of 512 that are masked
    as a whole none, and in two kernels of the gradient the scores, in one also theirs."""
    time = 1536
    model = dataclasses.replace(LONG, context=time, kv_heads=2, remat=remat)
    e = throughput.experiment(model, 8)
    e = dataclasses.replace(e, precision="bfloat16", parallel=Parallel(**spread))
    ours, xla = both(e, "tpu", 4)
    assert ours.count.model_flops == xla.count.model_flops
    assert ours.program.exact, (ours.program.reasons, ours.program.unknown)
    assert ours.program.memory.temporaries < xla.program.memory.temporaries / 2
    product = 2 * model.layers * 8 * time * time * model.width
    forward = 2 if remat == "none" else 4
    found = {d.cause: d.flops for d in ours.differences}
    # Of 9 blocks 6.
    assert found.pop(causes.AGAIN) == 3 * product * 6 // 9
    assert found.pop(causes.SKIPPED) == -(forward + 4) * product * 3 // 9
    assert {*found} == ({causes.RECOMPUTE} if remat == "full" else set())
    assert ours.rooflines()[0][1].at_least > 0


def test_an_encoders_rows_are_told_from_their_padding_on_tpus():
    model = EncoderConfig(vocab=7, context=128, classes=3, layers=1, heads=4, width=64)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Long(tiny.Sequences):
        def load(self):
            return {
                name: dataclasses.replace(
                    split,
                    rows=dict(split.rows, inputs=np.resize(split.rows["inputs"], (85, 128))),
                )
                for name, split in super().load().items()
            }

    e = tiny.mlp(model=model, data=Long(), attention="flash", precision="bfloat16")
    setup = prepare(e, ahead.devices("tpu"))
    traced = setup.step().trace(*setup.abstract_example())
    compiled = ahead.compile(traced, "tpu")
    found = compute.report(traced, compiled=compiled, mesh=setup.mesh, reference=setup.reference())
    assert any(p.kind == "splash_fwd" for p in found.program.products)
    assert found.program.exact, (found.program.reasons, found.program.unknown)
    # Nothing is masked in blocks; the mean's gradient leaves no product out.
    product = 2 * model.layers * 16 * 128 * 128 * model.width
    assert {d.cause: d.flops for d in found.differences} == {causes.AGAIN: 3 * product}


@pytest.mark.parametrize(
    ("platform", "small", "large"),
    [("cuda", "h100:16", "h100:32"), ("tpu", "v5e:2x2:2", "v5e:2x2:8")],
)
def test_what_is_extrapolated_has_the_same_model_flops(platform, small, large, monkeypatch):
    devices(platform)  # skips
    monkeypatch.setattr(extrapolation, "MOST", 16)
    e = outlined(throughput.experiment(LONG, 32))
    e = dataclasses.replace(e, precision="bfloat16")
    place = targets.place(large)
    row = plan.compiled(dataclasses.replace(e, attention="flash"), place)
    assert (row.extrapolated, row.attention) == (small, flash.NAMES[platform])
    assert row.model_flops == plan.compiled(e, place).model_flops
