"""What compiled programs do, against closed forms: on this CPU, and on text as the compilers for
TPU v5e (libtpu 0.0.42) and H100 (jax-cuda13-plugin 0.10.2) print it, names and attributes that
nothing reads left out. With those compilers installed, the programs themselves are compiled."""

import functools
from types import SimpleNamespace

import ahead
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from research.compute import hlo, targets
from research.compute.links import Collective, Level
from research.compute.program import program, read, valid_taps

N = 64
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)
ONE = 2 * N**3


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


AS_USERS = {"xla_cpu_use_fusion_emitters": True} if jax.__version__ < "0.11" else {}
"""Tests' programs are otherwise compiled quickly (conftest.py)."""


def of(function, *arguments):
    return program(jax.jit(function).lower(*arguments).compile(compiler_options=AS_USERS))


def exact(found, flops):
    assert found.exact, (found.unknown, found.reasons)
    assert found.matmul_flops == flops


# Products.


def test_matmul():
    found = of(jnp.matmul, f32(5, 7), f32(7, 11))
    exact(found, 2 * 5 * 7 * 11)
    assert found.bytes == 4 * (5 * 7 + 7 * 11 + 5 * 11)
    assert found.bytes_by_space.keys() == {0}


def test_batched_dot():
    exact(
        of(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), f32(3, 5, 7), f32(3, 11, 7)),
        2 * 3 * 5 * 7 * 11,
    )


def test_a_complex_product_is_four_real_ones():
    a = jax.ShapeDtypeStruct((8, 8), jnp.complex64)
    exact(of(jnp.matmul, a, a), 4 * 2 * 8**3)


def test_a_product_inside_a_fusion():
    exact(of(lambda a, x: jnp.tanh(a * 2) @ (x + 1) + a.sum(), SQUARE, SQUARE), ONE)


def test_one_large_elementwise_fusion_moves_what_goes_in_and_out():
    found = of(lambda a: jnp.tanh(a) * 2 + 1, f32(1000, 1000))
    exact(found, 0)
    assert found.bytes == 2 * 4 * 1000 * 1000


# Loops.


def test_a_scan_counts_every_trip_where_xla_counts_one():
    def scan(a, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ a), None), x, None, length=100)[0]

    compiled = jax.jit(scan).lower(SQUARE, SQUARE).compile()
    exact(program(compiled), 100 * ONE)
    assert compiled.cost_analysis()["flops"] < 2 * ONE


def test_nested_loops_multiply():
    def inner(a, c):
        return lax.fori_loop(0, 5, lambda _, d: jnp.tanh(d @ a), c)

    exact(
        of(lambda a, x: lax.fori_loop(3, 10, lambda _, c: inner(a, c), x), SQUARE, SQUARE),
        7 * 5 * ONE,
    )


def test_a_loop_that_does_not_say_its_trips_gives_a_reason():
    def loop(a, x):
        return lax.while_loop(lambda c: c.sum() < 1e3, lambda c: c @ a, x)

    found = of(loop, SQUARE, SQUARE)
    assert found.matmul_flops == ONE
    assert found.reasons == ["while: trip count unknown; one counted"]
    assert not found.exact


STEPS, BATCH, INPUT, HIDDEN = 11, 4, 24, 16


def lstm_loss(weights, xs):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ weights, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.ones((BATCH, HIDDEN)), jnp.ones((BATCH, HIDDEN))
    return (lax.scan(step, start, xs)[1] ** 2).sum()


LSTM = jax.value_and_grad(lstm_loss, (0, 1))
LSTM_FLOPS = 3 * STEPS * 2 * BATCH * (INPUT + HIDDEN) * 4 * HIDDEN
LSTM_ARGUMENTS = f32(INPUT + HIDDEN, 4 * HIDDEN), f32(STEPS, BATCH, INPUT)


def test_an_lstm_step_is_three_times_its_forward_pass():
    exact(of(LSTM, *LSTM_ARGUMENTS), LSTM_FLOPS)


def test_a_scan_reads_each_row_once_not_all_of_them_each_trip():
    found = of(lambda xs: lax.scan(lambda c, x: (c + x, c * 2), xs[0], xs), f32(500, 1000))
    rows = 4 * 500 * 1000
    assert 2 * rows <= found.bytes < 20 * rows


def test_cond_counts_the_largest_branch_and_says_so():
    def cond(p, a, x):
        return lax.cond(p, lambda: x @ a @ a, lambda: jnp.tanh(x @ a))

    found = of(cond, jax.ShapeDtypeStruct((), bool), SQUARE, SQUARE)
    assert found.matmul_flops == 2 * ONE
    assert found.reasons == ["conditional: branches differ; the largest counted"]


def test_cond_with_equal_branches_is_exact():
    def cond(p, a, x):
        return lax.cond(p, lambda: jnp.tanh(x @ a), lambda: jnp.sin(a @ x))

    exact(of(cond, jax.ShapeDtypeStruct((), bool), SQUARE, SQUARE), ONE)


# Convolutions.


def conv(x, k, stride=1, padding="SAME", **options):
    return lax.conv_general_dilated(
        x, k, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def both_gradients(f):
    return jax.grad(lambda x, k: (f(x, k) ** 2).sum(), (0, 1))


def test_a_convolution_counts_valid_taps():
    # SAME, 3 wide: the 2 edges lose one tap each.
    exact(of(conv, f32(2, 9, 9, 4), f32(3, 3, 4, 6)), 2 * 2 * 4 * 6 * (3 * 9 - 2) ** 2)
    exact(
        of(lambda x, k: conv(x, k, padding="VALID"), f32(2, 9, 9, 4), f32(3, 3, 4, 6)),
        2 * 2 * 4 * 6 * (3 * 7) ** 2,
    )


def test_a_convolutions_gradients_have_its_taps():
    # Stride 2 on 8: the last window loses one tap.
    found = of(both_gradients(lambda x, k: conv(x, k, 2)), f32(2, 8, 8, 4), f32(3, 3, 4, 6))
    exact(found, 3 * 2 * 2 * 4 * 6 * (3 * 4 - 1) ** 2)


def test_a_depthwise_convolution():
    one = 2 * 2 * 8 * (3 * 9 - 2) ** 2

    def depthwise(x, k):
        return conv(x, k, feature_group_count=8)

    exact(of(depthwise, f32(2, 9, 9, 8), f32(3, 3, 1, 8)), one)
    # XLA's CPU backend computes the kernel's gradient for all 8 x 8 pairs of channels.
    exact(of(both_gradients(depthwise), f32(2, 9, 9, 8), f32(3, 3, 1, 8)), one * (1 + 1 + 8))


def test_valid_taps_by_counting():
    rng = np.random.default_rng(0)
    for image, kernel, stride, low, high, hole, spread in rng.integers(
        (1, 1, 1, -2, -2, 1, 1), (9, 6, 5, 6, 6, 5, 4), (400, 7)
    ).tolist():
        extent = (image - 1) * hole + 1
        out = (extent + low + high - (kernel - 1) * spread - 1) // stride + 1
        met = sum(
            0 <= (at := n * stride + k * spread - low) < extent and at % hole == 0
            for n in range(max(out, 0))
            for k in range(kernel)
        )
        assert valid_taps(image, kernel, max(out, 0), stride, low, hole, spread) == met


# Collectives, on 8 devices.


@pytest.fixture(scope="module")
def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)


