import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from research import compute
from research.compute import chips, peaks, roofline
from research.compute.report import tree

A, B = 2 * 7 * 3 * 5, 2 * 7 * 5 * 2


def two_layers(params, x):
    for name in ("a", "b"):
        with jax.named_scope(name), jax.named_scope("dense"):
            x = jnp.tanh(x @ params[name])
    return x.sum()


PARAMS = {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 2))}
X = jnp.ones((7, 3))


@pytest.fixture
def found():
    return compute.report(jax.grad(two_layers), PARAMS, X)


def test_json_holds_the_closed_form(found):
    figures = json.loads(json.dumps(found.json()))
    assert figures["model_flops"] == 2 * A + 3 * B  # no gradient of the input
    assert figures["by_phase"] == {"forward": A + B, "backward": A + 2 * B}
    assert figures["by_module"] == {"a.dense": 2 * A, "b.dense": 3 * B}
    assert figures["qualifier"] == "exact"
    assert figures["reasons"] == []
    assert figures["program"]["matmul_flops"] == 2 * A + 3 * B
    assert figures["differences"] == []


def test_what_was_compiled_is_not_compiled_again(found):
    traced = jax.jit(jax.grad(two_layers)).trace(PARAMS, X)
    again = compute.report(traced, compiled=traced.lower().compile())
    assert again.json() == found.json()


def test_a_parent_is_the_sum_of_what_it_holds():
    rows = tree({"a.x": 1, "a.y": 2, "b.x": 4, "": 8})
    assert rows == [
        *[("a", 3), ("  x", 1), ("  y", 2)],
        *[("b", 4), ("  x", 4)],
        ("(no module)", 8),
    ]


def test_the_page_says_how_far_a_figure_can_be_trusted():
    def step(x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y, x)

    found = compute.report(step, jnp.ones((4, 4)))
    assert "128  lower bound" in str(found)
    assert "trips" in str(found)
    assert found.line().startswith("model FLOPs a step: 128 (lower bound)")
    assert found.json()["program"]["qualifier"] == "estimated"


def test_the_page_shows_model_executed_and_reported_side_by_side():
    def scanned(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=50)[0].sum()

    found = compute.report(jax.grad(scanned), jnp.ones((64, 64)), jnp.ones((64, 64)))
    text = str(found)
    model = 50 * 3 * 2 * 64**3
    assert f"{model:,}  exact" in text
    assert "exact; 1.000 of model" in text
    assert 1 / 50 < found.xla_flops / model < 1.1 / 50
    assert f"{found.xla_flops / model:.3f} of executed" in text
    assert f"-{model * 49 // 50:,}  loop bodies, counted once by XLA" in text


def test_memory_falls_into_what_holds_it():
    def step(params, opt_state, batch):
        grads = jax.grad(two_layers)(params, batch)
        moved = jax.tree.map(lambda m, g: 0.9 * m + g, opt_state, grads)
        return jax.tree.map(lambda p, m: p - m, params, moved), moved

    step = jax.jit(step, donate_argnums=(0, 1))
    found = compute.report(step, PARAMS, PARAMS, X)
    memory = found.program.memory
    parameters = 4 * (3 * 5 + 5 * 2)
    assert memory.arguments_by == {
        "params": parameters,
        "opt_state": parameters,
        "batch": 4 * 7 * 3,
    }
    assert memory.aliased == 2 * parameters
    assert sum(memory.arguments_by.values()) == memory.arguments
    for name in ("parameters", "optimizer state", "batch", "temporaries (activations)"):
        assert name in str(found)


def test_memory_of_one_device_of_eight():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct((3, 3), jnp.float32, sharding=NamedSharding(mesh, P()))
    found = compute.report(lambda w, x: jnp.sum(x @ w), w, x, mesh=mesh)
    assert found.program.memory.arguments_by == {"w": 36, "x": 2 * 3 * 4}
    assert found.devices == 8
    assert found.program.matmul_flops == 2 * 2 * 3 * 3
    assert "executed, on 8 devices" in str(found)
    assert "all-reduce over data (8 devices): 4 bytes in 1 messages" in str(found)
    assert found.json()["per_device"]["model_flops"] == 2 * 2 * 3 * 3


H100 = chips.chips()["h100-sxm"]


def on(found, seconds, *rates):
    return compute.Report(
        count=found.count, program=found.program, rates=rates, seconds=seconds, xla_flops=None
    )


