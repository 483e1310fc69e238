"""How much of the host's CPU other programs take while something is timed.

Rounds that lie close together do not tell a machine that is busy throughout, whose times are all
too long.
"""

import os
import pathlib
import time

_STAT = pathlib.Path("/proc/stat")


class Others:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = _busy(), _own(), time.perf_counter()

    def share(self) -> float | None:
        """Of all cores' time since then; what the host's other guests stole is in it. None where
        the system does not tell."""
        if self._busy is None or (busy := _busy()) is None:
            return None
        room = (os.cpu_count() or 1) * (time.perf_counter() - self._start)
        taken = busy - self._busy - (_own() - self._own)
        return min(1.0, max(0.0, taken / room))


def _busy() -> float | None:
    """Seconds that all cores have worked, and those stolen, since the system started (proc(5))."""
    try:
        fields = _STAT.read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds of this process."""
    times = os.times()
    return times.user + times.system