SPEC = P("data", "model")


def sharded(mesh, function, out=SPEC):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=SPEC, out_specs=out, check_vma=False)
    return program(jax.jit(mapped).lower(f32(64, 32)).compile(), mesh)


SHARD = 4 * 16 * 16


@pytest.mark.parametrize(
    ("over", "size", "axes"),
    [("data", 4, ("data",)), ("model", 2, ("model",)), (("data", "model"), 8, ("data", "model"))],
)
def test_psum_is_one_all_reduce(mesh, over, size, axes):
    found = sharded(mesh, lambda x: lax.psum(x, over), out=P())
    assert found.collectives == [Collective("all-reduce", SHARD, size, 1, axes)]
    assert found.exact


def test_all_gather_counts_what_it_makes(mesh):
    found = sharded(mesh, lambda x: lax.all_gather(x, "model", tiled=True), out=P("data"))
    assert found.collectives == [Collective("all-gather", 2 * SHARD, 2, 1, ("model",))]


def test_psum_scatter_counts_what_it_takes(mesh):
    found = sharded(mesh, lambda x: lax.psum_scatter(x, "data", tiled=True))
    assert found.collectives == [Collective("reduce-scatter", SHARD, 4, 1, ("data",))]


def test_ppermute(mesh):
    ring = [(i, (i + 1) % 4) for i in range(4)]
    found = sharded(mesh, lambda x: lax.ppermute(x, "data", ring))
    assert found.collectives == [Collective("collective-permute", SHARD, 4, 1, ("data",))]


def test_all_to_all(mesh):
    found = sharded(mesh, lambda x: lax.all_to_all(x, "data", 0, 1, tiled=True))
    assert found.collectives == [Collective("all-to-all", SHARD, 4, 1, ("data",))]


def test_collectives_in_a_scan_are_multiplied(mesh):
    def scan(x):
        return lax.scan(lambda c, _: (lax.psum(c, "data") * 0.1, None), x, None, length=7)[0]

    found = sharded(mesh, scan, out=P(None, "model"))
    assert found.collectives == [Collective("all-reduce", SHARD, 4, 7, ("data",))]


