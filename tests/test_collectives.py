"""What devices send one another in a step compiled for four TPU v5e or four H100 that are not
there: what theory says, and nothing besides."""

import dataclasses
import functools
import math
from collections import Counter

import ahead
import jax
import pytest
import tiny

from research import compute, pipeline, train
from research.compute import hlo
from research.init_from import flat
from research.models.cnn import CNNConfig
from research.models.lstm import LSTMConfig
from research.models.mlp import MLPConfig
from research.models.resnet import ResNetConfig
from research.models.transformer import TransformerConfig
from research.parallel import Parallel
from research.setup import prepare

VOCAB, LENGTH, WIDTH, LAYERS, HEADS, BATCH = 64, 8, 128, 2, 4, 32


def transformer(**fields):
    given = {"vocab": VOCAB, "context": LENGTH, "layers": LAYERS, "heads": HEADS, "width": WIDTH}
    return tiny.transformer(model=TransformerConfig(**given, dropout=0.1, **fields))


def lstm():
    model = LSTMConfig(vocab=VOCAB, outputs=VOCAB, width=WIDTH, layers=LAYERS, dropout=0.1)
    return tiny.lstm(model=model)


def mlp():
    return tiny.mlp(model=MLPConfig(features=5, sizes=(WIDTH, WIDTH, 3), dropout=0.1))


def cnn():
    model = CNNConfig(image=(8, 8, 1), classes=3, channels=(32, 64), dense=WIDTH, dropout=0.1)
    return tiny.mlp(model=model, data=tiny.Images())


def resnet():
    model = ResNetConfig(classes=3, channels=1, layers=(1, 1), width=32, stem="cifar")
    return tiny.mlp(model=model, data=tiny.Images())


FAMILIES = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "lstm": lstm,
    "transformer": transformer,
    "scanned": lambda: transformer(scan=True),
}
FIRST = {"mlp": "layers/0/kernel", "cnn": "convs/0/kernel", "resnet": "stem/kernel"}
"""Kernels that read the data."""
RECOMPUTED = functools.partial(transformer, scan=True, remat="full")


def unless_slow(*names):
    """Layers one by one say what a scan of them says, and take long to compile."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name == "transformer" else [])
        for name in names
    ]


def compiled(name, target, accumulate=1, **spread):
    """The set-up on four devices, and the program of its step."""
    return made(name, target, Parallel(**{"data": 1} | spread), accumulate)


@functools.cache
def built(name, target, spread, accumulate):
    devices = jax.devices()[:4] if target == "cpu" else ahead.devices(target)
    fields = {"parallel": spread, "accumulate": accumulate, "batch_size": BATCH}
    family = RECOMPUTED if name == "recomputed" else FAMILIES[name]
    setup = prepare(dataclasses.replace(family(), **fields), devices)
    traced = setup.step().trace(*setup.abstract_example())
    # As users do: with less effort XLA for TPU sums an LSTM's gradients once a step of time.
    return setup, traced, traced.lower(lowering_platforms=(target,)).compile()


@functools.cache
def made(*given):
    setup, traced, program = built(*given)
    found = compute.report(traced, compiled=program, mesh=setup.mesh)
    assert found.program.exact, (found.program.unknown, found.program.reasons)
    return setup, found.program


def largest(text):
    """Elements of the largest array that a program writes to memory: those inside of fusions it
    does not. Left out is what XLA for GPU makes of others: several joined, of one axis, and
    products in two parts of the axis that they sum over, which are added next."""
    (module,) = hlo.modules(text)
    found = [c.instructions.values() for c in module.computations.values()]
    fused = {
        n for each in found for i in each if i.opcode == "fusion" for n in i.computations("calls")
    }
    return max(
        (leaf.size, i.name)
        for name, c in module.computations.items()
        if name not in fused
        for i in c.instructions.values()
        if not i.name.startswith("gemm_fusion")
        for leaf in i.shape.leaves
        if len(leaf.dims) > 1
    )


def sent(program):
    total = Counter()
    for each in program.collectives:
        total[each.kind, *(each.axes or ("unknown",))] += each.bytes * each.count
    return dict(total)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def named(setup):
    """Parameters by name: their shape as a tree's leaf, and how they are placed."""
    places = flat(setup.shardings.params)
    return {name: (leaf, places[name]) for name, leaf in flat(setup.abstract.params).items()}


def over(setup, axis):
    """Parameters that an axis splits."""
    return {name: leaf for name, (leaf, place) in named(setup).items() if axis in place.spec}


