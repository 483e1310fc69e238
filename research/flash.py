"""Attention by cuDNN, whose scores never reach a GPU's main memory (Dao et al. 2022)."""

from collections.abc import Callable
from importlib import util
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research import UserError

PACKAGE = "nvidia-cudnn-cu13"

attention = jax.nn.dot_product_attention


class Flash(NamedTuple):
    """What `models.layers.attention` computes, of documents that are not packed. Every device works
    on its own rows and heads."""

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
        segments: tuple[jax.Array, jax.Array] | None = None,
        causal: bool = False,
    ) -> jax.Array:
        """Raises UserError for packed documents, and for what this cuDNN does not compute."""
        if segments is not None:
            raise UserError("attention cudnn: it cannot tell packed documents apart")

        def part(*given: jax.Array) -> jax.Array:
            return attention(*given, is_causal=causal, implementation="cudnn")

        # Around may be a program that is written for one device of several already. What is not
        # written so for every axis, JAX would have XLA part, which it cannot inside of what is.
        around = jax.sharding.get_abstract_mesh()
        left = {*self.mesh.axis_names} - {*around.manual_axes}
        try:
            if self.mesh.size == 1:
                return part(q_BTNh, k_BTKh, v_BTKh)
            spec = P(tuple(name for name in self.rows if name in left), None, "tensor", None)
            return jax.shard_map(
                part,
                mesh=around if around.manual_axes else self.mesh,
                in_specs=(spec, spec, spec),
                out_specs=spec,
                axis_names=left,
                check_vma=False,
            )(q_BTNh, k_BTKh, v_BTKh)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(f"attention cudnn: {error}; attention xla has no such limits") from None


def installed() -> bool:
    """Whether NVIDIA's package of cuDNN is there, beside which programs are compiled for GPUs that
    are not."""
    return util.find_spec("nvidia") is not None and util.find_spec("nvidia.cudnn") is not None