def test_a_partitioned_matmul_is_counted_per_device(mesh):
    def place(*axes):
        return NamedSharding(mesh, P(*axes))

    compiled = (
        jax.jit(
            jnp.matmul,
            in_shardings=(place("data", "model"), place("model", None)),
            out_shardings=place("data"),
        )
        .lower(f32(64, 32), f32(32, 16))
        .compile()
    )
    found = program(compiled, mesh)
    exact(found, 2 * 64 * 32 * 16 // 8)
    assert found.collectives == [Collective("all-reduce", 4 * 16 * 16, 2, 1, ("model",))]
    assert program(compiled).collectives[0].axes is None


# Memory and what cannot be read.


def test_memory_adds_up():
    compiled = (
        jax.jit(lambda x, a: jnp.tanh(x @ a) @ a, donate_argnums=0).lower(SQUARE, SQUARE).compile()
    )
    memory, own = program(compiled).memory, compiled.memory_analysis()
    assert memory.arguments == 2 * 4 * N * N
    assert memory.outputs == memory.aliased == 4 * N * N
    assert memory.temporaries == own.temp_size_in_bytes
    assert memory.total == 2 * 4 * N * N + memory.temporaries + memory.code
    assert memory.code == own.generated_code_size_in_bytes


@pytest.mark.parametrize("text", [None, "", "\n"])
def test_without_text_the_error_says_so(text):
    with pytest.raises(ValueError, match="gives no HLO text") as error:
        program(SimpleNamespace(as_text=lambda: text))
    assert "\n" not in str(error.value)


def test_without_memory_analysis_memory_is_none():
    def memory_analysis():
        raise NotImplementedError

    text = jax.jit(jnp.matmul).lower(SQUARE, SQUARE).compile().as_text()
    compiled = SimpleNamespace(as_text=lambda: text, memory_analysis=memory_analysis)
    assert program(compiled).memory is None
    compiled.memory_analysis = lambda: None
    assert program(compiled).memory is None


# Reading text.


@pytest.mark.parametrize(
    ("text", "dims", "size", "space"),
    [
        ("f32[8,128]{1,0:T(8,128)S(1)}", (8, 128), 4096, 1),
        ("bf16[8,<=128]{1,0:T(8,128)(2,1)}", (8, 128), 2048, 0),
        ("pred[]", (), 1, 0),
        ("pred[]{:T(512)}", (), 1, 0),
        ("f8e4m3fn[3]{0}", (3,), 3, 0),
        ("s4[3]{0}", (3,), 3, 0),
        ("s4[3]{0:E(4)}", (3,), 2, 0),
        ("c64[2,2]{1,0}", (2, 2), 32, 0),
        ("token[]", (), 0, 0),
        ("b(f32[8]{0})", (8,), 32, 0),
        ("u32[]{:S(2)}", (), 4, 2),
        ("f32[0,5]", (0, 5), 0, 0),
    ],
)
def test_shapes(text, dims, size, space):
    found = hlo.shape(text)
    assert (found.dims, found.bytes, found.space) == (dims, size, space)
    assert found.dynamic == ("<=" in text)


def test_nested_tuples():
    found = hlo.shape("((f32[2]{0}, pred[3]), token[], (), bf16[4]{0:T(256)(2,1)})")
    assert [e.dtype for e in found.elements] == ["", "token", "", "bf16"]
    assert [leaf.dtype for leaf in found.leaves] == ["f32", "pred", "token", "bf16"]
    assert found.bytes == 8 + 3 + 8


ODD = r"""HloModule odd, is_scheduled=true, replica_count=2, num_partitions=3

helper.1 {
  ROOT x = f32[] parameter(0)
}

%async (p: (f32[2], /*index=1*/f32[])) -> f32[] {
  ROOT %r = f32[] constant(-1.5e+10), metadata={op_name="jit(f)/{[(\"}, b=c" stack_frame_id=3}
}, execution_thread="parallel"

ENTRY %main.2_spmd (a.1: f32[2,2]) -> (f32[2,2], s32[2,2]) {
  %a.1 = f32[2,2]{1,0} parameter(0), sharding={devices=[2,1,4]<=[4,2]T(1,0) last_tile_dim_replicate}
  %big = s32[2,2]{1,0} constant({
    { 1, 2 },
    { 3, 4 }
  })
  add.1 = f32[2,2]{1,0} add(f32[2,2]{1,0} %a.1, f32[2,2]{1,0} a.1), backend_config="{\"k\":[1,2]}"
  ROOT %t = (f32[2,2]{1,0}, /*index=1*/s32[2,2]{1,0}) tuple(%add.1, /*index=1*/%big)
}
"""


def test_odd_text():
    (module,) = hlo.modules(ODD)
    assert module.devices == 6
    assert module.entry == "main.2_spmd"
    assert list(module.computations) == ["helper.1", "async", "main.2_spmd"]
    main = module.computations["main.2_spmd"]
    assert list(main.instructions) == ["a.1", "big", "add.1", "t"]
    assert main.root == "t"
    add = main.instructions["add.1"]
    assert add.operands == ("a.1", "a.1")
    assert add.config == {"k": [1, 2]}
    assert main.instructions["t"].operands == ("add.1", "big")
    assert "{ 3, 4 }" in main.instructions["big"].operands[0]
    marked = module.computations["async"].instructions["r"]
    assert list(marked.attributes) == ["metadata"]
    # The array given twice is read once.
    assert read(ODD).bytes == 2 * 16


def test_text_that_is_no_hlo():
    with pytest.raises(ValueError, match="not an HLO instruction"):
        read("ENTRY %main () -> f32[] {\n  %x = what is this\n}\n")
    assert read("HloModule empty\n").reasons == ["a module without an entry computation"]


def body(*lines, header="HloModule m, num_partitions=8", before=""):
    return "\n".join([header, before, "ENTRY %main () -> f32[] {", *(f"  {x}" for x in lines), "}"])


# Bytes.


def test_only_what_a_slice_or_an_update_touches():
    found = read(
        body(
            "%a = f32[100,10]{1,0} parameter(0)",
            "%i = s32[] parameter(1)",
            "%s = f32[1,10]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice",
            "%u = f32[100,10]{1,0} fusion(%a, %s, %i), kind=kLoop, calls=%update",
            "%d = f32[2,10]{1,0} dynamic-slice(%u, %i, %i), dynamic_slice_sizes={2,10}",
            "ROOT %v = f32[100,10]{1,0} dynamic-update-slice(%u, %d, %i, %i)",
            before="""
%slice (p: f32[100,10], i: s32[]) -> f32[1,10] {
  %p = f32[100,10]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %b = f32[100,10]{1,0} bitcast(%p)
  ROOT %d = f32[1,10]{1,0} dynamic-slice(%b, %i, %z), dynamic_slice_sizes={1,10}
}

%update (p: f32[100,10], s: f32[1,10], i: s32[]) -> f32[100,10] {
  %p = f32[100,10]{1,0} parameter(0)
  %s = f32[1,10]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %t = f32[1,10]{1,0} tanh(%s)
  ROOT %u = f32[100,10]{1,0} dynamic-update-slice(%p, %t, %i, %z)
}
""",
        )
    )
    # Each reads and writes the rows it touches, and the index.
    assert found.bytes == (40 + 4 + 40) + (40 + 4 + 40) + (80 + 4 + 80) + (80 + 4 + 80)


def test_a_fusion_of_several_outputs_that_updates_one():
    found = read(
        body(
            "%a = f32[100,10]{1,0} parameter(0)",
            "%s = f32[1,10]{1,0} parameter(1)",
            "%i = s32[] parameter(2)",
            "ROOT %f = (f32[1000]{0:S(1)}, f32[1,10]{1,0}) fusion(%a, %s, %i), "
            "kind=kLoop, calls=%both",
            before="""
%both (p: f32[100,10], s: f32[1,10], i: s32[]) -> (f32[1000], f32[1,10]) {
  %p = f32[100,10]{1,0} parameter(0)
  %s = f32[1,10]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %t = f32[1,10]{1,0} tanh(%s)
  %u = f32[100,10]{1,0} dynamic-update-slice(%p, %s, %i, %i)
  %b = f32[1000]{0} bitcast(%u)
  ROOT %r = (f32[1000]{0}, f32[1,10]{1,0}) tuple(%b, %t)
}
""",
        )
    )
    assert found.bytes_by_space == {0: 40 + 4 + 40, 1: 40}


def test_a_scatter_touches_its_updates():
    found = read(
        body(
            "%a = f32[100,10]{1,0} parameter(0)",
            "%i = s32[3,1]{1,0} parameter(1)",
            "%u = f32[3,10]{1,0} parameter(2)",
            "ROOT %s = f32[100,10]{1,0} scatter(%a, %i, %u), to_apply=%add",
        )
    )
    assert found.bytes == 3 * 120 + 12


# As libtpu prints it.

# The scan of 100 products, from jit(scan) above at 256 x 256.
TPU_SCAN = """HloModule jit_scan, is_scheduled=true

%bitcast_fusion (bitcast_input: f32[256,256]) -> f32[256,256] {
  %bitcast_input = f32[256,256]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %bitcast = f32[256,256]{1,0:T(8,128)} bitcast(%bitcast_input)
}

%fused_computation (param_0: f32[256,256], param_1: bf16[256,256]) -> f32[256,256] {
  %param_0 = f32[256,256]{1,0:T(8,128)S(1)} parameter(0)
  %fusion.4 = f32[256,256]{1,0:T(8,128)} fusion(%param_0), kind=kLoop, calls=%bitcast_fusion
  %param_1 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %convolution.3 = f32[256,256]{1,0:T(8,128)} convolution(%fusion.4, %param_1), dim_labels=bf_io->bf
  ROOT %tanh.4 = f32[256,256]{1,0:T(8,128)S(1)} tanh(%convolution.3)
}

%body (arg.0: (s32[], f32[256,256], bf16[256,256], s32[])) -> (s32[], f32[256,256], bf16[256,256], s32[]) {
  %constant.0 = s32[]{:T(128)} constant(1)
  %arg.0 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, bf16[256,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg.0), index=0
  %add.2 = s32[]{:T(128)} add(%gte.0, %constant.0)
  %gte.3 = s32[]{:T(128)} get-tuple-element(%arg.0), index=3
  %gte.2 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg.0), index=2
  %gte.1 = f32[256,256]{1,0:T(8,128)S(1)} get-tuple-element(%arg.0), index=1
  %fusion.2 = f32[256,256]{1,0:T(8,128)S(1)} fusion(%gte.1, %gte.2), kind=kOutput, calls=%fused_computation
  ROOT %tuple.11 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, bf16[256,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%add.2, %fusion.2, %gte.2, %gte.3)
}

%condition (arg.3: (s32[], f32[256,256], bf16[256,256], s32[])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(100)
  %arg.3 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, bf16[256,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %gte.15 = s32[]{:T(128)} get-tuple-element(%arg.3), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%gte.15, %constant.3), direction=LT
}

ENTRY %main.4 (a.1: f32[256,256], x.1: f32[256,256]) -> f32[256,256] {
  %constant.5 = s32[]{:T(128)} constant(0)
  %constant.1 = s32[]{:T(128)} constant(1)
  %a.1 = f32[256,256]{1,0:T(8,128)} parameter(0)
  %x.1 = f32[256,256]{1,0:T(8,128)} parameter(1)
  %copy-start.1 = (f32[256,256]{1,0:T(8,128)S(1)}, f32[256,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x.1)
  %copy.10 = s32[]{:T(128)} copy(%constant.5)
  %convert.1 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} convert(%a.1)
  %copy-done.1 = f32[256,256]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %tuple.13 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, bf16[256,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%copy.10, %copy-done.1, %convert.1, %constant.1)
  %while = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)S(1)}, bf16[256,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) while(%tuple.13), condition=%condition, body=%body, backend_config={"flag_configs":[]}
  %gte.43 = f32[256,256]{1,0:T(8,128)S(1)} get-tuple-element(%while), index=1
  %copy-start = (f32[256,256]{1,0:T(8,128)}, f32[256,256]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%gte.43)
  ROOT %copy-done = f32[256,256]{1,0:T(8,128)} copy-done(%copy-start)
}
"""  # noqa: E501


def test_a_trip_count_that_was_stripped():
    found = read(TPU_SCAN)
    exact(found, 100 * 2 * 256**3)
    full, half, counter = 4 * 256**2, 2 * 256**2, 4
    loop = 100 * (2 * counter + counter) + 101 * (2 * counter + 1)
    # Into the chip and out: the two arguments read, the result written.
    assert found.bytes_by_space[0] == 3 * full + 2 * counter + loop
    assert found.bytes_by_space[1] == full + half + full + 100 * (2 * full + half)


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("direction=LT", "direction=LE", 101),
        ("direction=LT", "direction=NE", 100),
        ("direction=LT", "direction=GT", 0),
        ("direction=LT", "direction=EQ", None),
        (
            "compare(%gte.15, %constant.3), direction=LT",
            "compare(%constant.3, %gte.15), direction=GT",
            100,
        ),
        (
            "%constant.0 = s32[]{:T(128)} constant(1)",
            "%constant.0 = s32[]{:T(128)} constant(-1)",
            None,
        ),
        (
            "%constant.0 = s32[]{:T(128)} constant(1)",
            "%constant.0 = s32[]{:T(128)} constant(3)",
            34,
        ),
        (
            "%constant.5 = s32[]{:T(128)} constant(0)",
            "%constant.5 = s32[]{:T(128)} constant(-7)",
            107,
        ),
        ("ROOT %lt.0 = ", "ROOT %c = pred[]{:T(512)} copy(%lt.0)\n  %lt.0 = ", 100),
        ("add(%gte.0, %constant.0)", "add(%gte.0, %gte.3)", None),
        ("add(%gte.0, %constant.0)", "multiply(%gte.0, %constant.0)", None),
        ("add(%gte.0, %constant.0)", "subtract(%constant.0, %gte.0)", None),
        ("copy(%constant.5)", "copy(%x.1)", None),
        ('{"flag_configs":[]}', '{"known_trip_count":{"n":"12"}}', 12),
    ],
)
def test_trip_counts(old, new, trips):
    assert old in TPU_SCAN
    found = read(TPU_SCAN.replace(old, new))
    assert found.matmul_flops == 2 * 256**3 * (1 if trips is None else trips)
    assert found.exact == (trips is not None)


