"""What lies between model FLOPs, executed FLOPs and XLA's figure, on programs this CPU compiles."""

import ahead
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from research import compute
from research.compute import causes, count, places
from research.compute.program import read

N = 64
ONE = 2 * N**3
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def by_cause(fn, *args):
    found = compute.report(fn, *args)
    executed = found.program.matmul_flops * found.devices
    assert sum(d.flops for d in found.differences) == executed - found.count.model_flops
    return {d.cause: (d.flops, d.modules) for d in found.differences}


def layer(w, x):
    with jax.named_scope("layer"):
        return jnp.tanh(x @ w)


def test_nothing_differs():
    assert by_cause(jax.grad(lambda w, x: layer(w, x).sum()), SQUARE, SQUARE) == {}


def test_recomputation_as_written():
    def deep(ws, x):
        body = jax.checkpoint(lambda x, w: (layer(w, layer(w, x)), None))
        return lax.scan(body, x, ws)[0].sum()

    found = by_cause(jax.value_and_grad(deep), f32(6, N, N), SQUARE)
    # The second product of a layer is recomputed by nobody: its tanh is the layer's output.
    assert list(found) == [causes.RECOMPUTE]
    flops, modules = found[causes.RECOMPUTE]
    assert flops % (6 * ONE) == 0
    assert modules == ("layer",)


def test_recomputation_that_the_compiler_merged():
    def twice(w, x):
        body = jax.checkpoint(lambda x: layer(w, layer(w, x)), prevent_cse=False)
        return body(x).sum()

    found = by_cause(jax.value_and_grad(twice), SQUARE, SQUARE)
    assert found[causes.RECOMPUTE] == (2 * ONE, ("layer",))
    assert found[causes.MERGED] == (-2 * ONE, ("layer",))
    assert len(found) == 2


def test_two_products_recomputed_as_one_of_their_names_are_not_merged():
    """As XLA for CUDA joins a gated layer's two, of jax 0.12."""

    def gated(ws, x):
        def body(x, w):
            with jax.named_scope("gate"):
                gate = jnp.sin(x @ w)
            with jax.named_scope("up"):
                up = jnp.sin(x @ w.T)
            return jnp.tanh(gate * up), None

        return lax.scan(jax.checkpoint(body), x, ws)[0].sum()

    found = compute.report(jax.value_and_grad(gated), f32(6, N, N), SQUARE)
    expected = {causes.RECOMPUTE: 2 * 6 * ONE}
    assert {d.cause: d.flops for d in found.differences} == expected
    products = found.program.products
    again = {p.path: p for p in products if "rematted" in p.path and products[p] == 6 * ONE}
    gate, up = (next(p for path, p in again.items() if f"/{n}/" in path) for n in ("gate", "up"))
    products[up] += products.pop(gate)
    assert {d.cause: d.flops for d in causes.executed(found.count, found.program)} == expected


def test_a_product_of_vectors():
    def last(w, x):
        with jax.named_scope("head"):
            return ((jnp.tanh(x) @ w) ** 2).sum()

    found = by_cause(jax.grad(last, (0, 1)), f32(N, 1), SQUARE)
    # The gradient of x is an outer product: there is nothing to add up.
    assert found == {causes.REWRITTEN: (-2 * N * N, ("head",))}


def depthwise(k, x):
    with jax.named_scope("conv"):
        y = lax.conv_general_dilated(
            x, k, (1, 1), "SAME", feature_group_count=16, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return (y**2).sum()


def test_a_depthwise_convolutions_gradient_on_a_cpu():
    found = by_cause(jax.grad(depthwise), f32(3, 3, 1, 16), f32(2, 8, 8, 16))
    assert list(found) == [causes.GROUPED]
    flops, modules = found[causes.GROUPED]
    assert flops > 0
    assert modules == ("conv",)


def test_a_product_computed_once_for_two():
    def equal(w, x):
        with jax.named_scope("a"):
            first = x @ w
        with jax.named_scope("b"):
            second = x @ w
        return jnp.tanh(first) + jnp.sin(second)

    found = by_cause(equal, SQUARE, SQUARE)
    assert list(found) == [causes.REMOVED]
    assert found[causes.REMOVED][0] == -ONE


def test_a_product_moved_out_of_a_loop():
    def loop(w, x):
        return lax.fori_loop(0, 10, lambda _, c: jnp.tanh(c + w @ w), x)

    found = by_cause(loop, SQUARE, SQUARE)
    assert found in ({}, {causes.REMOVED: (-9 * ONE, ())}, {causes.REMOVED: (-9 * ONE, ("",))})


def test_work_that_every_device_repeats():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P())
    placed = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=place)
    found = by_cause(jax.jit(layer, out_shardings=place), placed, placed)
    assert found == {causes.REPEATED: (7 * ONE, ("layer",))}


MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
EVERYWHERE = NamedSharding(MESH, P())


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (lambda k, x: depthwise(k, x), ((3, 3, 1, 16), (2, 8, 8, 16))),
        (lambda w, x: layer(w, jnp.pad(x, ((1, 1), (0, 0)))), ((N, N), (N - 2, N))),
    ],
    ids=["depthwise", "padded"],
)
def test_what_every_device_repeats_is_not_taken_for_another_cause(fn, shapes):
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=EVERYWHERE) for s in shapes]
    found = by_cause(jax.jit(fn, out_shardings=EVERYWHERE), *args)
    (module,) = compute.count(fn, *args).by_module
    model = compute.count(fn, *args).model_flops
    assert found == {causes.REPEATED: (7 * model, (module,))}


def test_work_that_the_devices_cannot_share_evenly():
    x = jax.ShapeDtypeStruct((16, N), jnp.float32, sharding=NamedSharding(MESH, P("data")))
    w = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=EVERYWHERE)
    found = by_cause(lambda w, x: layer(w, x[:10]), w, x)
    # 10 rows on 8 devices, 2 on each.
    assert found == {causes.UNEVEN: (6 * 2 * N * N, ("layer",))}


def test_a_complex_convolution_as_three_real_ones():
    def conv(x, k):
        return lax.conv_general_dilated(x, k, (1,), "VALID")

    shapes = (1, 8, 16), (8, 8, 3)
    args = [jax.ShapeDtypeStruct(s, jnp.complex64) for s in shapes]
    real = 2 * 14 * 8 * 8 * 3
    assert by_cause(conv, *args) == {causes.COMPLEX: (-real, ("",))}


def test_equal_products_are_not_taken_for_merged_recomputation():
    def deep(ws, x):
        body = jax.checkpoint(lambda x, w: (jnp.sin(layer(w, x) + jnp.cos(layer(w, x))), None))
        return lax.scan(body, x, ws)[0].sum()

    found = by_cause(jax.value_and_grad(deep), f32(6, N, N), SQUARE)
    assert causes.MERGED not in found
    assert found[causes.REMOVED][0] < 0


