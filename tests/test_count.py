"""Counts against closed forms, and against taps and trips enumerated in plain Python."""

import ast
import contextlib
import functools
import itertools
import math
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import sparse
from jax.extend.core import Primitive, primitives
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from research import command, setup
from research.compute import count, rules
from research.models.resnet import RESNET18, RESNET50
from research.models.transformer import TransformerConfig
from research.models.vit import VIT_B16

counts = sys.modules["research.compute.count"]
P = PartitionSpec
scope = jax.named_scope


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def counted(fn, *args, **kwargs):
    """A count whose parts add up and whose numbers are Python's."""
    found = count(fn, *args, **kwargs)
    for parts in (found.by_phase, found.by_module, found.by_dtype):
        assert sum(parts.values()) == found.matmul_flops
        assert all(type(n) is int and n > 0 for n in parts.values())
    numbers = (found.matmul_flops, found.model_flops, found.dense_flops, found.elementwise_flops)
    numbers += (found.transcendentals, *found.apart.values(), *found.unknown.values())
    assert all(type(n) is int and n >= 0 for n in numbers)
    assert found.model_flops == found.matmul_flops - found.by_phase.get("recompute", 0)
    assert found.exact == (found.qualifier == "exact")
    return found


def exact(fn, *args, **kwargs):
    found = counted(fn, *args, **kwargs)
    assert (found.lower, found.upper, dict(found.unknown)) == ([], [], {})
    return found


def flops(*shape, times=1):
    """[m, k] by [k, n], and batches before: a multiplication and an addition each."""
    return 2 * math.prod(shape) * times


def loss(fn):
    """A scalar from a function, not linear in what it gives."""
    return lambda *args: jnp.sum(jnp.sin(fn(*args)))


def trained(fn, argnums=0):
    """Value and gradient, so that nothing of the forward pass is dead."""
    return jax.value_and_grad(loss(fn), argnums)


# ---- products


def through_reference(x, y):
    ref = jax.new_ref(x)
    ref[...] = ref[...] @ y
    return ref[...]


X, Y, Z = array(3, 5), array(5, 7), array(7, 2)
SQUARE, CUBE = array(5, 5), flops(5, 5, 5)
BYTES = array(3, 5, dtype=jnp.int8), array(5, 7, dtype=jnp.int8)
COMPLEX = array(3, 5, dtype=jnp.complex64), array(5, 7, dtype=jnp.complex64)

PRODUCTS = {
    "matrices": (lambda x, y: x @ y, (X, Y), flops(3, 5, 7)),
    "inner": (jnp.dot, (array(9), array(9)), flops(9)),
    "vdot": (jnp.vdot, (X, X), flops(15)),
    "matrix_vector": (jnp.dot, (X, array(5)), flops(3, 5)),
    "outer_einsum": (lambda x, y: jnp.einsum("i,j->ij", x, y), (array(4), array(6)), flops(4, 6)),
    "outer_elementwise": (jnp.outer, (array(4), array(6)), 0),
    "transposed": (lambda x, y: x.T @ y.T, (array(5, 3), array(7, 5)), flops(3, 5, 7)),
    "batched": (jnp.matmul, (array(4, 3, 5), array(4, 5, 7)), flops(4, 3, 5, 7)),
    "broadcast": (lambda x, y: jnp.einsum("bij,jk", x, y), (array(4, 3, 5), Y), flops(4, 3, 5, 7)),
    "two_contracted": (
        lambda x, y: jnp.tensordot(x, y, 2),
        (array(2, 3, 5), array(3, 5, 7)),
        flops(2, 3, 5, 7),
    ),
    "all_contracted": (lambda x, y: jnp.tensordot(x, y, 2), (X, X), flops(3, 5)),
    # In the order of einsum 7x2 by 5x7 is first: 70 + 30 multiply-adds, where the other has 147.
    "chain": (lambda x, y, z: jnp.einsum("ij,jk,kl->il", x, y, z), (X, Y, Z), 2 * (70 + 30)),
    "left_to_right": (lambda x, y, z: x @ y @ z, (X, Y, Z), 2 * (105 + 42)),
    "zero_size": (jnp.dot, (array(0, 5), Y), 0),
    "zero_contracted": (jnp.dot, (array(3, 0), array(0, 7)), 0),
    "scalars": (lambda x, y: x * y, (array(), array()), 0),
    "integers": (jnp.dot, BYTES, flops(3, 5, 7)),
    "complex": (jnp.dot, COMPLEX, flops(3, 5, 7, times=4)),  # (a + bi)(c + di): 4 products
    "vmapped": (jax.vmap(jnp.dot, (0, None)), (array(4, 3, 5), Y), flops(4, 3, 5, 7)),
    "vmapped_both": (jax.vmap(jnp.dot), (array(4, 3, 5), array(4, 5, 7)), flops(4, 3, 5, 7)),
    "power": (lambda x: jnp.linalg.matrix_power(x, 5), (array(4, 4),), flops(4, 4, 4, times=3)),
    "map": (lambda x, y: lax.map(lambda row: row @ y, x), (X, Y), flops(3, 5, 7)),
    "partial": (functools.partial(jnp.dot, precision="highest"), (X, Y), flops(3, 5, 7)),
    "scaled": (
        lambda x, y, s, t: jax.nn.scaled_matmul(x, y, s, t),
        tuple(array(*s, dtype=jnp.float8_e4m3fn) for s in ((2, 3, 64), (2, 5, 64)))
        + tuple(array(*s, dtype=jnp.float8_e8m0fnu) for s in ((2, 3, 2), (2, 5, 2))),
        flops(2, 3, 64, 5),
    ),
    "linear_solve": (  # with one product as its solver; the operator itself is not applied
        lambda a, b: lax.custom_linear_solve(
            lambda v: a @ (a @ v), b, lambda _, v: a @ v, symmetric=True
        ),
        (array(5, 5), array(5)),
        flops(5, 5),
    ),
    "composite": (lax.composite(lambda x, y: x @ y, name="a.b"), (X, Y), flops(3, 5, 7)),
    "reference": (through_reference, (SQUARE, SQUARE), CUBE),
    "compiled_once": (jax.jit(jnp.dot), (X, Y), flops(3, 5, 7)),
    "traced_inside": (lambda x, y: jax.jit(jnp.dot).trace(x, y)(x, y), (X, Y), flops(3, 5, 7)),
    "of_many_primitives": (jnp.searchsorted, (array(8), array(3)), 0),
    "static": (
        jax.jit(lambda n, x: x @ jnp.zeros((5, n)), static_argnums=0),
        (7, X),
        flops(3, 5, 7),
    ),
}


@pytest.mark.parametrize(("fn", "args", "expected"), PRODUCTS.values(), ids=PRODUCTS)
def test_products(fn, args, expected):
    found = exact(fn, *args)
    assert found.matmul_flops == expected
    assert found.dense_flops == expected
    assert set(found.by_phase) <= {"forward"}
    assert set(found.by_module) <= {""}


def test_arguments_by_name_and_nothing_but_shapes():
    fn = jax.jit(lambda x, *, y, n: (x @ y) ** n, static_argnames="n")
    assert exact(fn, X, y=Y, n=3).matmul_flops == flops(3, 5, 7)
    assert exact(lambda tree: tree["x"] @ tree["y"][0], {"x": X, "y": [Y]}).model_flops == 210
    assert exact(jnp.dot, np.ones((3, 5)), jnp.ones((5, 7))).matmul_flops == flops(3, 5, 7)


def test_traced():
    traced = jax.jit(jnp.dot).trace(X, Y)
    assert exact(traced) == exact(jnp.dot, X, Y)
    assert exact(nnx.jit(lambda x, y: x @ y), jnp.ones((3, 5)), jnp.ones((5, 7))).model_flops == 210
    with pytest.raises(ValueError, match="has its arguments"):
        count(traced, X, Y)


def fails(*_):
    raise RuntimeError(f"\nthe first line{' and more' * 99}\nthe second")


@pytest.mark.parametrize(
    ("fn", "args", "message", "cause"),
    [
        (3, (), "count needs a function or a jax.stages.Traced, not 3", type(None)),
        (np.ones(2), (), "count needs a function or a jax.stages.Traced, not array", type(None)),
        (fails, (), "fails cannot be traced: RuntimeError: the first line", RuntimeError),
        (jnp.dot, (X, X), "dot cannot be traced: TypeError: dot_general requires", TypeError),
        (jnp.dot, ("x", X), "dot cannot be traced: TypeError: ", TypeError),
        (lambda x: x if x > 0 else -x, (array(),), "<lambda> cannot be traced: Tracer", TypeError),
        (jax.jit(lambda x: x), (), "<lambda> cannot be traced: TypeError: ", TypeError),
    ],
    ids=itertools.count(),
)
def test_what_cannot_be_traced(fn, args, message, cause):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        count(fn, *args)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    assert isinstance(caught.value.__cause__, cause)


def test_it_imports_jax_and_numpy_only():
    for source in pathlib.Path(counts.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(source.read_text())))
        names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        for name in names:
            own = name == "research.compute" or name.startswith("research.compute.")
            assert own or name.split(".")[0] in {"jax", "numpy", *sys.stdlib_module_names}, source


# ---- convolutions


def spread(n, step):
    return (n - 1) * step + 1 if n else 0