# Limits kept in the state, compares and steps in fusions, one loop in another.
LOOPS = """HloModule m

%add (p: s32[], q: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %a = s32[] add(%q, %p)
}

%less (p: s32[], q: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  %one = s32[] constant(1)
  %later = s32[] subtract(%p, %one)
  ROOT %c = pred[] compare(%later, %q), direction=LT
}

%inner (s: (s32[], s32[], f32[8,8])) -> (s32[], s32[], f32[8,8]) {
  %s = (s32[], s32[], f32[8,8]) parameter(0)
  %two = s32[] constant(2)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  %x = f32[8,8] get-tuple-element(%s), index=2
  %next = s32[] fusion(%two, %i), kind=kLoop, calls=%add
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], s32[], f32[8,8]) tuple(%next, %limit, %y)
}

%condition (s: (s32[], s32[], f32[8,8])) -> pred[] {
  %s = (s32[], s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  ROOT %c = pred[] fusion(%i, %limit), kind=kLoop, calls=%less
}

%outer (s: (s32[], s32[], f32[8,8])) -> (s32[], s32[], f32[8,8]) {
  %s = (s32[], s32[], f32[8,8]) parameter(0)
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  %x = f32[8,8] get-tuple-element(%s), index=2
  %further = s32[] add(%limit, %two)
  %into = (s32[], s32[], f32[8,8]) tuple(%zero, %limit, %x)
  %w = (s32[], s32[], f32[8,8]) while(%into), condition=%condition, body=%inner
  %y = f32[8,8] get-tuple-element(%w), index=2
  %next = s32[] add(%i, %two)
  %same = s32[] get-tuple-element(%w), index=1
  ROOT %t = (s32[], s32[], f32[8,8]) tuple(%next, %same, %y)
}

ENTRY %main (x: f32[8,8]) -> (s32[], s32[], f32[8,8]) {
  %x = f32[8,8] parameter(0)
  %start = s32[] constant(4)
  %limit = s32[] constant(9)
  %into = (s32[], s32[], f32[8,8]) tuple(%start, %limit, %x)
  ROOT %w = (s32[], s32[], f32[8,8]) while(%into), condition=%condition, body=%outer
}
"""