@pytest.mark.parametrize("groups", [1, 64])
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_a_strided_convolutions_zeros_written_out(target, groups):
    def loss(k, x):
        y = lax.conv_general_dilated(
            x,
            k,
            (2, 2),
            "SAME",
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return (y**2).sum()

    mesh = jax.sharding.Mesh(ahead.devices(target, 1), ("x",))
    shapes = (3, 3, 64 // groups, 64), (2, 16, 16, 64)
    place = NamedSharding(mesh, P())
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in shapes]
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(*args)
    compiled = traced.lower(lowering_platforms=(target,)).compile()
    found = compute.report(traced, compiled=compiled).differences
    assert [d.cause for d in found] == [causes.FILLED]


def test_a_factorisation_hides_no_product():
    def f(w, x):
        y = x @ w
        return jnp.tanh(y) + jnp.sin(x @ w)

    text = """HloModule jit_f

ENTRY %main (w: f32[64,64], x: f32[64,64]) -> f32[64,64] {
  %w = f32[64,64]{1,0} parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  %y = f32[64,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/dot_general"}
  ROOT %lu = f32[64,64]{1,0} custom-call(%y), custom_call_target="lapack_spotrf_ffi", metadata={op_name="jit(f)/cholesky"}
}
"""  # noqa: E501
    found = causes.executed(count(f, SQUARE, SQUARE), read(text))
    assert found == [causes.Difference(causes.REMOVED, -ONE, ("",))]


def test_a_call_that_cannot_be_read():
    def f(w, x):
        with jax.named_scope("a"):
            y = x @ w
        with jax.named_scope("b"):
            return jnp.tanh(y) @ w

    text = """HloModule jit_f

ENTRY %main (w: f32[64,64], x: f32[64,64]) -> f32[64,64] {
  %w = f32[64,64]{1,0} parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  %y = f32[64,64]{1,0} custom-call(%x, %w), custom_call_target="mystery", metadata={op_name="jit(f)/a/dot_general"}
  ROOT %dot = f32[64,64]{1,0} dot(%y, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/b/dot_general"}
}
"""  # noqa: E501
    found = causes.executed(count(f, SQUARE, SQUARE), read(text))
    assert found == [causes.Difference(causes.OPAQUE, -ONE, ("a",))]


def test_more_than_was_written_is_unexplained():
    text = """HloModule jit_layer

ENTRY %main (w: f32[64,64], x: f32[64,64]) -> f32[64,64] {
  %w = f32[64,64]{1,0} parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  %y = f32[64,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(layer)/layer/dot_general"}
  ROOT %dot = f32[64,64]{1,0} dot(%y, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(layer)/layer/dot_general"}
}
"""  # noqa: E501
    found = causes.executed(count(layer, SQUARE, SQUARE), read(text))
    assert found == [causes.Difference(causes.UNEXPLAINED, ONE, ("layer",))]


def test_products_that_lost_their_names_are_those_that_are_missing():
    text = """HloModule jit_layer

ENTRY %main (w: f32[64,64], x: f32[64,64]) -> f32[64,64] {
  %w = f32[64,64]{1,0} parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  ROOT %dot = f32[64,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    assert causes.executed(count(layer, SQUARE, SQUARE), read(text)) == []


# ---- XLA's figure


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").sum()


def softmax(x):
    return -jax.nn.log_softmax(x)[:, 0].mean()


def scanned(w, x):
    return lax.scan(lambda c, _: (layer(w, c), None), x, None, length=100)[0].sum()


REPORTED = {
    "product": (layer, SQUARE, SQUARE),
    "loop": (jax.grad(scanned), SQUARE, SQUARE),
    "depthwise": (jax.grad(depthwise), f32(3, 3, 1, 16), f32(2, 8, 8, 16)),
    "pooling": (jax.grad(pooled), f32(2, 8, 8, 4)),
    "softmax": (jax.grad(softmax), f32(32, 10)),
    "argmax": (lambda x: x.argmax(-1), f32(32, 10)),
    "random": (lambda: jax.random.normal(jax.random.key(0), (1000,)),),
}


@pytest.mark.parametrize("name", REPORTED)
def test_what_xla_reports_is_explained(name):
    fn, *args = REPORTED[name]
    found = compute.report(fn, *args)
    total = found.program.matmul_flops + sum(d.flops for d in found.xla_differences)
    assert total == round(found.xla_flops)
    rest = sum(d.flops for d in found.xla_differences if d.cause == causes.UNEXPLAINED)
    assert abs(rest) <= 0.05 * found.xla_flops


def test_a_loops_body_counts_once_for_xla():
    found = compute.report(scanned, SQUARE, SQUARE)
    (loops,) = (d.flops for d in found.xla_differences if d.cause == causes.LOOPS)
    assert loops == -99 * ONE


def test_custom_calls_are_not_counted_by_xla():
    text = """HloModule jit_f

ENTRY %main (w: f32[64,64], x: f32[64,64]) -> f32[64,64] {
  %w = f32[64,64]{1,0} parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  %y = f32[64,64]{1,0} custom-call(%x, %w), custom_call_target="__onednn$matmul", backend_config={"onednn_matmul_config":{}}
  ROOT %dot = f32[64,64]{1,0} dot(%y, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501
    found = read(text)
    assert found.matmul_flops == 2 * ONE
    assert causes.reported(found, ONE) == [causes.Difference(causes.CALLS, -ONE)]


def test_a_backend_without_figures_has_none():
    class Silent:
        def cost_analysis(self):
            return None

    class Failing:
        def cost_analysis(self):
            raise NotImplementedError

    class Negative:
        def cost_analysis(self):
            return [{"flops": -1.0}]

    assert [causes.xla_flops(c()) for c in (Silent, Failing, Negative)] == [None, None, None]


# ---- places


@pytest.mark.parametrize(
    ("path", "phase", "module"),
    [
        ("jit(f)/jvp(layers)/attention/qkv/dot_general", "forward", "layers.attention.qkv"),
        ("jit(f)/transpose(jvp(layers/0))/input/transpose", "backward", "layers.0.input"),
        (
            "jit(f)/jvp(layers/0)/while/body/closed_call/hidden/dot_general",
            "forward",
            "layers.0.hidden",
        ),
        (
            "jit(f)/transpose(jvp())/checkpoint/rematted_computation/a/dot_general",
            "recompute",
            "a",
        ),
        ("jit(f)/jit(g)/b/dot_general", "forward", "b"),
        ("jit(f)/jvp(a)/causal/vmap(BTNH,BSNH->BNTS)/dot_general", "forward", "a"),
        ("jit(f)/cond/branch_1_fun/a/dot_general", "forward", "a"),
        ("jit(f)/dot_general", "forward", ""),
        ("", "forward", ""),
    ],
)
def test_a_path_tells_the_place(path, phase, module):
    place = places.of_path(path)
    assert (place.phase, place.module) == (phase, module)
