"""Times and shares of peak against arithmetic by hand."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from research.compute import chips, peaks, program, roofline
from research.compute.links import Collective
from research.compute.program import Product, Program

CHIPS = chips.chips()
H100 = roofline.of_chip(CHIPS["h100-sxm"])
V5E = roofline.of_chip(CHIPS["tpu-v5e"])


def made(flops, moved, compulsory=0, collectives=(), dtype="bfloat16"):
    return Program(
        products=Counter({Product("a/dot_general", "dot", dtype): flops}),
        moved=Counter({("a/dot_general", 0): moved}),
        compulsory=compulsory,
        collectives=list(collectives),
    )


def test_times_by_hand():
    peak, bandwidth = 197e12, 819e9
    found = roofline.roofline(made(int(197e9), int(8.19e9)), V5E)
    assert found.compute == pytest.approx(1e-3)
    assert found.memory == pytest.approx(1e-2)
    assert found.communication == 0
    assert found.binds == "memory"
    assert found.overlapped == pytest.approx(1e-2)
    assert found.serial == pytest.approx(1.1e-2)
    assert found.intensity == pytest.approx(197e9 / 8.19e9)
    assert found.intensity < peak / bandwidth  # left of the ridge, where memory binds
    assert roofline.roofline(made(int(197e10), int(8.19e8)), V5E).binds == "compute"


def test_messages_by_hand():
    link = CHIPS["tpu-v5e"].interconnect_bandwidth / 2
    reduced = Collective("all-reduce", 8 * 10**9, 4, 3, ("data",))
    gathered = Collective("all-gather", 4 * 10**9, 4, 2, ("fsdp",))
    passed = Collective("collective-permute", 10**9, 4, 1)
    found = roofline.roofline(made(1, 1, collectives=[reduced, gathered, passed]), V5E)
    sent = 3 * 2 * 8e9 * 3 / 4 + 2 * 4e9 * 3 / 4 + 1e9
    assert found.communication == pytest.approx(sent / link)
    assert found.binds == "links"
    least = 3 * 8e9 * 3 / 4 + 2 * 4e9 * 3 / 4 + 1e9
    assert found.at_least == pytest.approx(least / link)


def test_messages_without_a_known_link_take_an_unknown_time():
    cpu = roofline.Rates("cpu", "measured", lambda d: (1e9, d), lambda n: 1e9, None)
    found = roofline.roofline(made(1, 1, collectives=[Collective("all-reduce", 8, 2, 1)]), cpu)
    assert found.communication is None
    assert "links" not in found.times


def test_what_may_stay_on_the_chip_binds_nothing():
    small = roofline.roofline(made(1, 10**6, compulsory=10**6), H100)
    assert small.at_least == small.compute
    large = 10 * 2**30
    found = roofline.roofline(made(1, large, compulsory=large), H100)
    bandwidth = CHIPS["h100-sxm"].memory_bandwidth
    assert found.at_least == pytest.approx((large - 256 * 2**20) / bandwidth)
    assert found.at_least < found.memory


def test_a_lower_bound_never_exceeds_an_estimate():
    found = roofline.roofline(made(10**12, 10**10, compulsory=10**10), H100)
    assert found.at_least <= found.overlapped <= found.serial


def test_utilization_by_hand():
    found = roofline.utilization({"bfloat16": 10**13}, 1e-1, 16, V5E)
    assert found.value == pytest.approx(1e13 / (0.1 * 16 * 197e12))
    assert str(found) == "3.2%"
    assert roofline.utilization({"bfloat16": 197 * 10**12}, 1.0, 1, V5E).value == 1


def test_mixed_precisions_each_have_their_peak():
    published = CHIPS["h100-sxm"].peaks
    found = roofline.utilization({"bfloat16": 10**15, "float32": 10**14}, 10.0, 1, H100)
    ideal = 1e15 / published["bfloat16"] + 1e14 / published["tf32"]
    assert found.value == pytest.approx(ideal / 10)
    highest = roofline.utilization({"float32:HIGHEST": 10**14}, 10.0, 1, H100)
    assert highest.value == pytest.approx(1e14 / published["float32"] / 10)
    assert highest.value > roofline.utilization({"float32": 10**14}, 10.0, 1, H100).value


def test_a_product_of_two_dtypes_runs_as_the_slower():
    published = CHIPS["h100-sxm"].peaks
    assert H100.peak("float32*bfloat16")[0] == published["tf32"]
    assert H100.peak("bfloat16*float32:HIGHEST")[0] == published["float32"]
    assert H100.peak("bfloat16*nonsense") is H100.peak("nonsense") is None
    assert V5E.peak("float32*bfloat16")[0] == 197e12


def test_bfloat16_that_is_asked_for_as_an_algorithm_is_bfloat16():
    rates = {"float32": 1e9, "bfloat16": 2e9}
    found = roofline.of_peaks(
        peaks.Peaks(
            device="x",
            platform="cpu",
            versions={},
            date="2026-01-02",
            matmul=rates,
            bandwidth=((1, 1.0),),
        )
    )
    for dtype in ("float32*bfloat16:BF16_BF16_F32", "bfloat16:bfloat16_bfloat16_float32_X1"):
        assert found.peak(dtype)[0] == 2e9
        assert H100.peak(dtype)[0] == CHIPS["h100-sxm"].peaks["bfloat16"]
    assert found.peak("float32:BF16_BF16_F32_X3") is None  # three products, not measured
    assert found.peak("float32*bfloat16")[0] == 1e9


@pytest.mark.parametrize(
    ("by_dtype", "seconds", "rates", "reason"),
    [
        ({"bfloat16": 199 * 10**12}, 1.0, V5E, "101% of the peak of TPU v5e"),
        ({"bfloat16": 10**12}, 1e-3, V5E, "508% of the peak of TPU v5e"),
        ({"bfloat16": 1}, 0.0, V5E, "cannot take 0.0 seconds"),
        ({"bfloat16": 1}, -1.0, V5E, "cannot take -1.0 seconds"),
        ({"bfloat16": 1}, math.nan, V5E, "cannot take nan seconds"),
        ({"bfloat16": 1}, 1.0, None, "no peak is known"),
        ({"bfloat16": 1, "complex64": 1}, 1.0, V5E, "no peak for complex64 on TPU v5e"),
    ],
)
def test_refused_with_the_reason(by_dtype, seconds, rates, reason):
    found = roofline.utilization(by_dtype, seconds, 1, rates)
    assert found.value is None
    assert reason in found.reason
    assert str(found).startswith("unavailable: ")


def test_a_peak_that_is_not_known_leaves_the_other_bounds():
    found = roofline.roofline(made(10**9, 10**9, dtype="complex64"), V5E)
    assert found.compute is None
    assert found.binds == "memory"


class Device:
    platform = "tpu"

    def __init__(self, kind, memory=None):
        self.device_kind, self.memory = kind, memory

    def memory_stats(self):
        if self.memory is None:
            raise NotImplementedError
        return {"bytes_limit": self.memory}


def test_rates_by_the_kind_of_device():
    assert roofline.datasheet(Device("TPU v5 lite")).device == "TPU v5e"
    assert roofline.datasheet(Device("TPU v5 lite", 16 * 10**9)).device == "TPU v5e"
    assert roofline.datasheet(Device("TPU v5 lite", 4 * 10**9)) is None
    assert roofline.datasheet(Device("TPU v99")) is None
    assert roofline.datasheet(jax.devices()[0]) is None


def of(fn, *args, donated=()):
    return program(jax.jit(fn, donate_argnums=donated).lower(*args).compile())


def test_a_lower_bound_holds_whichever_branch_is_taken():
    big, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1 << 20, 16), (64, 64)))
    taken = jax.ShapeDtypeStruct((), jnp.bool_)

    def branches(taken, big, w):
        def heavy(big, w):
            return jnp.sin(big).sum() + (w @ w).sum()

        return jax.lax.cond(taken, heavy, lambda big, w: 0.0, big, w)

    found = of(branches, taken, big, w)
    assert found.compulsory < 100
    assert found.matmul_flops == 2 * 64**3
    slow = roofline.Rates("chip", "datasheet", lambda d: (1.0, d), lambda n: 1e9, None)
    assert roofline.roofline(found, slow).at_least < 1e-3 < roofline.roofline(found, slow).compute


def test_a_lower_bound_of_a_loop_that_reads_rows_of_a_table():
    table = jax.ShapeDtypeStruct((1 << 20, 16), jnp.float32)
    rows = jax.ShapeDtypeStruct((4,), jnp.int32)

    def gathered(table, rows):
        return jax.lax.scan(lambda c, i: (jnp.sin(c) + table[i], None), jnp.zeros(16), rows)[0]

    assert of(gathered, table, rows).compulsory < 1000


def test_a_lower_bound_of_a_loop_has_what_one_trip_reads():
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 64), (32, 64)))

    def scanned(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=9)[0]

    assert of(scanned, w, x).compulsory >= 4 * 64 * 64


def test_bytes_that_no_fusion_spares():
    product = of(jnp.matmul, *(jax.ShapeDtypeStruct((64, 64), jnp.float32),) * 2)
    assert product.compulsory == 3 * 4 * 64 * 64
    f32 = jnp.float32
    x, w = jax.ShapeDtypeStruct((64, 32), f32), jax.ShapeDtypeStruct((32, 16), f32)
    assert of(lambda x, w: jnp.tanh(x @ w), x, w).compulsory == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    table = jax.ShapeDtypeStruct((10_000, 8), f32)
    rows = jax.ShapeDtypeStruct((4,), jnp.int32)
    looked_up = of(lambda table, rows: table[rows] * 2.0, table, rows)
    assert looked_up.compulsory < 1000  # the rows, not the table
    kept = of(lambda table, x: (table, x + 1), table, x, donated=(0, 1))
    assert kept.compulsory == 2 * 4 * 64 * 32