def test_a_trip_count_from_the_state():
    # i - 1 < 9 in steps of 2: 0 2 4 6 8 inside, 4 6 8 outside.
    exact(read(LOOPS), 3 * 5 * 2 * 8**3)
    # i - 1 < 9 + 2 inside.
    further = LOOPS.replace("tuple(%zero, %limit, %x)", "tuple(%zero, %further, %x)")
    exact(
        read(further.replace("tuple(%next, %same, %y)", "tuple(%next, %limit, %y)")), 18 * 2 * 8**3
    )
    # The limit moves along: the outer loop does not end.
    found = read(further)
    assert found.matmul_flops == 2 * 8**3
    assert found.reasons == ["while: trip count unknown; one counted"]


TPU = """
%p = f32[256,128]{1,0:T(8,128)} parameter(0)
%collective-permute-start = (f32[256,128]{1,0:T(8,128)}, f32[256,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=1, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}, backend_config={"flag_configs":[],"barrier_config":{"barrier_type":"CUSTOM","id":"0"}}
%collective-permute-done = f32[256,128]{1,0:T(8,128)S(1)} collective-permute-done(%collective-permute-start)
%custom-call.5 = f32[50,8,128]{2,1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
ROOT %batched = f32[4,64,32]{1,2,0:T(8,128)} convolution(%q, %r), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
%q = f32[4,64,128]{1,2,0:T(8,128)} parameter(1)
%r = f32[4,128,32]{1,2,0:T(8,128)} parameter(2)
"""  # noqa: E501


def test_what_a_tpu_prints():
    found = read(body(*TPU.strip().split("\n"), header="HloModule m, num_partitions=4"))
    exact(found, 2 * 4 * 64 * 128 * 32)
    assert found.collectives == [Collective("collective-permute", 4 * 256 * 128, 2, 1)]
    permute, product = 4 * 256 * 128, 4 * 4 * (64 * 128 + 128 * 32 + 64 * 32)
    assert found.bytes_by_space == {0: permute + product, 1: permute}


def test_a_tpus_fused_reduce_scatter(mesh):
    found = read(
        body(
            "%p = bf16[512,768]{1,0:T(8,128)(2,1)} parameter(0)",
            "%f = bf16[128,768]{1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, "
            "calls=%all-reduce-scatter.2.clone.1",
            before="""
%all-reduce-scatter.2.clone.1 (input_0.2: bf16[512,768]) -> bf16[128,768] {
  %input_0.2 = bf16[512,768]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.34 = bf16[512,768]{1,0:T(8,128)(2,1)} all-reduce(%input_0.2), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, to_apply=%add.9.clone
  %constant.983 = u32[] constant(128)
  %constant.984 = u32[] constant(0)
  ROOT %dynamic-slice.320 = bf16[128,768]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.34, %constant.983, %constant.984), dynamic_slice_sizes={128,768}
}
""",  # noqa: E501
        ),
        mesh,
    )
    full = 2 * 512 * 768
    assert found.collectives == [Collective("reduce-scatter", full, 4, 1, ("data",))]
    assert found.bytes == full + full // 4


def test_a_pallas_kernel_is_unknown_or_as_its_author_says():
    call = '%k = f32[8]{0} custom-call(), custom_call_target="tpu_custom_call", backend_config='
    found = read(body(call + '{"custom_call_config":{"body":"TUzv"}}'))
    assert (found.unknown, found.exact) == ({"tpu_custom_call": 1}, False)
    found = read(body(call + '{"custom_call_config":{"cost_estimate":{"flops":"1234"}}}'))
    assert (found.matmul_flops, found.unknown, found.exact) == (1234, {}, False)


# As XLA prints it for CUDA.

CUDA = r"""
%a.1 = f32[512,256]{1,0} parameter(0)
%b.1 = f32[256,128]{1,0} parameter(1)
%custom-call.1 = (f32[512,128]{1,0}, s8[4194304]{0}) custom-call(%a.1, %b.1), custom_call_target="__cublas$lt$matmul", backend_config={"operation_queue_id":"0","gemm_backend_config":{"selected_algorithm":"0","alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
"""  # noqa: E501


def test_a_cublas_call():
    found = read(body(*CUDA.strip().split("\n")))
    exact(found, 2 * 512 * 256 * 128)
    assert found.bytes == 4 * (512 * 256 + 256 * 128 + 512 * 128)
    called = CUDA.replace("$lt$matmul", "$lt$matmul$f8")
    exact(read(body(*called.strip().split("\n"))), 2 * 512 * 256 * 128)
    # An older print of the same: the whole as a string.
    start = CUDA.index("backend_config=") + len("backend_config=")
    config = CUDA[start:].strip().replace('"', r"\"")
    exact(read(body(*f'{CUDA[:start]}"{config}"'.strip().split("\n"))), 2 * 512 * 256 * 128)


def test_a_batched_cublas_call():
    numbers = (
        '{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],'
        '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}'
    )
    found = read(
        body(
            "%a = f32[96,128,64]{2,1,0} parameter(0)",
            "%c = (f32[96,128,128]{2,1,0}, s8[4194304]{0}) custom-call(%a, %a), "
            'custom_call_target="__cublas$lt$matmul", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":' + numbers + "}}",
        )
    )
    exact(found, 2 * 96 * 128 * 64 * 128)


# jit(conv) above at stride 2 and its gradients: XLA pads beforehand.
CUDNN = r"""
%x = f32[8,33,33,16]{3,2,1,0} parameter(0)
%k = f32[32,3,3,16]{3,2,1,0} parameter(1)
%g = f32[8,16,16,32]{3,2,1,0} parameter(2)
%b = f32[32]{0} parameter(3)
%f = (f32[8,16,16,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
%fb = (f32[8,16,16,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k, %b), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward"
%bk = (f32[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
%bx = (f32[8,33,33,16]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
"""  # noqa: E501


@pytest.mark.parametrize("call", ["f", "fb", "bk", "bx"])
def test_a_cudnn_convolution(call):
    kept = [line for line in CUDNN.strip().split("\n") if line.startswith(f"%{call} =")]
    found = read(body(*CUDNN.strip().split("\n")[:4], *kept))
    exact(found, 2 * 8 * 16 * 16 * 32 * 3 * 3 * 16)


