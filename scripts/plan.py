"""Says what a config's step, and run, would cost on accelerators that are not here."""

import dataclasses
import json as jsons
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro
from annotated_types import Ge, Gt

from research import command, environment
from research.bench import comparison, page, plan, planning

USAGE = "python scripts/plan.py CONFIG --target KIND:CHIPS [--target ...] [--field value ...]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    target: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Such as v5e:4x4, v5p:64, h100:8 or cpu; several, each after a --target."""
    all: bool = False
    """A host of each kind that is known."""
    tokens: Annotated[float, Gt(0)] | None = None
    """Of the run; None: its steps are the experiment's."""
    epochs: Annotated[float, Gt(0)] | None = None
    json: Path | None = None
    """Also write the rows to this file, for scripts/compare.py too."""
    html: Path | None = None
    """Also write a page that needs nothing else."""
    prices: Path | None = None
    """A file of prices, grids and PUEs of yours, as research/compute/prices.toml."""
    provider: str | None = None
    """Whose prices; None: the cheapest that is known."""
    grid: str = "world"
    """Whose electricity."""
    tries: Annotated[int, Ge(0)] = 4
    """Programs to compile in search of settings that fit, where those given do not."""
    search: Annotated[int, Ge(0)] = 0
    """Programs to compile in search of the fastest settings that fit."""
    timeout: Annotated[float, Gt(0)] = 1800
    """Seconds that a target may take."""
    workers: Annotated[int, Ge(1)] = 2
    """Targets that are compiled for at once."""
    here: str | None = None
    """Compile for this target in this process, and print its row as JSON."""


def main() -> None:
    options = command.parse(Options, USAGE)
    e = options.experiment
    with command.one_line_errors():
        if options.here is not None:
            # JAX keeps programs for devices that are not there, and cannot read them.
            jax.config.update("jax_enable_compilation_cache", False)
            row = plan.answer(e, planning.place(options.here), options.tries, options.search)
            print(jsons.dumps(row.json()))
            return
        asked = (*options.target, *(planning.ALL if options.all else ()))
        if not asked:
            command.fail(f"nothing to plan for: {USAGE}, or --all")
        command.check_writable(options.json, options.html)
        places = [planning.place(text) for text in asked]
        steps = planning.Length(tokens=options.tokens, epochs=options.epochs).steps(e)
        costs = planning.Costs.of(options.prices, options.provider, options.grid)
        with command.progress(len(places), "target") as (bar, say):

            def done(line: str) -> None:
                say(line)
                bar.update()

            again = [sys.executable, *sys.argv, "--here"]
            found = planning.rows(again, places, options.timeout, options.workers, done)
    for row in found:
        row["run"] = costs.of_run(row, steps)
    print(planning.table(found))
    versions = environment.versions("libtpu", "jax-cuda13-plugin")
    written = {"config": options.config, "versions": versions, "targets": found}
    command.write_json(options.json, written)
    if options.html:
        options.html.write_text(page.html_page(comparison.of_plan(written)), encoding="utf-8")
    if all(row["status"] in ("failed", "not installed") for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