def test_mfu_is_of_model_flops_and_hfu_of_executed_ones():
    def layer(w, x):
        return jax.checkpoint(lambda x: jnp.tanh(x @ w))(jnp.tanh(x @ w)).sum()

    w = jnp.ones((64, 64))
    found = compute.report(jax.value_and_grad(layer), w, w)
    one = 2 * 64**3
    assert found.count.model_flops == 5 * one
    assert found.count.by_phase["recompute"] == one
    rates = roofline.of_chip(H100)
    seconds = 1e-6
    figures = on(found, seconds, rates).utilization(rates)
    peak = H100.peaks["tf32"]
    assert figures["MFU"].value == pytest.approx(5 * one / seconds / peak)
    executed = found.program.matmul_flops
    assert figures["HFU"].value == pytest.approx(executed / seconds / peak)


def test_mfu_names_the_causal_convention():
    def attend(q):
        with jax.named_scope("causal"):
            return q @ q.T

    found = compute.report(attend, jnp.ones((32, 8)))
    rates = roofline.of_chip(H100)
    figures = on(found, 1.0, rates).utilization(rates)
    dense, halved = figures["MFU"].value, figures["MFU, causal attention halved"].value
    assert halved == pytest.approx(dense / 2)
    assert "causal attention halved" in str(on(found, 1.0, rates))


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be_is_refused(found, seconds):
    odd = on(found, seconds, roofline.of_chip(H100))
    assert f"time of a step unavailable: a step cannot take {seconds} seconds" in str(odd)
    figures = json.loads(json.dumps(odd.json(), allow_nan=False))
    assert figures["seconds"] is None
    assert figures["utilization"][0]["MFU"]["value"] is None


def test_arguments_by_the_names_of_the_pages_rows():
    found = compute.report(lambda code: code @ code, jnp.ones((8, 8)))
    memory = dataclasses.replace(found.program.memory, code=100)
    program = dataclasses.replace(found.program, memory=memory)
    page = str(dataclasses.replace(found, program=program))
    for size in (256, 100):
        assert f"  {'code':40}{size:>22,}" in page


def test_a_program_in_primitives_that_do_not_lower_by_themselves():
    a = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    found = compute.report(jax.scipy.linalg.expm, a)
    assert found.count.qualifier == "upper bound"
    assert found.program.memory.arguments == 4 * 8 * 8


def test_what_is_not_compiled_is_refused():
    lowered = jax.jit(jnp.tanh).lower(X)
    for call in (
        lambda: compute.program(lowered),
        lambda: compute.report(jnp.tanh, X, compiled=lowered),
    ):
        with pytest.raises(ValueError, match="Lowered gives no HLO text: not a compiled program"):
            call()


def test_no_number_above_a_hundred_percent(found):
    rates = roofline.of_chip(H100)
    page = str(on(found, 1e-15, rates))
    assert "MFU unavailable" in page
    assert "not waited for" in page
    figures = on(found, 1e-15, rates).json()["utilization"][0]
    assert figures["MFU"]["value"] is None


def test_a_device_without_rates_says_so(found, monkeypatch, tmp_path):
    monkeypatch.setenv("ERGON_CACHE", str(tmp_path))
    unknown = compute.report(jax.grad(two_layers), PARAMS, X, seconds=1.0)
    assert unknown.rates == []
    assert "times unavailable: no peak is known" in str(unknown)
    assert "MFU unavailable: no peak is known" in str(unknown)


def test_measured_rates_serve_a_device_that_no_table_has(monkeypatch, tmp_path):
    monkeypatch.setenv("ERGON_CACHE", str(tmp_path))
    device = jax.devices()[0]
    made = peaks.Peaks(
        device=peaks.name_of(device),
        platform="cpu",
        versions=peaks._versions(),
        date="2026-01-02",
        matmul={"float32": 1e9},
        bandwidth=((1000, 1e8), (100_000, 1e7)),
    )
    peaks.save(made)
    found = compute.report(jax.grad(two_layers), PARAMS, X, seconds=1.0)
    (rates,) = found.rates
    assert rates.source == "measured, 2026-01-02"
    figures = found.utilization(rates)
    assert figures["MFU"].value == pytest.approx((2 * A + 3 * B) / 1e9)


def test_a_program_that_cannot_be_traced_is_one_line():
    with pytest.raises(ValueError, match="cannot be traced") as caught:
        compute.report(lambda x: float(x), jnp.ones(()))
    assert "\n" not in str(caught.value)


def test_the_device_tells_its_peak_where_it_can(found):
    class Telling:
        def memory_stats(self):
            return {"peak_bytes_in_use": 12345}

    assert found.after(1.0).peak_bytes is None  # a CPU does not
    told = dataclasses.replace(found, device=Telling()).after(1.0)
    assert told.peak_bytes == told.json()["peak_bytes"] == 12345
    assert "measured, since the device started" in str(told)
