"""Measurements: benchmark.py {ngram,bayes,linear,loop,input,peaks,ledger,optimizers,clients} ..."""

import sys

from research import command
from research.bench import commands


def main() -> None:
    kind, *argv = sys.argv[1:] or [""]
    if kind not in commands.KINDS:
        command.fail(f"usage: {commands.USAGE}")
    commands.KINDS[kind](argv)


if __name__ == "__main__":
    main()
