"""The measurements of scripts/benchmark.py: options, and what is printed."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from research import UserError, command, flags, plot, run
from research.bench import (
    bayes,
    bounds,
    calibrate,
    clients,
    ledger,
    linear,
    loop,
    metering,
    methods,
    ngram,
    optimizers,
    reading,
    result,
    scaling,
    suite,
    throughput,
    words,
)
from research.bench.families import FAMILIES
from research.compute import chips, peaks, predict
from research.data.bundled import PythonReference
from research.data.text import LabelledText

USAGE = (
    "python scripts/benchmark.py "
    "{suite --out FILE [--only NAME ...], ngram [RUN ...], bayes CONFIG [--runs RUN ...], "
    "linear CONFIG [--splits N], loop CONFIG, "
    "input CONFIG [--seconds N] [--torch], peaks [--json FILE], ledger, "
    "optimizers [--workdir DIR], clients CONFIG [--every N ...], "
    "scaling CONFIG [--kind KIND] [--devices N ...], published [--bounds] [--json FILE], "
    "calibrate [--rounds N] [--json FILE]}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    out: Path
    """The file, for scripts/compare.py."""
    only: tuple[Literal["mlp", "cnn", "resnet", "lstm", "transformer"], ...] = ()
    """Families to measure; by default all."""
    seconds: float = 8.0
    """Of timing a family's steps, and as many again beside the making of batches."""
    price: float | None = None
    """USD an hour of this machine, for the money to the target."""


def the_suite(argv: list[str]) -> None:
    flags.apply(os.environ)  # what is measured is what scripts/train.py runs
    options = command.parse(Suite, USAGE, argv)
    command.check_writable(options.out)
    families = {k: v for k, v in FAMILIES.items() if k in options.only or not options.only}
    with command.one_line_errors(), command.progress(len(families), "family") as (bar, say):
        found = suite.measure(families, options.seconds, options.price, say, bar.update)
    command.write_json(options.out, result.to_json(found))
    print(words.table(found))
    if all(row.failed for row in found.rows):
        sys.exit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ngram:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Finished runs of text models, printed beside the n-grams."""
    orders: int = 8


def ngrams(argv: list[str]) -> None:
    options = command.parse(Ngram, USAGE, argv)
    if options.orders < 1:
        command.fail(f"--orders must be 1 or more, not {options.orders}")
    with command.one_line_errors():
        models = [run.summary(path) for path in options.runs]
    for model in models:
        if "bits_per_character" not in model.metrics.get("validation", {}):
            command.fail(f"{model.name} has no validation bits_per_character: not a run on text")
    tokens, vocab = PythonReference.tokens(), len(PythonReference.alphabet())
    text = tokens["train"], tokens["validation"], vocab
    orders = range(1, options.orders + 1)
    columns = [dict(ngram.table(*text, orders, smoothing=s)) for s in ngram.SMOOTHINGS]
    print("bits per character on the validation text\n")
    print(f"{'order':24}" + "".join(f"{name:>14}" for name in ngram.SMOOTHINGS))
    for order in orders:
        print(f"{order:<24}" + "".join(f"{column[order]:14.3f}" for column in columns))
    for model in models:
        print(f"{model.name:24}{model.metrics['validation']['bits_per_character']:14.3f}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bayes(command.Options):
    runs: tuple[Path, ...] = ()
    """Finished runs on the same texts, printed below."""


def naive_bayes(argv: list[str]) -> None:
    options = command.parse(Bayes, USAGE, argv)
    source: Any = options.experiment.data
    if not isinstance(source, LabelledText):
        command.fail(f"{options.config} is not on labelled texts")
    with command.one_line_errors():
        runs = {str(path): [row] for path, row in _accuracies(options.runs).items()}
        found = {f"naive Bayes, {name}": [row] for name, row in bayes.accuracies(source).items()}
    print("accuracy in %\n")
    print(linear.table(found | runs))


def _accuracies(runs: Sequence[Path]) -> dict[Path, dict[str, float]]:
    """Of finished runs, by split. Raises UserError where one has none."""
    found = {}
    for path in runs:
        metrics = run.summary(path).metrics
        if not all("accuracy" in row for row in metrics.values()):
            raise UserError(f"{path} has no accuracy: not a run that classifies")
        found[path] = {name: row["accuracy"] for name, row in metrics.items()}
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(command.Options):
    rounds: int = 5
    """Times that both are measured, in turn."""


def the_loop(argv: list[str]) -> None:
    options = command.parse(Loop, USAGE, argv)
    with command.one_line_errors():
        found = loop.overhead(options.experiment, rounds=options.rounds)
    print(f"bare step  {found.bare_ms:8.2f} ms")
    print(f"in train() {found.loop_ms:8.2f} ms")
    low, high = found.spread
    print(f"ratio      {found.ratio:8.3f}     rounds from {low:.3f} to {high:.3f}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(command.Options):
    seconds: float = 30.0
    """Of measuring steps, in short rounds."""
    torch: bool = False
    """Also a PyTorch DataLoader on the same files; for images of TFDS."""


def the_input(argv: list[str]) -> None:
    options = command.parse(Reading, USAGE, argv)
    with command.one_line_errors():
        found = reading.measure(options.experiment, options.seconds)
        print(f"made and placed  {found.supply:12,.0f} examples/s  {found.megabytes:10,.1f} MB/s")
        print(f"a step's appetite{found.appetite:12,.0f} examples/s")
        print(
            f"waiting          {found.waiting:12.1%} of a step  "
            f"standard error {found.error:.1%}, {found.rounds} rounds"
        )
        if options.torch:
            try:
                beside = reading.loaders(options.experiment)
            except ImportError as error:
                command.fail(f"--torch needs a package: {error}")
            print(f"\n{'decoded and augmented':28}{'examples/s':>12}{'of PyTorch':>12}")
            for name, rate in dataclasses.asdict(beside).items():
                print(f"{LOADERS[name]:28}{rate:12,.0f}{rate / beside.torch:12.2f}")


LOADERS = {
    "kept": "Ergon, decoded once",
    "read": "Ergon, decoding each anew",
    "torch": "PyTorch's DataLoader",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(command.Options):
    splits: int = 1
    """Divisions of the data, with data.split from 0 on; 1: the config's own."""
    runs: tuple[Path, ...] = ()
    """Finished runs, whose accuracies are printed beside."""


