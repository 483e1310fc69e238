"""Measurements: python scripts/benchmark.py KIND [...]; without a KIND it says which there are."""

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
