"""Transformer decoder language model.

Shapes: B batch, T time, D width, N query heads, K key heads, G = N / K queries a key head,
h head width, F feed-forward width, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Interval
from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A pre-norm decoder. The defaults, at 12 layers, 12 heads and width 768, are GPT-2 124M."""

    vocab: Annotated[int, Ge(1)]
    context: Annotated[int, Ge(1)]
    """The longest sequence."""
    layers: Annotated[int, Ge(1)]
    heads: Annotated[int, Ge(1)]
    width: Annotated[int, Ge(1)]
    kv_heads: Annotated[int, Ge(1)] | None = None
    """Key and value heads, shared by groups of query heads (Ainslie et al. 2023); None: heads."""
    feed_forward: Annotated[int, Ge(1)] | None = None
    """Width between the two feed-forward products; None: 4 x width."""
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["learned", "rotary"] = "learned"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    """Biases in dense layers and norms."""
    tied: bool = True
    """The output layer is the embedding, transposed."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """On the embedding and on both branches of every layer."""
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

    def make(self, rngs: nnx.Rngs) -> "Transformer":
        return Transformer(self, rngs)


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm == "rms":
        return nnx.RMSNorm(config.width, epsilon=1e-5, rngs=rngs)
    return nnx.LayerNorm(config.width, epsilon=1e-5, use_bias=config.bias, rngs=rngs)


def _init(config: TransformerConfig, residual: bool = False) -> Callable:
    """GPT-2's: deviation 0.02, smaller where L layers add to the residual stream twice each."""
    return nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5 if residual else 0.02)


class Attention(nnx.Module):
    """Causal attention; queries are grouped by the key head that they share."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        kv_heads = config.kv_heads or config.heads
        groups, head = config.heads // kv_heads, config.width // config.heads
        self.rotary = config.positions == "rotary"
        self.qkv = nnx.LinearGeneral(
            config.width,
            (kv_heads, groups + 2, head),
            use_bias=config.bias,
            kernel_init=_init(config),
            rngs=rngs,
        )
        self.out = nnx.Linear(
            config.width,
            config.width,
            use_bias=config.bias,
            kernel_init=_init(config, residual=True),
            rngs=rngs,
        )

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        qkv_BTKCh = self.qkv(x_BTD)  # C = G + 2: a group's queries, its key, its value
        batch, time, _, _, head = qkv_BTKCh.shape
        q_BTNh = qkv_BTKCh[..., :-2, :].reshape(batch, time, -1, head)
        k_BTKh, v_BTKh = qkv_BTKCh[..., -2, :], qkv_BTKCh[..., -1, :]
        if self.rotary:
            q_BTNh, k_BTKh = _rotate(q_BTNh), _rotate(k_BTKh)
        with jax.named_scope("causal"):  # half of these products are masked: the ledger says both
            y_BTNh = jax.nn.dot_product_attention(q_BTNh, k_BTKh, v_BTKh, is_causal=True)
        return self.out(y_BTNh.reshape(batch, time, -1))


def _rotate(x_BTNh: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): turns pairs (i, i + h/2) by position x frequency."""
    time, half = x_BTNh.shape[1], x_BTNh.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_1T1h = jnp.outer(jnp.arange(time, dtype=jnp.float32), frequency)[None, :, None]
    cos, sin = jnp.cos(angle_1T1h), jnp.sin(angle_1T1h)
    a, b = jnp.split(x_BTNh, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class FeedForward(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        inner = config.feed_forward or 4 * config.width
        dense: dict[str, Any] = {"use_bias": config.bias, "rngs": rngs}
        self.up = nnx.Linear(config.width, inner, kernel_init=_init(config), **dense)
        self.gate = (
            nnx.Linear(config.width, inner, kernel_init=_init(config), **dense)
            if config.mlp == "swiglu"
            else None
        )
        self.down = nnx.Linear(inner, config.width, kernel_init=_init(config, True), **dense)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTF = self.up(x_BTD)
        if self.gate is None:
            return self.down(jax.nn.gelu(x_BTF))
        return self.down(jax.nn.silu(self.gate(x_BTD)) * x_BTF)


class Layer(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = FeedForward(config, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x_BTD: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        x = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD)), rngs=rngs)
        return x + self.dropout(self.mlp(self.mlp_norm(x)), rngs=rngs)


class Transformer(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        init = _init(config)
        self.context, self.remat, self.scan = config.context, config.remat, config.scan
        self.embed = nnx.Embed(config.vocab, config.width, embedding_init=init, rngs=rngs)
        self.positions = (
            nnx.Embed(config.context, config.width, embedding_init=init, rngs=rngs)
            if config.positions == "learned"
            else None
        )
        keys = jax.random.split(rngs.params(), config.layers)

        def layer(key: jax.Array) -> Layer:
            return Layer(config, nnx.Rngs(params=key))

        self.layers = nnx.vmap(layer)(keys) if config.scan else nnx.List(map(layer, keys))
        self.norm = _norm(config, rngs)
        self.output = (
            None
            if config.tied
            else nnx.Linear(config.width, config.vocab, use_bias=False, kernel_init=init, rngs=rngs)
        )
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, tokens_BT: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, T] -> logits [B, T, V]; T is at most `context`."""
        time = tokens_BT.shape[1]
        if time > self.context:
            raise ValueError(f"{time} tokens exceed the model's context of {self.context}")
        x = self.embed(tokens_BT)
        if self.positions is not None:
            x = x + self.positions(jnp.arange(time))[None]
        x = self._layers(self.dropout(x, rngs=rngs), rngs)
        x = self.norm(x)
        if self.output is not None:
            return self.output(x)
        with jax.named_scope("output"):
            return self.embed.attend(x)

    def _layers(self, x_BTD: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Applies the layers; each draws its dropout from a key of its own, scanned or not."""
        layers: Any = [self.layers] if self.scan else self.layers
        graphs, stacks = zip(*map(nnx.split, layers), strict=True)
        count = jax.tree.leaves(stacks[0])[0].shape[0] if self.scan else len(stacks)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), count)

        def body(x: jax.Array, layer: tuple[nnx.State, jax.Array | None]) -> tuple[jax.Array, None]:
            params, key = layer
            rngs = None if key is None else nnx.Rngs(dropout=key)
            return nnx.merge(graphs[0], params)(x, rngs), None

        if self.remat != "none":
            policy = jax.checkpoint_policies.checkpoint_dots if self.remat == "dots" else None
            body = jax.checkpoint(body, policy=policy)
        if self.scan:
            return jax.lax.scan(body, x_BTD, (stacks[0], keys))[0]
        for i, params in enumerate(stacks):
            x_BTD, _ = body(x_BTD, (params, None if keys is None else keys[i]))
        return x_BTD
