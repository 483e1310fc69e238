"""Published throughput: the MFU that follows from the count is the one that was published."""

import dataclasses
import json
import pathlib
import re

import ahead
import pytest

from research.bench import bounds, commands, plan, throughput
from research.bench.throughput import Run, span
from research.models.transformer import TransformerConfig


@pytest.fixture(scope="module")
def rows():
    return list(throughput.measure())


def parameters(m):
    """Of a layer's products, and of the embedding."""
    keys = m.kv_heads or m.heads
    attention = m.width * m.width // m.heads * (2 * m.heads + 2 * keys)
    inner = (3 if m.mlp == "swiglu" else 2) * m.width * (m.feed_forward or 4 * m.width)
    return attention + inner, m.vocab * m.width


@pytest.mark.parametrize("name", ["Llama 2 7B", "Llama 3 405B", "GPT-2 124M"])
def test_a_tokens_flops_are_those_of_the_closed_forms(name):
    """6 for each parameter in a product and, of attention, 12 L T D (Kaplan et al. 2020, 2.1)."""
    m = throughput.model(name, 1024)
    layer, embedding = parameters(m)
    products, attention = m.layers * layer + embedding, 12 * m.layers * 1024 * m.width
    norms = (2 * m.layers + 1) * m.width
    assert throughput.per_token(m) == {
        "full": 6 * products + attention,
        "causal": 6 * products + attention // 2,
        "6N": 6 * (products + (0 if m.tied else embedding) + norms) + attention,
    }


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama 2 7B", 6.738),
        ("Llama 2 13B", 13.016),
        ("Llama 2 70B", 68.977),
        ("Llama 3 8B", 8.030),
        ("Llama 3 8B, long", 8.030),
        ("Llama 3 70B", 70.554),
        ("Llama 3 405B", 405.853),
        ("GPT-2 124M", 123.6e-3),
    ],
)
def test_shapes_have_the_parameters_that_their_weights_have(name, billions):
    m = throughput.model(name, 1024)
    layer, embedding = parameters(m)
    norms = (2 * m.layers + 1) * m.width
    total = m.layers * layer + embedding * (1 if m.tied else 2) + norms
    assert total / 1e9 == pytest.approx(billions, abs=5e-4)


def test_published_mfu_follows_by_a_convention(rows):
    """MaxText counts masked attention in full until July 2025 and halved since; torchtitan counts
    an embedding, until it leaves it out; nanoGPT counts it as it is its output layer."""
    found = [(row.run.model, row.run.chip, *row.agreeing) for row in rows if row.run.published]
    assert found == [
        ("Llama 2 70B", "tpu-v6e", "full"),
        ("Llama 3 8B", "tpu-v6e", "full"),
        ("Llama 3 8B", "tpu-v6e", "full"),
        ("Llama 3 70B", "tpu-v6e", "full"),
        ("Llama 3 405B", "tpu-v6e", "full"),
        ("Llama 3 405B", "tpu-v5p", "causal"),
        ("Llama 2 70B", "tpu-v5p"),  # its tokens a second are called approximate
        ("Llama 3 8B, long", "tpu-v5p", "causal"),
        ("Llama 3 8B, long", "tpu-v5p", "causal"),
        ("Llama 3 8B", "h100-sxm", "full"),
        ("Llama 3 8B", "h100-sxm", "full"),
        ("Llama 3 8B", "a100-sxm4-80gb", "6N"),
        ("Llama 3 70B", "a100-sxm4-80gb", "6N"),
        ("Llama 2 13B", "a100-sxm4-80gb", "6N"),
        ("Llama 2 70B", "a100-sxm4-80gb", "6N"),
        ("Llama 2 7B", "a100-sxm4-80gb"),  # two documents' figures
        ("GPT-2 124M", "a100-sxm4-80gb", "6N"),
    ]


def test_no_published_run_is_faster_than_its_chip(rows):
    for row in rows:
        assert 0.2 < row.mfu["causal"][0] < 0.75, row.run
        # Masked attention in full may be more than a chip can do: then it is no MFU.
        assert (row.mfu["full"] is None) == (row.run.context > 10_000)


def test_what_is_printed_is_known_to_its_last_digit():
    assert span("7207.336") == pytest.approx((7207.3355, 7207.3365), abs=1e-9)
    assert span("39") == (38.5, 39.5)
    given = {"model": "Llama 2 7B", "context": 4096, "chip": "tpu-v5p", "devices": 4, "source": ""}
    steps = Run(**given, seconds="2.0", batch=8, mfu="50")
    assert steps.rate == (8 * 4096 / 4 / 2.05, 8 * 4096 / 4 / 1.95)
    assert steps.published == (0.495, 0.505)
    logged = Run(**given, tokens="10", teraflops="229.5")
    assert logged.published == pytest.approx((229.45 / 459, 229.55 / 459))
    assert Run(**given, tokens="10").published is None


