"""Layers of a Transformer, with what stands around them in every one: positions and the last norm.

Shapes: B batch, T time, D width, N query heads, K key heads, G = N / K queries a key head,
h head width, F feed-forward width, L layers.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Interval
from flax import nnx

from research.models.stochastic_depth import StochasticDepth
from research.modules import keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """Pre-norm layers."""

    layers: Annotated[int, Ge(1)]
    heads: Annotated[int, Ge(1)]
    width: Annotated[int, Ge(1)]
    kv_heads: Annotated[int, Ge(1)] | None = None
    """Key and value heads, shared by groups of query heads (Ainslie et al. 2023); None: heads."""
    feed_forward: Annotated[int, Ge(1)] | None = None
    """Width between the two feed-forward products; None: 4 x width."""
    norm: Literal["layer", "rms"] = "layer"
    epsilon: Annotated[float, Gt(0)] = 1e-5
    """Of the norms."""
    positions: Literal["learned", "rotary"] = "learned"
    mlp: Literal["gelu", "gelu_erf", "swiglu"] = "gelu"
    """gelu: by tanh, as in GPT-2; gelu_erf: exact."""
    bias: bool = True
    """Biases in dense layers and norms."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """On the embedding and on both branches of every layer."""
    stochastic_depth: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Rate at which each branch of the last layer is left out; it rises linearly over the layers
    (Huang et al. 2016)."""
    scan: bool = False
    """Compile one layer and loop over it; its parameters are stacked. Changes no number."""
    remat: Literal["none", "full", "dots"] = "none"
    """Recompute a layer in the backward pass: all of it, or all but its matrix products. Changes
    no number."""

    def __post_init__(self) -> None:
        if min(self.heads, self.width, self.kv_heads or 1) < 1:
            return  # out of the range that the fields declare: the experiment says so
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{self.heads} heads do not divide over {self.kv_heads} kv_heads")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"rotary positions need an even head, not {self.width // self.heads}")


def _norm(config: LayersConfig, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm == "rms":
        return nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, use_bias=config.bias, rngs=rngs)


def init(config: LayersConfig, residual: bool = False) -> Callable:
    """GPT-2's: deviation 0.02, smaller where L layers add to the residual stream twice each."""
    return nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5 if residual else 0.02)


Segments = tuple[jax.Array, jax.Array]
"""What queries [B or 1, T or 1] and keys [B, T] are of: a query attends to keys of its own."""


def attention(
    q_BTNh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segments: Segments | None = None,
    causal: bool = False,
) -> jax.Array:
    """Softmax of scaled products, over all keys or, causally, over those up to a query's own."""
    mask_B1QT = None
    if segments is not None:
        mask_B1QT = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNh, k_BTKh, v_BTKh, mask=mask_B1QT, is_causal=causal)