# From jax.nn.dot_product_attention(implementation="cudnn"): as jax 0.10.2 writes the calls.
@pytest.mark.parametrize(
    ("target", "products"),
    [("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 5), ("__cudnn$fmhaSoftmaxF8", 2)],
)
@pytest.mark.parametrize("mask", ["NO_MASK", "CAUSAL"])
def test_cudnn_attention(target, products, mask):
    config = (
        '{"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":'
        f'["2","4","256","128"]}},"mask_type":"{mask}"}}}}'
    )
    found = read(
        body(
            "%q = bf16[2,256,4,64]{3,2,1,0} parameter(0)",
            "%k = bf16[2,128,4,64]{3,2,1,0} parameter(1)",
            "%o = (bf16[2,4,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), "
            f'custom_call_target="{target}", backend_config={config}',
        )
    )
    assert found.matmul_flops == products * 2 * 2 * 4 * 256 * 128 * 64
    assert found.exact == (mask == "NO_MASK")


# As jax 0.10.2 and libtpu 0.0.42 write the calls: what a kernel says of itself in lines of its own.
@pytest.mark.parametrize(
    ("kernel", "suffix", "products", "again"),
    [
        ("fwd_residuals", "", 2, 0),
        ("dq_no_residuals", "_dq", 3, 1),
        ("dkv_no_residuals", "_dkv", 4, 2),
    ],
)
@pytest.mark.parametrize(
    ("mask", "scope", "done", "exact"),
    [
        ((), "causal", 1, True),
        (("s32[2048,128]",), "causal", 0.625, True),  # 10 of 16 blocks
        (("s32[2048,128]", "s32[8,2048]"), "segments", 1, True),
        (("s32[2048,128]", "s32[8,2048]", "s32[2048,128]"), "causal", 0.625, True),
        # A window, or a mask that is written out.
        (("s32[2048,128]",), "window", 1, False),
        (("s32[1,512,512]",), "causal", 1, False),
        (("s32[6,128,128]",), "causal", 1, False),
    ],
)
def test_splash_attention(kernel, suffix, products, again, mask, scope, done, exact):
    name = f"splash_mha_{kernel}"
    masked = [f"%m{n} = {shape}{{0}} parameter({n + 2})" for n, shape in enumerate(mask)]
    found = read(
        body(
            "%i = s8[1,4,4]{2,1,0} parameter(0)",
            "%q = bf16[2,4,2048,64]{3,2,1,0} parameter(1)",
            "%k = bf16[2,2,2048,64]{3,2,1,0} parameter(2)",
            *masked,
            "%o = (f32[2,512,128]{2,1,0}, bf16[2,4,2048,64]{3,2,1,0}) custom-call(%i, %i, %q, %k, "
            f"%k, {', '.join(f'%m{n}' for n in range(len(mask))) or '%k'}), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
            rf'"xprof_metadata":"{{\"block_q{suffix}\": 512, \"block_kv{suffix}\": 512, '
            rf'\"block_kv_compute\": 256}}"'
            "\n}}, metadata={op_name="
            f'"jit(f)/jvp(layers)/{scope}/vmap(static_sparsity_splash)/{name}/pallas_call"}}, '
            'backend_config={"custom_call_config":{"body":"TUzv"}}',
        )
    )
    product = 2 * 2 * 4 * 2048 * 2048 * 64
    assert found.matmul_flops == products * product * done
    assert sum(found.skipped.values()) == (products - again) * product * (1 - done)
    assert {p.dtype for p in found.products} == {"bfloat16"}
    assert (found.exact, found.unknown) == (exact, {})


# As a fused kernel of jax 0.10.2 and 0.12 gives them; a value head of its own; a turned layout.
@pytest.mark.parametrize(
    ("values", "given", "layout"),
    [
        ("bf16[2,2,2048,64]", "f32[2,512,64], bf16[4,2,4,2048,64], bf16[2,2,2048,64]", 1),
        ("bf16[2,2,2048,64]", "bf16[4,2,4,2048,64], bf16[2,2,2048,64], bf16[2,2,2048,64]", 1),
        ("bf16[2,2,2048,32]", "bf16[2,2,2048,64], bf16[2,2,2048,64]", 1),
        ("bf16[2,2,2048,64]", "bf16[2,2,2048,64], bf16[2,2,2048,64]", 2),
    ],
)
def test_other_kernels_of_splash_attention_are_not_known(values, given, layout):
    found = read(
        body(
            "%i = s8[1,4,4]{2,1,0} parameter(0)",
            "%q = bf16[2,4,2048,64]{3,2,1,0} parameter(1)",
            "%k = bf16[2,2,2048,64]{3,2,1,0} parameter(2)",
            f"%v = {values}{{3,2,1,0}} parameter(3)",
            f"%o = ({given}) custom-call(%i, %i, %q, %k, %v), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
            r'"xprof_metadata":"{\"block_q_dkv\": 512, \"block_kv_dkv\": 512, \"k_layout\": '
            rf'{layout}}}"'
            '\n},xla_other="1"}, metadata={op_name="jit(f)/causal/splash_mha_dkv/pallas_call"}',
            "%d = f32[8,8]{1,0} dot(%q, %k)",
        )
    )
    assert (found.unknown, found.exact) == ({"splash_dkv": 1}, False)


def test_onednn_calls():
    found = read(
        body(
            "%a = f32[3,5,7]{2,1,0} parameter(0)",
            "%b = f32[3,7,11]{2,1,0} parameter(1)",
            '%c = f32[3,5,11]{2,1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul"',
        )
    )
    exact(found, 2 * 3 * 5 * 7 * 11)


def test_other_calls_are_named_and_make_it_inexact():
    found = read(
        body(
            "%a = f32[5]{0} parameter(0)",
            '%t = f32[5]{0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton"',
            '%s = f32[5]{0} custom-call(%a), custom_call_target="Sharding"',
            '%o = (f32[2]{0}, s32[2]{0}) custom-call(%a), custom_call_target="TopK"',
            '%x = f32[5]{0} custom-call(%a), custom_call_target="X64SplitLow"',
            '%u = f32[5]{0} custom-call(%a), custom_call_target="triton_kernel_call"',
            '%v = f32[5]{0} custom-call(%a), custom_call_target="triton_kernel_call"',
        )
    )
    assert found.unknown == {"__gpu$xla.gpu.triton": 1, "triton_kernel_call": 2}
    assert not found.exact
    # Sharding moves nothing, TopK reads.
    assert found.bytes == 4 * 40 + 20 + 16


def test_a_start_and_its_end_count_once():
    found = read(
        body(
            "%p = f32[256,128]{1,0} parameter(0)",
            "%ag = (f32[256,128]{1,0}, f32[512,128]{1,0}) all-gather-start(%p), channel_id=1, "
            "replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}",
            "%agd = f32[512,128]{1,0} all-gather-done(%ag)",
            "%rs = ((f32[256,128]{1,0}), f32[128,128]{1,0}) reduce-scatter-start(%p), "
            "replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, to_apply=%sum",
            "%rsd = f32[128,128]{1,0} reduce-scatter-done(%rs)",
            "%ar = f32[256,128]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%sum",
            "%ard = f32[256,128]{1,0} all-reduce-done(%ar)",
            "%a2a = ((f32[256,128]{1,0}), f32[256,128]{1,0}, s32[]) async-start(%p), calls=%inside",
            "%a2au = ((f32[256,128]{1,0}), f32[256,128]{1,0}, s32[]) async-update(%a2a)",
            "%a2ad = f32[256,128]{1,0} async-done(%a2au)",
            before="""
%inside (p: f32[256,128]) -> f32[256,128] {
  %p = f32[256,128]{1,0} parameter(0)
  ROOT %x = f32[256,128]{1,0} all-to-all(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}, execution_thread="x"
""",
        )
    )
    full = 4 * 256 * 128
    assert found.collectives == [
        Collective("all-gather", 2 * full, 2, 1),
        Collective("reduce-scatter", full, 2, 1),
        Collective("all-reduce", full, 8, 1),
        Collective("all-to-all", full, 4, 1),
    ]
    assert found.bytes == 3 * full + full + full // 2 + 2 * full + 2 * full
    assert found.exact


def test_a_collective_in_the_fusions_that_start_hide_and_end_it_counts_once():
    gather = "all-gather(%p), channel_id=7, replica_groups={}, dimensions={0}"
    found = read(
        body(
            "%p = f32[256]{0} parameter(0)",
            "%s = (f32[256]{0}, f32[2048]{0}) fusion(%p), kind=kCustom, calls=%start",
            "%h = f32[256]{0} fusion(%p, %s), kind=kCustom, calls=%hide",
            "%e = f32[2048]{0} fusion(%p, %s), kind=kCustom, calls=%end",
            before=f"""
%start (p: f32[256]) -> (f32[256], f32[2048]) {{
  %p = f32[256]{{0}} parameter(0)
  %g = f32[2048]{{0}} {gather}
  ROOT %c = (f32[256]{{0}}, f32[2048]{{0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%hide (p: f32[256], s: (f32[256], f32[2048])) -> f32[256] {{
  %p = f32[256]{{0}} parameter(0)
  %s = (f32[256]{{0}}, f32[2048]{{0}}) parameter(1)
  %g = f32[2048]{{0}} {gather}
  ROOT %t = f32[256]{{0}} tanh(%p)
}}

%end (p: f32[256], s: (f32[256], f32[2048])) -> f32[2048] {{
  %p = f32[256]{{0}} parameter(0)
  %s = (f32[256]{{0}}, f32[2048]{{0}}) parameter(1)
  %g = f32[2048]{{0}} {gather}
  ROOT %c = f32[2048]{{0}} custom-call(%s, %g), custom_call_target="AsyncCollectiveDone"
}}
""",  # noqa: E501
        )
    )
    assert found.collectives == [Collective("all-gather", 4 * 2048, 8, 1)]
    assert found.exact


def test_a_start_whose_end_is_elsewhere():
    found = read(
        body(
            "%p = f32[256]{0} parameter(0)",
            "%ag = (f32[256]{0}, f32[2048]{0}) all-gather-start(%p), replica_groups={}",
            "%ar = f32[256]{0} all-reduce-start(%p), replica_groups={}, to_apply=%sum",
            "%c = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%p)",
        )
    )
    assert [c.bytes for c in found.collectives] == [8192, 1024]
    assert found.bytes_by_space == {0: 1024 + 8192 + 1024 + 1024 + 1024, 1: 1024}


@pytest.mark.parametrize(
    ("groups", "size", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2, ("model",)),
        ("[4,2]<=[8]", 2, ("model",)),
        ("[2,4]<=[4,2]T(1,0)", 4, ("data",)),
        ("mesh['data'=4,'model'=2] {'data'}", 4, ("data",)),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8, ("data", "model")),
        ("mesh['x'=8] {'x':(1)4}", 4, ("data",)),
        ("mesh['x'=8] {'x':(4)2}", 2, ("model",)),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", 4, None),
        ("{{0,2},{1,3},{4,6},{5,7}}", 2, None),
        ("{{0,1,2,3,4,5,6,7}}", 8, ("data", "model")),
        ("{}", 8, ("data", "model")),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", 1, ()),
    ],
)
def test_groups_as_printed(mesh, groups, size, axes):
    line = f"%r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add"
    found = read(body("%p = f32[4]{0} parameter(0)", line), mesh)
    assert found.collectives == [Collective("all-reduce", 16, size, 1, axes)]
    # A mesh of another size names nothing.
    other = body("%p = f32[4]{0} parameter(0)", line, header="HloModule m, num_partitions=16")
    assert read(other, mesh).collectives[0].axes is None


