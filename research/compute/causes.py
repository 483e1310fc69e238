"""Why a compiled program executes other FLOPs than were written, and why XLA reports yet others."""

import dataclasses
from collections import Counter
from typing import Any

from research.compute import places, rules
from research.compute.count import Count
from research.compute.program import Program

RECOMPUTE = "recomputation, as written"
MERGED = "recomputation that the compiler merged with the forward pass"
AGAIN = "scores of attention, computed again for their gradient and not kept"
SKIPPED = "masked blocks of attention, left out by its kernel"
REWRITTEN = "products of vectors, done as multiplications and additions"
OPAQUE = "inside calls that cannot be read"
REMOVED = "not executed: dead, constant, computed once for several, or moved out of a loop"
GROUPED = "grouped convolutions, computed for every pair of channels"
REPEATED = "the same work on several devices"
UNEVEN = "work that the devices do not share evenly: repeated, or sizes filled up to divide"
COMPLEX = "complex products, done as three real ones"
FILLED = "convolutions over operands that the compiler filled up with zeros: padding, holes"
PADDED = "sizes filled up to those of the compiler's kernels"
UNEXPLAINED = "unexplained"
LOOPS = "loop bodies, counted once by XLA"
CALLS = "custom calls, not counted by XLA"
ELEMENTWISE = "elementwise operations and reductions, counted by XLA"


@dataclasses.dataclass(frozen=True)
class Difference:
    """A step on the way from one figure to another."""

    cause: str
    flops: int
    """Added to the figure before."""
    modules: tuple[str, ...] = ()