def pairs(n, k, stride, pads, hole, dilation):
    """(output, tap) pairs that meet an input, one by one, of the definition of a convolution with
    all spatial axes together: XLA, Operation Semantics, ConvWithGeneralPadding. And those with
    padding: each tap of each output, or of each input where along an axis these are fewer."""
    axes = range(len(n))
    wide = [spread(n[d], hole[d]) for d in axes]
    room = [wide[d] + sum(pads[d]) - spread(k[d], dilation[d]) for d in axes]
    out = [room[d] // stride[d] + 1 for d in axes]
    valid = 0
    every = math.prod(min(m, size) * taps for m, size, taps in zip(out, n, k, strict=True))
    for position in itertools.product(*map(range, out)):
        for tap in itertools.product(*map(range, k)):
            at = [position[d] * stride[d] + tap[d] * dilation[d] - pads[d][0] for d in axes]
            valid += all(0 <= at[d] < wide[d] and at[d] % hole[d] == 0 for d in axes)
    return valid, every


def same(n, k, stride):
    """TensorFlow's padding, the odd element after."""
    pads = [max(0, (-(-a // s) - 1) * s + b - a) for a, b, s in zip(n, k, stride, strict=True)]
    return [(p // 2, p - p // 2) for p in pads]


def convolution(n, k, stride=None, pads=None, hole=None, dilation=None, **kwargs):
    ones = (1,) * len(n)
    sizes = {"n": n, "k": k, "stride": stride or ones, "hole": hole or ones}
    sizes |= {"dilation": dilation or ones, "pads": pads or [(0, 0)] * len(n)}
    return sizes, {"batch": 2, "inputs": 4, "outputs": 6, "groups": 1, "batches": 1} | kwargs


CONVOLUTIONS = {
    "valid": convolution((7, 6), (3, 2)),
    "same": convolution((7, 6), (3, 2), pads=same((7, 6), (3, 2), (1, 1))),
    "same_2": convolution((8, 7), (3, 3), (2, 2), same((8, 7), (3, 3), (2, 2))),
    "same_3": convolution((8, 7), (4, 3), (3, 3), same((8, 7), (4, 3), (3, 3))),
    "valid_2": convolution((8, 7), (3, 3), (2, 2)),
    "valid_3": convolution((8, 9), (3, 2), (3, 3)),
    "strides_apart": convolution((8, 9), (3, 3), (1, 3), [(1, 1), (2, 0)]),
    "dilated": convolution((9, 8), (3, 3), dilation=(2, 3), pads=[(2, 2), (3, 3)]),
    "dilated_strided": convolution((9, 8), (3, 3), (2, 3), [(2, 2), (1, 2)], dilation=(2, 2)),
    "grouped": convolution((6, 6), (3, 3), pads=[(1, 1)] * 2, groups=2),
    "depthwise": convolution((6, 6), (3, 3), pads=[(1, 1)] * 2, groups=4, outputs=8),
    "transposed": convolution((4, 5), (3, 3), hole=(2, 2), pads=[(1, 2), (2, 1)]),
    "transposed_3": convolution((4, 5), (4, 3), hole=(3, 2), pads=[(3, 3), (2, 2)]),
    "transposed_strided": convolution((5, 4), (3, 3), (2, 3), [(2, 2), (1, 3)], hole=(3, 2)),
    "transposed_dilated": convolution((4,), (3,), (2,), [(4, 4)], hole=(4,), dilation=(2,)),
    "never_meets": convolution((4,), (2,), (2,), [(1, 1)], hole=(2,), dilation=(2,)),
    "asymmetric": convolution((6, 5), (3, 3), pads=[(0, 2), (3, 1)]),
    "negative": convolution((8, 7), (3, 3), pads=[(-1, -2), (-2, 3)]),
    "wide_padding": convolution((3,), (2,), (2,), [(5, 6)]),
    "one": convolution((11,), (4,), (2,), [(1, 2)]),
    "three": convolution((4, 3, 5), (2, 3, 2), (1, 2, 2), [(1, 0), (1, 1), (0, 1)], inputs=2),
    "none": convolution((), ()),
    "kernel_1": convolution((5, 5), (1, 1), (2, 2)),
    "larger_kernel": convolution((3, 3), (5, 5), pads=[(2, 2), (3, 3)]),
    "empty": convolution((0, 4), (2, 2), pads=[(2, 2), (1, 1)]),
    "no_batch": convolution((4,), (2,), batch=0),
    "batch_groups": convolution((6, 5), (3, 3), pads=[(1, 1)] * 2, batch=4, batches=2),
}


def convolve(sizes, channels, layout=("NC", "OI", "NC")):
    """The function, its arguments, and its (valid, all) FLOPs by the definition."""
    axes = "DHW"[3 - len(sizes["n"]) :]
    lhs_spec = layout[0].replace("C", "C" + axes) if layout[0] == "NC" else f"N{axes}C"
    rhs_spec = f"OI{axes}" if layout[1] == "OI" else f"{axes}IO"
    c = channels
    dims = dict(zip(axes, sizes["n"], strict=True)) | {"N": c["batch"], "C": c["inputs"]}
    taps = dict(zip(axes, sizes["k"], strict=True))
    taps |= {"O": c["outputs"], "I": c["inputs"] // c["groups"]}
    args = array(*(dims[a] for a in lhs_spec)), array(*(taps[a] for a in rhs_spec))
    fn = functools.partial(
        lax.conv_general_dilated,
        window_strides=sizes["stride"],
        padding=sizes["pads"],
        lhs_dilation=sizes["hole"],
        rhs_dilation=sizes["dilation"],
        dimension_numbers=(lhs_spec, rhs_spec, lhs_spec),
        feature_group_count=c["groups"],
        batch_group_count=c["batches"],
    )
    each = c["batch"] // c["batches"] * c["outputs"] * c["inputs"] // c["groups"]
    return fn, args, [flops(each, n) for n in pairs(**sizes)]


@pytest.mark.parametrize(("sizes", "channels"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(sizes, channels):
    fn, args, (valid, every) = convolve(sizes, channels)
    found = exact(fn, *args)
    assert found.matmul_flops == valid
    assert found.dense_flops == every
    fn, args, _ = convolve(sizes, channels, ("last", "last"))
    assert exact(fn, *args).matmul_flops == valid


@pytest.mark.parametrize(("sizes", "channels"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_gradients_of_convolutions_meet_the_same_pairs(sizes, channels):
    fn, args, (valid, every) = convolve(sizes, channels)
    expected = {"forward": valid, "backward": valid} if valid else {}
    by_inputs, by_kernel = (exact(trained(fn, i), *args) for i in (0, 1))
    assert by_inputs.by_phase == by_kernel.by_phase == expected
    assert by_inputs.dense_flops == 2 * every
    outputs = jax.eval_shape(fn, *args).shape[2:]
    if all(max(m, k) <= n for m, n, k in zip(outputs, sizes["n"], sizes["k"], strict=True)):
        assert by_kernel.dense_flops == 2 * every
    both = exact(trained(fn, (0, 1)), *args).by_phase
    assert both == ({"forward": valid, "backward": 2 * valid} if valid else {})


def test_any_convolution():
    """A hundred along one axis, of sizes, steps and padding at random."""
    rng = np.random.default_rng(0)
    tried = 0
    while tried < 100:
        n, k, stride, hole, dilation = (int(i) for i in rng.integers(1, [9, 6, 5, 5, 4]))
        pads = [tuple(int(i) for i in rng.integers(-2, 7, 2))]
        sizes, channels = convolution((n,), (k,), (stride,), pads, (hole,), (dilation,))
        if spread(n, hole) + sum(pads[0]) < spread(k, dilation) or min(pads[0]) < -n + 1:
            continue
        fn, args, (valid, every) = convolve(sizes, channels)
        found = exact(fn, *args)
        assert (found.matmul_flops, found.dense_flops) == (valid, every), sizes
        tried += 1


def test_padding_in_a_loop():
    conv = functools.partial(lax.conv, window_strides=(1,), padding="SAME")

    def fn(x, w):
        return lax.scan(lambda c, _: (conv(c, w), None), x, None, length=7)[0]

    found = exact(fn, array(2, 4, 5), array(4, 4, 3))
    assert (found.matmul_flops, found.dense_flops) == (
        7 * flops(2, 4, 4, 13),
        7 * flops(2, 4, 4, 15),
    )


def test_padding_named_and_transposed_by_name():
    conv = functools.partial(lax.conv, window_strides=(2, 2), padding="SAME")
    valid, every = pairs((7, 8), (3, 3), (2, 2), same((7, 8), (3, 3), (2, 2)), (1, 1), (1, 1))
    found = exact(conv, array(2, 4, 7, 8), array(6, 4, 3, 3))
    assert (found.matmul_flops, found.dense_flops) == (48 * 2 * valid, 48 * 2 * every)
    up = functools.partial(
        lax.conv_transpose, strides=(2,), padding=[(2, 2)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    valid, _ = pairs((5,), (3,), (1,), [(2, 2)], (2,), (1,))
    assert exact(up, array(2, 5, 4), array(3, 4, 6)).matmul_flops == 48 * 2 * valid


def test_a_long_convolution_is_counted_without_enumeration():
    """An output at i meets min(i + 1, n) of the n taps: n (n + 1) / 2 pairs."""
    n = 1 << 17
    conv = functools.partial(lax.conv, window_strides=(1,), padding=[(n - 1, 0)])
    traced = jax.jit(trained(conv, (0, 1))).trace(array(1, 1, n), array(1, 1, n))
    start = time.perf_counter()
    assert exact(traced).matmul_flops == 3 * n * (n + 1)
    assert time.perf_counter() - start < 2


# ---- networks

WIDTHS = (6, 5, 4, 3)


def mlp(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def test_mlp():
    """The first layer's inputs need no gradient, unless they are asked for it."""
    weights = [array(m, n) for m, n in itertools.pairwise(WIDTHS)]
    every = flops(8, 6 * 5 + 5 * 4 + 4 * 3)
    first = flops(8, 6 * 5)
    assert exact(mlp, weights, array(8, 6)).by_phase == {"forward": every}
    by_params = {"forward": every, "backward": 2 * every - first}
    assert exact(trained(mlp), weights, array(8, 6)).by_phase == by_params
    by_inputs = {"forward": every, "backward": every}
    assert exact(trained(mlp, 1), weights, array(8, 6)).by_phase == by_inputs
    both = {"forward": every, "backward": 2 * every}
    assert exact(trained(mlp, (0, 1)), weights, array(8, 6)).by_phase == both


def lstm(params, x_TBD):
    """Gates of the inputs in one product; Hochreiter and Schmidhuber 1997, with forget gates."""
    into, hidden = params

    def step(carry, gates):
        c, h = carry
        i, f, g, o = jnp.split(gates + h @ hidden, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    zeros = jnp.zeros((x_TBD.shape[1], hidden.shape[0]))
    return lax.scan(step, (zeros, zeros), x_TBD @ into)[1]


def test_lstm():
    """D inputs and H hidden into 4 H gates, for B rows at T steps; the inputs are data."""
    t, b, d, h = 100, 4, 6, 8
    params, x = (array(d, 4 * h), array(h, 4 * h)), array(t, b, d)
    forward = flops(t, b, d + h, 4 * h)
    assert exact(lstm, params, x).by_phase == {"forward": forward}
    backward = flops(t, b, d + 2 * h, 4 * h)
    assert exact(trained(lstm), params, x).by_phase == {"forward": forward, "backward": backward}


def gru(params, x_TBD):
    """The inputs' products inside the loop; Cho et al. 2014."""
    into, gates, candidate = params

    def step(h, x):
        z, r, n = jnp.split(x @ into, 3, axis=-1)
        zh, rh = jnp.split(h @ gates, 2, axis=-1)
        z, r = jax.nn.sigmoid(z + zh), jax.nn.sigmoid(r + rh)
        h = z * h + (1 - z) * jnp.tanh(n + (r * h) @ candidate)
        return h, h

    return lax.scan(step, jnp.zeros((x_TBD.shape[1], candidate.shape[0])), x_TBD)[1]


def test_gru():
    t, b, d, h = 9, 4, 6, 8
    params, x = (array(d, 3 * h), array(h, 2 * h), array(h, h)), array(t, b, d)
    into, hidden = flops(t, b, d, 3 * h), flops(t, b, h, 3 * h)
    assert exact(gru, params, x).matmul_flops == into + hidden
    phases = {"forward": into + hidden, "backward": into + 2 * hidden}
    assert exact(trained(gru), params, x).by_phase == phases
    rows = array(5, t, b, d)
    mapped = jax.vmap(trained(gru), (None, 0))
    assert exact(mapped, params, rows).by_phase == {k: 5 * n for k, n in phases.items()}


def attend(q, k, v):
    with scope("attention"), scope("causal"):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def block(x_BTD, p, heads=4):
    """A layer of a transformer, pre-norm (Radford et al. 2019), its norms left out."""
    b, t, d = x_BTD.shape
    q, k, v = (jnp.reshape(x_BTD @ p[n], (b, t, heads, d // heads)) for n in "qkv")
    x = x_BTD + attend(q, k, v).reshape(b, t, d) @ p["o"]
    with scope("mlp"):
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def layer_params(d, f, *stack):
    shapes = dict.fromkeys("qkvo", (d, d)) | {"up": (d, f), "down": (f, d)}
    return {name: array(*stack, *shape) for name, shape in shapes.items()}


def layer_flops(b, t, d, f):
    """(dense products, attention's): Kaplan et al. 2020, table 1, and every pair of positions."""
    return flops(b, t, 4 * d * d + 2 * d * f), flops(2, b, t, t, d)


def layers(params, x, wrap=lambda f: f, unroll=1):
    with scope("layers"):
        body = wrap(block)
        return lax.scan(lambda x, p: (body(x, p), None), x, params, unroll=unroll)[0]


def test_layers_of_a_transformer():
    b, t, d, f, depth = 2, 8, 16, 40, 12
    dense, attention = (depth * n for n in layer_flops(b, t, d, f))
    args = layer_params(d, f, depth), array(b, t, d)
    assert exact(layers, *args).matmul_flops == dense + attention
    found = exact(trained(layers, (0, 1)), *args)
    assert found.by_phase == {"forward": dense + attention, "backward": 2 * (dense + attention)}
    assert found.by_module == {
        "layers": 3 * depth * flops(b, t, 4 * d * d),
        "layers.attention": 3 * attention,
        "layers.mlp": 3 * depth * flops(b, t, 2 * d * f),
    }
    assert found.causal_flops == 3 * dense + 3 * attention // 2
    unrolled = functools.partial(layers, unroll=3)
    assert exact(trained(unrolled, (0, 1)), *args).by_phase == found.by_phase


def test_rematerialised_layers():
    """Backward reads what goes into each product but the layer's last, and saves what a policy
    says: those products are not repeated."""
    b, t, d, f, depth = 2, 8, 16, 40, 12
    dense, attention = (depth * n for n in layer_flops(b, t, d, f))
    last = depth * flops(b, t, f, d)
    policies = jax.checkpoint_policies
    repeated = {
        None: dense + attention - last,
        policies.nothing_saveable: dense + attention - last,
        policies.everything_saveable: 0,
        policies.dots_saveable: 0,
        policies.dots_with_no_batch_dims_saveable: attention,
    }
    args = layer_params(d, f, depth), array(b, t, d)
    plain = exact(trained(layers, (0, 1)), *args)
    for policy, recompute in repeated.items():
        wrap = functools.partial(jax.checkpoint, policy=policy)
        found = exact(trained(functools.partial(layers, wrap=wrap), (0, 1)), *args)
        assert found.by_phase == plain.by_phase | ({"recompute": recompute} if recompute else {})
        assert found.model_flops == plain.model_flops
        assert found.causal_flops == plain.causal_flops
        assert set(found.by_module) == set(plain.by_module)


def test_remat_within_remat():
    """Two layers of tanh(x w), each checkpointed, in a checkpoint: backward repeats the inner
    products once for the outer and once for the inner."""
    inner = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
    outer = jax.checkpoint(lambda x, w: inner(inner(x, w[0]), w[1]))
    one = flops(3, 5, 5)
    found = exact(trained(outer, (0, 1)), X, array(2, 5, 5))
    assert found.by_phase == {"forward": 2 * one, "recompute": 3 * one, "backward": 4 * one}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_grouped_query_attention(heads, kv_heads):
    """Scores and mix, whatever the heads that share a key; four such products backward."""
    b, t, s, h = 2, 5, 7, 8
    q, k = array(b, t, heads, h), array(b, s, kv_heads, h)
    one = flops(b, heads, t, s, h)
    found = exact(trained(jax.nn.dot_product_attention, (0, 1, 2)), q, k, k)
    assert found.by_phase == {"forward": 2 * one, "backward": 4 * one}
    assert found.causal_flops is None
    assert set(found.by_module) == {""}


def test_a_mark_of_causality_holds_for_the_bodies_within():
    def fn(x):
        return scope("causal")(jax.jit(once))(x) + scope("inner")(once)(x)

    assert exact(fn, SQUARE).causal_flops == CUBE + CUBE // 2


def test_causal_attention_is_halved():
    b, t, n, h = 2, 6, 4, 8
    q = array(b, t, n, h)
    every = flops(2, b, n, t, t, h)
    found = exact(attend, q, q, q)
    assert (found.model_flops, found.causal_flops) == (every, every // 2)
    assert found.by_module == {"attention": every}
    remat = exact(trained(jax.checkpoint(attend), (0, 1, 2)), q, q, q)
    assert remat.causal_flops == remat.model_flops // 2


# ---- derivatives


def layer(x, w):
    return jnp.tanh(x @ w)


def hessian_vector(mode):
    def product(x, w, v):
        grad = jax.grad(lambda w: loss(jnp.dot)(x, w))
        if mode == "forward_over_reverse":
            return jax.jvp(grad, (w,), (v,))[1]
        return jax.grad(lambda w: jnp.sum(grad(w) * v))(w)

    return product


def linearized(x, w, v):
    value, push = jax.linearize(functools.partial(layer, x), w)
    return value, push(v), push(2 * v)


def pulled(x, w, g):
    value, pull = jax.vjp(layer, x, w)
    return value, pull(g), pull(2 * g)


def second(x, w):
    return jax.grad(lambda x: jnp.sum(jax.grad(loss(layer))(x, w)))(x)


@jax.custom_vjp
def recomputing(x, w):
    return layer(x, w)


def recomputing_backward(saved, g):
    x, w = saved
    y = layer(x, w)
    g = g * (1 - y * y)
    return g @ w.T, x.T @ g


recomputing.defvjp(lambda x, w: (layer(x, w), (x, w)), recomputing_backward)


@jax.custom_jvp
def with_tangents(x, w):
    return layer(x, w)


@with_tangents.defjvp
def _tangents(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = with_tangents(x, w)
    return y, (1 - y * y) * (dx @ w + x @ dw)


V = array(3, 7)
ONE = flops(3, 5, 7)

DERIVATIVES = {
    "jvp": (lambda x, w, v: jax.jvp(layer, (x, w), (x, v)), (X, Y, Y), {"forward": 3}),
    "linearize": (linearized, (X, Y, Y), {"forward": 3}),
    "vjp": (pulled, (X, Y, V), {"forward": 1, "backward": 4}),
    "gradient_only": (jax.grad(loss(layer), (0, 1)), (X, Y), {"forward": 1, "backward": 2}),
    "linear": (jax.grad(lambda x, w: jnp.sum(x @ w)), (X, Y), {"backward": 1}),
    # H v = x^T (f''(x w) * (x v)): the gradient itself is dead.
    "hvp": (hessian_vector("forward_over_reverse"), (X, Y, Y), None),
    "hvp_reverse": (hessian_vector("reverse_over_reverse"), (X, Y, Y), None),
    "jacfwd": (lambda x, w: jax.jacfwd(lambda w: layer(x, w))(w), (X, array(5, 1)), None),
    "stop_gradient": (
        jax.value_and_grad(lambda x, w: jnp.sum(layer(lax.stop_gradient(x), w)), (0, 1)),
        (X, Y),
        {"forward": 1, "backward": 1},
    ),
    "custom_vjp": (trained(recomputing, (0, 1)), (X, Y), {"forward": 1, "backward": 3}),
    "custom_vjp_forward": (recomputing, (X, Y), {"forward": 1}),
    "custom_jvp": (trained(with_tangents, (0, 1)), (X, Y), {"forward": 1, "backward": 2}),
    "custom_jvp_jvp": (
        lambda x, w, v: jax.jvp(with_tangents, (x, w), (x, v)),
        (X, Y, Y),
        {"forward": 3},
    ),
    "vmap_of_grad": (jax.vmap(trained(layer), (0, None)), (array(4, 3, 5), Y), None),
    "jit_of_grad": (jax.jit(trained(jax.jit(layer))), (X, Y), {"forward": 1, "backward": 1}),
    "remat_forward": (jax.checkpoint(layer), (X, Y), {"forward": 1}),
    "linear_transpose": (
        lambda g, w: jax.linear_transpose(lambda x: x @ w, jnp.zeros((3, 5)))(g),
        (V, Y),
        {"backward": 1},
    ),
}
PHASES = {
    "hvp": {"forward": 2 * ONE, "backward": ONE},
    # Backward through the inner backward's x^T g: x v, then x^T again.
    "hvp_reverse": {"forward": ONE, "backward": 2 * ONE},
    "jacfwd": {"forward": flops(3, 5) + flops(3, 5, 5)},  # a tangent for each of 5 weights
    "vmap_of_grad": {"forward": 4 * ONE, "backward": 4 * ONE},
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name):
    fn, args, phases = DERIVATIVES[name]
    expected = PHASES.get(name) or {phase: n * ONE for phase, n in phases.items()}
    assert exact(fn, *args).by_phase == expected


# ---- dead code


def carried(wanted):
    """Three carries: a feeds on itself, b on a, c on nothing; and an output of each trip."""

    def body(carry, _):
        a, b, c = carry
        return (a @ a, b @ a, c), a @ b

    return lambda x: lax.scan(body, (x, x, x), None, length=10)[0][wanted]


def rotated(x, y):
    """The first carry needs the second a trip before, and that the third."""
    return lax.scan(lambda c, _: ((c[1], c[2] @ y, c[2]), None), (x, x, x), None, length=4)[0][0]


def looped(wanted):
    def body(carry):
        i, a, b = carry
        return i + 1, a @ a, b @ a

    return lambda x: lax.while_loop(lambda c: c[0] < 10, body, (0, x, x))[wanted]


def with_a_test(x):
    """The test reads a carry that nothing else does, and multiplies it."""
    return lax.while_loop(
        lambda c: jnp.sum(c[0] @ x) < 1, lambda c: (c[0] @ x, c[1] + 1, c[2] @ x), (x, 0, x)
    )[1]


def in_jit(x):
    return jax.jit(lambda x: (x @ x, x @ x @ x))(x)[0]


def feeds_nothing(x):
    """A product which goes into an input that the wanted output of a call does not need."""
    return jax.jit(lambda x, y: (x, y))(x @ x, x @ x @ x)[0]


def unused_branch(x):
    return lax.cond(x[0, 0] > 0, lambda x: (x @ x, x @ x), lambda x: (x @ x, x), x)[0]


def into_branch(x):
    return lax.cond(x[0, 0] > 0, lambda x, y: x, lambda x, y: x + 1, x, x @ x)


def printed(x):
    jax.debug.print("{}", x @ x)
    return x


def printed_in_jit(x):
    """What is printed lives; what else the call would give, and what it would need, does not."""

    def both(x, y):
        jax.debug.print("{}", x @ x)
        return y @ y

    jax.jit(both)(x, x @ x)
    return x


def solved(x):
    """The solver takes x x and multiplies by it; the operator's own matrix serves gradients."""
    operator, inverse = x @ x @ x @ x, x @ x
    return lax.custom_linear_solve(
        lambda v: operator @ v, x, lambda _, v: inverse @ (inverse @ v), symmetric=True
    )


both_powers = jax.jit(lambda x: (x @ x, x @ x @ x))
first_jvp = jax.custom_jvp(lambda x, y: x)
first_jvp.defjvps(None, None)
first_vjp = jax.custom_vjp(lambda x, y: x)
first_vjp.defvjp(lambda x, y: (x, None), lambda _, g: (g, g))

DEAD = {
    "unused": (lambda x: (x @ x, x)[1], 0),
    "carry_a": (carried(0), 10),
    "carry_b": (carried(1), 20),
    "carry_c": (carried(2), 0),
    "trip_outputs": (lambda x: lax.scan(lambda c, _: (c, c @ c), x, None, length=10)[0], 0),
    "rotated": (lambda x: rotated(x, x), 4),
    "while_a": (looped(1), 10),
    "while_b": (looped(2), 20),
    "while_counter": (looped(0), 0),
    "into_dead_carry": (lambda x: looped(1)(x) + carried(2)(x @ x), 11),
    "in_jit": (in_jit, 1),
    "feeds_nothing": (feeds_nothing, 1),
    "custom_jvp": (lambda x: first_jvp(x, x @ x), 0),
    "custom_vjp": (lambda x: first_vjp(x, x @ x), 0),
    "checkpoint": (lambda x: jax.checkpoint(lambda x: (x @ x, x))(x)[1], 0),
    "cond": (unused_branch, 1),
    "into_cond": (into_branch, 0),
    "into_one_branch": (
        lambda x: lax.cond(x[0, 0] > 0, lambda x, y: y, lambda x, y: x, x, x @ x),
        1,
    ),
    "into_scan": (lambda x: lax.scan(lambda c, r: (c + 1, c + r), x, (x @ x)[None])[0], 0),
    "into_while": (
        lambda x: lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1]), (0, x @ x))[0],
        0,
    ),
    "printed": (printed, 1),
    "printed_in_jit": (printed_in_jit, 1),
    "read_reference": (lambda x: (jax.new_ref(x @ x)[...], x)[1], 0),
    "solve": (solved, 3),
    "outputs_in_turn": (lambda x: both_powers(x)[0] + both_powers(x + 1)[1], 3),
}


@pytest.mark.parametrize(("fn", "products"), DEAD.values(), ids=DEAD)
def test_dead_code(fn, products):
    assert exact(fn, SQUARE).matmul_flops == products * CUBE


def test_the_test_of_a_while_loop_is_never_dead():
    found = counted(with_a_test, SQUARE)
    assert (found.matmul_flops, found.qualifier) == (2 * CUBE, "lower bound")


# ---- loops


def test_nested_scans():
    def nest(depths):
        if not depths:
            return lambda x: x @ x
        inner = nest(depths[1:])
        return lambda x: lax.scan(lambda c, _: (inner(c), None), x, None, length=depths[0])[0]

    assert exact(nest((3, 4)), SQUARE).matmul_flops == 12 * CUBE
    phases = {"forward": 12 * CUBE, "backward": 24 * CUBE}
    assert exact(trained(nest((3, 4))), SQUARE).by_phase == phases
    assert exact(nest((0, 4)), SQUARE).matmul_flops == 0
    huge = exact(nest((2**30, 2**30, 2**30)), SQUARE)
    assert huge.matmul_flops == CUBE << 90
    assert huge.by_module == {"": CUBE << 90}


LOOPS = {  # start, test, step
    "up": (0, lambda i: i < 10, lambda i: i + 1),
    "up_by_3": (1, lambda i: i < 10, lambda i: i + 3),
    "up_to": (1, lambda i: i <= 10, lambda i: i + 3),
    "down": (10, lambda i: i > 0, lambda i: i - 1),
    "down_by_3": (10, lambda i: i > 0, lambda i: i - 3),
    "down_to": (10, lambda i: i >= 1, lambda i: i + -3),
    "below_zero": (-7, lambda i: i < -1, lambda i: i + 2),
    "turned": (0, lambda i: lax.gt(10, i), lambda i: 2 + i),
    "turned_down": (9, lambda i: lax.le(2, i), lambda i: i - 2),
    "never": (10, lambda i: i < 10, lambda i: i + 1),
    "never_down": (5, lambda i: i < 3, lambda i: i - 1),
    "never_up": (0, lambda i: i > 3, lambda i: i + 1),
}


@pytest.mark.parametrize(("start", "test", "step"), LOOPS.values(), ids=LOOPS)
def test_trips_of_while_loops(start, test, step):
    i, trips = start, 0
    while test(i):
        i, trips = step(i), trips + 1

    def loop(x):
        return lax.while_loop(lambda c: test(c[0]), lambda c: (step(c[0]), c[1] @ x), (start, x))[1]

    assert exact(loop, SQUARE).matmul_flops == trips * CUBE
    assert exact(jax.vmap(loop), array(3, 5, 5)).matmul_flops == 3 * trips * CUBE


def fori(start, stop, x):
    return lax.fori_loop(start, stop, lambda _, y: y @ x, x)


BOUND = np.int32(9)

BOUNDS = {
    "static": (lambda x: fori(2, 9, x), 7),
    "numpy": (lambda x: fori(np.int64(2), BOUND, x), 7),
    "jax": (lambda x: fori(jnp.int32(2), jnp.int32(9), x), 7),
    "passed_to_jit": (lambda x: jax.jit(fori)(2, 9, x), 7),
    "passed_twice": (lambda x: jax.jit(lambda n, x: jax.jit(fori)(2, n, x))(9, x), 7),
    "computed": (lambda x: jax.jit(lambda n, x: fori(n - 7, 2 * n + 1, x))(9, x), 17),
    "wrapped": (lambda x: jax.jit(lambda n, x: fori(0, n.astype(jnp.int8), x))(300, x), 300 - 256),
    "rounded": (lambda x: jax.jit(lambda n, x: fori(0, 2, x) * n.astype("float16"))(70_000, x), 2),
    "overflown": (
        lambda x: jax.jit(lambda n, x: fori(n * n, n * n - 5, x))(np.uint32(1 << 31), x),
        (1 << 32) - 5,
    ),
    "below_zero": (lambda x: jax.jit(lambda n, x: fori(n - 9, n, x))(2, x), 9),
    "truth": (
        lambda x: jax.jit(lambda n, x: lax.cond(n.astype(bool), twice, once, x))(9, x),
        2,
    ),
    "converted": (lambda x: jax.jit(lambda n, x: fori(0, n.astype(int), x))(np.int8(9), x), 9),
    "shared_body": (lambda x: jax.jit(fori)(2, 9, x) + jax.jit(fori)(2, 4, x), 9),
    "in_a_scan": (
        lambda x: jax.jit(
            lambda n, x: lax.scan(lambda c, _: (fori(0, n, c), None), x, None, length=3)[0]
        )(9, x),
        27,
    ),
    "in_a_while": (
        lambda x: jax.jit(
            lambda n, x: lax.while_loop(
                lambda c: c[0] < 4, lambda c: (c[0] + 1, fori(0, n, c[1])), (0, x)
            )[1]
        )(9, x),
        36,
    ),
    "step_passed": (
        lambda x: jax.jit(
            lambda n, x: lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + n, c[1] @ x), (0, x))[
                1
            ]
        )(2, x),
        5,
    ),
    "checkpointed": (lambda x: jax.checkpoint(lambda x: fori(2, 9, x))(x), 7),
}


@pytest.mark.parametrize(("fn", "trips"), BOUNDS.values(), ids=BOUNDS)
def test_bounds_that_the_program_tells(fn, trips):
    assert exact(fn, SQUARE).matmul_flops == trips * CUBE


def test_a_bound_that_is_a_closed_over_array():
    bound, step = jnp.asarray(9), jnp.asarray(2)

    def fn(x):
        return lax.while_loop(
            lambda c: c[0] < bound, lambda c: (c[0] + step, c[1] @ x), (jnp.asarray(0), x)
        )

    assert exact(fn, SQUARE).matmul_flops == 5 * CUBE
    assert exact(jax.jit(fn), SQUARE).matmul_flops == 5 * CUBE


@pytest.mark.parametrize("around", [jax.jit, jax.vmap])
def test_a_bound_that_is_traced_around_the_count(around):
    def fn(n):
        found = counted(lambda x: fori(0, n, x), SQUARE)
        assert (found.matmul_flops, found.qualifier) == (CUBE, "lower bound")
        return n

    around(fn)(jnp.arange(3) if around is jax.vmap else 9)


def test_a_bound_of_64_bits():
    with jax.enable_x64(True):
        fn = jax.jit(lambda n, x: fori(n * n * n, n * n * n + 7, x))
        assert exact(lambda x: fn(np.uint64(1 << 40), x), SQUARE).matmul_flops == 7 * CUBE


def wild(start, test, step):
    return lambda n, x: lax.while_loop(
        lambda c: test(c[0], n), lambda c: (step(c[0], n), c[1] @ x), (start, x)
    )[1]


UNKNOWN_TRIPS = {
    "bound": lambda n, x: fori(0, n, x),
    "start": lambda n, x: fori(n, 9, x),
    "step": wild(0, lambda i, n: i < 9, lambda i, n: i + n),
    "endless": wild(0, lambda i, n: i < 9, lambda i, n: i - 1),
    "still": wild(0, lambda i, n: i < 9, lambda i, n: i + 0),
    "doubled": wild(1, lambda i, n: i < 9, lambda i, n: i * 2),
    "added_to_itself": wild(1, lambda i, n: i < 9, lambda i, n: i + i),
    "taken_from_above": wild(1, lambda i, n: i > -9, lambda i, n: 3 - i),
    "of_another": lambda n, x: lax.while_loop(
        lambda c: c[0] < 9, lambda c: (c[1] + 1, c[1], c[2] @ x), (0, 5, x)
    )[2],
    "taken_from": wild(1, lambda i, n: i < 9, lambda i, n: 3 - i),
    "unequal": wild(0, lambda i, n: i != 9, lambda i, n: i + 1),
    "and": wild(0, lambda i, n: (i < 9) & (n > 3), lambda i, n: i + 1),
    "other": wild(0, lambda i, n: n < 9, lambda i, n: i + 1),
    "fractions": wild(0.5, lambda i, n: i < 3, lambda i, n: i + 1.0),
    "half_steps": wild(0, lambda i, n: i < 3.5, lambda i, n: i + 1),
    "moving_bound": lambda n, x: lax.while_loop(
        lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1] - 1, c[2] @ x), (0, 9, x)
    )[2],
    "converging": lambda n, x: lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: y @ x, x),
}


@pytest.mark.parametrize("name", UNKNOWN_TRIPS)
def test_trips_that_depend_on_data(name):
    start = array(dtype=jnp.int32)
    found = counted(UNKNOWN_TRIPS[name], start, SQUARE)
    assert found.matmul_flops == CUBE
    assert found.qualifier == "lower bound"
    assert found.lower == ["while: the number of trips depends on data; one is counted"]


def test_bounds_that_change_from_trip_to_trip():
    def fn(x):
        def step(carry, stop):
            start, y = carry
            return (start + 1, fori(start, stop, fori(start, 9, y))), None

        return lax.scan(step, (1, x), jnp.arange(5))[0]

    found = counted(fn, SQUARE)
    assert (found.matmul_flops, found.qualifier) == (10 * CUBE, "lower bound")


def test_a_reason_is_given_once():
    loop = wild(0, lambda i, n: i < n, lambda i, n: i + 1)
    nested = wild(0, lambda i, n: i < n, lambda i, n: i + 1)

    def fn(n, x):
        return lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, loop(n, c[1]) + nested(n, c[1])), (0, x)
        )[1]

    found = counted(fn, array(dtype=jnp.int32), SQUARE)
    assert found.matmul_flops == 2 * CUBE
    assert len(found.lower) == 1


def test_sizes_of_numpy():
    three = np.int64(3)
    found = exact(lambda x: lax.scan(lambda c, _: (c @ x, None), x, None, length=three)[0], SQUARE)
    assert found.matmul_flops == 3 * CUBE
    fn = functools.partial(
        lax.reduce_window, init_value=0.0, computation=lax.add, window_dimensions=(three,)
    )
    pooled = exact(lambda x: fn(x, window_strides=(three,), padding="VALID"), array(9))
    assert pooled.elementwise_flops == 3 * 2


def test_a_loop_without_products_is_exact():
    assert exact(lambda n, x: lax.fori_loop(0, n, lambda i, y: y * x, x), 9, X).matmul_flops == 0


# ---- branches


def branches(*fns):
    return lambda i, x: lax.switch(i, fns, x)


def once(x):
    return x @ x


def twice(x):
    return x @ x @ x


INDEX = array(dtype=jnp.int32)


def test_the_most_of_unequal_branches():
    found = counted(branches(once, twice, lambda x: x), INDEX, SQUARE)
    assert found.matmul_flops == 2 * CUBE
    assert found.qualifier == "upper bound"
    assert found.upper == [f"cond: branches of 0 to {2 * CUBE:,}; the most counts"]
    found = counted(trained(branches(once, twice), 1), INDEX, SQUARE)
    assert found.by_phase == {"forward": 2 * CUBE, "backward": 4 * CUBE}


def test_equal_branches_are_exact():
    found = exact(branches(once, lambda x: jnp.sin(x @ x), lambda x: x.T @ x), INDEX, SQUARE)
    assert (found.matmul_flops, found.transcendentals) == (CUBE, 25)


@pytest.mark.parametrize(("index", "products"), [(0, 1), (1, 2), (7, 2), (-1, 1)])
def test_a_branch_that_the_program_tells(index, products):
    switch = jax.jit(branches(once, twice))
    assert exact(lambda x: switch(index, x), SQUARE).matmul_flops == products * CUBE


def test_both_branches_under_vmap():
    fn = jax.vmap(branches(once, twice))
    found = exact(fn, array(4, dtype=jnp.int32), array(4, 5, 5))
    assert found.matmul_flops == 4 * 3 * CUBE


def test_doubts_of_every_branch():
    found = counted(branches(twice, lambda x: made_up_p.bind(x)), INDEX, SQUARE)
    assert found.unknown == {"made_up": 1}
    assert found.qualifier == "estimated"


def test_platforms_are_branches():
    fn = functools.partial(lax.platform_dependent, cpu=once, default=twice)
    assert counted(fn, SQUARE).qualifier == "upper bound"


# ---- devices


def meshed(*shape):
    names = "ab"[: len(shape)]
    return jax.make_mesh(shape, tuple(names), axis_types=(AxisType.Auto,) * len(shape))


def test_shard_map_counts_every_device():
    fn = jax.shard_map(
        lambda x, w: lax.psum(x @ w, "a"),
        mesh=meshed(8),
        in_specs=(P(None, "a"), P("a")),
        out_specs=P(),
    )
    found = exact(fn, array(3, 16), array(16, 5))
    assert found.matmul_flops == 8 * flops(3, 2, 5) == flops(3, 16, 5)
    phases = {"forward": flops(3, 16, 5), "backward": 2 * flops(3, 16, 5)}
    assert exact(trained(fn, (0, 1)), array(3, 16), array(16, 5)).by_phase == phases


def test_what_shard_map_repeats_on_every_device():
    fn = jax.shard_map(lambda x: x @ x, mesh=meshed(4, 2), in_specs=P(), out_specs=P())
    assert exact(fn, SQUARE).matmul_flops == 8 * CUBE


def test_shard_map_over_some_axes():
    mesh = meshed(4, 2)
    some = functools.partial(jax.shard_map, in_specs=(P("a"), P()), out_specs=P("a"))
    fn = some(lambda x, w: x @ w, mesh=mesh, axis_names={"a"})
    assert exact(fn, array(8, 6), array(6, 5)).matmul_flops == flops(8, 6, 5)
    inner = jax.shard_map(
        jnp.dot, in_specs=(P(), P(None, "b")), out_specs=P(None, "b"), axis_names={"b"}
    )
    nested = some(lambda x, w: inner(x, w), mesh=mesh, axis_names={"a"})
    assert exact(nested, array(8, 6), array(6, 4)).matmul_flops == flops(8, 6, 4)


def test_one_device_of_a_shard_map_does_what_its_body_says():
    fn = jax.shard_map(
        lambda x, w: lax.psum(jnp.tanh(x @ w), "a"),
        mesh=meshed(8),
        in_specs=(P(None, "a"), P("a")),
        out_specs=P(),
    )
    one = exact(trained(fn, (0, 1)), array(3, 16), array(16, 5)).per_device
    assert one.qualifier == "exact"
    assert one.by_phase == {"forward": flops(3, 2, 5), "backward": 2 * flops(3, 2, 5)}
    assert exact(fn, array(3, 16), array(16, 5)).per_device.transcendentals == 3 * 5
    repeated = jax.shard_map(lambda x: x @ x, mesh=meshed(4, 2), in_specs=P(), out_specs=P())
    assert exact(repeated, SQUARE).per_device.matmul_flops == CUBE


def test_one_device_of_what_the_compiler_divides_has_an_even_share_at_least():
    mesh = meshed(4, 2)
    x, w = array(8, 6), array(6, 5)
    placed = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("a")))
    one = exact(jnp.dot, placed, w).per_device
    assert (one.matmul_flops, one.qualifier) == (flops(8, 6, 5) // 8, "lower bound")
    some = jax.shard_map(
        jnp.dot, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"}
    )
    both = exact(lambda x, w: some(x, w) @ w.T, x, w)
    assert both.devices == 8
    assert both.per_device.matmul_flops == flops(2, 6, 5) // 2 + flops(8, 5, 6) // 8
    constrained = exact(lambda x: lax.with_sharding_constraint(x, placed.sharding) @ x.T, x)
    assert constrained.per_device.matmul_flops == flops(8, 6, 8) // 8


def test_one_device_where_jit_is_told_the_shardings():
    row = NamedSharding(meshed(4, 2), P("a"))
    for fn in (jax.jit(jnp.dot, in_shardings=(row, None)), jax.jit(jnp.dot, out_shardings=row)):
        for each in (fn, lambda x, w, fn=fn: jnp.tanh(fn(x, w))):
            found = exact(each, array(8, 6), array(6, 5))
            assert found.devices == 8
            assert found.per_device.matmul_flops == flops(8, 6, 5) // 8


def test_one_device_of_one_is_the_whole():
    found = exact(jnp.dot, SQUARE, SQUARE)
    assert found.devices == 1
    assert found.per_device is found


def test_dead_code_in_shard_map():
    def body(x, y):
        return x @ x, lax.psum(y @ y, "a")

    fn = jax.shard_map(body, mesh=meshed(8), in_specs=P(), out_specs=P())
    assert exact(lambda x: fn(x, x @ x)[0], SQUARE).matmul_flops == 8 * CUBE
    unread = jax.shard_map(
        lambda x: (lax.psum(x @ x, "a"), x)[1], mesh=meshed(8), in_specs=P("a"), out_specs=P("a")
    )
    assert exact(unread, array(40, 5)).matmul_flops == 0


def test_shardings_change_nothing():
    mesh = meshed(4, 2)
    placed = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))
        for s, spec in ((array(8, 6), P("a")), (array(6, 4), P(None, "b")))
    ]
    fn = trained(layer, (0, 1))
    assert exact(fn, *placed) == exact(fn, array(8, 6), array(6, 4))
    assert exact(fn, *placed).model_flops == 3 * flops(8, 6, 4)


def test_pmap():
    with contextlib.suppress(DeprecationWarning):
        assert exact(jax.pmap(once), array(8, 5, 5)).matmul_flops == 8 * CUBE


# ---- kernels


def blocked(kernel, m, k, n, tile, interpret=False):
    grid = (m // tile, n // tile, k // tile)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((tile, tile), lambda i, j, k: (i, k)),
            pl.BlockSpec((tile, tile), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((tile, tile), lambda i, j, k: (i, j)),
        out_shape=array(m, n),
        interpret=interpret,
    )


def accumulate(x_ref, y_ref, out_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    out_ref[...] += x_ref[...] @ y_ref[...]


def skip(x_ref, y_ref, out_ref):
    @pl.when(pl.program_id(0) >= pl.program_id(2))
    def _():
        out_ref[...] = x_ref[...] @ y_ref[...]


def in_loop(x_ref, y_ref, out_ref):
    def body(i, total):
        return total + x_ref[...] @ y_ref[...]

    out_ref[...] = lax.fori_loop(0, 3, body, jnp.zeros(out_ref.shape))


def in_scratch(x_ref, y_ref, out_ref):
    def body(scratch):
        scratch[...] = x_ref[...] @ y_ref[...]
        out_ref[...] = scratch[...]

    pl.run_scoped(body, pl.MemoryRef(jax.core.ShapedArray((8, 8), jnp.float32), pl.ANY))


@pytest.mark.parametrize("interpret", [False, True])
def test_kernels(interpret):
    args = array(16, 24), array(24, 32)
    whole = flops(16, 24, 32)
    for kernel, times in ((accumulate, 1), (in_loop, 3), (in_scratch, 1)):
        fn = blocked(kernel, 16, 24, 32, 8, interpret)
        assert exact(fn, *args).matmul_flops == times * whole


def test_a_kernel_that_skips_tiles():
    found = counted(blocked(skip, 16, 16, 16, 8), array(16, 16), array(16, 16))
    assert (found.matmul_flops, found.qualifier) == (flops(16, 16, 16), "upper bound")


def test_a_kernel_under_vmap():
    fn = jax.vmap(blocked(accumulate, 16, 24, 32, 8))
    assert exact(fn, array(4, 16, 24), array(4, 24, 32)).matmul_flops == flops(4, 16, 24, 32)


def test_a_kernel_whose_grid_depends_on_data():
    def fn(n, x):
        def kernel(x_ref, out_ref):
            out_ref[...] = x_ref[...] @ x_ref[...]

        return pl.pallas_call(kernel, grid=(n, 3), out_shape=array(8, 8))(x)

    found = counted(fn, INDEX, array(8, 8))
    assert (found.matmul_flops, found.qualifier) == (3 * flops(8, 8, 8), "lower bound")


# ---- ragged products


def test_ragged_dot():
    """Rows by their own expert's matrix, k x n: m k n, whatever the number of experts."""
    args = array(12, 5), array(3, 5, 7), array(3, dtype=jnp.int32)
    one = flops(12, 5, 7)
    assert exact(lax.ragged_dot, *args).matmul_flops == one
    found = exact(trained(lax.ragged_dot, (0, 1)), *args)
    assert found.by_phase == {"forward": one, "backward": 2 * one}
    assert exact(trained(lax.ragged_dot, 0), *args).by_phase == {"forward": one, "backward": one}


def test_ragged_dot_over_batches():
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((2,), (1,)), ((0,), (0,))),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    fn = functools.partial(lax.ragged_dot_general, ragged_dot_dimension_numbers=numbers)
    args = array(4, 3, 5), array(4, 5, 7), array(2, dtype=jnp.int32)
    assert exact(fn, *args).matmul_flops == flops(4, 3, 5, 7)


# ---- names


def named(x, w):
    with scope("outer"), scope("inner"):
        return layer(x, w)


def keyed(found):
    return {(phase, module): n for (phase, module, _, _), n in found.matmul.items()}


def around(name, fn):
    return lambda *args: scope(name)(fn)(*args)


def stack(fn):
    with_scope = around("inner", fn)
    return lambda x, w: scope("outer")(
        lambda: lax.scan(lambda c, w: (with_scope(c, w), None), x, w)[0]
    )()


NAMES = {
    "scopes": (named, "outer.inner"),
    "slash": (around("outer/inner", layer), "outer.inner"),
    "jit": (around("outer", jax.jit(around("inner", layer))), "outer.inner"),
    "twice_used": (lambda x, w: named(named(x, w), w), "outer.inner"),
    "scan": (stack(layer), "outer.inner"),
    "scan_remat": (stack(jax.checkpoint(layer)), "outer.inner"),
    "scan_custom_jvp": (stack(with_tangents), "outer.inner"),
    "remat": (around("outer", around("inner", jax.checkpoint(layer))), "outer.inner"),
    "remat_inside": (around("outer", jax.checkpoint(around("inner", layer))), "outer.inner"),
    "jit_remat": (
        around("outer", jax.jit(around("inner", jax.checkpoint(layer)))),
        "outer.inner",
    ),
    "custom_jvp": (around("outer", around("inner", with_tangents)), "outer.inner"),
    "custom_vjp": (around("outer", around("inner", recomputing)), "outer.inner"),
    "einsum": (
        around("outer", lambda x, w: jnp.tanh(jnp.einsum("...i, i j -> ...j", x, w))),
        "outer",
    ),
    "einsum_implicit": (around("outer", lambda x, w: jnp.tanh(jnp.einsum("ij,jk", x, w))), "outer"),
    "vmap": (
        lambda x, w: scope("outer")(jax.vmap(around("inner", layer), (0, None)))(x[None], w)[0],
        "outer.inner",
    ),
    "none": (layer, ""),
    "number": (around("layers", around("0", layer)), "layers.0"),
    "checkpoint": (around("checkpoint", around("outer", layer)), "outer"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_module_has_one_name_in_all_phases(name):
    fn, module = NAMES[name]
    w = array(2, 5, 5) if "scan" in name else SQUARE
    assert set(exact(fn, SQUARE, w).by_module) == {module}
    found = exact(trained(fn, (0, 1)), SQUARE, w)
    assert set(found.by_module) == {module}
    assert set(found.by_phase) - {"recompute"} == {"forward", "backward"}
    step = exact(around("step", jax.jit(trained(fn, (0, 1)))), SQUARE, w)
    assert set(step.by_module) == {f"step.{module}".strip(".")}


def test_names_apart():
    def fn(x, w):
        with scope("a"):
            x = layer(x, w)
        with scope("b"):
            return layer(x, w)

    assert keyed(exact(trained(fn, (0, 1)), SQUARE, SQUARE)) == {
        ("forward", "a"): CUBE,
        ("forward", "b"): CUBE,
        ("backward", "a"): 2 * CUBE,
        ("backward", "b"): 2 * CUBE,
    }


def test_a_shared_body_has_the_names_of_its_callers():
    shared = jax.jit(around("inner", layer))

    def fn(x, w):
        return around("b", shared)(around("a", shared)(x, w), w)

    assert exact(fn, SQUARE, SQUARE).by_module == {"a.inner": CUBE, "b.inner": CUBE}


@pytest.mark.parametrize("path", ["a/a", "stages/0/0/conv", "a/b/a/b/c", "a/b/a"])
@pytest.mark.parametrize("wrapped", [layer, jax.checkpoint(layer), with_tangents])
def test_a_path_may_repeat_itself(path, wrapped):
    expected = {path.replace("/", ".")}
    fn = around(path, wrapped)
    assert set(exact(fn, SQUARE, SQUARE).by_module) == expected
    assert set(exact(trained(fn, (0, 1)), SQUARE, SQUARE).by_module) == expected
    scanned = stack(fn)
    found = exact(trained(scanned, (0, 1)), SQUARE, array(2, 5, 5))
    assert set(found.by_module) == {f"outer.inner.{path.replace('/', '.')}"}


def test_a_gradient_alone_has_its_module_once():
    """Nothing of the forward pass is left to tell the name."""
    fn = around("a", around("b", jax.checkpoint(layer)))
    assert set(exact(jax.grad(loss(lambda x: fn(x, x)), 0), SQUARE).by_module) == {"a.b"}
    alone = jax.jit(around("a", jax.grad(lambda x: jnp.sum(around("b", jnp.dot)(x, X)))))
    assert exact(alone, array(2, 3)).by_module == {"a.b": flops(2, 3, 5)}


def newton(x):
    with scope("optimizer"):
        return x @ x


def inner_gradient(x):
    with scope("optimizer"):
        return trained(once)(x)


@pytest.mark.parametrize(
    ("fn", "phases"),
    [
        (newton, {"optimizer": CUBE}),
        (jax.jit(newton), {"optimizer": CUBE}),
        (jax.vmap(newton), {"optimizer": 2 * CUBE}),
        (inner_gradient, {"optimizer": 3 * CUBE}),
        (around("my", newton), {"forward": CUBE}),
        (
            lambda x: newton(jax.grad(loss(once))(x)),
            {"forward": CUBE, "backward": 2 * CUBE} | {"optimizer": CUBE},
        ),
    ],
    ids=itertools.count(),
)
def test_the_optimizer_is_a_phase(fn, phases):
    x = array(2, 5, 5) if phases.get("optimizer") == 2 * CUBE else SQUARE
    assert exact(fn, x).by_phase == phases


FLOAT8 = jnp.float8_e4m3fn, jnp.float8_e5m2
HALF = array(3, 5, dtype=jnp.bfloat16), array(5, 7, dtype=jnp.bfloat16)


def typed(**kwargs):
    return lambda x, y: lax.dot(x, y, **kwargs)


def default_precision(x, y):
    with jax.default_matmul_precision("float32"):
        return x @ y


DTYPES = {
    "float32": (typed(), (X, Y), "float32"),
    "bfloat16": (typed(preferred_element_type=jnp.float32), HALF, "bfloat16"),
    "int8": (typed(preferred_element_type=jnp.int32), BYTES, "int8"),
    "mixed": (
        typed(preferred_element_type=jnp.float32),
        (array(3, 5, dtype=FLOAT8[0]), array(5, 7, dtype=FLOAT8[1])),
        "float8_e4m3fn*float8_e5m2",
    ),
    "highest": (typed(precision="highest"), (X, Y), "float32:HIGHEST"),
    "default": (typed(precision="default"), (X, Y), "float32"),
    "both": (typed(precision=("high", "highest")), (X, Y), "float32:HIGH+HIGHEST"),
    "one": (typed(precision=("default", "highest")), (X, Y), "float32:HIGHEST"),
    "context": (default_precision, (X, Y), "float32:HIGHEST"),
    "preset": (
        typed(precision=lax.DotAlgorithmPreset.BF16_BF16_F32_X3),
        (X, Y),
        "float32:BF16_BF16_F32_X3",
    ),
    "algorithm": (
        typed(precision=lax.DotAlgorithm(jnp.bfloat16, jnp.bfloat16, jnp.float32)),
        (X, Y),
        "float32:bfloat16_bfloat16_float32_X1",
    ),
    "convolution": (
        lambda x, y: lax.conv(x, y, (1,), "VALID", precision="highest"),
        (array(2, 3, 4), array(5, 3, 2)),
        "float32:HIGHEST",
    ),
    "ragged": (
        lambda x, y: lax.ragged_dot(x, y, jnp.array([1, 2]), precision="highest"),
        (X, array(2, 5, 7)),
        "float32:HIGHEST",
    ),
}


@pytest.mark.parametrize(("fn", "args", "dtype"), DTYPES.values(), ids=DTYPES)
def test_dtypes(fn, args, dtype):
    assert set(exact(fn, *args).by_dtype) == {dtype}


# ---- arithmetic

N = 15
WHOLE = array(3, 5, dtype=jnp.int32)


def pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID")


ARITHMETIC = {  # elementwise, transcendental
    "add": (lambda x: x * 2 + 1, X, 2 * N, 0),
    "transcendental": (lambda x: jnp.exp(x) + x, X, N, N),
    "both": (lambda x: jnp.sin(x) * jnp.sqrt(x), X, N, 2 * N),
    "logistic": (jax.nn.sigmoid, X, 0, N),
    "relu": (jax.nn.relu, X, N, 0),
    "compare_select": (lambda x: jnp.where(x > 0, x, 0), X, 2 * N, 0),
    "sum": (jnp.sum, X, N - 1, 0),
    "sum_rows": (lambda x: jnp.sum(x, axis=1), X, N - 3, 0),
    "max": (lambda x: jnp.max(x, axis=0), X, N - 5, 0),
    "argmax": (lambda x: jnp.argmax(x, axis=1), X, N - 3, 0),
    "cumsum": (lambda x: lax.cumsum(x, axis=1), X, N, 0),
    "power": (lambda x: x**3, X, N, 0),
    "real_power": (lambda x: x**1.5, X, 0, N),
    "mean": (jnp.mean, X, N, 0),
    "half": (lambda x: x * x, HALF[0], N, 0),
    "float8": (lambda x: lax.neg(x), array(3, 5, dtype=FLOAT8[0]), N, 0),
    "complex": (lambda x: x * x, COMPLEX[0], N, 0),
    "empty_sum": (lambda x: jnp.sum(x, axis=0), array(0, 5), 0, 0),
    "scalar": (lambda x: x + x, array(), 1, 0),
    "moves": (
        lambda x: jnp.concatenate([x.T.reshape(3, 5)[::-1], x]).astype(jnp.bfloat16),
        X,
        0,
        0,
    ),
    "product": (lambda x: x @ x.T, X, 0, 0),
    "integers": (lambda x: jnp.sum(x * 2 + 1, axis=0) // 3, WHOLE, 0, 0),
    "integer_power": (lambda x: x**3 % 5, WHOLE, 0, 0),
    "integer_to_float": (lambda x: x.astype(jnp.float32) / 3, WHOLE, N, 0),
    "booleans": (lambda x: ~(x & True), array(3, 5, dtype=bool), 0, 0),
    "random": (lambda k: jax.random.bits(k, (8,)), jax.eval_shape(jax.random.key, 0), 0, 0),
    "scatter": (lambda x: x.at[jnp.array([0, 2])].add(1.0), X, 10, 0),
    "set": (lambda x: x.at[0].set(1.0), X, 0, 0),
    "pool": (pool, array(4, 6), 6 * 3, 0),
    # Each of 6 windows: 3 comparisons and an addition. The sum whose gradient it is is dead.
    "pool_gradient": (jax.grad(lambda x: jnp.sum(pool(x))), array(4, 6), 6 * 4, 0),
    "scan": (lambda x: lax.scan(lambda c, r: (c + r, c * r), x[0], x)[1], X, 2 * N, 0),
    "reduce": (lambda x: lax.reduce(x, 1.0, lambda a, b: a * b, (0,)), X, N - 5, 0),
}


@pytest.mark.parametrize(
    ("fn", "x", "elementwise", "transcendental"), ARITHMETIC.values(), ids=ARITHMETIC
)
def test_arithmetic(fn, x, elementwise, transcendental):
    found = exact(fn, x)
    assert (found.elementwise_flops, found.transcendentals) == (elementwise, transcendental)


def test_arithmetic_is_no_product():
    assert exact(lambda x: jnp.exp(x) * x, X).matmul_flops == 0


APART = {  # leading terms of Golub and Van Loan, Matrix Computations, 4th edition
    "sort": (lambda x: jnp.sort(x, axis=0), array(8, 3), {"sort": 3 * 8 * 3}),
    "top_k": (lambda x: lax.top_k(x, 2)[0], array(3, 8), {"top_k": 3 * 8 * 3}),
    "approximate": (
        lambda x: lax.approx_max_k(x, 2, reduction_dimension=0)[0],
        array(8, 3),
        {"approx_top_k": 3 * 8 * 3},
    ),
    "fft": (jnp.fft.fft, array(3, 16, dtype=jnp.complex64), {"fft": 3 * 5 * 16 * 4}),
    "rfft": (jnp.fft.rfft, array(3, 16), {"fft": 3 * 5 * 16 * 4 // 2}),
    "fft2": (jnp.fft.fft2, array(3, 4, 8, dtype=jnp.complex64), {"fft": 3 * 5 * 32 * 5}),
    "cholesky": (lax.linalg.cholesky, array(2, 6, 6), {"cholesky": 2 * 6**3 // 3}),
    "lu": (lambda x: lax.linalg.lu(x)[0], array(6, 6), {"lu": 2 * 6**3 // 3}),
    "lu_tall": (lambda x: lax.linalg.lu(x)[0], array(9, 6), {"lu": 9 * 36 - 6**3 // 3}),
    "eigh": (lambda x: lax.linalg.eigh(x)[0], array(6, 6), {"eigh": 9 * 6**3}),
    "svd": (lax.linalg.svd, array(6, 6), {"svd": 21 * 6**3}),
    "singular_values": (
        functools.partial(lax.linalg.svd, compute_uv=False),
        array(9, 6),
        {"svd": 4 * 9 * 36 - 4 * 6**3 // 3},
    ),
    "qr": (lax.linalg.qr, array(9, 6), {"qr": 2 * 36 * (9 - 2)}),
    "triangular": (
        lambda x: lax.linalg.triangular_solve(x, x, left_side=True),
        array(6, 6),
        {"triangular_solve": 6**3},
    ),
    "symmetric": (
        lambda x: lax.linalg.symmetric_product(x, jnp.zeros((4, 4))),
        array(4, 6),
        {"symmetric_product": 4 * 5 * 6},
    ),
    "in_a_scan": (
        lambda x: lax.scan(lambda c, _: (jnp.sort(c), None), x, None, length=5)[0],
        array(8),
        {"sort": 5 * 8 * 3},
    ),
}


@pytest.mark.parametrize(("fn", "x", "operations"), APART.values(), ids=APART)
def test_operations_apart(fn, x, operations):
    found = exact(fn, x)
    assert found.apart == operations
    assert found.matmul_flops == 0


# ---- what is not known

made_up_p = Primitive("made_up")
made_up_p.def_abstract_eval(lambda x: x)


def callback(x):
    return jax.pure_callback(np.sin, x, x)


def sparse_product(x):
    matrix = sparse.BCOO((x[0], jnp.zeros((5, 2), jnp.int32)), shape=(5, 5))
    return matrix @ x


UNKNOWN = {
    "made_up": (lambda x: made_up_p.bind(x), {"made_up": 1}),
    "in_a_scan": (
        lambda x: lax.scan(lambda c, _: (made_up_p.bind(c), None), x, None, length=7)[0],
        {"made_up": 7},
    ),
    "callback": (callback, {"pure_callback": 1}),
    "io": (lambda x: jax.experimental.io_callback(np.sin, x, x), {"io_callback": 1}),
    "ffi": (lambda x: jax.ffi.ffi_call("a", x)(x), {"ffi_call": 1}),
    "sparse": (sparse_product, {"bcoo_dot_general": 1}),
}


@pytest.mark.parametrize(("fn", "names"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_primitives_are_named(fn, names):
    found = counted(lambda x: fn(x) + x @ x, SQUARE)
    assert found.unknown == names
    assert found.matmul_flops == CUBE
    assert found.lower == [f"{name}: what it computes is not known" for name in names]
    assert found.qualifier == "lower bound"


def test_what_is_dead_is_not_named():
    exact(lambda x: (made_up_p.bind(x), x @ x)[1], SQUARE)


def test_every_primitive_of_jax_has_a_rule():
    """Only custom_lin has none: it is of tracing, and in no finished program."""
    tables = [rules.PRODUCTS, rules.TRANSCENDENTAL, rules.ELEMENTWISE, rules.APART, rules.FREE]
    tables += [counts._CONTROL, counts._CALLS, {"custom_linear_solve"}]
    known = list(itertools.chain(*tables))
    assert len(known) == len(set(known))
    public = {getattr(primitives, name).name for name in dir(primitives) if name.endswith("_p")}
    assert len(public) > 150
    assert public - set(known) == {"custom_lin"}


# ---- speed


def test_deep_programs_are_quick():
    def rotating(depth):
        if not depth:
            return lambda c: (c[1], c[2], c[0] @ c[1])
        inner = rotating(depth - 1)
        return lambda c: lax.scan(lambda c, _: (inner(c), None), c, None, length=2)[0]

    deep = once
    for _ in range(30):
        deep = jax.jit(lambda x, f=deep: f(x) @ x)
    doubled = once
    for _ in range(60):
        doubled = jax.jit(lambda x, f=doubled: f(f(x)))
    programs = (
        (lambda x: rotating(6)((x, x, x))[0], 2**6),
        (deep, 31),
        (doubled, 2**60),
    )
    for fn, products in programs:
        traced = jax.jit(fn).trace(SQUARE)
        start = time.perf_counter()
        found = exact(traced)
        assert time.perf_counter() - start < 0.5
        assert found.matmul_flops <= products * CUBE
        if fn is not programs[0][0]:
            assert found.matmul_flops == products * CUBE


# ---- optimizers and the house's own steps


def test_adamw():
    """The optimizer multiplies no matrices: all products are the MLP's."""
    optimizer = optax.adamw(1e-3)
    weights = [array(m, n) for m, n in itertools.pairwise(WIDTHS)]
    state = jax.eval_shape(optimizer.init, weights)

    def update(weights, state, grads):
        with scope("optimizer"):
            updates, state = optimizer.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

    def step(weights, state, x):
        value, grads = trained(mlp)(weights, x)
        return value, *update(weights, state, grads)

    every, first = flops(8, 6 * 5 + 5 * 4 + 4 * 3), flops(8, 6 * 5)
    found = exact(step, weights, state, array(8, 6))
    assert found.by_phase == {"forward": every, "backward": 2 * every - first}
    alone = exact(update, weights, state, weights)
    parameters = 6 * 5 + 5 * 4 + 4 * 3
    assert alone.matmul_flops == 0
    assert alone.elementwise_flops > 10 * parameters  # two moments of each, decayed and corrected
    assert alone.transcendentals >= parameters  # a root each
    assert found.elementwise_flops > alone.elementwise_flops


def dense_step(rows, *sizes, inputs=False):
    """Forward, dW and dx of a chain of dense layers; the first dx only where inputs ask for it."""
    every = sum(flops(rows, m, n) for m, n in sizes)
    return every, 2 * every - (0 if inputs else flops(rows, *sizes[0]))


def mlp_cancer(e):
    return dense_step(e.batch_size, (30, 64), (64, 32), (32, 1))


def lenet_digits(e):
    """5x5 convolutions without padding, 28x28 and 10x10 outputs; LeCun et al. 1998."""
    b = e.batch_size
    first, second = flops(b, 28 * 28, 25, 1, 6), flops(b, 10 * 10, 25, 6, 16)
    forward, backward = dense_step(b, (400, 120), (120, 84), (84, 10), inputs=True)
    return forward + first + second, backward + first + 2 * second


def cnn_digits(e):
    """3x3 convolutions padded to 16x16, then 8x8: along an axis of n, 3 n - 2 taps are valid."""
    b = e.batch_size
    first, second = flops(b, 46 * 46, 1, 32), flops(b, 22 * 22, 32, 64)
    forward, backward = dense_step(b, (4 * 4 * 64, 128), (128, 10), inputs=True)
    return forward + first + second, backward + first + 2 * second


def lstm_text(e, gates=4):
    """Gates of inputs and of the hidden state, at each step of two layers, and the outputs."""
    m, t = e.model, e.data.length
    products = [(m.features, gates * m.width), (m.width, gates * m.width)]
    products += [(m.width, gates * m.width)] * 2
    return dense_step(e.batch_size * t, *products, (m.width, m.vocab), inputs=True)


def gru_text(e):
    return lstm_text(e, gates=3)


def transformer_text(e):
    """Layers by Kaplan et al. 2020 with the three matrices of SwiGLU; the tied output counts, the
    embedding, a gather, does not."""
    m, b, t = e.model, e.batch_size, e.data.length
    dense = m.layers * (4 * m.width**2 + 3 * m.width * m.feed_forward) + m.width * m.vocab
    forward = flops(b, t, dense) + m.layers * flops(2, b, t, t, m.width)
    return forward, 2 * forward


@pytest.mark.parametrize(
    "closed", [mlp_cancer, lenet_digits, cnn_digits, lstm_text, gru_text, transformer_text]
)
def test_steps_of_the_configs(closed):
    e = command.load(f"configs/{closed.__name__}.py")
    s = setup.prepare(e, jax.devices()[:1])
    found = exact(s.step().trace(*s.example()))
    forward, backward = closed(e)
    assert found.by_phase == {"forward": forward, "backward": backward}
    assert found.elementwise_flops > 10 * s.parameters  # the optimizer's, at the least
    assert (found.dense_flops > found.matmul_flops) == (closed is cnn_digits)
    scores = e.model.layers * flops(6, 16, 128, 128, 128) if closed is transformer_text else 0
    assert found.causal_flops == (found.model_flops - scores // 2 if scores else None)


# ---- published figures: multiply-adds at 224 x 224, batch 1, by torchvision (model weights'
# "_ops"), where every tap of a convolution counts, those on padding too


def of_model(config, *args):
    """The count of one call of a model in its evaluation form."""
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(params=jax.random.key(0))))
    graph, state = nnx.split(model)

    def call(state, *args):
        model = nnx.merge(graph, state)
        model.eval()
        return model(*args)

    return exact(call, state, *args)


def taps(n, kernel, stride):
    """(valid, all) (output, tap) pairs over an axis of n, padded by half the kernel."""
    half = kernel // 2
    at = [i + j - half for i in range(0, n, stride) for j in range(kernel)]
    return sum(0 <= p < n for p in at), len(at)


def resnet_macs(depths, bottleneck, convention):
    """By the architecture's table: (size in, channels in, channels out, kernel, stride)."""
    convs, channels, size = [(224, 3, 64, 7, 2)], 64, 56
    for i, depth in enumerate(depths):
        width = 64 << i
        out = 4 * width if bottleneck else width
        for j in range(depth):
            stride = 2 if i and not j else 1
            if bottleneck:
                convs += [(size, channels, width, 1, 1), (size, width, width, 3, stride)]
                convs += [(size // stride, width, out, 1, 1)]
            else:
                convs += [(size, channels, width, 3, stride), (size // stride, width, width, 3, 1)]
            if channels != out or stride > 1:
                convs.append((size, channels, out, 1, stride))
            channels, size = out, size // stride
    every = sum(m * n * taps(s, k, stride)[convention] ** 2 for s, m, n, k, stride in convs)
    return every + channels * 1000


@pytest.mark.parametrize(
    ("config", "published"), [(RESNET18, 1.814e9), (RESNET50, 4.089e9)], ids=["18", "50"]
)
def test_published_resnets(config, published):
    found = of_model(config, array(1, 224, 224, 3))
    bottleneck = config.block == "bottleneck"
    assert found.dense_flops == 2 * resnet_macs(config.layers, bottleneck, 1)
    assert found.dense_flops / 2 == pytest.approx(published, rel=5e-3)
    assert found.matmul_flops == 2 * resnet_macs(config.layers, bottleneck, 0)
    assert 0.92 < found.matmul_flops / found.dense_flops < 0.97


def test_published_vit():
    """ViT-B/16 (Dosovitskiy et al. 2021): 196 patches and the class token; 17.56e9."""
    b, t, d = 1, 197, 768
    found = of_model(VIT_B16, array(b, 224, 224, 3))
    closed = flops(196, d, d) + 12 * sum(layer_flops(b, t, d, 4 * d)) + flops(d, 1000)
    assert found.matmul_flops == found.dense_flops == closed
    assert found.matmul_flops / 2 == pytest.approx(17.56e9, rel=5e-3)


def test_published_gpt2():
    """GPT-2 124M forward, a token: 2 a parameter in a product, and attention's 4 T D a layer
    (Kaplan et al. 2020, 2.1); the positions' embedding is in no product, the tokens' is once."""
    t, d, vocab, depth = 1024, 768, 50257, 12
    gpt2 = TransformerConfig(vocab=vocab, context=t, layers=depth, heads=12, width=d, scan=True)
    found = of_model(gpt2, array(1, t, dtype=jnp.int32))
    multiplied = depth * 12 * d * d + vocab * d
    assert found.matmul_flops == t * (2 * multiplied + depth * 4 * t * d)
    assert multiplied == pytest.approx(124e6, rel=5e-3)
