"""The scripts as a user calls them: real processes, from the root, on real files."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import benchmarks
import pytest
import tiny

ROOT = pathlib.Path(__file__).parents[1]
MLP = ["configs/mlp_cancer.py", "--steps", "60", "--log_every", "20"]


def script(name, *args):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"XLA_FLAGS": tiny.flags()}
    command = [sys.executable, f"scripts/{name}.py", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def ok(name, *args):
    result = script(name, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "mlp"
    return workdir, ok("train", *MLP, "--workdir", workdir)


def test_train_explains_where_parameters_are_put_and_makes_nothing(tmp_path):
    spread = ["--parallel.fsdp", "2", "--parallel.tensor", "2", "--workdir", tmp_path / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "4")
        out = ok("train", *MLP, *spread, "--explain")
    assert "mesh: data 1 x fsdp 2 x tensor 2" in out
    kernel, head = (re.search(rf"layers/{i}/kernel +(.*)", out)[1].split("  ") for i in (0, 2))
    # 30 x 64 of float32 over four devices; of an output of one number, over two.
    assert [x.strip() for x in kernel if x][0:2] == ["30 x 64", "fsdp, tensor"]
    assert [x.strip() for x in kernel if x][-2:] == ["7,680", "1,920"]
    assert [x.strip() for x in head if x][-2:] == ["128", "64"]
    assert "layers/2/kernel: tensor 2 does not divide its dimension, which stays whole" in out
    assert not (tmp_path / "run").exists()


def test_train_prints_plain_lines_and_a_table(trained):
    _, out = trained
    lines = out.splitlines()
    assert lines[0].startswith("model FLOPs a step: 645,120 (exact); forward 40%, backward 60%")
    assert lines[1].startswith("step 20/60  train  loss ")
    assert any(line.startswith("step 60/60  test  loss ") for line in lines)
    assert any(line.startswith("model") and "FLOPs/step" in line for line in lines)


def test_a_finished_run_is_not_trained_again(trained):
    workdir, _ = trained
    out = ok("train", *MLP, "--workdir", workdir)
    assert out.startswith("model ")


def test_a_runs_json_trains_again_to_the_same_numbers(trained, tmp_path):
    workdir, _ = trained
    ok("train", workdir / "config.json", "--workdir", tmp_path / "again")
    first, again = (
        json.loads((path / "summary.json").read_text())["metrics"]
        for path in (workdir, tmp_path / "again")
    )
    assert first == again


def test_evaluate(trained, tmp_path):
    workdir, _ = trained
    ok("evaluate", workdir, "--split", "test", "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    summary = json.loads((workdir / "summary.json").read_text())
    tables = found.pop("tables")
    assert found == {"step": 60, "split": "test", "metrics": summary["metrics"]["test"]}
    counts = tables["confusion_matrix"]
    right = (counts[0][0] + counts[1][1]) / sum(map(sum, counts))
    assert right == pytest.approx(found["metrics"]["accuracy"])


def test_a_run_is_evaluated_on_another_mesh_than_it_was_trained_on(tmp_path):
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "4")
        ok("train", *MLP, "--parallel.fsdp", "2", "--parallel.tensor", "2", "--workdir", workdir)
    result = script("evaluate", workdir)
    assert result.returncode == 2
    assert result.stderr.endswith("and there are 1 devices; nearest that fit: data 1\n")
    ok("evaluate", workdir, "--parallel.data", "1", "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["metrics"]
    assert found == pytest.approx(
        json.loads((workdir / "summary.json").read_text())["metrics"]["test"], rel=1e-5
    )


def test_evaluate_gives_the_moving_average_and_the_best(tmp_path):
    stop = ["--early_stop.keep_best", "True", "--early_stop.metric", "auc"]
    rates = ["--eval_every", "20", "--early_stop.goal", "max", "--ema", "0.9"]
    workdir = tmp_path / "run"
    ok("train", *MLP, *stop, *rates, "--target.split", "test_ema", "--workdir", workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["reached"] == summary["metrics"]["test_ema"]["accuracy"]
    out = ok("evaluate", workdir, "--best", "--json", tmp_path / "out.json")
    assert out.count("confusion matrix: target down, prediction across") == 2
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["step"] == summary["best"]
    assert found["metrics"] == summary["metrics"]["test"]
    assert found["ema"]["metrics"] == summary["metrics"]["test_ema"]


def test_plot_and_table(trained, tmp_path):
    workdir, out = trained
    ok("plot", workdir, "--out", tmp_path / "curves.svg")
    assert "loss" in (tmp_path / "curves.svg").read_text()
    assert ok("table", workdir).strip() in out


def test_compute_prints_what_training_wrote(trained, tmp_path):
    workdir, _ = trained
    out = ok("compute", workdir / "config.json", "--json", tmp_path / "cost.json")
    assert "645,120  exact" in out
    assert "XLA reports" in out
    now, then = (
        json.loads(p.read_text()) for p in (tmp_path / "cost.json", workdir / "compute.json")
    )
    assert then.pop("seconds") > 0
    assert then.pop("utilization") == []  # no peaks were measured
    assert now == then


def test_compute_counts_without_compiling_and_measures(tmp_path):
    out = ok("compute", "configs/mlp_cancer.py", "--trace_only")
    assert "645,120  exact" in out
    assert "executed" not in out
    assert "measured" in ok("compute", "configs/mlp_cancer.py", "--measure", "3")
    refused = script("compute", "configs/mlp_cancer.py", "--plot", tmp_path / "r.png")
    assert refused.returncode == 2
    assert "benchmark.py peaks" in refused.stderr
    assert not (tmp_path / "r.png").exists()


def test_profile_writes_a_trace(tmp_path):
    ok("train", *MLP, "--workdir", tmp_path / "run", "--profile", "3")
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_a_missed_target_is_said_and_is_an_error_only_when_asked(tmp_path):
    args = [*MLP, "--target.value", "1.01", "--workdir", tmp_path / "run"]
    assert "missed its target: test accuracy >= 1.01" in ok("train", *args)
    assert script("train", *args, "--require-target").returncode == 1


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("train", [*MLP, "--model.dropuot", "1"], "did you mean --model.dropout?"),
        ("train", [*MLP, "--batch_size", "1000"], "exceeds the 398 training examples"),
        ("train", [*MLP, "--data.split", "x"], "--data.split"),
        ("train", [*MLP, "--tracker", "trackio"], "pip install 'ergon[trackio]'"),
        ("train", ["configs/none.py"], "no config at configs/none.py"),
        ("train", [], "the first argument must be a config"),
        ("evaluate", ["nowhere"], "nowhere is not a run directory"),
        ("evaluate", [], "Missing"),
        ("plot", ["nowhere"], "nowhere"),
        ("table", ["nowhere"], "nowhere is not a run directory"),
        ("benchmark", ["speed"], "usage"),
        ("benchmark", ["loop"], "the first argument must be a config"),
    ],
)
def test_a_mistake_ends_in_one_line_and_makes_nothing(name, args, words, tmp_path):
    if "trackio" in args and __import__("importlib.util").util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    workdir = ["--workdir", tmp_path / "run"] if name == "train" and args else []
    result = script(name, *args, *workdir)
    assert result.returncode == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_kept_no_best(trained):
    result = script("evaluate", trained[0], "--best")
    assert result.returncode == 2
    assert "kept no best checkpoint: see early_stop.keep_best" in result.stderr


def test_a_split_that_the_data_lacks(trained):
    workdir, _ = trained
    result = script("evaluate", workdir, "--split", "tset")
    assert result.returncode == 2
    assert result.stderr == "error: the data has no split 'tset'; did you mean test?\n"


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(trained, tmp_path):
    workdir = tmp_path / "run"
    whole = [*MLP[:1], "--steps", "4000", "--log_every", "10", "--workdir"]
    command = [sys.executable, "scripts/train.py", *whole, str(workdir)]
    env = os.environ | {"XLA_FLAGS": tiny.flags(), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    while "step" not in process.stdout.readline():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by signal 15 at step" in out
    stopped = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert 0 < stopped < 4000
    ok("train", *whole, workdir)
    ok("train", *whole, tmp_path / "whole")
    ends = [json.loads((p / "summary.json").read_text()) for p in (workdir, tmp_path / "whole")]
    assert ends[0]["metrics"] == ends[1]["metrics"]


def test_the_loop_is_measured_beside_the_bare_step():
    out = ok("benchmark", "loop", *MLP, "--rounds", "1")
    bare, within, ratio = (float(re.search(r"\d+\.\d+", line)[0]) for line in out.splitlines())
    assert min(bare, within) > 0
    assert ratio == pytest.approx(within / bare, rel=0.1)  # of figures rounded to 0.01 ms


def test_ngram_prints_both_smoothings():
    out = ok("benchmark", "ngram", "--orders", "3").split()
    assert {"witten-bell", "kneser-ney"} <= set(out)


def test_linear_prints_baselines_beside_runs(trained):
    out = ok("benchmark", "linear", MLP[0], "--splits", "2", "--runs", trained[0])
    head, *rows = out.splitlines()[2:]
    assert "validation: mean" in head
    assert "test: mean" in head
    assert len(rows) == 4
    assert rows[2].startswith("logistic regression ")
    assert rows[3].startswith("the runs ")
    refused = script("benchmark", "linear", "configs/gru_text.py")
    assert refused.returncode == 2
    assert refused.stderr == "error: linear reads examples with inputs and targets alone\n"


def test_compare(tmp_path):
    good = benchmarks.written(tmp_path / "good.json", benchmarks.result())
    bad = tmp_path / "bad.json"
    bad.write_text(good.read_text()[:900])
    outs = {name: tmp_path / name for name in ("page.html", "all.csv", "figures")}
    options = [
        part
        for name, path in zip(("--html", "--csv", "--figures"), outs.values(), strict=True)
        for part in (name, path)
    ]
    result = script("compare", good, bad, *options)
    assert result.returncode == 0
    assert result.stderr.startswith(f"{bad}: not whole JSON, cut short")
    assert result.stderr.count("\n") == 1
    assert "times as fast as good" in result.stdout
    assert outs["page.html"].read_text().startswith("<!doctype html>")
    assert (outs["figures"] / "speed.pdf").exists()
    assert "times_as_fast" in outs["all.csv"].read_text()
    result = script("compare", bad)
    assert result.returncode == 2
    assert "no file has a measurement, or a plan, to compare" in result.stderr
    assert result.stderr.count("\n") == 1
