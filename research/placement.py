"""Where a state's arrays are put, as text: what `scripts/train.py CONFIG --explain` prints."""

import math

from research import parallel, run
from research.init_from import flat
from research.setup import Setup

PARTS = {
    "params": "parameters",
    "ema": "moving average",
    "model_state": "other variables",
    "opt_state": "optimizer state",
    "clients": "clients' optimizer states",
    "carry": "carry",
}


def explained(setup: Setup) -> str:
    """Every parameter's placement, the rule that says it, and the bytes of all parts of the state,
    of one copy and on one device; then, what rules ask for and shapes do not allow."""
    sizes = dict(setup.mesh.shape)
    table: list[tuple[str, ...]] = [("", "shape", "split over", "rule", "bytes", "on a device")]
    whole: list[str] = []
    totals = []
    for part, title in PARTS.items():
        total = [0, 0]
        places = flat(getattr(setup.shardings, part))
        for name, leaf in flat(getattr(setup.abstract, part)).items():
            place = places[name]
            shapes = leaf.shape, place.shard_shape(leaf.shape)
            held = [math.prod(shape) * leaf.dtype.itemsize for shape in shapes]
            total = [a + b for a, b in zip(total, held, strict=True)]
            if part != "params":
                continue
            found = parallel.placement(name, leaf.shape, sizes)
            split = [axes if sizes.get(axes, 1) > 1 else "-" for axes in place.spec]
            table.append(
                (
                    name,
                    " x ".join(map(str, leaf.shape)) or "1",
                    ", ".join(split) or "-",
                    found.rule or "none",
                    *(f"{n:,}" for n in held),
                )
            )
            if found.whole:
                axes = ", ".join(f"{axis} {sizes[axis]}" for axis in found.whole)
                whole.append(f"{name}: {axes} does not divide its dimension, which stays whole")
        if total[0]:
            totals.append((title, "", "", "", *(f"{n:,}" for n in total)))
    lines = [
        f"mesh: {parallel.words(sizes)}",
        run.aligned([*table, *totals], left={0, 1, 2, 3}),
        *whole,
    ]
    if setup.mesh.shape["fsdp"] > 1:
        lines.append("where no rule matches, fsdp splits the largest dimension that divides")
    return "\n".join(lines)
