"""Attention whose scores never reach a device's main memory (Dao et al. 2022), by others' kernels:
cuDNN's on NVIDIA GPUs, and on TPUs those that come with JAX (splash attention, of Pallas)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research import UserError

PACKAGE = "nvidia-cudnn-cu13"

NAMES = {"cuda": "cuDNN flash", "tpu": "splash"}
"""By the platforms that programs are compiled for."""

BLOCKS = (512, 256, 128)
"""Queries, and keys, that a TPU's kernel takes at once: the first that divides a row."""

Segments = tuple[jax.Array, jax.Array]

library = jax.nn.dot_product_attention


class Unsuited(UserError):
    """Flash attention that is not there, or does not compute what is asked."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"attention flash: {reason}")


def _cudnn(
    q_BTNh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, segments: Segments | None, causal: bool
) -> jax.Array:
    if segments is not None:
        raise Unsuited("cuDNN's cannot tell packed documents, or padding, apart")
    try:
        return library(q_BTNh, k_BTKh, v_BTKh, is_causal=causal, implementation="cudnn")
    except (RuntimeError, NotImplementedError) as error:
        raise Unsuited(f"{error} (cuDNN is in the package {PACKAGE})") from None


def _splash(
    q_BTNh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segments: Segments | None,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    batch, time, heads, head = q_BTNh.shape
    block = next((n for n in BLOCKS if time % n == 0), None)
    if block is None:
        raise Unsuited(f"TPU's is of rows of a multiple of {BLOCKS[-1]} tokens, these have {time}")
    mask = (masks.CausalMask if causal else masks.FullMask)((time, time))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dq=block,
            block_kv_dq=block,
            block_q_dkv=block,
            block_kv_dkv=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    ids = segments and splash.SegmentIds(
        *(jnp.broadcast_to(s, (batch, time)).astype(jnp.int32) for s in segments)
    )
    q_BNTh, k_BKTh, v_BKTh = (x.swapaxes(1, 2) for x in (q_BTNh * head**-0.5, k_BTKh, v_BTKh))
    y_BNTh = jax.vmap(kernel)(q_BNTh, k_BKTh, v_BKTh, ids)
    return y_BNTh.swapaxes(1, 2)


KERNELS: dict[str, Callable] = {"cuda": _cudnn, "gpu": _cudnn, "tpu": _splash}


class Flash(NamedTuple):
    """What `models.layers.attention` computes. Every device works on its own rows and heads."""

    kernel: Callable
    """Of `KERNELS`."""
    mesh: Mesh
    rows: tuple[str, ...]
    """The axes over which rows are split; heads are, over `tensor`."""
    plain: Callable
    """In whose place it is."""

    def __call__(
        self,
        q_BTNh: jax.Array,
        k_BTKh: jax.Array,
        v_BTKh: jax.Array,
        segments: Segments | None = None,
        causal: bool = False,
    ) -> jax.Array:
        """Raises Unsuited for what the kernel does not compute."""
        part = functools.partial(self.kernel, causal=causal)
        if self.mesh.size == 1:
            return part(q_BTNh, k_BTKh, v_BTKh, segments)
        # Around may be a program that is written for one device of several already. What is not
        # written so for every axis, JAX would have XLA part, which it cannot inside of what is.
        around = jax.sharding.get_abstract_mesh()
        left = {*self.mesh.axis_names} - {*around.manual_axes}
        rows = tuple(name for name in self.rows if name in left)
        spec = P(rows, None, "tensor", None)
        if segments is not None:  # of which one may be for all rows
            of_q, of_k = segments
            segments = jnp.broadcast_to(of_q, q_BTNh.shape[:2]), of_k
        return jax.shard_map(
            part,
            mesh=around if around.manual_axes else self.mesh,
            in_specs=(spec, spec, spec, segments and (P(rows), P(rows))),
            out_specs=spec,
            axis_names=left,
            check_vma=False,
        )(q_BTNh, k_BTKh, v_BTKh, segments)