def test_groups_not_understood_are_a_reason():
    line = "%r = f32[4]{0} all-reduce(%p), replica_groups=new{style}, to_apply=%add"
    found = read(body("%p = f32[4]{0} parameter(0)", line))
    assert found.reasons == ["all-reduce: groups not understood"]


# With the compilers for TPU and CUDA themselves, which need no such device.


@pytest.fixture(scope="module", params=ahead.TARGETS)
def compile_for(request):
    devices = ahead.devices(request.param)

    def compile_(function, *arguments, place=None):
        place = place or SingleDeviceSharding(devices[0])
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arguments]
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=(request.param,))
        return lowered.compile()

    compile_.devices = np.array(devices)
    return compile_


def test_other_compilers_products_and_loops(compile_for):
    square = f32(256, 256)
    exact(program(compile_for(jnp.matmul, square, square)), 2 * 256**3)

    def scan(a, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ a), None), x, None, length=100)[0]

    compiled = compile_for(scan, square, square)
    exact(program(compiled), 100 * 2 * 256**3)
    own = compiled.cost_analysis()
    assert own is None or own["flops"] < 50 * 2 * 256**3
    assert program(compiled).memory.arguments == 2 * 4 * 256**2


def test_other_compilers_lstm(compile_for):
    exact(program(compile_for(LSTM, *LSTM_ARGUMENTS)), LSTM_FLOPS)


def test_other_compilers_collectives(compile_for):
    mesh = jax.sharding.Mesh(compile_for.devices.reshape(2, 2), ("data", "model"))

    def scan(x):
        return lax.scan(lambda c, _: (lax.psum(c, "data") * 0.1, None), x, None, length=7)[0]

    mapped = jax.shard_map(
        scan, mesh=mesh, in_specs=SPEC, out_specs=P(None, "model"), check_vma=False
    )
    found = program(compile_for(mapped, f32(512, 256), place=NamedSharding(mesh, SPEC)), mesh)
    torus = mesh.devices.flat[0].platform == "tpu"
    span = (Level("torus", 2, lines=(2,)) if torus else Level("node", 2),)
    assert found.collectives == [Collective("all-reduce", 4 * 256 * 128, 2, 7, ("data",), span)]


