"""The compute ledger: what a step costs, exactly. Imports jax and numpy only."""

from research.compute import report
from research.compute.count import Count, count

__all__ = ["Count", "count", "report"]
