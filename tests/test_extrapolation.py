"""What is extrapolated from fewer devices, beside what is compiled for all of them."""

import dataclasses

import ahead
import pytest
import tiny

from research.bench import extrapolation, plan
from research.compute import targets
from research.compute.links import Collective, Level
from research.parallel import Parallel

CASES = [
    ("tpu", "v5e:2x2:4", "v5e:2x2:2", {"fsdp": 4}, {"data": 4, "fsdp": 4}),
    ("tpu", "v5e:2x2:4", "v5e:2x2:2", {}, {"data": 16}),
    ("tpu", "v5e:2x2:4", "v5e:2x2:2", {"replica": 4, "data": 4}, {"replica": 4, "data": 4}),
    ("cuda", "h100:32", "h100:16", {"fsdp": 4}, {"data": 8, "fsdp": 4}),
    ("cuda", "h100:32", "h100:16", {"replica": 4, "data": 2, "fsdp": 4},
     {"replica": 4, "data": 2, "fsdp": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("platform", "text", "fewer", "spread", "mesh"), CASES)
def test_it_is_what_is_compiled_for_all_of_them(monkeypatch, platform, text, fewer, spread, mesh):
    ahead.devices(platform)  # skips
    e = tiny.mlp(batch_size=64, parallel=Parallel(**spread))
    where = targets.place(text)
    whole = plan.compiled(e, where)
    monkeypatch.setattr(extrapolation, "MOST", 16 if platform == "cuda" else 8)
    row = plan.compiled(e, where)
    assert (whole.extrapolated, row.extrapolated) == (None, fewer)
    assert row.mesh == whole.mesh == mesh
    for name in ("devices", "chips", "model_flops", "examples", "tokens", "flops", "state"):
        assert getattr(row, name) == getattr(whole, name), name
    assert (whole.qualifier, row.qualifier) == ("exact", "estimated")
    assert row.memory.qualifier == "estimated"
    assert row.memory.needed == pytest.approx(whole.memory.needed, rel=0.01)
    assert row.bytes == pytest.approx(whole.bytes, rel=0.01)
    assert messages(row) == messages(whole)
    for name, seconds in whole.bounds.items():
        assert row.bounds[name] == pytest.approx(seconds, rel=0.01), name
    assert row.mfu == pytest.approx(whole.mfu, rel=0.01)


def messages(row):
    """What a device sends, by where to: XLA joins and orders messages as it likes."""
    found = {}
    for c in row.collectives:
        key = c["kind"], c["axes"], c["group_size"], tuple(c["span"])
        found[key] = found.get(key, 0) + c["bytes"] * c["count"]
    return found


def test_groups_grow_along_the_copies_alone():
    few = extrapolation.Fewer(experiment=None, place=None, times=3, axis="replica")
    near = Level("node", 8)
    within = Collective("all-gather", 64, 8, 2, ("fsdp",), (near,))
    assert few._collective(within) == within
    # Of an axis that extends over several slices, what is summed within one.
    in_slice = Collective("all-reduce", 64, 4, 2, ("replica",), (Level("torus", 4),))
    assert few._collective(in_slice) == in_slice
    summed = Collective("all-reduce", 64, 32, 2, ("replica", "fsdp"), (near, Level("network", 4)))
    wider = (near, Level("network", 12))
    assert few._collective(summed) == dataclasses.replace(summed, group_size=96, span=wider)
    gathered = dataclasses.replace(summed, kind="all-gather")
    assert few._collective(gathered).bytes == 3 * 64


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("v5p:16x16x16:4", "v5p:16x16x16:4"),
        ("v5p:16x16x16:8", "v5p:16x16x16:2"),
        ("v5p:16x16x16:9", "v5p:16x16x16:3"),
        ("h100:16384", "h100:16384"),
        ("h100:32768", "h100:16384"),
        ("h100:24576", "h100:12288"),
    ],
)
def test_what_is_compiled_for(text, part):
    e = tiny.mlp(batch_size=32768 * 9)
    found = extrapolation.fewer(e, targets.place(text))
    assert str(found.place) == part
    times = targets.place(text).chips // targets.place(part).chips
    assert (found.times, found.experiment.batch_size) == (times, e.batch_size // times)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 32769},
        {"batch_size": None},
        {"parallel": Parallel(data=1, fsdp=32768)},
        {"parallel": Parallel(data=2, fsdp=16384)},  # of half there is one copy
        {"parallel": Parallel(replica=2, data=1, fsdp=16384)},
    ],
)
def test_what_does_not_divide_is_compiled_whole(changes):
    e = tiny.mlp(**{"batch_size": 32768} | changes)
    found = extrapolation.fewer(e, targets.place("h100:32768"))
    assert (found.times, str(found.place), found.experiment) == (1, "h100:32768", e)


def test_the_longest_axis_of_copies_that_divides_is_shorter():
    e = tiny.mlp(batch_size=32768, parallel=Parallel(replica=3, data=4, fsdp=2048))
    found = extrapolation.fewer(e, targets.place("h100:24576"))
    assert (found.axis, found.times, found.experiment.parallel.data) == ("data", 2, 2)