def twice(setup):
    """Parameters whose gradient has two parts, of a table to look up and of logits, which XLA sums
    apart."""
    model = setup.experiment.model
    shared = isinstance(model, TransformerConfig) and "output/kernel" not in named(setup)
    return [place_of for name, place_of in named(setup).items() if shared and "embed/" in name]


def summed(setup):
    """Bytes of the gradients on one device, of its parts of parameters."""
    held = [*named(setup).values(), *twice(setup)]
    return sum(math.prod(place.shard_shape(leaf.shape)) * 4 for leaf, place in held)


def statistics(setup):
    """Bytes that batch norms sum: a mean and a mean of squares, and a gradient of theirs."""
    return 3 * nbytes(setup.abstract.model_state) // 2


SCALARS = range(3 * 4, 6 * 4)
"""A loss, its weight and a metric, and what of them a compiler sums twice."""


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("name", unless_slow(*FAMILIES))
def test_data_parallel_sums_each_gradient_once(name, target):
    setup, program = compiled(name, target, data=4)
    found = sent(program)
    assert found.keys() == {("all-reduce", "data")}
    assert found["all-reduce", "data"] - summed(setup) - statistics(setup) in SCALARS


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("name", unless_slow("mlp", "lstm", "transformer", "scanned"))
def test_parts_of_a_batch_are_added_up_once(name, target):
    """Where a tied table's two gradients are added before they are sent; on either axis."""
    setup, program = compiled(name, target, accumulate=2, replica=2, data=2)
    scalars = 3 * 4
    assert sent(program) == {
        ("all-reduce", "replica", "data"): nbytes(setup.abstract.params) + scalars
    }


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_split_parameters_gradients_are_scattered_once_a_part(target):
    _, whole = compiled("lstm", target, fsdp=4)
    _, parts = compiled("lstm", target, accumulate=2, fsdp=4)
    once, twice = (
        sum(n for (kind, _), n in sent(program).items() if kind != "all-gather")
        for program in (whole, parts)
    )
    assert twice == pytest.approx(2 * once, rel=0.01)


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("name", unless_slow(*FAMILIES))
def test_fsdp_gathers_each_parameter_twice_and_scatters_its_gradient(name, target):
    setup, program = compiled(name, target, fsdp=4)
    found = sent(program)
    assert found.keys() == {(k, "fsdp") for k in ("all-gather", "reduce-scatter", "all-reduce")}
    split = over(setup, "fsdp")
    tables = {k: x for k, x in split.items() if k.endswith("embedding")}
    kernels = {k: x for k, x in split.items() if k.endswith("kernel")}
    statistic = statistics(setup)
    # Once, for what is before it has no gradient.
    first = nbytes([x for path, x in kernels.items() if path == FIRST.get(name)])
    if target == "tpu":
        # Kernels as bfloat16, which is what they are multiplied in. The attention's output in a
        # scan stays as it is.
        expected = nbytes(kernels) + nbytes(tables) - first // 2
        if name == "scanned":
            expected += nbytes(kernels["layers/attention/out/kernel"])
    else:
        expected = nbytes(split) + nbytes(kernels) - first
    # XLA for GPU scatters the sums of batch norms and gathers them again.
    assert 0 <= found["all-gather", "fsdp"] - expected <= 2 * statistic
    # A sum of squares of every part, for the norm of the gradient.
    gradients = nbytes(setup.abstract.params) + nbytes([leaf for leaf, _ in twice(setup)])
    reduced = found["reduce-scatter", "fsdp"] + found["all-reduce", "fsdp"]
    # What is small XLA for TPU sums and then cuts, and may sum twice, for its norm and its update.
    small = [x for x in split.values() if nbytes(x) < 1 << 14]
    allowed = nbytes(small) * (target == "tpu") + 4 * len(split) + max(SCALARS)
    assert 0 <= reduced - gradients - statistic <= allowed
    assert found["reduce-scatter", "fsdp"] >= nbytes(split) - nbytes(small)


