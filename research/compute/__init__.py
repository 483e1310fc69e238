"""The compute ledger: what a step costs."""

import re
from typing import Any


def xla_flops(compiled: Any) -> float | None:
    """FLOPs of one call of a compiled program on one device, as XLA counts them, or None.

    XLA counts a loop's body once and a custom call as nothing, so that a program with either has
    no figure here: None, in place of a wrong one. Elementwise operations are included.
    """
    if re.search(r" (while|custom-call|conditional)\(", compiled.as_text() or " while("):
        return None
    cost = compiled.cost_analysis()
    flops = cost.get("flops") if isinstance(cost, dict) else None
    return float(flops) if flops and flops > 0 else None
