import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from research import UserError, compute, plot
from research.compute import chips, roofline

ROOT = Path(__file__).parents[1]


def write(run, splits=("train", "validation"), metrics=("accuracy", "loss"), rows=20):
    run.mkdir(parents=True)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(rows):
            for split in splits:
                values = {metric: 1 / (step + index + 1) for index, metric in enumerate(metrics)}
                row = {"step": step * 100, "split": split, **values, "seconds": step / 2}
                file.write(json.dumps(row) + "\n")
    return run


def texts(svg):
    """The strings of an SVG in drawing order."""
    found = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()).strip() for element in found]


def groups(svg, start):
    """How many parts of an SVG have a name that starts so."""
    found = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}g")
    return sum(element.get("id", "").startswith(start) for element in found)


def test_runs_and_axes_are_named(tmp_path):
    runs = [write(tmp_path / "mlp"), write(tmp_path / "price_$5$")]
    out = plot.curves(runs, tmp_path / "new" / "curves.svg")
    assert out == tmp_path / "new" / "curves.svg"
    shown = texts(out)
    for text in ("mlp", "price_$5$", "train", "validation", "loss", "accuracy (fraction correct)"):
        assert text in shown, text
    assert shown.count("training steps") == 2
    assert shown.index("loss") < shown.index("accuracy (fraction correct)")
    plot.curves(runs, out, ["accuracy"], x="seconds")
    shown = texts(out)
    assert shown.count("training time (s)") == 1
    assert "loss" not in shown


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [write(tmp_path / path) for path in ("a/x/seed0", "b/x/seed0", "c/seed1")]
    shown = texts(plot.curves([*runs, runs[0] / ".." / "seed0"], tmp_path / "curves.svg"))
    assert [t for t in shown if "seed" in t] == ["a/x/seed0", "b/x/seed0", "seed1"]


def test_lines_by_split_and_run(tmp_path, monkeypatch):
    drawn = []
    plain = plot.Figure.savefig
    monkeypatch.setattr(
        plot.Figure, "savefig", lambda fig, *a, **k: (drawn.append(fig), plain(fig, *a, **k))
    )
    splits = ("test", "train", "validation")
    runs = [write(tmp_path / "a", splits), write(tmp_path / "b", splits, rows=1)]
    plot.curves(runs, tmp_path / "curves.png", ["loss"], x="seconds")
    (axis,) = drawn[0].axes
    lines = axis.get_lines()
    assert len(lines) == 6
    assert list(lines[0].get_xdata()) == [step / 2 for step in range(20)]
    assert list(lines[0].get_ydata()) == [1 / (step + 2) for step in range(20)]
    test, train, validation = lines[:3]
    assert train.get_alpha() < 1
    assert test.get_alpha() is validation.get_alpha() is None
    assert train.get_linewidth() < test.get_linewidth() == validation.get_linewidth()
    assert [line.get_linestyle() for line in (test, validation)] == ["-", "--"]
    assert {line.get_color() for line in lines[:3]} != {line.get_color() for line in lines[3:]}
    # A line through one point would not be seen.
    assert [line.get_marker() for line in lines] == ["None"] * 3 + ["o"] * 3
    assert axis.get_xscale() == axis.get_yscale() == "linear"


def test_default_panels_are_shared_and_at_most_six(tmp_path):
    many = [f"metric{index}" for index in range(7)]
    first = write(tmp_path / "a", metrics=[*many, "only_a", "loss"])
    second = write(tmp_path / "b", metrics=["only_b", "loss", *many])
    out = tmp_path / "curves.svg"
    shown = texts(plot.curves([first, second], out))
    assert [t for t in shown if t == "loss" or t.startswith(("metric", "only"))] == [
        "loss",
        *many[:5],
    ]
    assert groups(plot.curves([first], out, many), "axes_") == 9  # seven drawn, two left empty


def test_every_run_has_a_colour(tmp_path):
    runs = [write(tmp_path / f"run{index}", rows=2) for index in range(12)]
    assert len({tuple(colour) for colour in plot._colours(12)}) == 12
    assert len(set(plot._colours(7))) == 7
    assert len([t for t in texts(plot.curves(runs, tmp_path / "c.svg")) if "run" in t]) == 12


@pytest.mark.parametrize("count", [1, 3, 12])
def test_nothing_overlaps_or_leaves_the_page(tmp_path, monkeypatch, count):
    drawn = []
    plain = plot.Figure.savefig
    monkeypatch.setattr(
        plot.Figure, "savefig", lambda fig, *a, **k: (drawn.append(fig), plain(fig, *a, **k))
    )
    metrics = ["loss", "accuracy", "grad_norm", "perplexity"][: max(1, count - 1)]
    runs = [write(tmp_path / f"a-rather-long-run-name-{i}", metrics=metrics) for i in range(count)]
    out = plot.curves(runs, tmp_path / "curves.png")
    (figure,) = drawn
    boxes = [part.get_tightbbox() for part in [*figure.axes, *figure.legends]]
    for index, box in enumerate(boxes):
        assert figure.bbox.containsx(box.x0), index
        assert figure.bbox.containsx(box.x1), index
        assert figure.bbox.containsy(box.y0), index
        assert figure.bbox.containsy(box.y1), index
        assert not any(box.overlaps(other) for other in boxes[:index]), index
    assert all(axis.get_position().height * figure.get_figheight() > 2.2 for axis in figure.axes)
    assert np.ptp(matplotlib.image.imread(out)) == 1.0


