"""Measurements: python scripts/benchmark.py {ngram,loop} [...]"""

import dataclasses
import sys
from pathlib import Path

import tyro

from research import command, run
from research.bench import loop, ngram
from research.data.bundled import PythonReference

USAGE = "python scripts/benchmark.py {ngram [RUN ...], loop CONFIG}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ngram:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Finished runs of text models, printed beside the n-grams."""
    orders: int = 8


def print_ngram(argv: list[str]) -> None:
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
class Loop(command.Options):
    rounds: int = 5
    """Times that both are measured, in turn."""


def print_loop(argv: list[str]) -> None:
    options = command.parse(Loop, USAGE, argv)
    with command.one_line_errors():
        found = loop.overhead(options.experiment, rounds=options.rounds)
    print(f"bare step  {found.bare_ms:8.2f} ms")
    print(f"in train() {found.loop_ms:8.2f} ms")
    low, high = found.spread
    print(f"ratio      {found.ratio:8.3f}     rounds from {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    kinds = {"ngram": print_ngram, "loop": print_loop}
    if sys.argv[1:2] and sys.argv[1] in kinds:
        kinds[sys.argv[1]](sys.argv[2:])
    else:
        command.fail(f"usage: {USAGE}")
