"""What several slices of a TPU exchange: XLA compiles one slice's program, in which a collective
over the data centre's network is a send to the host, and a receive, by the names of libtpu 0.0.42.
"""

import re
from typing import NamedTuple

from research.compute.hlo import Instruction

_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_SLICE = 100_000
"""A device's number is its slice's times this, and its own in the slice."""


class Transfer(NamedTuple):
    kind: str
    """As HLO names the collective."""
    bytes: int
    """As `Collective.bytes`."""
    groups: list[list[int]] | None
    """Numbers of the devices that exchange; None where the text is not understood."""


def transfer(i: Instruction) -> Transfer | None:
    """What a send takes part in; None for one that is no part of a collective."""
    given = i.attributes.get("frontend_attributes", "")
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', given)
    if found is None:
        return None
    groups = _groups(given)
    kind = _KINDS.get(found[1], found[1])
    size = i.shape.elements[0].bytes
    if kind == "all-gather" and groups:
        size *= max(map(len, groups))
    return Transfer(kind, size, groups if kind in _KINDS.values() else None)


def _groups(given: str) -> list[list[int]] | None:
    # Of every device, with those of its number in the slices of a list.
    if found := re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}"', given):
        slices = [int(n) for n in found[1].split(",")]
        numbers = range(int(found[2]), int(found[3]) + 1)
        return [[_SLICE * n + number for n in slices] for number in numbers]
    # One by one: those of a group, or a sender and who receives.
    if found := re.search(r"_xla_megascale_target=\{(\{[\d,{}>-]*\})\}", given):
        listed = re.findall(r"\{([\d,>-]+)\}", found[1])
        return [[int(n) for n in re.split(",|->", group)] for group in listed]
    return None
