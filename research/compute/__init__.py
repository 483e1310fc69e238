"""The compute ledger: what a step costs, exactly. Imports jax and numpy only."""

from research.compute.count import Count, count
from research.compute.program import Program, program
from research.compute.report import Report, report

__all__ = ["Count", "Program", "Report", "count", "program", "report"]