def executed(count: Count, program: Program) -> list[Difference]:
    """From model FLOPs to those executed, both on all devices; their sum is the difference.

    Products are matched by the module and the phase that the compiler kept the names of; what it
    executes under no name stands for what else is missing.
    """
    devices = program.devices
    wanted: Counter[tuple[str, str]] = Counter()
    imaginary: Counter[str] = Counter()
    """By module, FLOPs of complex products that are executed as something else."""
    for (phase, module, dtype, _), flops in count.matmul.items():
        wanted[phase, places.scoped(module)] += flops
        imaginary[places.scoped(module)] += flops * dtype.startswith("complex")
    forward = {module for _, module in wanted}

    def module_of(path: str) -> tuple[str, str]:
        place = places.settle(places.of_path(path), forward)
        return place.phase, place.module

    done: Counter[tuple[str, str]] = Counter()
    rewritten: Counter[str] = Counter()
    again: Counter[str] = Counter()
    unnamed = 0
    for product, flops in program.products.items():
        phase, module = module_of(product.path)
        if product.kind == "multiply":
            rewritten[module] += flops * devices
        elif not product.path:
            unnamed += flops * devices
        else:
            if product.flash:
                products, twice = product.flash
                again[module] += flops // products * twice * devices
            done[phase, module] += flops * devices
            imaginary[module] -= flops * devices * product.dtype.startswith("complex")
    skipped: Counter[str] = Counter()
    for path, flops in program.skipped.items():
        skipped[module_of(path)[1]] += flops * devices
    # Of factorisations and callbacks count has no products.
    opaque = {
        module_of(path)[1]
        for path in program.opaque
        if path.rpartition("/")[2] not in rules.APART and not path.endswith("_callback")
    }
    padded = {module_of(path)[1] for path in program.padded}
    filled = {module_of(path)[1] for path in program.filled}
    ungrouped = {module_of(path)[1] for path in program.ungrouped}

    found: dict[str, Counter[str]] = {RECOMPUTE: Counter(), MERGED: Counter()}

    def book(cause: str, module: str, flops: int) -> None:
        if flops:
            found.setdefault(cause, Counter())[module] += flops

    missing: Counter[str] = Counter()
    merged: Counter[str] = Counter()
    surplus: Counter[str] = Counter()
    times: dict[str, set[int | None]] = {}
    """By module, how often the products of a phase are executed, where that is a whole number."""
    for module in forward | {module for _, module in done}:
        given, asked = (
            {phase: c[phase, module] for phase in places.PHASES} for c in (done, wanted)
        )
        book(RECOMPUTE, module, asked["recompute"])
        book(AGAIN, module, again[module])
        book(SKIPPED, module, -skipped[module])
        gap = sum(given.values()) - again[module] + skipped[module] - sum(asked.values())
        if gap >= 0:
            surplus[module] = gap
            times[module] = {_multiple(given[p], asked[p]) for p in given if given[p] or asked[p]}
            continue
        missing[module] = -gap
        # What is merged keeps the forward pass's name; where some is recomputed still, the rest
        # may have been merged with that.
        gone = 0 if given["recompute"] or rewritten[module] else asked["recompute"]
        merged[module] = min(missing[module], gone)
        missing[module] -= merged[module]
        if missing[module] and 4 * missing[module] == imaginary[module]:
            book(COMPLEX, module, -missing.pop(module))
        simple = min(missing[module], rewritten[module])
        missing[module] -= simple
        book(REWRITTEN, module, -simple)

    # What lost its name, or bears another's, is taken for what is missing elsewhere.
    lost = {module for module in count.grouped if missing[module]}
    unnamed = _settle(missing, unnamed)
    if unnamed and lost:
        book(GROUPED, ", ".join(sorted(lost)), unnamed)
        unnamed = 0
    for module in list(surplus):
        grouped = count.grouped.get(module, 0)
        asked_here = sum(n for (_, m), n in wanted.items() if m == module)
        shared = asked_here and surplus[module] * devices <= (asked_here + surplus[module]) * (
            devices - 1
        )
        repeated = all(n and devices % n == 0 for n in times[module])
        if shared and repeated and len(times[module]) == 1:
            book(REPEATED, module, surplus.pop(module))
        elif surplus[module] and grouped and module in ungrouped:
            book(GROUPED, module, surplus.pop(module))
        elif module in filled:
            book(FILLED, module, surplus.pop(module))
        elif module in padded:
            book(PADDED, module, surplus.pop(module))
        # Of work that every device repeats, all but one device's is surplus.
        elif shared:
            book(REPEATED if repeated else UNEVEN, module, surplus.pop(module))
        # Products of two modules that read the same may be one, by one of their names.
        else:
            surplus[module] = _settle(merged, _settle(missing, surplus[module]))
    for module, flops in merged.items():
        book(MERGED, module, -flops)
    for module, flops in missing.items():
        book(OPAQUE if module in opaque else REMOVED, module, -flops)
    for module, flops in surplus.items():
        book(UNEXPLAINED, module, flops)
    book(UNEXPLAINED, "", unnamed)
    return [
        Difference(cause, by.total(), tuple(sorted(m for m in by if by[m])))
        for cause, by in found.items()
        if by.total()
    ]


def _multiple(given: int, asked: int) -> int | None:
    return given // asked if asked and given % asked == 0 else None


def _settle(missing: Counter[str], flops: int) -> int:
    """Fills gaps with FLOPs, those of just that size first; gives what is left."""
    for module in sorted(missing, key=lambda m: (missing[m] != flops, -missing[m])):
        filled = min(missing[module], flops)
        missing[module] -= filled
        flops -= filled
    return flops


def reported(program: Program, raw: float) -> list[Difference]:
    """From the FLOPs executed on a device to the figure of XLA's cost_analysis()."""
    products, elementwise = program.once
    calls = sum(
        n
        for product, n in program.products.items()
        if product.kind not in ("dot", "convolution", "multiply")
    )
    loops = program.matmul_flops - calls - products
    rest = round(raw) - products - elementwise
    steps = ((LOOPS, -loops), (CALLS, -calls), (ELEMENTWISE, elementwise), (UNEXPLAINED, rest))
    return [Difference(cause, flops) for cause, flops in steps if flops]


def xla_flops(compiled: Any) -> float | None:
    """What XLA's own cost_analysis() says of one device; None where it says nothing."""
    try:
        found = compiled.cost_analysis()
    except Exception:  # of any kind, by backend
        return None
    found = found[0] if isinstance(found, list) and found else found
    flops = found.get("flops") if isinstance(found, dict) else None
    return None if flops is None or flops < 0 else float(flops)
