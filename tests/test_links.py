"""Times of messages, by hand, and the levels that devices of absent machines are near at."""

import jax
import numpy as np
import pytest

from research.compute import chips, links, targets
from research.compute.links import Collective, Level, Links, Wiring

GPU = Links(every=400e9, network=50e9)
TPU = Links(every=180e9, torus=45e9, network=6e9)
NODE, NODES = Level("node", 8), Level("network", 4)
GB = 10**9


def one(kind, size, *span, held=8 * GB):
    return Collective(kind, held, size, 1, None, span or None)


@pytest.mark.parametrize(
    ("kind", "span", "seconds"),
    [
        # Within a node; across nodes each of 8 sends its eighth; one GPU of each of 4 nodes.
        ("all-gather", (NODE,), 7 / 400),
        ("all-gather", (NODE, NODES), 7 / 400 + 3 / 4 / 50),
        ("all-gather", (NODES,), 6 / 50),
        ("reduce-scatter", (NODE, NODES), 7 / 400 + 3 / 4 / 50),
        ("all-reduce", (NODE, NODES), 2 * (7 / 400 + 3 / 4 / 50)),
        # What is exchanged is not shared: 24 of 32 parts leave the node.
        ("all-to-all", (NODE, NODES), 7 / 400 + 6 / 50),
        ("collective-permute", (NODE,), 8 / 400),
        ("collective-permute", (NODE, NODES), 8 / 50),
        ("collective-permute", (), 8 / 400),
    ],
)
def test_gpus_by_hand(kind, span, seconds):
    size = int(np.prod([level.size for level in span])) or 8
    assert GPU.by_rings(one(kind, size, *span)) == pytest.approx(seconds)


RING, LINE = Level("torus", 16, rings=(16,)), Level("torus", 4, lines=(4,))


@pytest.mark.parametrize(
    ("kind", "span", "seconds"),
    [
        ("all-gather", (RING,), 7.5 / 90),
        ("all-gather", (LINE,), 6 / 45),
        ("all-gather", (Level("torus", 64, (16,), (4,)),), 8 * 63 / 64 / 135),
        ("all-reduce", (Level("chip", 2), RING), 2 * (4 / 180 + 4 * 15 / 16 / 90)),
        ("all-reduce", (RING, Level("network", 2)), 2 * (7.5 / 90 + 0.25 / 6)),
        # Of a ring a quarter of what gathering the parts takes (Austin et al., 2025).
        ("all-to-all", (RING,), 8 * 16 / 4 / 90),
        ("all-to-all", (LINE,), 8 * 4 / 4 / 45),
        ("all-to-all", (Level("torus", 2, lines=(2,)),), 4 / 45),
        ("collective-permute", (RING,), 8 / 45),
        ("collective-permute", (LINE,), 8 / 45),
    ],
)
def test_tpus_by_hand(kind, span, seconds):
    size = int(np.prod([level.size for level in span]))
    assert TPU.by_rings(one(kind, size, *span)) == pytest.approx(seconds)


@pytest.mark.parametrize("rates", [GPU, TPU])
@pytest.mark.parametrize(
    "kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]
)
def test_no_estimate_is_below_the_bound(kind, rates):
    near = [(NODE,), ()] if rates is GPU else [(RING,), (Level("chip", 2), LINE), ()]
    for inside in near:
        for outside in ((NODES,), (Level("network", 2),), ()):
            span = inside + outside
            if not span:
                continue
            size = int(np.prod([level.size for level in span]))
            c = one(kind, size, *span)
            assert 0 < rates.at_least(c) <= rates.by_rings(c)


def test_what_leaves_a_node_bounds_a_step():
    # 8 GB x 3/4 over four nodes, from 8 GPUs of 50 GB/s each.
    found = GPU.at_least(one("all-gather", 32, NODE, NODES))
    assert found == pytest.approx(max(8 * 31 / 32 / 450, 6 / 8 / 50))
    assert GPU.at_least(one("all-gather", 4, NODES)) == pytest.approx(6 / 50)
    assert GPU.at_least(one("all-to-all", 32, NODE, NODES)) == pytest.approx(6 / 50)


def test_a_network_that_is_not_known_takes_an_unknown_time():
    near = Links(every=400e9)
    for found in (near.by_rings, near.at_least):
        assert np.isnan(found(one("all-reduce", 16, NODE, Level("network", 2))))
        assert found(one("all-reduce", 8, NODE)) > 0


def test_rates_by_the_table():
    table = chips.chips()
    h100, v5e, v7 = (links.of_chip(table[k]) for k in ("h100-sxm", "tpu-v5e", "tpu-v7"))
    assert h100 == Links(every=450e9, network=50e9)
    assert v5e == Links(every=200e9, torus=50e9, network=3.125e9)
    assert v7 == Links(every=300e9, torus=50e9, network=6.25e9)  # of one of a chip's two devices
    assert links.of_chip(table["rtx-4090"]) == Links(every=32e9)  # through the host
    assert links.of_chip(table["tpu-v2"]) is None


def wired(text, shape):
    """Devices of a place, row by row, in a mesh, and groups along each of its axes."""
    found = targets.devices(targets.place(text))
    if found[0].platform == "tpu":
        found.sort(key=lambda d: (getattr(d, "slice_index", 0), d.coords[::-1], d.core_on_chip))
    ids = np.arange(len(found)).reshape(shape)
    return Wiring(found), [
        np.moveaxis(ids, axis, -1).reshape(-1, n).tolist() for axis, n in enumerate(shape)
    ]


@pytest.mark.parametrize(
    ("text", "shape", "spans"),
    [
        ("h100:32", (4, 8), [(NODES,), (NODE,)]),
        ("h100:32", (2, 16), [(Level("network", 2),), (NODE, Level("network", 2))]),
        ("h100:4", (4,), [(Level("node", 4),)]),
        ("v5e:4x4", (4, 4), [(LINE,), (LINE,)]),
        ("v5e:16x16", (16, 16), [(RING,), (RING,)]),
        ("v5e:16x16", (32, 8), [
            (Level("torus", 32, (16,), (2,)),), (Level("torus", 8, (), (8,)),)
        ]),
        ("v5e:16x16", (256,), [(Level("torus", 256, (16, 16)),)]),
        ("v5e:2x2:2", (2, 4), [
            (Level("network", 2),), (Level("torus", 4, (), (2, 2)),)
        ]),
        ("v5p:4x4x4", (64,), [(Level("torus", 64, (4, 4, 4)),)]),
        ("v5p:2x2x4", (16,), [(Level("torus", 16, (), (2, 2, 4)),)]),
        ("tpu7x:4", (8,), [(Level("chip", 2), Level("torus", 4, (), (2, 2)))]),
    ],
)  # fmt: skip
def test_the_levels_of_absent_machines(text, shape, spans):
    if not targets.installed(text.partition(":")[0]):
        pytest.skip("its compiler is not installed")
    wiring, groups = wired(text, shape)
    assert [wiring.span(each) for each in groups] == spans


def test_the_group_that_reaches_furthest_counts():
    if not targets.installed("h100"):
        pytest.skip("the compiler for CUDA is not installed")
    wiring, _ = wired("h100:16", (16,))
    assert wiring.span([[0, 1], [7, 8], [2, 3]]) == (Level("network", 2),)
    assert wiring.span([[0, 1], [2, 3]]) == (Level("node", 2),)


def test_devices_that_are_not_in_the_table_have_no_levels():
    assert Wiring(jax.devices("cpu")[:2]).span([[0, 1]]) is None
