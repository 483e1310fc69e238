"""A run is the same on any mesh: ten steps, with dropout and accumulation, against one device."""

import dataclasses
import functools
import math

import defined
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from research import UserError, compute
from research.init_from import flat
from research.models.cnn import CNNConfig
from research.models.encoder import EncoderConfig
from research.models.recurrent import RecurrentConfig
from research.parallel import Parallel
from research.setup import prepare


def sequence(**fields):
    """A bidirectional GRU with attention, which gives one output a sequence."""
    model = RecurrentConfig(
        cell="gru",
        vocab=7,
        outputs=3,
        width=8,
        layers=2,
        bidirectional=True,
        dropout=0.2,
        head="sequence",
        attention="additive",
    )
    return tiny.mlp(model=model, data=tiny.Sequences(), **fields)


def encoder(**fields):
    model = EncoderConfig(
        vocab=7, context=8, classes=3, layers=2, heads=4, kv_heads=2, width=16, dropout=0.2
    )
    return tiny.mlp(model=model, data=tiny.Sequences(), **fields)


def cnn(**fields):
    model = CNNConfig(image=(8, 8, 1), classes=3, channels=(4, 8), dense=16, dropout=0.2)
    return tiny.mlp(model=model, data=tiny.Images(), **fields)


def recomputed(remat="full", **fields):
    model = dataclasses.replace(tiny.transformer().model, remat=remat)
    return tiny.transformer(model=model, **fields)


FAMILIES = {
    "mlp": tiny.mlp,
    "cnn": cnn,
    "resnet": tiny.resnet,
    "vit": tiny.vit,
    "lstm": tiny.lstm,
    "sequence": sequence,
    "encoder": encoder,
    "transformer": tiny.transformer,
    "packed": tiny.packed,
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2},
    "data, fsdp": {"data": 2, "fsdp": 4},
    "data, tensor": {"data": 4, "tensor": 2},
    "fsdp, tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
SEQUENCES = {
    "context": {"context": 4},
    "data, context": {"data": 2, "context": 4},
    "fsdp, context": {"fsdp": 2, "context": 4},
    "context, tensor": {"context": 4, "tensor": 2},
    "replica, context": {"replica": 2, "context": 2},
}
STAGES = {
    "pipeline": {"pipeline": 2, "microbatches": 4},
    "pipeline, data": {"pipeline": 2, "data": 2, "microbatches": 2},
    "pipeline, fsdp": {"pipeline": 2, "fsdp": 2, "microbatches": 2},
    "replica, pipeline": {"replica": 2, "pipeline": 2, "microbatches": 2},
}
REPLICAS = {
    "replica": {"replica": 2},
    "replica, data": {"replica": 2, "data": 2},
    "replica, fsdp": {"replica": 2, "fsdp": 2},
    "replica, tensor": {"replica": 2, "tensor": 2},
}
SPREADS = MESHES | SEQUENCES | STAGES | REPLICAS
PAIRS = [
    *((name, mesh) for name in FAMILIES for mesh in MESHES),
    *((name, mesh) for name in ("transformer", "packed", "encoder") for mesh in SEQUENCES),
    *((name, mesh) for name in ("transformer", "packed") for mesh in STAGES),
    *((name, mesh) for name in FAMILIES for mesh in REPLICAS),
]
# Of others' scanned layers: their families' own are one by one.
PAIRS += [(name, "pipeline") for name in ("scanned encoder", "scanned vit")]
RUNS = [pytest.param(*pair, marks=[pytest.mark.slow] if pair[1] == "all" else []) for pair in PAIRS]
RUNS.append(pytest.param("recomputed", "fsdp", marks=pytest.mark.slow))


def scanned(make):
    """A family whose layers are scanned."""

    def made(**fields):
        e = make(**fields)
        return dataclasses.replace(e, model=dataclasses.replace(e.model, scan=True))

    return made


OTHERS = {
    "recomputed": recomputed,
    "scanned encoder": scanned(encoder),
    "scanned vit": scanned(tiny.vit),
}


def on(mesh, e):
    """An experiment set up on as many devices as its mesh has."""
    spread = Parallel(**{"data": 1} | mesh)
    devices = jax.devices()[: math.prod(spread.axes.values())]
    return prepare(dataclasses.replace(e, parallel=spread), devices)


def precisely(graph, state):
    """A model whose embeddings are of their parameters' type, and no longer of the first one's."""
    model = nnx.merge(graph, state.params, state.model_state)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Embed):
            module.dtype = None
    return nnx.split(model, nnx.Param, ...)[0]


def doubled(tree):
    return jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, tree)


