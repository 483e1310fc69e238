"""Models in plain JAX, each with a closed form of its FLOPs that no counter had a hand in.

2 per multiply-add of matrix products and convolutions, as the program is written. A convolution's
taps on padding are not work; masked attention is; a recomputation is, where the program asks for
one. Inputs have no gradient; parameters do, and an LSTM's first state.

Shapes: B batch, T and S time, D width, H an LSTM's width, G = 4H, F feed-forward, V vocabulary, N
query heads, K key heads, h a head's width, C channels.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def flops(*shape: int) -> int:
    """[m, k] by [k, n], and batches before: a multiplication and an addition each."""
    return 2 * math.prod(shape)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# ---- multilayer perceptron

ROWS, WIDTHS = 128, (784, 512, 256, 10)
DENSE = tuple(itertools.pairwise(WIDTHS))


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for i, (w, b) in enumerate(params):
        x = (jax.nn.relu(x) if i else x) @ w + b[None]
    return x


def mlp_flops(backward: bool) -> int:
    every = sum(flops(ROWS, m, n) for m, n in DENSE)
    return every + backward * (2 * every - flops(ROWS, *DENSE[0]))


def mlp_arrays() -> tuple[Any, jax.ShapeDtypeStruct]:
    return [(array(m, n), array(n)) for m, n in DENSE], array(ROWS, WIDTHS[0])


# ---- LSTM

LSTM_BTDH = 16, 100, 64, 128


def lstm(params: Any, x_BTD: jax.Array, scanned: bool = True) -> jax.Array:
    """Gates in PyTorch's order: input, forget, candidate, output."""
    w_DG, w_HG, hidden_BH, cell_BH = params

    def step(carry: Any, x_BD: jax.Array) -> tuple[Any, jax.Array]:
        hidden, cell = carry
        i, f, g, o = jnp.split(x_BD @ w_DG + hidden @ w_HG, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    if scanned:
        return lax.scan(step, (hidden_BH, cell_BH), x_BTD.swapaxes(0, 1))[1]
    carry, hiddens = (hidden_BH, cell_BH), []
    for t in range(x_BTD.shape[1]):
        carry, hidden = step(carry, x_BTD[:, t])
        hiddens.append(hidden)
    return jnp.stack(hiddens)


def lstm_flops(backward: bool) -> int:
    b, t, d, h = LSTM_BTDH
    inputs, hidden = flops(b, t, d, 4 * h), flops(b, t, h, 4 * h)
    # The inputs' half gives the gradient of its matrix alone.
    return inputs + hidden + backward * (inputs + 2 * hidden)


def lstm_arrays() -> tuple[Any, jax.ShapeDtypeStruct]:
    b, t, d, h = LSTM_BTDH
    return [array(d, 4 * h), array(h, 4 * h), array(b, h), array(b, h)], array(b, t, d)


# ---- convolutions, padded by half the kernel


@dataclasses.dataclass(frozen=True)
class Conv:
    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class Convs:
    """Convolutions with ReLU between; then, with classes, their mean over places and a product."""

    batch: int
    size: int
    layers: tuple[Conv, ...]
    classes: int = 0


CNN = Convs(8, 32, (Conv(3, 16, 3, 1), Conv(16, 32, 3, 2), Conv(32, 64, 5, 2)), 10)
DEPTHWISE = Convs(8, 32, (Conv(64, 64, 3, 1, 64), Conv(64, 64, 3, 2, 64)))


def cnn(params: Any, x_BCHW: jax.Array, convs: Convs) -> jax.Array:
    kernels, *head = params
    x = x_BCHW
    for i, (w, layer) in enumerate(zip(kernels, convs.layers, strict=True)):
        pad = [(layer.kernel // 2,) * 2] * 2
        x = lax.conv_general_dilated(
            jax.nn.relu(x) if i else x,
            w,
            (layer.stride,) * 2,
            pad,
            feature_group_count=layer.groups,
        )
    return x.mean((2, 3)) @ head[0] if head else x


def taps(size: int, kernel: int, stride: int, padding: bool) -> int:
    """Pairs of an output and a tap along an axis; `padding`: those that meet padding too."""
    meets = [0 <= i + j - kernel // 2 < size for i in range(0, size, stride) for j in range(kernel)]
    return len(meets) if padding else sum(meets)


def cnn_flops(convs: Convs, backward: bool, padding: bool = False) -> int:
    """A convolution's gradients are of its own pairs: as much work again each."""
    each, size = [], convs.size
    for c in convs.layers:
        pairs = taps(size, c.kernel, c.stride, padding) ** 2
        each.append(flops(convs.batch, pairs, c.inputs // c.groups, c.outputs))
        size = -(-size // c.stride)
    every = sum(each) + flops(convs.batch, convs.layers[-1].outputs, convs.classes)
    return every + backward * (2 * every - each[0])


def cnn_arrays(convs: Convs) -> tuple[Any, jax.ShapeDtypeStruct]:
    kernels = [array(c.outputs, c.inputs // c.groups, c.kernel, c.kernel) for c in convs.layers]
    first, last = convs.layers[0], convs.layers[-1]
    head = [array(last.outputs, convs.classes)] if convs.classes else []
    return [kernels, *head], array(convs.batch, first.inputs, convs.size, convs.size)


# ---- GPT


@dataclasses.dataclass(frozen=True)
class Gpt:
    """Pre-norm decoder, learned positions, biases, tied output: GPT-2's."""

    batch: int
    time: int
    vocab: int
    layers: int
    heads: int
    width: int


SMALL = Gpt(2, 128, 256, 12, 4, 256)
GPT2 = Gpt(1, 1024, 50257, 12, 12, 768)


def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * scale[None, None] + bias[None, None]


def gpt(
    params: Any, tokens_BT: jax.Array, size: Gpt, scanned: bool, remat: bool = False
) -> jax.Array:
    b, t, d = size.batch, size.time, size.width
    causal_TS = jnp.tril(jnp.ones((t, t), bool))[None, None]

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        qkv = norm(x, *p["norm1"]) @ p["qkv"] + p["qkv_bias"][None, None]
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, size.heads, -1), 2, 0)
        scores = jnp.einsum("BTNh,BSNh->BNTS", q, k) / math.sqrt(d // size.heads)
        weights = jax.nn.softmax(jnp.where(causal_TS, scores, -jnp.inf))
        y = jnp.einsum("BNTS,BSNh->BTNh", weights, v).reshape(b, t, d)
        x = x + y @ p["out"] + p["out_bias"][None, None]
        y = jax.nn.gelu(norm(x, *p["norm2"]) @ p["up"] + p["up_bias"][None, None])
        return x + y @ p["down"] + p["down_bias"][None, None], None

    body = jax.checkpoint(layer) if remat else layer
    x = params["tokens"][tokens_BT] + params["positions"][None]
    if scanned:
        x, _ = lax.scan(body, x, params["layers"])
    else:
        for i in range(size.layers):
            x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], params["layers"]))
    return norm(x, *params["norm"]) @ params["tokens"].T


def gpt_flops(size: Gpt, backward: bool = False, remat: bool = False) -> int:
    """Every product's operands have gradients, the first layer's input too, for it is trained.

    Recomputing a layer leaves out its last product, whose value no gradient needs.
    """
    b, t, d = size.batch, size.time, size.width
    down = flops(b, t, 4 * d, d)
    layer = flops(b, t, d, 3 * d + d + 4 * d) + down + 2 * flops(b, t, t, d)
    every = size.layers * layer + flops(b, t, d, size.vocab)
    return every * (3 if backward else 1) + remat * size.layers * (layer - down)


def gpt_arrays(size: Gpt) -> tuple[Any, jax.ShapeDtypeStruct]:
    d, n = size.width, size.layers
    dense = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    layers: dict[str, Any] = {f"norm{i}": [array(n, d)] * 2 for i in (1, 2)}
    for name, shape in dense.items():
        layers |= {name: array(n, *shape), f"{name}_bias": array(n, shape[1])}
    params = {
        "tokens": array(size.vocab, d),
        "positions": array(size.time, d),
        "layers": layers,
        "norm": [array(d)] * 2,
    }
    return params, array(size.batch, size.time, dtype=jnp.int32)


# ---- grouped-query attention, by each framework's own attention

GQA_BTDNK = 2, 256, 256, 8, 2


def gqa(params: Any, x_BTD: jax.Array) -> jax.Array:
    w_DNh, w_DKh, v_DKh, w_DD = params
    q, k, v = (jnp.einsum("BTD,DNh->BTNh", x_BTD, w) for w in (w_DNh, w_DKh, v_DKh))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return y.reshape(x_BTD.shape) @ w_DD


def gqa_flops(backward: bool) -> int:
    b, t, d, n, k = GQA_BTDNK
    projected = flops(b, t, d, d) + 2 * flops(b, t, d, d // n * k)
    after = 2 * flops(b, t, t, d) + flops(b, t, d, d)
    return projected + after + backward * (projected + 2 * after)


def gqa_arrays() -> tuple[Any, jax.ShapeDtypeStruct]:
    b, t, d, n, k = GQA_BTDNK
    h = d // n
    return [array(d, n, h), array(d, k, h), array(d, k, h), array(d, d)], array(b, t, d)