class Attention(nnx.Module):
    """Attention, causal or of all to all; queries are grouped by the key head that they share."""

    def __init__(self, config: LayersConfig, causal: bool, rngs: nnx.Rngs) -> None:
        self.causal = causal
        self.attention_fn: Callable = attention
        """Another may be put in its place, of a sequence that devices share."""
        kv_heads = config.kv_heads or config.heads
        groups, head = config.heads // kv_heads, config.width // config.heads
        self.rotary = config.positions == "rotary"
        self.qkv = nnx.LinearGeneral(
            config.width,
            (kv_heads, groups + 2, head),
            use_bias=config.bias,
            kernel_init=init(config),
            rngs=rngs,
        )
        self.out = nnx.Linear(
            config.width,
            config.width,
            use_bias=config.bias,
            kernel_init=init(config, residual=True),
            rngs=rngs,
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        segments: Segments | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """segments, positions_BT: as `Layers._encode` has them."""
        qkv_BTKCh = self.qkv(x_BTD)  # C = G + 2: a group's queries, its key, its value
        batch, time, _, _, head = qkv_BTKCh.shape
        q_BTNh = qkv_BTKCh[..., :-2, :].reshape(batch, time, -1, head)
        k_BTKh, v_BTKh = qkv_BTKCh[..., -2, :], qkv_BTKCh[..., -1, :]
        if self.rotary:
            q_BTNh, k_BTKh = (_rotate(x, positions_BT) for x in (q_BTNh, k_BTKh))
        # Half of causal products are masked: the ledger says both.
        with jax.named_scope("causal") if self.causal else contextlib.nullcontext():
            y_BTNh = self.attention_fn(q_BTNh, k_BTKh, v_BTKh, segments, self.causal)
        return self.out(y_BTNh.reshape(batch, time, -1))


def _rotate(x_BTNh: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
    """Rotary positions (Su et al. 2021): turns pairs (i, i + h/2) by position x frequency."""
    half = x_BTNh.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if positions_BT is None:
        positions_BT = jnp.arange(x_BTNh.shape[1])[None]
    angle_BTh = positions_BT[..., None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angle_BTh)[:, :, None], jnp.sin(angle_BTh)[:, :, None]
    a, b = jnp.split(x_BTNh, 2, axis=-1)
    # In float32, whose products with bfloat16 are float32, and back.
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BTNh.dtype)


class FeedForward(nnx.Module):
    def __init__(self, config: LayersConfig, rngs: nnx.Rngs) -> None:
        inner = config.feed_forward or 4 * config.width
        dense: dict[str, Any] = {"use_bias": config.bias, "rngs": rngs}
        self.up = nnx.Linear(config.width, inner, kernel_init=init(config), **dense)
        self.gate = (
            nnx.Linear(config.width, inner, kernel_init=init(config), **dense)
            if config.mlp == "swiglu"
            else None
        )
        self.exact = config.mlp == "gelu_erf"
        self.down = nnx.Linear(inner, config.width, kernel_init=init(config, True), **dense)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTF = self.up(x_BTD)
        if self.gate is None:
            return self.down(jax.nn.gelu(x_BTF, approximate=not self.exact))
        return self.down(jax.nn.silu(self.gate(x_BTD)) * x_BTF)


class Layer(nnx.Module):
    def __init__(self, config: LayersConfig, causal: bool, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, causal, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = FeedForward(config, rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.stochastic_depth = StochasticDepth(config.stochastic_depth)

    def __call__(
        self,
        x_BTD: jax.Array,
        segments: Segments | None = None,
        positions_BT: jax.Array | None = None,
        depth: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        def branch(y_BTD: jax.Array) -> jax.Array:
            return self.stochastic_depth(self.dropout(y_BTD, rngs=rngs), depth, rngs)

        attention = self.attention(self.attention_norm(x_BTD), segments, positions_BT)
        x = x_BTD + branch(attention)
        return x + branch(self.mlp(self.mlp_norm(x)))


_KEPT = {"none": keep, "full": None, "dots": jax.checkpoint_policies.checkpoint_dots}


def loop(body: Callable, x_BTD: jax.Array, layers: Any, beside: Any) -> jax.Array:
    """What layers [L, ...] make of x, one after another; beside: what each has of x's rows."""
    return jax.lax.scan(lambda x, layer: (body(x, layer, beside), None), x_BTD, layers)[0]


class Layers(nnx.Module):
    """What a Transformer has between its input and its output; a family adds these two."""

    def __init__(self, config: LayersConfig, length: int, causal: bool, rngs: nnx.Rngs) -> None:
        """length: of the longest sequence."""
        self.remat, self.scan = config.remat, config.scan
        self.loop_fn: Callable = loop
        """Another may be put in its place, of layers that devices share."""
        self.stochastic_depth = config.stochastic_depth
        self.positions = (
            nnx.Embed(length, config.width, embedding_init=init(config), rngs=rngs)
            if config.positions == "learned"
            else None
        )
        keys = jax.random.split(rngs.params(), config.layers)

        def layer(key: jax.Array) -> Layer:
            return Layer(config, causal, nnx.Rngs(params=key))

        self.layers = nnx.vmap(layer)(keys) if config.scan else nnx.List(map(layer, keys))
        self.norm = _norm(config, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def _encode(
        self,
        x_BTD: jax.Array,
        rngs: nnx.Rngs | None,
        segments: Segments | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Adds positions, applies the layers and the norm.

        segments: which steps may attend to which (all, without it). positions_BT: places in a
        sequence (0, 1, ... without it).
        """
        if self.positions is not None:
            numbers = jnp.arange(x_BTD.shape[1])[None] if positions_BT is None else positions_BT
            x_BTD = x_BTD + self.positions(numbers)
        x_BTD = self.dropout(x_BTD, rngs=rngs)
        return self.norm(self._layers(x_BTD, rngs, segments, positions_BT))

    def _layers(
        self,
        x_BTD: jax.Array,
        rngs: nnx.Rngs | None,
        segments: Segments | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layers; each draws its dropout from a key of its own, scanned or not."""
        layers: Any = [self.layers] if self.scan else self.layers
        graphs, stacks = zip(*map(nnx.split, layers), strict=True)
        count = jax.tree.leaves(stacks[0])[0].shape[0] if self.scan else len(stacks)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), count)

        dropped = self.stochastic_depth > 0 and rngs is not None
        depths = jnp.arange(1, count + 1) / count if dropped else None

        def body(x: jax.Array, layer: tuple[nnx.State, Any, Any], beside: Any) -> jax.Array:
            params, key, depth = layer
            rngs = None if key is None else nnx.Rngs(dropout=key)
            return nnx.merge(graphs[0], params)(x, *beside, depth, rngs)

        if self.remat != "none" or self.scan:
            body = jax.checkpoint(body, policy=_KEPT[self.remat], prevent_cse=not self.scan)
        beside = segments, positions_BT
        if self.scan:
            return self.loop_fn(body, x_BTD, (stacks[0], keys, depths), beside)
        for i, params in enumerate(stacks):
            key, depth = (None if each is None else each[i] for each in (keys, depths))
            x_BTD = body(x_BTD, (params, key, depth), beside)
        return x_BTD