def family(name):
    return OTHERS.get(name) or FAMILIES[name]


@functools.cache
def start(name):
    """The state before the first step."""
    return jax.device_get(on({}, family(name)()).initial())


@functools.cache
def ten_steps(name, mesh, double):
    """Losses, and the parameters after ten steps: of AdamW in float64, or of SGD in float32; and
    the model FLOPs of a step as it is written for the mesh."""
    optimizer = {} if double else {"optimizer": tiny.sgd(0.1, clip_norm=1.0)}
    before = start(name)
    with jax.enable_x64(double), pytest.MonkeyPatch.context() as patch:
        setup = on(dict(mesh), family(name)(steps=10, accumulate=2, **optimizer))
        if double:
            before = doubled(before)
            setup = dataclasses.replace(setup, graph=precisely(setup.graph, before))
            patch.setattr(jax.nn, "dot_product_attention", defined.attention)
        else:
            before = dataclasses.replace(before, opt_state=setup.optimizer.init(before.params))
        state = jax.device_put(before, setup.shardings)
        feed = setup.feed(0, 10)
        first = next(feed)
        traced = setup.step().trace(state, first, setup.root)
        step = traced.lower().compile()
        losses = []
        for fed in (first, *feed):
            state, metrics = step(state, fed, setup.root)
            losses.append(float(metrics["loss"].mean()))
        assert {p.dtype for p in jax.tree.leaves(state.params)} == {
            np.dtype(float if double else np.float32)
        }
        count = compute.count(traced)
        assert count.exact, (count.lower, count.upper, count.unknown)
        found = jax.device_get((state.params, state.model_state))
        return np.array(losses), found, count.model_flops


def within(found, wanted, tolerance):
    """Of the largest number of an array."""
    largest = np.max(np.abs(wanted), initial=1e-3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_state_is_the_same_wherever_it_is_made(name):
    setup = on(MESHES["all"], FAMILIES[name]())
    state = setup.initial()
    # An orthogonal matrix's last bit may be another where a device makes a part of it.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(same, jax.device_get(state), start(name))
    for array, place in zip(*map(jax.tree.leaves, (state, setup.shardings)), strict=True):
        assert array.sharding.is_equivalent_to(place, array.ndim)


@pytest.mark.parametrize(("name", "mesh"), RUNS)
def test_any_mesh_computes_what_one_device_does(name, mesh):
    losses, state, flops = ten_steps(name, tuple(SPREADS[mesh].items()), True)
    alone, wanted, once = ten_steps(name, (), True)
    np.testing.assert_allclose(losses, alone, rtol=1e-9)
    jax.tree.map(functools.partial(within, tolerance=1e-9), state, wanted)
    assert flops == once or mesh in SEQUENCES | STAGES


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, "all") for name in FAMILIES),
        *((name, "fsdp, context") for name in ("transformer", "packed", "encoder")),
        *((name, "pipeline, fsdp") for name in ("transformer", "packed")),
    ],
)
def test_the_same_in_single_precision_under_sgd(name, mesh):
    losses, state, _ = ten_steps(name, tuple(SPREADS[mesh].items()), False)
    alone, wanted, _ = ten_steps(name, (), False)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    jax.tree.map(functools.partial(within, tolerance=1e-5), state, wanted)


@pytest.mark.parametrize("mesh", ["context", "pipeline"])
def test_schedules_by_hand_count_as_the_step_on_one_device(mesh):
    """Theirs has other products, of rounds and of a bubble."""
    setup = on(SPREADS[mesh], tiny.transformer(steps=10, accumulate=2))
    *_, flops = ten_steps("transformer", (), True)
    assert compute.count(setup.reference()).model_flops == flops


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_layers_are_recomputed_as_they_are_on_one_device(remat):
    def count(mesh, remat=remat):
        setup = on(mesh, recomputed(remat))
        return compute.count(setup.step().trace(*setup.abstract_example()))

    alone, kept = count({}), count({}, "none")
    assert alone.transcendentals > kept.transcendentals
    assert ("recompute" in alone.by_phase) == (remat == "full")
    for mesh in ("data", "fsdp", "data, fsdp", "fsdp, tensor"):
        assert count(MESHES[mesh]) == alone, mesh


def test_heads_and_models_that_do_not_divide_are_refused():
    near = r"parallel\.tensor 4; nearest that do: parallel\.tensor 2, or model\.heads 4$"
    with pytest.raises(UserError, match=rf"^model\.heads 2 does not divide over {near}"):
        on({"tensor": 4}, tiny.transformer())
    with pytest.raises(UserError, match=r"model\.kv_heads 2 .* parallel\.tensor 4"):
        on({"tensor": 4}, encoder())
    with pytest.raises(UserError, match=r"no rule of .* splits a parameter of Scale"):
        on({"tensor": 2}, tiny.scale())