@pytest.mark.parametrize("target", ["tpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_recomputed_layers_are_so_where_fsdp_splits_them_and_gather_no_more(target):
    setup, program = compiled("recomputed", target, fsdp=4)
    written = compute.count(setup.step().trace(*setup.abstract_example()))
    assert written.by_phase["recompute"] > written.by_phase["forward"] / 3
    assert 4 * program.matmul_flops == written.matmul_flops
    assert sent(program)["all-gather", "fsdp"] <= 2 * nbytes(over(setup, "fsdp"))


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("name", unless_slow(*FAMILIES))
def test_tensor_parallel_sums_gradients_of_parts(name, target):
    setup, program = compiled(name, target, data=2, tensor=2)
    found = sent(program)
    assert {axes for _, *axes in found for axes in axes} <= {"data", "tensor"}
    # Channels' statistics are of a device's own.
    assert found["all-reduce", "data"] <= summed(setup) + statistics(setup) + max(SCALARS)
    # Of what is whole, such as a bias of units that are split, each device may sum its part.
    assert found["all-reduce", "data"] >= nbytes(setup.abstract.params) / 2


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("name", unless_slow("transformer", "scanned"))
@pytest.mark.parametrize("spread", [{"tensor": 4}, {"data": 2, "tensor": 2}])
def test_a_transformers_heads_and_units_add_up_four_times_a_layer(name, spread, target):
    """After attention and after the units, forward and backward (Shoeybi et al. 2019); and once for
    the table's rows, once for the gradient of the logits."""
    setup, program = compiled(name, target, **{"data": 1} | spread)
    found = sent(program)
    rows = BATCH // spread.get("data", 1)
    activation = rows * LENGTH * WIDTH * 4
    # A softmax over a vocabulary in parts: a maximum and a sum for each token; and sums of squares.
    small = 3 * rows * LENGTH * 4 + 4 * len(named(setup)) + max(SCALARS)
    assert 0 <= found["all-reduce", "tensor"] - (4 * LAYERS + 2) * activation <= small
    # The best token of each part, and its logit.
    assert found["all-gather", "tensor"] <= 2 * spread["tensor"] * rows * LENGTH * 4
    assert not [key for key in found if key[0] not in ("all-reduce", "all-gather")]


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("name", unless_slow("transformer", "scanned"))
def test_keys_and_values_go_round_a_ring(name, target):
    """To the next of four devices three times, forward and backward; their gradients, which come
    home, four times. Nothing besides but the sum of gradients."""
    setup, program = compiled(name, target, context=4)
    found = sent(program)
    assert found.keys() == {("collective-permute", "context"), ("all-reduce", "context")}
    part = BATCH * LENGTH // 4 * WIDTH * 4
    assert found["collective-permute", "context"] == LAYERS * (3 * 2 + 3 * 2 + 4 * 2) * part
    assert found["all-reduce", "context"] - summed(setup) in SCALARS


STAGED = {"pipeline": 2, "data": 2}


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("parts", [2, 4])
def test_stages_pass_on_parts_of_a_batch(parts, target):
    """A part at each tick, forward and backward; rows come together before the layers and are
    scattered after them, and the other way round; gradients are summed over copies of a stage."""
    setup, program = compiled("scanned", target, **STAGED, microbatches=parts)
    found = sent(program)
    rows = BATCH // 2 * LENGTH * WIDTH * 4
    layers = nbytes([x for name, x in over(setup, "pipeline").items()])
    rest = nbytes(setup.abstract.params) - layers
    assert found["collective-permute", "pipeline"] == 2 * (parts + 1) * rows // parts
    assert found["all-gather", "pipeline"] == found["reduce-scatter", "pipeline"] == 2 * rows
    assert found["all-reduce", "data"] == layers // 2
    tied = VOCAB * WIDTH * 4
    assert found["all-reduce", "pipeline", "data"] - rest - tied in SCALARS
    # Sums of squares, for the norm of the gradient.
    assert found["all-reduce", "pipeline"] <= 4 * len(named(setup))
    assert len(found) == 6


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("parts", [2, 4])
def test_a_pipelines_bubble_is_computed_and_thrown_away(parts, target):
    setup, program = compiled("scanned", target, **STAGED, microbatches=parts)
    count = compute.count(setup.reference())
    output = count.by_module["output"]
    layers = count.model_flops - output
    assert 4 * program.matmul_flops * parts == output * parts + layers * (parts + 1)
    assert pipeline.bubble(2, parts) == 1 / (parts + 1)


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_an_lstms_units_exchange_states(target):
    """A layer's states are gathered for its own gates and for the next layer's, forward and for the
    gradients of kernels, and their gradients are summed twice; and as a Transformer's twice."""
    _, program = compiled("lstm", target, data=2, tensor=2)
    found = sent(program)
    total = sum(n for (_, axis), n in found.items() if axis == "tensor")
    assert total <= (6 * LAYERS + 2) * BATCH // 2 * LENGTH * WIDTH * 4 + 2 * max(SCALARS)


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("name", unless_slow("lstm", "transformer", "scanned"))
def test_a_devices_parameters_and_moments_are_its_share(name, target):
    held = {}
    for fsdp in (1, 2, 4):
        _, program = compiled(name, target, data=4 // fsdp, fsdp=fsdp)
        by = program.memory.arguments_by
        held[fsdp] = by["state.params"] + by["state.opt_state"]
    assert held[1] / held[2] == pytest.approx(2, rel=0.05)
    assert held[1] / held[4] == pytest.approx(4, rel=0.05)


LAYER = 4 * WIDTH * WIDTH
"""The largest kernel of a layer, of a Transformer's units and of an LSTM's gates."""
UNITS = BATCH * LENGTH * 4 * WIDTH
"""Of a layer, or of all its gates, for a whole batch."""


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize(
    ("name", "spread", "bound"),
    [
        # Kernels of all layers, and their gradients, are whole; activations of four are not.
        ("scanned", {"data": 4}, max(LAYERS * LAYER, LAYERS * UNITS // 4)),
        # A layer's kernel is whole at a time.
        ("scanned", {"fsdp": 4}, max(LAYER, LAYERS * UNITS // 4)),
        ("lstm", {"fsdp": 4}, max(LAYER, UNITS // 4)),
        ("scanned", {"data": 2, "tensor": 2}, LAYERS * max(LAYER, UNITS // 2) // 2),
        ("scanned", {"context": 4}, max(LAYERS * LAYER, LAYERS * UNITS // 4)),
        ("scanned", STAGED | {"microbatches": 4}, max(LAYER, 5 * UNITS // 2 // 4)),
    ],
    ids=str,
)
def test_no_array_is_larger_than_a_devices_share(name, spread, bound, target):
    """Of parameters what a device has or gathers, of activations what its rows, its stretch or its
    units have, kept for every layer or every tick."""
    _, _, program = built(name, target, Parallel(**{"data": 1} | spread), 1)
    assert largest(program.as_text()) <= (bound, "~")


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("name", ["lstm", "scanned"])
def test_a_state_is_made_in_parts(name, target):
    """Of which no device ever has an array that is more than its own, nor all of it at once."""
    setup, _ = compiled(name, target, fsdp=4)
    make = jax.jit(functools.partial(train.init, setup, given={}), out_shardings=setup.shardings)
    _, _, root = setup.abstract_example()
    program = make.trace(root).lower(lowering_platforms=(target,)).compile()
    memory = compute.program(program, setup.mesh).memory
    parts = [
        (math.prod(place.shard_shape(x.shape)), x.dtype.itemsize)
        for x, place in zip(*map(jax.tree.leaves, (setup.abstract, setup.shardings)), strict=True)
    ]
    share = sum(size * item for size, item in parts)
    assert share <= nbytes(setup.abstract.params) * 3 / 4 * 1.05
    assert share <= memory.outputs <= 2 * share
    assert largest(program.as_text()) <= (max(size for size, _ in parts), "~")
    assert memory.outputs + memory.temporaries < nbytes(setup.abstract)
    # libtpu 0.0.50, of jax 0.12, holds an LSTM's draws twice.
    doubled = (name, target) == ("lstm", "tpu") and jax.__version__ >= "0.12"
    assert memory.temporaries <= share * (2.1 if doubled else 1)


@pytest.mark.parametrize("spread", [{"data": 4}, {"fsdp": 4}])
@pytest.mark.parametrize("name", ["mlp", "lstm", "transformer"])
def test_the_cpus_own_theory(name, spread):
    """It has no reduce-scatter, and sums the gradients of what a loop over time uses, an LSTM's
    hidden kernels, once a step of time."""
    setup, program = compiled(name, "cpu", **spread)
    found = sent(program)
    (axis,) = spread
    whole = nbytes(setup.abstract.params) + nbytes([leaf for leaf, _ in twice(setup)])
    hidden = [leaf for path, (leaf, _) in named(setup).items() if "hidden/kernel" in path]
    summed = whole + (LENGTH - 1) * nbytes(hidden)
    assert 0 <= found["all-reduce", axis] - summed <= 4 * len(named(setup)) + max(SCALARS)
    if axis == "fsdp":
        split = over(setup, "fsdp")
        kernels = [x for path, x in split.items() if path.endswith("kernel")]
        assert found["all-gather", "fsdp"] <= nbytes(split) + nbytes(kernels)
    assert len(found) == len(spread) + (axis == "fsdp")
