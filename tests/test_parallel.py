"""Meshes and placement, by what each of the eight devices ends up holding."""

import concurrent.futures
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from research import UserError, parallel
from research.compute import targets
from research.parallel import Parallel


def shards(rules=(), data=1, fsdp=8, **shapes):
    """The shape of one device's part of each array."""
    mesh = Parallel(data=data, fsdp=fsdp).mesh(8)
    abstract = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    placed = parallel.place(abstract, mesh, rules)
    found = {k: placed[k].shard_shape(s) for k, s in shapes.items()}
    return found if len(found) > 1 else next(iter(found.values()))


@pytest.mark.parametrize(
    ("data", "fsdp", "devices", "shape"),
    [
        (None, 1, 8, (8, 1, 1)),
        (None, 4, 8, (2, 4, 1)),
        (None, 8, 8, (1, 8, 1)),
        (4, 2, 8, (4, 2, 1)),
        (None, 1, 1, (1, 1, 1)),
        (2, 2, 4, (2, 2, 1)),
        (None, 1, 2, (1, 1, 2)),
        (None, 2, 8, (2, 2, 2)),
    ],
)
def test_a_mesh_has_every_device_once(data, fsdp, devices, shape):
    given = None if devices == 8 else jax.devices()[-devices:]
    mesh = Parallel(data=data, fsdp=fsdp, tensor=shape[2]).mesh(16, given)
    assert mesh.axis_names == ("replica", "pipeline", "data", "fsdp", "context", "tensor")
    assert tuple(mesh.shape[name] for name in ("data", "fsdp", "tensor")) == shape
    assert set(mesh.devices.flat) == set(jax.devices()[-devices:])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"data": 2, "fsdp": 2},
            "data 2 x fsdp 2 = 4, and there are 8 devices; nearest that fit: "
            "data 4 x fsdp 2 or data 2 x fsdp 4$",
        ),
        ({"data": 8, "fsdp": 2}, "= 16, .* fit: data 8 or data 4 x fsdp 2$"),
        ({"fsdp": 3}, "data 2 x fsdp 3 = 6, .*: data 2 x fsdp 4 or data 4 x fsdp 2$"),
        ({"fsdp": 16}, "= 16, .*: data 1 x fsdp 8 or data 2 x fsdp 4$"),
        ({"tensor": 3}, "= 6, .*: data 2 x tensor 4 or data 4 x tensor 2$"),
        (
            {"replica": 3, "context": 2},
            "replica 3 x data 1 x context 2 = 6, .*: replica 4 x data 1 x",
        ),
    ],
)
def test_axes_multiply_to_the_devices(asked, message):
    with pytest.raises(UserError, match=message):
        Parallel(**asked).mesh(8)


def test_a_replica_is_one_slice():
    """Of two slices of TPU v5e that are not there, in any order."""
    found = slices(2)
    for devices in (found, found[::-1], found[::2] + found[1::2]):
        mesh = Parallel(replica=2, fsdp=2).mesh(16, devices)
        assert [{d.slice_index for d in part.flat} for part in mesh.devices] in (
            [{0}, {1}],
            [{1}, {0}],
        )


def slices(number):
    """Devices of so many slices of four TPU v5e."""
    if not targets.installed("v5e"):
        pytest.skip("libtpu, the compiler for TPU, is not installed")
    return targets.devices(targets.place(f"v5e:2x2:{number}"))


@pytest.mark.parametrize(
    ("sizes", "outer"),
    [
        ({"fsdp": 4}, {"data": 4}),
        ({"replica": 2, "fsdp": 4}, {"replica": 2, "data": 2}),
        ({"pipeline": 2, "tensor": 4}, {"pipeline": 2, "data": 2}),
        ({"data": 1, "fsdp": 16}, {"fsdp": 4}),
    ],
)
def test_slices_part_the_axes_that_come_first(sizes, outer):
    """And each other axis is within a slice."""
    mesh = Parallel(**sizes).mesh(64, slices(4))
    index = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    for axis, (name, size) in enumerate(mesh.shape.items()):
        lines = np.moveaxis(index, axis, -1).reshape(-1, size)
        assert {len(np.unique(line)) for line in lines} == {outer.get(name, 1)}
    assert len(np.unique(index)) == 4


@pytest.mark.parametrize(
    ("batch_size", "nearest"), [(3, "8"), (12, "8, 16"), (17, "16, 24"), (63, "56, 64")]
)
def test_devices_divide_the_batch(batch_size, nearest):
    message = f"batch_size {batch_size} does not divide over 8 devices; .*: {nearest}$"
    with pytest.raises(UserError, match=message):
        Parallel(fsdp=2).mesh(batch_size)
    for size in map(int, nearest.split(", ")):
        Parallel(fsdp=2).mesh(size)