@pytest.mark.parametrize(
    ("asked", "e"),
    [
        ({"tensor": 3}, tiny.transformer()),  # of 2 heads
        ({"data": 3, "fsdp": 3}, tiny.transformer(batch_size=4)),
        ({"data": 5}, tiny.mlp(accumulate=8)),
        ({"context": 3}, tiny.transformer()),  # of 8 tokens
        ({"pipeline": 3}, tiny.transformer(batch_size=64)),  # of 2 layers
        ({"pipeline": 3, "microbatches": 4}, tiny.transformer(batch_size=64)),
    ],
)
def test_the_nearest_meshes_suit_the_model_and_the_batch(asked, e):
    with pytest.raises(UserError, match="and there are 8 devices; nearest that fit: ") as raised:
        prepare(dataclasses.replace(e, parallel=Parallel(**asked)), jax.devices())
    named = str(raised.value).partition("nearest that fit: ")[2].split(" or ")
    for words in named:
        sizes = dict(part.split(" ") for part in words.split(" x "))
        given = {axis: int(size) for axis, size in sizes.items()}
        spread = Parallel(microbatches=asked.get("microbatches"), **given)
        prepare(dataclasses.replace(e, parallel=spread), jax.devices())


@pytest.mark.parametrize(
    ("mesh", "e", "message"),
    [
        (
            {"context": 4},
            tiny.lstm(),
            "parallel.context 4: Recurrent has no attention that shares a sequence",
        ),
        ({"context": 4}, tiny.vit(), "parallel.context 4: ViT attends to more than the data's tok"),
        (
            {"context": 8},
            tiny.transformer(),
            "parallel.context 8: rows of 8 tokens do not divide into 16 stretches, two a device",
        ),
        (
            {"pipeline": 2},
            tiny.mlp(),
            "parallel.pipeline 2: stages are of a Transformer's scanned layers .*, and MLP has no",
        ),
        (
            {"pipeline": 4},
            tiny.transformer(),
            "model.layers 2 does not divide over parallel.pipeline 4; nearest that do: "
            "parallel.pipeline 2, or model.layers 4",
        ),
        (
            {"pipeline": 2, "microbatches": 3},
            tiny.transformer(),
            "batch_size 16 does not divide into 3 parallel.microbatches .*; nearest that does: 18",
        ),
        (
            {"microbatches": 2},
            tiny.transformer(),
            "parallel.microbatches needs parallel.pipeline of 2 or more stages",
        ),
        (
            {"pipeline": 2, "tensor": 2},
            tiny.transformer(),
            "parallel.pipeline 2: not together with parallel.tensor; with replica, data and fsdp",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(mesh, e, message):
    with pytest.raises(UserError, match=message):
        on(mesh, e)


KERNELS = {
    # (fsdp 2, tensor 2): what one of four devices has of each kernel.
    "mlp": {"layers/0": (5, 4), "layers/1": (4, 3)},
    "cnn": {
        "convs/0": (3, 3, 1, 2),
        "convs/1": (3, 3, 2, 4),
        "dense": (16, 8),
        "head": (8, 3),  # no rule: fsdp
    },
    "lstm": {
        "layers/0/input": (4, 4, 4),
        "layers/0/hidden": (4, 4, 4),
        "layers/1/input": (4, 4, 4),
        "layers/1/hidden": (4, 4, 4),
        "output": (4, 7),
    },
    "transformer": {
        "layers/attention/qkv": (2, 4, 1, 3, 4),  # 2 layers in a stack
        "layers/attention/out": (2, 4, 4),
        "layers/mlp/up": (2, 4, 16),
        "layers/mlp/down": (2, 16, 4),
    },
    "resnet": {"stem": (3, 3, 1, 2)},
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_rules_split(name):
    setup = on({"fsdp": 2, "tensor": 2}, FAMILIES[name]())
    places = flat(setup.shardings.params)
    shapes = {name: leaf.shape for name, leaf in flat(setup.abstract.params).items()}
    found = {name: places[name].shard_shape(shape) for name, shape in shapes.items()}
    kernels = {path.removesuffix("/kernel"): s for path, s in found.items() if "kernel" in path}
    wanted = KERNELS[name]
    assert {path: kernels[path] for path in wanted} == wanted
    # Moments are where their parameters are.
    moments = jax.tree.leaves(setup.shardings.opt_state[0][0].mu)
    assert [m.spec for m in moments] == [p.spec for p in places.values()]
