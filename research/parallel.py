"""Where arrays live: the mesh, placement rules for parameters, placement of batches."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Ge
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research import UserError

Rules = Sequence[tuple[str, P]]
"""(regex on a parameter's path, its spec): the first match wins."""

BATCH = P(("data", "fsdp"))
"""Every array of a batch is split over its first axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """The sizes of the mesh's axes; their product is the number of devices."""

    data: Annotated[int, Ge(1)] | None = None
    """Copies of the model; None: all the devices that `fsdp` leaves."""
    fsdp: Annotated[int, Ge(1)] = 1
    """Devices over which parameters and optimizer state are split."""

    def mesh(self, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all of them).

        Raises UserError where the axes do not multiply to the number of devices, or do not divide
        the batch.
        """
        devices = jax.devices() if devices is None else devices
        data = self.data or max(len(devices) // self.fsdp, 1)
        if data * self.fsdp != len(devices):
            raise UserError(
                f"parallel: data {data} x fsdp {self.fsdp} = {data * self.fsdp}, "
                f"and there are {len(devices)} devices"
            )
        check_divides("batch_size", batch_size, len(devices))
        types = (AxisType.Auto, AxisType.Auto)
        return jax.make_mesh((data, self.fsdp), ("data", "fsdp"), types, devices=devices)


def check_divides(field: str, size: int, devices: int) -> None:
    """Raises UserError where the rows of a batch do not divide over the devices."""
    if size % devices:
        near = size // devices * devices
        nearest = [n for n in (near, near + devices) if n]
        raise UserError(
            f"{field} {size} does not divide over {devices} devices; "
            f"nearest that do: {', '.join(map(str, nearest))}"
        )


def place(abstract: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """A NamedSharding for each array of a tree of shapes.

    An array that no rule matches is split over `fsdp` along the largest axis that divides, and
    otherwise replicated. A spec shorter than an array's rank is aligned to its last axes, so that
    one rule serves a layer by itself and a stack of them.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, P(*[None] * (leaf.ndim - len(spec)), *spec))
        return NamedSharding(mesh, _fsdp(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def _fsdp(shape: tuple[int, ...], size: int) -> P:
    divisible = [(n, -i) for i, n in enumerate(shape) if n % size == 0 and n >= size]
    if size == 1 or math.prod(shape) < 2 * size or not divisible:
        return P()
    axis = -max(divisible)[1]
    return P(*[None] * axis, "fsdp")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def replicate(key: jax.Array, mesh: Mesh) -> jax.Array:
    """A random key, the same in every process, on all devices."""
    if not mesh.is_multi_process:
        return jax.device_put(key, replicated(mesh))
    data = jax.device_get(jax.random.key_data(key))
    whole = jax.make_array_from_process_local_data(replicated(mesh), data)
    return jax.random.wrap_key_data(whole, impl=jax.random.key_impl(key))


def refuse_several() -> None:
    """Raises UserError where there are several processes."""
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: runs of several are not supported yet")


def batched(mesh: Mesh) -> NamedSharding:
    """Split over the first axis, as batches are."""
    return NamedSharding(mesh, BATCH)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """The batches of several steps, of which a step takes its own."""

    first: Any
    """int32: the step of the first."""
    batches: Any
    """Arrays with an axis of steps before a batch's own."""

    def at(self, step: Any) -> dict[str, Any]:
        """The batch of a step; those of the block come again and again after it."""

        def take(x: jax.Array) -> jax.Array:
            i = (step - self.first) % len(x)
            return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

        return {name: take(x) for name, x in self.batches.items()}


def fed(batch: Any, mesh: Mesh) -> Any:
    """Where the arrays of a batch, or of a block, go."""
    if isinstance(batch, Block):
        return Block(replicated(mesh), NamedSharding(mesh, P(None, *BATCH)))
    return batched(mesh)


def share(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a batch that this process's devices hold, and that it alone reads.

    Raises UserError where they do not follow one another, or where there are none.
    """
    held = batched(mesh).addressable_devices_indices_map((batch_size,)).values()
    parts = sorted({index[0].indices(batch_size)[:2] for index in held if index})
    if not parts:
        raise UserError(f"no device of the mesh is of process {jax.process_index()}")
    for (_, stop), (start, _) in itertools.pairwise(parts):
        if start != stop:
            raise UserError(
                f"process {jax.process_index()} holds rows up to {stop} and from {start} on of a "
                "batch: the devices of a process must follow one another in the mesh"
            )
    return slice(parts[0][0], parts[-1][1])


def put(batch: Mapping[str, np.ndarray] | Block, mesh: Mesh) -> Any:
    """A batch, or a block of them, on the devices, each batch split over the mesh.

    Where there are several processes each gives its `share`.
    """
    # As numpy's, whatever they were: a device's own would be given away.
    batch, places = jax.tree.map(np.asarray, batch), fed(batch, mesh)
    if mesh.is_multi_process:
        places = jax.tree.broadcast(places, batch)
        return jax.tree.map(jax.make_array_from_process_local_data, places, batch)
    return _identity(places)(batch)


@functools.lru_cache
def _identity(places: Any) -> Any:
    """A compiled call takes arrays to their devices in a fifth of `jax.device_put`'s time."""
    # What is donated is the copy on the device, which would be copied once more.
    return jax.jit(
        lambda batch: batch, in_shardings=(places,), out_shardings=places, donate_argnums=0
    )