@pytest.fixture(scope="module")
def slices():
    """Four slices of four TPU v5e: two by two of them, and the devices of one."""
    if not targets.installed("v5e"):
        pytest.skip("libtpu, the compiler for TPU, is not installed")
    found = targets.devices(targets.place("v5e:2x2:4"))
    shaped = mesh_utils.create_hybrid_device_mesh((1, 1, 4), (2, 2, 1), found)
    return jax.sharding.Mesh(shaped, ("a", "b", "c"))


def permuted(mesh, axis, pairs):
    def f(x):
        send = functools.partial(lax.ppermute, axis_name=axis, perm=pairs)
        return jax.shard_map(send, mesh=mesh, in_specs=P(axis), out_specs=P(axis), check_vma=False)(
            x
        )

    return f


WHOLE = 4 * 1024 * 1024


@pytest.mark.parametrize(
    ("f", "before", "after", "found"),
    [
        (lambda x: x, P("b"), P(), ("all-gather", WHOLE, ("b",), 2)),
        (lambda x: x, P(("a", "b")), P(), ("all-gather", WHOLE, ("a", "b"), 4)),
        # In a slice a quarter of the rows gathered from the others; then all from its devices.
        (lambda x: x, P(("a", "b", "c")), P(), ("all-gather", WHOLE // 4, ("a", "b"), 4)),
        (
            lambda x: x.reshape(16, 64, 1024).sum(0),
            P(("a", "b", "c")),
            P(),
            ("all-reduce", 4 * 64 * 1024 // 4, ("a", "b"), 4),
        ),
        (
            lambda x: x.reshape(2, 512, 1024).sum(0),
            P("b"),
            P("b"),
            ("reduce-scatter", WHOLE // 2, ("b",), 2),
        ),
        (lambda x: x, P("b"), P(None, "b"), ("all-to-all", WHOLE // 2, ("b",), 2)),
        ("b", P("b"), P("b"), ("collective-permute", WHOLE // 2, ("b",), 2)),
        ("a", P("a"), P("a"), ("collective-permute", WHOLE // 2, ("a",), 2)),
    ],
)
def test_what_slices_exchange(slices, f, before, after, found):
    """XLA compiles one slice's program, where it is sent to the host and received from it."""
    if isinstance(f, str):
        f = permuted(slices, f, [(0, 1)])
    at, to = (NamedSharding(slices, spec) for spec in (before, after))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    compiled = jax.jit(f, in_shardings=at, out_shardings=to).trace(x)
    read_from = program(compiled.lower(lowering_platforms=("tpu",)).compile(), slices)
    assert read_from.exact, (read_from.unknown, read_from.reasons)
    assert read_from.devices == 16
    network = [c for c in read_from.collectives if c.span[-1].kind == "network"]
    kind, size, axes, group = found
    assert network == [Collective(kind, size, group, 1, axes, (Level("network", group),))]
    near = [c for c in read_from.collectives if c not in network]
    assert all(c.axes == ("c",) and c.span[0].kind == "torus" for c in near)
    assert bool(near) == (before == P(("a", "b", "c")))


def test_a_send_that_is_not_understood_is_said():
    """As libtpu 0.0.42 prints one, its target as none that is known."""
    text = """HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %t = token[] after-all()
  %s = (f32[8]{0}, u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="TARGET",_xla_megascale_transfer_type="ALL_REDUCE"}
  %d = token[] send-done(%s), channel_id=2, is_host_transfer=true
  ROOT %c = f32[8]{0} copy(%p)
}
"""  # noqa: E501
    found = read(text)
    assert not found.exact
    assert found.reasons == ["all-reduce between slices: groups not understood"]
    known = read(text.replace("TARGET", "{1,2,3}x{0:0}"))
    assert known.exact
    assert known.collectives == [Collective("all-reduce", 32, 3, 1)]


# Kernels.


def test_kernels_add_up_to_the_program():
    def scan(a, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ a), None), x, None, length=9)[0]

    found = of(scan, SQUARE, SQUARE)
    kernels = found.kernels.items()
    assert sum(k.flops * n for k, n in kernels) == found.matmul_flops == 9 * ONE
    assert sum(k.bytes * n for k, n in kernels) == found.bytes
    assert sum(k.transcendentals * n for k, n in kernels) == 9 * N * N
    dots = {(k.kind, k.dtype, k.looped): n for k, n in kernels if k.flops}
    assert dots == {("dot", "float32", True): 9}


def test_what_is_fused_is_one_kernel():
    found = of(lambda a: jnp.tanh(a) * 2 + 1, f32(1000, 1000))
    (kernel,) = found.kernels
    assert found.kernels[kernel] == 1
    assert kernel.transcendentals == 1000 * 1000
    assert kernel.elementwise == 2 * 1000 * 1000
    assert kernel.bytes == found.bytes
    assert not kernel.looped


def test_a_reductions_operations_are_its_kernels():
    found = of(lambda a: a.sum(1), f32(64, 1000))
    assert sum(k.elementwise * n for k, n in found.kernels.items()) == pytest.approx(
        64 * 1000, rel=0.02
    )


def test_what_goes_to_places_that_windows_and_indices_tell():
    def pooled(x):
        return lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "VALID")

    found = of(pooled, f32(64, 32))
    assert [(k.elementwise, k.singly) for k in found.kernels] == [(32 * 16 * 3, 32 * 16 * 3)]
    rows = jax.ShapeDtypeStruct((40, 1), jnp.int32)
    found = of(lambda x, rows, y: x.at[rows[:, 0]].add(y), f32(99, 8), rows, f32(40, 8))
    assert sum(k.singly * n for k, n in found.kernels.items()) == 40 * 8


def test_a_convolutions_patches():
    taps = (3 * 9 - 2) ** 2
    (found,) = (k for k in of(conv, f32(2, 9, 9, 4), f32(3, 3, 4, 6)).kernels if k.flops)
    assert (found.kind, found.patches) == ("convolution", 2 * 4 * taps)

    def depthwise(x, k):
        return conv(x, k, feature_group_count=8)

    (found,) = (k for k in of(depthwise, f32(2, 9, 9, 8), f32(3, 3, 1, 8)).kernels if k.flops)
    assert found.patches == 2 * 8 * taps


def test_nothing_is_a_kernel_of_what_only_names_or_sends(mesh):
    found = sharded(mesh, lambda x: lax.psum(x, "data"), out=P(None, "model"))
    assert not found.kernels
    assert of(lambda a: (a, a), SQUARE).kernels.total() <= 2  # copies