def baselines(argv: list[str]) -> None:
    options = command.parse(Linear, USAGE, argv)
    if options.splits < 1:
        command.fail(f"--splits must be 1 or more, not {options.splits}")
    found: dict[str, list[dict[str, float]]] = {}
    with command.one_line_errors():
        runs = _accuracies(options.runs)
        for one in linear.divided(options.experiment, options.splits):
            for model, scores in linear.accuracies(one.data.load()).items():
                found.setdefault(model, []).append(scores)
    if runs:
        found["the runs"] = list(runs.values())
    print(f"accuracy in %, {options.splits} division{'s' * (options.splits > 1)} of the data\n")
    print(linear.table(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    json: Path | None = None
    """Also write the figures to this file."""
    if_missing: bool = False
    """Print what was kept for this device and these versions, where it was, and measure nothing."""


def the_peaks(argv: list[str]) -> None:
    options = command.parse(Peaks, USAGE, argv)
    device = jax.local_devices()[0]
    with command.one_line_errors():
        found = peaks.load(device) if options.if_missing else None
        if found is None:
            found = peaks.measure(device, say=lambda line: print(line, file=sys.stderr))
        chip = chips.match(device.device_kind, device.platform)
        giga = max(found.matmul.values()) < 1e13
        unit, scale = ("GFLOP/s", 1e9) if giga else ("TFLOP/s", 1e12)
        beside = f"{'datasheet':>12}{'ratio':>8}" if chip else ""
        versions = (f"{name} {version}" for name, version in found.versions.items())
        print(", ".join((found.device, found.platform, *versions, found.date)))
        print(f"\n{'products of':24}{unit:>12}{beside}")
        for name, rate in found.matmul.items():
            dtype, _, precision = name.partition(":")
            peak = chips.peak(chip, dtype, precision or None) if chip else None
            print(_row(name, rate, peak[0] if peak else None, scale))
        print(f"\n{'triad over':24}{'GB/s':>12}{beside}")
        for size, rate in found.bandwidth:
            largest = size == found.bandwidth[-1][0]
            published = chip.memory_bandwidth if chip and largest else None
            print(_row(f"{size / 2**20:g} MiB", rate, published, 1e9))
        kept = peaks.save(found)
        command.write_json(options.json, peaks.to_json(found))
        print(f"\nkept in {kept}")


def _row(name: str, rate: float, published: float | None, scale: float) -> str:
    row = f"{name:24}{rate / scale:12,.1f}"
    return row + (f"{published / scale:12,.1f}{rate / published:8.2f}" if published else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    json: Path | None = None
    """Also write the figures to this file."""
    only: Literal["counters", "costs"] | None = None
    """counters: the table of counters alone; costs: what counting costs alone."""


def the_ledger(argv: list[str]) -> None:
    options = command.parse(Ledger, USAGE, argv)
    found: dict[str, Any] = {"versions": ledger.versions()}
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    with command.one_line_errors():
        if options.only != "costs":
            lines = []
            for line in ledger.measure():
                print(line.row.name, file=sys.stderr)
                lines.append(line)
            found["counters"] = [line.to_json() for line in lines]
            print(f"\n{ledger.table(lines)}")
        if options.only != "counters":
            configs = [p for p in sorted(Path("configs").glob("*.py")) if p.stem != "__init__"]
            costs = {}
            for path in configs:
                try:
                    costs[path.stem] = metering.cost(command.load(path))
                except UserError as error:  # data that is not here
                    print(f"{path.stem} is left out: {error}", file=sys.stderr)
            seconds = metering.per_step()
            found["costs"] = {name: dataclasses.asdict(cost) for name, cost in costs.items()}
            found["metering_seconds_per_step"] = seconds
            print(f"\n{metering.table(costs)}")
            share = 100 * seconds / metering.STEP
            print(f"metering a step: {1e6 * seconds:.0f} us, {share:.2f}% of one of 20 ms")
        command.write_json(options.json, found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizers:
    workdir: Path = Path("runs/optimizers")
    """Holds a run directory for each run; what is finished there is not trained again."""
    only: tuple[Literal["cnn", "lstm", "transformer"], ...] = ()
    """Models to compare on; by default all."""
    steps: int = 300
    """The budget: updates of plain SGD by mini-batches."""
    json: Path | None = None
    """Also write the figures to this file."""
    plot: Path | None = None
    """Also draw them: .png or .svg."""


def the_optimizers(argv: list[str]) -> None:
    options = command.parse(Optimizers, USAGE, argv)
    if options.steps < 1:
        command.fail(f"--steps must be 1 or more, not {options.steps}")
    if options.json is not None and not options.json.parent.is_dir():
        command.fail(f"cannot write {options.json}: there is no folder {options.json.parent}")
    if options.workdir.exists() and not options.workdir.is_dir():
        command.fail(f"{options.workdir} is a file, not a folder for runs")
    models = [name for name in optimizers.CONFIGS if name in options.only or not options.only]
    found: dict[str, list[optimizers.Row]] = {}
    with command.one_line_errors():
        if options.plot is not None:
            plot.image(options.plot)
        bases = {name: optimizers.base(name, options.steps) for name in models}
        config: Any = jax.config
        if config.jax_compilation_cache_dir is None:
            # The seeds of a rate, and every evaluation, are one program: compiled once.
            config.update("jax_compilation_cache_dir", str(options.workdir / "compiled"))
            config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        total = len(models) * len(methods.METHODS)
        with command.progress(total, "optimizer") as (bar, say):
            for name, base in bases.items():
                found[name] = []
                for row in optimizers.measure(name, base, options.workdir, methods.METHODS, say):
                    found[name].append(row)
                    bar.update()
        print("\n\n".join(optimizers.table(rows) for rows in found.values()))
        if options.plot is not None:
            plot.dots(optimizers.panels(found), options.plot)
    rows = [row.to_json() for rows in found.values() for row in rows]
    command.write_json(options.json, {"versions": ledger.versions(), "rows": rows})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clients(command.Options):
    every: tuple[int, ...] = (1, 4, 16)
    """Steps of a client between two meetings."""
    seeds: tuple[int, ...] = (0, 1, 2)


def the_clients(argv: list[str]) -> None:
    options = command.parse(Clients, USAGE, argv)
    with command.one_line_errors():
        total = 2 * len(options.every) * len(options.seeds)
        rows = []
        with command.progress(total, "run") as (bar, say):
            for row in clients.measure(options.experiment, options.every, options.seeds, say):
                rows.append(row)
                bar.update(len(options.seeds))
    print(clients.table(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling(command.Options):
    kind: Literal["v5e", "v5p", "h100"] = "h100"
    """What is compiled for; no such device is needed."""
    devices: tuple[int, ...] = (1, 8, 64, 512, 4096)
    axis: scaling.Axis = "data"
    """The axis of the mesh that grows."""


def the_scaling(argv: list[str]) -> None:
    options = command.parse(Scaling, USAGE, argv)
    e = options.experiment
    with command.one_line_errors():
        rows = list(scaling.measure(e, options.kind, options.devices, options.axis))
    print(f"{options.kind}, batch_size {e.batch_size} for each of {options.axis}: of one device\n")
    print(scaling.table(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    bounds: bool = False
    """Compile the steps whose layout is published for their accelerators, and put their times
    beside the least that they can take."""
    json: Path | None = None
    """Also write the figures, and their sources, to this file."""


def the_published(argv: list[str]) -> None:
    options = command.parse(Published, USAGE, argv)
    kind = bounds if options.bounds else throughput
    rows = list(kind.measure())
    print(kind.table(rows))
    command.write_json(options.json, [row.to_json() for row in rows])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate:
    seconds: float = 1.0
    """Of timing each program's steps, in each round."""
    rounds: int = 3
    """Times that all programs are timed, in turn; the best round counts."""
    json: Path | None = None
    """Also write the figures to this file."""


def the_calibration(argv: list[str]) -> None:
    options = command.parse(Calibrate, USAGE, argv)
    with command.one_line_errors():
        found = peaks.load()
        if found is None:
            found = peaks.measure(say=lambda line: print(line, file=sys.stderr))
            peaks.save(found)
        programs = calibrate.others() | calibrate.configs()
        steps = calibrate.measure(
            programs,
            options.seconds,
            options.rounds,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        others = [step for step in steps if step.name in calibrate.OTHERS]
        configs = [step for step in steps if step.name not in calibrate.OTHERS]
        rows = {
            "configs, by a calibration on other programs": (
                calibrate.foretold(others, configs, found)
            ),
            "every program, by a calibration on all the rest": (calibrate.left_out(steps, found)),
        }
        made = calibrate.calibrated(steps, found)
        for title, part in rows.items():
            print(f"{title}\n\n{calibrate.table(part)}\n")
        for name, factor in made.factors.items():
            unit = "us each" if name in predict.NUMBERS else "x"
            scale = 1e6 if name in predict.NUMBERS else 1
            print(f"{name:16}{scale * factor:10.3f} {unit:8} {predict.TERMS[name]}")
        kept = predict.save(made)
        command.write_json(
            options.json,
            {title: [dataclasses.asdict(row) for row in part] for title, part in rows.items()}
            | {"calibration": predict.to_json(made)},
        )
        print(f"\nkept in {kept}")


KINDS = {
    "suite": the_suite,
    "ngram": ngrams,
    "bayes": naive_bayes,
    "loop": the_loop,
    "input": the_input,
    "peaks": the_peaks,
    "ledger": the_ledger,
    "optimizers": the_optimizers,
    "clients": the_clients,
    "scaling": the_scaling,
    "published": the_published,
    "calibrate": the_calibration,
    "linear": baselines,
}