def test_a_row_cut_short_by_a_kill_is_ignored(tmp_path):
    run = write(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "spl')
    plot.curves([run], tmp_path / "curves.svg")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 41: not a metrics row"):
        plot.curves([run], tmp_path / "curves.svg")


def test_errors(tmp_path):
    run, other = write(tmp_path / "run"), write(tmp_path / "other", metrics=["bleu"])
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    (empty / "metrics.jsonl").touch()
    out = tmp_path / "curves.png"
    for arguments, message in [
        (([run], tmp_path / "c.pdf"), "c.pdf: cannot write .pdf; use .png or .svg"),
        (([run], tmp_path / "c"), "c: cannot write a file without suffix; use .png or .svg"),
        (([], out), "no runs to plot; give at least one run directory"),
        (([tmp_path / "no"], out), "no: no such directory; give the run directory of a training"),
        (([bare], out), "bare: no metrics.jsonl; give the run directory"),
        (([empty], out), "empty/metrics.jsonl: no metrics yet; let the run write a row first"),
        (([run, other], out), "the runs share no metric; plot them one at a time"),
        (
            ([run], out, ["acuracy"]),
            "run: no metric 'acuracy'; did you mean 'accuracy'? it has accuracy, loss",
        ),
        (([run, other], out, ["loss"]), "other: no metric 'loss'; it has bleu"),
        (([run], out, None, "epoch"), "x is 'epoch'; use 'step' or 'seconds'"),
    ]:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            plot.curves(*arguments)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert not out.exists()


def test_script(tmp_path):
    run = write(tmp_path / "run")

    def script(*arguments):
        done = subprocess.run(
            [sys.executable, "-W", "error", ROOT / "scripts" / "plot.py", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return done.returncode, done.stdout, done.stderr

    assert script("run") == (0, "curves.png\n", "")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    options = ("--out", "c.svg", "--metrics", "loss", "accuracy", "--x", "seconds")
    assert script("run", *options) == (0, "c.svg\n", "")
    assert texts(tmp_path / "c.svg").count("training time (s)") == 2
    code, printed, error = script("run", "nowhere")
    assert (code, printed) == (2, "")
    assert error.startswith("error: nowhere: no such directory")
    assert error.count("\n") == 1
    assert run.exists()


# ---- the roofline


def two_modules(w, x):
    with jax.named_scope("wide"):
        x = jnp.tanh(x @ w)
    with jax.named_scope("narrow"):
        return (x @ w[:, :4]).sum()


@pytest.fixture(scope="module")
def step():
    return compute.report(jax.grad(two_modules), jnp.ones((64, 64)), jnp.ones((64, 64)))


def points(monkeypatch):
    """What is drawn as single points: (intensity, rate)."""
    drawn = []
    scatter, line = matplotlib.axes.Axes.scatter, matplotlib.axes.Axes.plot

    def keep(draw):
        def kept(axis, xs, ys, *args, **kwargs):
            drawn.append((xs, ys, kwargs["label"]))
            return draw(axis, xs, ys, *args, **kwargs)

        return kept

    monkeypatch.setattr(matplotlib.axes.Axes, "scatter", keep(scatter))
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", keep(line))
    return drawn


def test_modules_stand_under_the_roof(step, tmp_path, monkeypatch):
    drawn = points(monkeypatch)
    rates = roofline.of_chip(chips.chips()["a100-sxm4-40gb"])
    measured = dataclasses.replace(step, rates=[rates], seconds=1e-3)
    out = plot.roofline(measured, tmp_path / "roof.svg")
    shown = " ".join(texts(out))
    for words in ("wide", "narrow", "A100", "FLOPs a byte of main memory", "as measured"):
        assert words in shown
    by_label = {label: (xs, ys) for xs, ys, label in drawn}
    peak, bandwidth = 156e12, 1555e9
    for module, (flops, moved) in step.program.by_module.items():
        if flops:
            (x,), (y,) = by_label[module]
            assert x == pytest.approx(flops / moved)
            assert y == pytest.approx(min(peak, x * bandwidth))
    assert by_label["as measured"][1] == [step.program.matmul_flops / 1e-3]


def test_a_roof_needs_rates(step, tmp_path):
    with pytest.raises(UserError, match=r"benchmark\.py peaks"):
        plot.roofline(step, tmp_path / "roof.svg")
    with pytest.raises(UserError, match=r"\.png or \.svg"):
        plot.roofline(step, tmp_path / "roof.pdf")
    bare = roofline.Rates("x", "measured", lambda dtype: None, lambda size: 1e9, None)
    with pytest.raises(UserError, match="no peak is known for float32"):
        plot.roofline(dataclasses.replace(step, rates=[bare]), tmp_path / "roof.svg")
    assert not list(tmp_path.iterdir())


def test_a_step_without_products_has_no_roofline(tmp_path):
    rates = roofline.of_chip(chips.chips()["h100-sxm"])
    step = dataclasses.replace(compute.report(jnp.tanh, jnp.ones(4)), rates=[rates])
    with pytest.raises(UserError, match="no matrix products"):
        plot.roofline(step, tmp_path / "roof.svg")


def test_dots_are_named_and_a_note_stands_in_place_of_a_mean(tmp_path):
    lines = [
        ("adam", (0.1, 0.2, 0.3), ""),
        ("sgd", (1.0, None, 2.0), "diverged: 1"),
        ("x", (), "no"),
    ]
    out = plot.dots({"loss (nats)": lines, "other": lines[:1]}, tmp_path / "new" / "dots.svg")
    shown = texts(out)
    for text in ("adam", "sgd", "x", "diverged: 1", "no", "loss (nats)", "other", "a seed", "mean"):
        assert text in shown, text
    assert shown.index("adam") < shown.index("sgd") < shown.index("x")
    with pytest.raises(UserError, match=r"cannot write \.pdf"):
        plot.dots({"loss": lines}, tmp_path / "dots.pdf")
