"""Layers in stages on devices, through which the parts of a batch go one behind another.

GPipe's schedule (Huang et al. 2019): stage s works on part t - s at tick t. All parts go forward,
and then, in the transposed program, backward. Of n stages and m parts, each device works for m of
m + n - 1 ticks; what it computes in the others (`bubble`) is thrown away.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research import draws

AXIS = "pipeline"


def bubble(stages: int, parts: int) -> float:
    """The share of its time that a stage waits: (n - 1) / (m + n - 1)."""
    return (stages - 1) / (parts + stages - 1)


class Pipeline(NamedTuple):
    """What `models.layers.loop` computes, of layers whose first axis is split over `pipeline`."""

    mesh: Mesh
    rows: tuple[str, ...]
    """The axes over which rows are split."""
    parts: int
    """Of the rows on a device, which they divide."""

    def __call__(self, body: Callable, x_BTD: jax.Array, layers: Any, beside: Any) -> jax.Array:
        beside = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (len(x_BTD), *x.shape[1:])) if len(x) == 1 else x, beside
        )
        rows = P(self.rows)

        def device(x: jax.Array, layers: Any, beside: Any) -> jax.Array:
            return self._stage(body, x, layers, beside)

        run: Any = jax.shard_map(
            device,
            mesh=self.mesh,
            in_specs=(rows, P(AXIS), rows),
            # Rows that a stage goes on with after the last layer: of the output, and the loss.
            out_specs=P((*self.rows, AXIS)),
            check_vma=False,
        )
        return run(x_BTD, layers, beside)

    def _stage(self, body: Callable, x: jax.Array, layers: Any, beside: Any) -> jax.Array:
        """One device's: its layers, over all parts of its rows."""
        size, stage = self.mesh.shape[AXIS], jax.lax.axis_index(AXIS)
        count = len(x) // self.parts
        start = jax.lax.axis_index(self.rows) * len(x)
        x, beside = jax.tree.map(lambda x: x.reshape(self.parts, count, *x.shape[1:]), (x, beside))

        def through(x: jax.Array, part: jax.Array) -> jax.Array:
            of_part = jax.tree.map(lambda x: x[part], beside)

            def layer(x: jax.Array, each: Any) -> tuple[jax.Array, None]:
                params, key, depth = each
                if key is not None:
                    key = draws.of_rows(key, start + part * count, count)
                return body(x, (params, key, depth), of_part), None

            return jax.lax.scan(layer, x, layers)[0]

        def tick(state: Any, t: jax.Array) -> tuple[Any, None]:
            given, done = state
            part = jnp.clip(t - stage, 0, self.parts - 1)
            y = through(jnp.where(stage == 0, x[part], given), part)
            # A later tick overwrites what comes too early, and what is too late is the last again.
            done = jax.lax.dynamic_update_index_in_dim(done, y, part, axis=0)
            given = jax.lax.ppermute(y, AXIS, [(i, i + 1) for i in range(size - 1)])
            return (given, done), None

        ticks = jnp.arange(self.parts + size - 1)
        (_, done), _ = jax.lax.scan(tick, (jnp.zeros_like(x[0]), jnp.zeros_like(x)), ticks)
        last = jnp.where(stage == size - 1, done, 0).reshape(-1, *x.shape[2:])
        return jax.lax.psum_scatter(last, AXIS, scatter_dimension=0, tiled=True)
