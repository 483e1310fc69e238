"""Energy by the counters of the machine, read by Zeus (You et al., NSDI 2023; extra `energy`).

GPUs count their own energy (NVML and AMD SMI, of a board); of CPUs, RAPL counts the packages and,
where it has a zone for it, their memory. Neither has the fans, the disks or what the power supply
loses.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

WINDOW = 5.0
"""Seconds that a window lasts at least. NVML's counter moves every 100 ms or so (ml.energy's blog,
Thermally stable profiling), so that the two ends of 5 s are at most 4% of it. On A100 and H100 the
sensor sees a quarter of the time (Yang, Adamek and Armour, arXiv 2312.02741): of steps that repeat
themselves, many times a window, a fair part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counters:
    """Of one device."""

    monitor: Any
    """A zeus.monitor.ZeusMonitor."""
    covers: str
    """What is counted, and what is not."""

    def joules_per_step(self, steps: Callable[[float], int]) -> tuple[float | None, str]:
        """Energy of a step and how it was got, or None and why not.

        steps: makes steps for at least so many seconds, waits for them, and returns their number.
        """
        self.monitor.begin_window("steps", sync_execution=False)
        start = time.perf_counter()
        count = steps(WINDOW)
        seconds = time.perf_counter() - start
        found = self.monitor.end_window("steps", sync_execution=False)
        parts = (found.gpu_energy, found.cpu_energy, found.dram_energy)
        total = sum(sum(part.values()) for part in parts if part)
        if total <= 0:
            return None, f"the counters did not move in {seconds:.1f} s: {self.covers}"
        return total / count, f"{self.covers}; {count} steps in a window of {seconds:.1f} s"


def find(device: jax.Device) -> tuple[Counters | None, str]:
    """The counters that cover a device, or None and why there are none."""
    if device.platform not in ("gpu", "cuda", "rocm", "cpu"):
        return None, f"{device.platform} has no energy counters that Zeus reads"
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, "Zeus is not installed: pip install 'ergon[energy]'"
    if device.platform != "cpu":
        index = device.local_hardware_id
        monitor = ZeusMonitor(gpu_indices=None, cpu_indices=[])
        if index is None or index >= len(monitor.gpu_indices):
            return None, f"Zeus finds no counter of GPU {index}"
        return (
            Counters(
                monitor=ZeusMonitor(gpu_indices=[index], cpu_indices=[]),
                covers="GPU only: its board, not the host",
            ),
            "",
        )
    monitor = ZeusMonitor(gpu_indices=[])
    if not monitor.cpu_indices:
        return None, "the host shows no RAPL counters to this process"
    memory = any(
        monitor.cpus.cpus[i].supports_get_dram_energy_consumption() for i in monitor.cpu_indices
    )
    packages = len(monitor.cpu_indices)
    return (
        Counters(
            monitor=monitor,
            covers=f"{packages} CPU package{'s' * (packages > 1)}"
            + (" and memory" if memory else ", memory not counted")
            + ", other programs' work on them included; not the whole machine",
        ),
        "",
    )