@pytest.mark.parametrize(
    ("fsdp", "whole", "part"),
    [
        (8, (16, 64), (16, 8)),
        (8, (64, 16), (8, 16)),
        (8, (3, 24, 16), (3, 3, 16)),
        (8, (65, 16), (65, 2)),  # the largest axis does not divide
        (4, (65, 6, 8), (65, 6, 2)),
        (8, (3, 5), (3, 5)),  # no axis divides
        (8, (4, 100), (4, 100)),
        (8, (), ()),
        (8, (8,), (8,)),  # one number a device: too small
        (8, (16,), (2,)),
        (2, (3,), (3,)),
        (1, (64, 64), (64, 64)),
    ],
)
def test_without_a_rule_the_largest_axis_that_divides_is_split(fsdp, whole, part):
    assert shards(data=8 // fsdp, fsdp=fsdp, x=whole) == part


def test_rules_win_over_the_fallback_and_the_first_match_wins():
    rules = [("kernel$", P(None, "fsdp")), ("e", P()), ("kernel", P("fsdp"))]
    whole = dict.fromkeys(("kernel", "embed", "other_kernel", "bias"), (64, 16))
    assert shards(rules, **whole) == {
        "kernel": (64, 2),
        "embed": (64, 16),
        "other_kernel": (64, 2),
        "bias": (8, 16),
    }
    assert shards(rules[::-1], **whole)["kernel"] == (64, 2)  # P("fsdp"): the last axis
    assert shards(rules[1:], **whole)["kernel"] == (64, 16)


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ((30, 64), (30, 8)),  # 30 does not divide: the other dimension does
        ((64, 30), (8, 30)),
        ((30, 30), (30, 30)),
        ((4, 30, 64), (4, 30, 8)),
    ],
)
def test_a_rule_that_does_not_divide_leaves_fsdp_another_dimension(whole, part):
    assert shards([("kernel", P("fsdp", "tensor"))], kernel=whole) == part
    sizes = dict.fromkeys(("replica", "pipeline", "data", "context"), 1) | {"fsdp": 2, "tensor": 4}
    found = parallel.placement("kernel", (3, 8), sizes, [("kernel", P("fsdp", "tensor"))])
    assert (found.spec, found.whole) == (P(None, "tensor"), ("fsdp",))


def test_rules_read_paths():
    mesh = Parallel(fsdp=8).mesh(8)
    kernel = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    tree = {"layers": {0: {"kernel": kernel}, 1: {"kernel": kernel}}, "none": None}
    placed = parallel.place(tree, mesh, [("^layers/1/kernel$", P())])
    assert placed["none"] is None
    assert not placed["layers"][0]["kernel"].is_fully_replicated
    assert placed["layers"][1]["kernel"].is_fully_replicated


