"""Files of the suite that no machine measured, for the tests of what reads them."""

import json

from research.bench import result as results
from research.bench.result import FIGURES, Figure, Machine, Result, Roof, Row, unavailable
from research.compute.peaks import Peaks

VALUES = {
    "parameters": 1000,
    "model_flops": 10**9,
    "executed_flops": 10**9,
    "moved_bytes": 10**8,
    "spread": 0.02,
    "others": 0.01,
    "input_wait": -0.01,
    "mfu_measured": 0.25,
    "hfu_measured": 0.25,
    "memory": 2**20,
    "compile_seconds": 2.0,
    "first_step_seconds": 4.0,
    "target_reached": 0.97,
    "target_steps": 200,
}
NONE = "mfu mfu_causal hfu mfu_causal_measured memory_peak joules_per_step".split()
NONE += ["target_joules", "target_money"]


def row(name="cnn", step=0.01, **figures):
    """A family whose step takes so many seconds, give or take 2%."""
    rounds = tuple(step * (1 + 0.02 * (k % 5 - 2) / 2) for k in range(25))
    found = {k: Figure(value=v, qualifier="measured", how="made up") for k, v in VALUES.items()}
    found |= {k: unavailable("made up") for k in NONE}
    timed = {
        "step_seconds": (step, 0.99 * step, 1.01 * step),
        "examples_per_second": (64 / step, 63 / step, 65 / step),
        "step_p50": (step, None, None),
        "step_p95": (1.2 * step, None, None),
        "target_seconds": (200 * step, None, None),
    }
    found |= {
        k: Figure(value=v, qualifier="measured", how="made up", low=low, high=high)
        for k, (v, low, high) in timed.items()
    }
    found |= figures
    return Row(
        name=name,
        config=f"configs/{name}_digits.py",
        experiment={"steps": 400},
        data="0" * 64,
        target="validation accuracy >= 0.97",
        intensity=10.0,
        binds="memory",
        rounds=rounds,
        figures={k: found[k] for k in FIGURES},
    )


def result(*rows, **changes):
    peaks = Peaks(
        device="A CPU, 2 cores",
        platform="cpu",
        versions={"jax": "0.10.2", "jaxlib": "0.10.2"},
        date="2026-01-02",
        matmul={"float32": 4e11},
        bandwidth=((2**28, 5e10),),
    )
    fields = {
        "suite": results.VERSION,
        "date": "2026-01-02T03:04:05+00:00",
        "machine": Machine(
            device="A CPU, 2 cores",
            platform="cpu",
            devices=1,
            host="A CPU, 2 cores",
            driver="cpu",
            load=0.1,
            memory=None,
            price=None,
        ),
        "environment": {"versions": {"jax": "0.10.2"}, "python": "3.11.7"},
        "noise": 0.1,
        "peaks": peaks,
        "roofs": (Roof(source="measured, 2026-01-02", flops=4e11, bandwidth=5e10),),
        "rows": rows or (row(), row("lstm", 0.1)),
    }
    return Result(**(fields | changes))


def written(path, found):
    """The file of a result, or of any JSON."""
    data = results.to_json(found) if isinstance(found, Result) else found
    path.write_text(json.dumps(data))
    return path


def plan(config="configs/cnn_digits.py", *targets):
    """As scripts/plan.py --json writes it."""
    step = {"value": 0.001, "low": 0.0005, "high": 0.002, "qualifier": "estimated"}
    hours = {"value": 2.5, "unit": "hours", "qualifier": "estimated", "basis": "", "low": 1.25}
    money = {"value": None, "qualifier": "unavailable", "basis": "no list price"}
    ok = {
        "target": "h100:8",
        "status": "ok",
        "step_seconds": step,
        "examples_per_second": 64000,
        "mfu": 0.3,
        "model_flops": 10**9,
        "chips": 8,
        "run": {
            "hours": hours | {"high": 5.0},
            "energy": {"value": 14.0, "qualifier": "estimated", "basis": "PUE 1.1"},
            "money": money,
            "warnings": ["the price is old"],
        },
    }
    small = {"target": "v5e:16", "status": "does not fit", "reason": "3 GiB too many"}
    return {"config": config, "versions": {}, "targets": [ok, small, *targets]}
