"""Devices to compile for that are not there, and how a step grows with their number."""

import dataclasses

import ahead
import jax
import pytest
import tiny

from research import UserError
from research.bench import scaling, throughput
from research.compute import targets
from research.local import Local
from research.models.transformer import TransformerConfig
from research.parallel import Parallel
from research.setup import prepare


@pytest.mark.parametrize(
    ("kind", "count", "name"),
    [
        ("v5e", 1, "TPU v5 lite"),
        ("v5e", 256, "TPU v5 lite"),
        ("v5p", 4, "TPU v5"),
        ("v5p", 4096, "TPU v5"),
        ("v5p", "2x2x2", "TPU v5"),
        ("h100", 4, "NVIDIA H100 80GB HBM3"),
        ("h100", 4096, "NVIDIA H100 80GB HBM3"),
    ],
)
def test_as_many_devices_as_are_asked_for(kind, count, name):
    if not targets.installed(kind):
        pytest.skip("its compiler is not installed")
    found = targets.devices(targets.place(f"{kind}:{count}"))
    assert len({device.id for device in found}) == (8 if count == "2x2x2" else count)
    assert {device.device_kind for device in found} == {name}


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_a_devices_work_stays_the_same_and_so_does_what_it_sends(target):
    ahead.devices(target)  # skips
    e = tiny.lstm(batch_size=4)
    one, four, many = scaling.measure(e, ahead.KINDS[target], (1, 4, 64), "data")
    assert one.flops == four.flops == many.flops
    assert (one.sent, one.messages) == (0, 0)
    assert [row.devices for row in (one, four, many)] == [1, 4, 64]
    assert {row.qualifier for row in (one, four, many)} == {"exact"}
    parameters = sum(x.size for x in jax.tree.leaves(prepare(e, tiny.ONE).abstract.params))
    assert four.kinds == many.kinds
    assert 4 * parameters <= four.sent <= 4 * parameters + 5 * 4


def test_devices_share_flash_attention():
    ahead.devices("tpu")  # skips
    model = TransformerConfig(vocab=256, context=128, layers=1, heads=2, width=32)
    e = throughput.experiment(model, 4)
    e = dataclasses.replace(e, attention="flash", precision="bfloat16")
    with ahead.little_effort("tpu"):
        one, four = scaling.measure(e, "v5e", (1, 4), "data")
    assert one.flops == four.flops
    assert (one.qualifier, four.kinds.keys()) == ("exact", {"all-reduce"})


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_parameters_that_are_split_are_gathered(target):
    ahead.devices(target)
    (four,) = scaling.measure(tiny.lstm(batch_size=4), ahead.KINDS[target], (4,), "fsdp")
    assert {"all-gather", "all-reduce"} <= four.kinds.keys()


def test_what_cannot_grow_so_is_refused():
    ahead.devices("cuda")
    with pytest.raises(UserError, match="--devices 9 does not divide by the other axes' 2"):
        list(scaling.measure(tiny.lstm(parallel=Parallel(tensor=2)), "h100", (9,), "data"))
    with pytest.raises(UserError, match="--devices: h100:12: h100 come up to 8"):
        list(scaling.measure(tiny.lstm(batch_size=4), "h100", (12,), "data"))


@pytest.mark.parametrize(
    ("e", "message"),
    [
        (tiny.transformer(parallel=Parallel(tensor=4)), "model.heads 2 does not divide over"),
        (tiny.mlp(parallel=Parallel(pipeline=2)), "stages are of a Transformer's scanned layers"),
        (tiny.mlp(local=Local(clients=2)), "local.clients 2 does not divide over 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model_is_refused_before_it_is_compiled(e, message):
    ahead.devices("cuda")
    with pytest.raises(UserError, match=message):
        list(scaling.measure(e, "h100", (4,), "data"))


def test_rows_that_are_evaluated_at_once_do_not_matter():
    setup = prepare(tiny.mlp(eval_batch_size=1), tiny.ONE)
    assert setup.scaled(Parallel(), jax.devices(), 8).mesh.size == 8
