"""A count as text and as JSON."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from research.compute.count import Count


def to_json(cost: Count) -> dict[str, Any]:
    """Every figure of a count, over all devices; integers are exact unless `qualifier` says not."""
    return {
        "model_flops": cost.model_flops,
        "causal_flops": cost.causal_flops,
        "matmul_flops": cost.matmul_flops,
        "dense_flops": cost.dense_flops,
        "qualifier": cost.qualifier,
        "reasons": [*cost.lower, *cost.upper],
        "by_phase": cost.by_phase,
        "by_module": cost.by_module,
        "by_dtype": cost.by_dtype,
        "elementwise_flops": cost.elementwise_flops,
        "transcendentals": cost.transcendentals,
        "apart": dict(cost.apart),
        "unknown": dict(cost.unknown),
    }


def line(cost: Count) -> str:
    """The count in one line, for a log."""
    shares = (f"{k} {100 * n / max(cost.matmul_flops, 1):.0f}%" for k, n in cost.by_phase.items())
    return f"model FLOPs a step: {cost.model_flops:,} ({cost.qualifier}); {', '.join(shares)}"


def text(cost: Count) -> str:
    """The count as a page: totals, then phases, modules and dtypes with their shares."""
    causal = cost.causal_flops
    totals = [
        ("model FLOPs", cost.model_flops, cost.qualifier),
        *([] if causal is None else [("causal attention halved", causal, cost.qualifier)]),
        ("as written, with recompute", cost.matmul_flops, cost.qualifier),
        *([("every tap of convolutions", cost.dense_flops, "dense")] if cost.dense_extra else []),
        ("elementwise FLOPs", cost.elementwise_flops, "apart"),
        ("transcendentals", cost.transcendentals, "apart"),
        *((name, n, "apart, by its own rule") for name, n in cost.apart.items()),
    ]
    lines = [f"{name:30}{n:>22,}  {words}" for name, n, words in totals]
    lines += [f"  {reason}" for reason in (*cost.lower, *cost.upper)]
    if cost.unknown:
        lines.append("no rule for: " + ", ".join(f"{k} x{n}" for k, n in cost.unknown.items()))
    phases, dtypes = list(cost.by_phase.items()), list(cost.by_dtype.items())
    parts = [("by phase", phases), ("by module", tree(cost.by_module)), ("by dtype", dtypes)]
    for title, rows in parts:
        lines += ["", title]
        for name, n in rows:
            lines.append(f"  {name:40}{n:>22,}  {100 * n / max(cost.matmul_flops, 1):5.1f}%")
    return "\n".join(lines)


def tree(modules: Mapping[str, int]) -> list[tuple[str, int]]:
    """(indented name, FLOPs) of modules and of the parents that hold them, each a sum."""
    sums: Counter[tuple[str, ...]] = Counter()
    for module, n in modules.items():
        path = tuple(module.split(".")) if module else ("(no module)",)
        for depth in range(1, len(path) + 1):
            sums[path[:depth]] += n
    rows: list[tuple[str, int]] = []

    def visit(parent: tuple[str, ...]) -> None:
        for path in [p for p in sums if p[:-1] == parent]:
            rows.append(("  " * (len(path) - 1) + path[-1], sums[path]))
            visit(path)

    visit(())
    return rows