@pytest.mark.parametrize(
    ("whole", "part"),
    [((16, 32), (2, 32)), ((8, 16, 32), (8, 2, 32)), ((8, 8, 16, 32), (8, 8, 2, 32))],
)
def test_a_rule_serves_stacked_layers(whole, part):
    assert shards([("kernel", P("fsdp", None))], kernel=whole) == part


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_each_device_holds_its_share_of_a_big_matrix(fsdp):
    mesh = Parallel(fsdp=fsdp).mesh(8)
    matrix = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    state = optax.adam(1e-3).init({"kernel": matrix, "scale": np.float32(1)})
    placed = jax.device_put(state, parallel.place(state, mesh))
    for name, whole in (("kernel", matrix), ("mu", 0 * matrix), ("nu", 0 * matrix)):
        if name == "kernel":
            array = jax.device_put(matrix, parallel.place(matrix, mesh))
        else:
            array = getattr(placed[0], name)["kernel"]
        parts = array.addressable_shards
        assert {part.device for part in parts} == set(jax.devices())
        assert {part.data.nbytes for part in parts} == {matrix.nbytes // fsdp}
        assert len({str(part.index) for part in parts}) == fsdp
        np.testing.assert_array_equal(array, whole)
    assert placed[0].count.is_fully_replicated


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_a_batch_is_split_over_all_devices(fsdp):
    mesh = Parallel(fsdp=fsdp).mesh(16)
    batch = {
        "inputs": np.arange(16 * 5, dtype=np.int32).reshape(16, 5),
        "weights": np.linspace(0, 1, 16, dtype=np.float32),
        "reset": np.arange(16) % 2 == 0,
    }
    placed = parallel.put(batch, mesh)
    assert placed.keys() == batch.keys()
    for key, array in placed.items():
        assert array.dtype == batch[key].dtype
        assert array.sharding.is_equivalent_to(parallel.batched(mesh), array.ndim)
        parts = sorted(array.addressable_shards, key=lambda part: part.index[0].start)
        assert {part.device for part in parts} == set(jax.devices())
        rows = [np.asarray(part.data) for part in parts]
        assert [len(r) for r in rows] == [2] * 8
        np.testing.assert_array_equal(np.concatenate(rows), batch[key])


PROCESS = """
import json
import sys

import jax
import numpy as np

port, processes, me = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.distributed.initialize(f"localhost:{port}", processes, me)

import tiny
from jax.experimental import multihost_utils

from research import UserError
from research.data.splits import Examples, Streams
from research.parallel import Block, Parallel, share
from research.setup import prepare

Streams.threads = 1  # so that its batches are made one by one
taken, take = [], Examples.take


def noted(self, index):
    taken.append(len(index))
    return take(self, index)


def whole(array):
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array).tolist()


found = {}
for family in (tiny.mlp, tiny.lstm):
    setup = prepare(family(steps=9), jax.devices())
    state, step, losses, batches = setup.initial(), setup.step(), [], []
    assert (setup.together > 1) == (family is tiny.mlp)
    Examples.take = noted
    for i, fed in enumerate(setup.feed(0, 9)):
        batch = jax.jit(Block.at)(fed, i) if isinstance(fed, Block) else fed
        batches.append({name: whole(array) for name, array in batch.items()})
        state, metrics = step(state, fed, setup.root)
        losses.append(float(metrics["loss"].total / metrics["loss"].weight))
    found[family.__name__] = {
        "batches": batches,
        "losses": losses,
        "metrics": setup.evaluate(state, "validation"),
        "params": [whole(p) for p in jax.tree.leaves(state.params)],
    }
    Examples.take = take
found["taken"] = sum(taken)
mesh = Parallel().mesh(8, [jax.devices()[i] for i in (0, 2, 1, 3)])
share(mesh, 8)
mixed = mesh.devices.reshape(-1)[[0, 2, 1, 3]].reshape(mesh.devices.shape)
try:
    share(jax.sharding.Mesh(mixed, mesh.axis_names), 8)
except UserError as error:
    found["apart"] = str(error)
print("found", json.dumps(found))
"""


def by_processes(processes):
    """What each of several processes, of 4 devices in all, feeds and finds in nine steps."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(["tests", str(pathlib.Path.cwd())])
    environment = os.environ | {"XLA_FLAGS": tiny.flags(), "PYTHONPATH": paths}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(processes), str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        # At once: a process whose pipe is full would keep the others from their end.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ended = list(pool.map(lambda process: process.communicate(timeout=300), started))
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
    lines = [next(x for x in out.splitlines() if x.startswith("found ")) for out, _ in ended]
    return [json.loads(line.removeprefix("found ")) for line in lines]


def test_processes_read_their_shares_and_step_as_one_does():
    (one,) = by_processes(1)
    # 9 batches of 16 rows, and two of the 21 that validate.
    assert one["taken"] == 9 * 16 + 2 * 16
    for processes, found in [(n, found) for n in (2, 4) for found in by_processes(n)]:
        assert found["taken"] == one["taken"] / processes
        # Two devices of a process may have others between them; one has not.
        assert ("must follow one another" in found.get("apart", "")) == (processes == 2)
        for family in ("mlp", "lstm"):
            assert found[family]["batches"] == one[family]["batches"]
            for part in ("losses", "metrics", "params"):
                jax.tree.map(
                    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
                    found[family][part],
                    one[family][part],
                )


def test_placing_leaves_what_is_placed_as_it_was():
    mesh = Parallel().mesh(8)
    space = np.zeros(8 * 16 + 16, np.float32)
    aligned = space[-space.ctypes.data % 64 // 4 :][: 8 * 16].reshape(8, 16)  # no copy is needed
    aligned[:] = 1
    given = {"host": aligned, "device": jnp.ones((8, 16))}
    placed = parallel.put(given, mesh)
    aligned[:] = 2
    assert placed["host"].sum() == placed["device"].sum() == given["device"].sum() == 8 * 16


def test_replicated_is_whole_everywhere():
    x = jax.device_put(np.arange(8.0), parallel.replicated(Parallel(fsdp=4).mesh(8)))
    assert [part.data.shape for part in x.addressable_shards] == [(8,)] * 8