def test_a_rate_that_does_not_give_the_published_mfu_agrees_with_nothing(rows):
    first = rows[0]
    faster = dataclasses.replace(first.run, tokens="1000.000")
    assert throughput.Row(faster, first.flops).agreeing == []


def test_every_run_has_a_source_and_every_figure_its_words(rows, capsys, tmp_path):
    for run in throughput.runs():
        assert re.fullmatch(r"https://github\.com/\S+", run.source)
        assert (run.tokens is None) != (run.seconds is None)
        assert run.mfu is None or run.teraflops is None
    commands.KINDS["published"](["--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == throughput.table(rows)
    docs = pathlib.Path(__file__).parents[1] / "docs" / "published.md"
    assert printed in docs.read_text()
    found = json.loads((tmp_path / "found.json").read_text())
    assert [each["agreeing"] for each in found] == [row.agreeing for row in rows]
    assert found[-1]["published_mfu"] is None


def test_a_published_time_is_above_what_its_step_takes_at_least(monkeypatch):
    """nanoGPT on eight A100. Products bind, so that the bound is passed by as much as MFU says; by
    cuDNN's attention, where it is there, half of what is masked is not in the bound."""
    ahead.devices("cuda")  # skips
    (run,) = (run for run in throughput.runs() if run.rows and run.model == "GPT-2 124M")
    monkeypatch.setattr(throughput, "runs", lambda: [run])
    (row,) = bounds.measure()
    assert (row.planned.target, row.planned.mesh) == ("a100:8", {"data": 8})
    assert row.planned.examples == run.batch
    low, high = row.seconds
    assert low == pytest.approx(0.562175)
    assert high == pytest.approx(0.562185)
    (found,) = (each for each in throughput.measure())
    full, causal = (1 / found.mfu[name][1] for name in ("full", "causal"))
    if row.planned.attention == "XLA":
        assert row.over == pytest.approx(full, rel=1e-3)
    else:
        assert full < row.over < causal
    step = row.planned.step_seconds
    assert step["low"] < low < high < step["high"]
    assert json.loads(json.dumps(row.to_json(), allow_nan=False))["over_bound"] == row.over
    _, line = bounds.table([row]).splitlines()
    assert line.split()[:4] == ["GPT-2", "124M", "a100:8", "60"]


def test_what_a_tpu_recomputes_is_not_in_the_bound(monkeypatch):
    """Where only parts of a batch fit, with their layers recomputed, the bound is of the products
    that are made for the first time: by splash attention, of what is not masked in blocks."""
    ahead.devices("tpu")  # skips
    model = TransformerConfig(
        vocab=512, context=2048, layers=8, heads=4, width=512, feed_forward=8192, scan=True
    )
    run = throughput.Run(
        model="small", context=2048, chip="tpu-v6e", devices=1, rows=32, tokens="1e4", source=""
    )
    monkeypatch.setattr(throughput, "runs", lambda: [run])
    monkeypatch.setattr(throughput, "model", lambda name, context: model)
    with ahead.little_effort("tpu"):
        (row,) = bounds.measure()
    planned = row.planned
    assert (planned.status, planned.attention) == ("ok", "splash")
    scores = 2 * model.layers * 32 * 2048 * 2048 * 512
    done = planned.model_flops - 6 * scores * 6 // 16  # 10 blocks of 16
    assert planned.flops - planned.recomputed == done
    assert planned.recomputed > 0.15 * done
    assert row.bound == pytest.approx(done / row.run.peak, rel=1e-9)
    assert row.to_json()["bound"] == row.bound < planned.bounds["at_least"]
    assert "products" in bounds.table([row])


def test_a_step_that_is_refused_has_no_bound():
    run = next(run for run in throughput.runs() if run.rows)
    planned = plan.Row(
        target="v6e:256", status="does not fit", reason="refused", chips=1, devices=1, mesh={},
        state=1, model_flops=1, model_qualifier="exact", examples=1, tokens=None,
    )  # fmt: skip
    row = bounds.Row(run, planned)
    assert row.over is None
    assert "unavailable: does not fit, refused" in bounds.table([row])


def test_layouts_are_of_all_devices():
    for run in throughput.runs():
        if run.rows:
            assert run.chip in bounds.KINDS
            assert not run.batch or run.batch == run.rows * run.devices
            assert run.devices % max(run.replica, 1) == 0
