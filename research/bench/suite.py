"""The measuring suite: every family of models at declared settings, on bundled data, in minutes.

One device is measured, by the configs that a user trains. A time is a median over rounds of steps
that are each waited for, with an interval; where the rounds lie too far apart it is not reported.
"""

import datetime
import math
import os
import pathlib
from collections.abc import Callable, Mapping

import jax

from research import UserError, environment
from research.bench import counters, measuring
from research.bench import result as results
from research.bench.families import Family
from research.bench.result import Machine, Result, Roof
from research.compute import peaks, roofline


def measure(
    families: Mapping[str, Family],
    seconds: float,
    price: float | None = None,
    say: Callable[[str], None] = lambda line: None,
    done: Callable[[], object] = lambda: None,
    device: jax.Device | None = None,
) -> Result:
    """Measures this process's first device, or another.

    seconds: of timing a family's steps, and as many again beside the making of batches; training
    to the target comes on top. price: USD an hour of the machine.
    say: told what is at work. done: called after each family.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"--seconds must be more than 0, not {seconds:g}")
    if price is not None and not (math.isfinite(price) and price > 0):
        raise UserError(f"--price must be more than 0 USD an hour, not {price:g}")
    device = device or jax.local_devices()[0]
    machine = _machine(device, price)
    found = peaks.load(device)
    if found is None:
        say("peaks of this device, measured once")
        found = peaks.measure(device, say=say)
        peaks.save(found)
    datasheet, reached = roofline.datasheet(device), roofline.of_peaks(found)
    bench = measuring.Bench(
        device=device,
        seconds=seconds,
        price=price,
        datasheet=datasheet,
        measured=reached,
        counters=counters.find(device),
    )
    rows = []
    for name, family in families.items():
        say(f"{name}: {family.config}")
        rows.append(bench.row(name, family))
        done()
    return Result(
        suite=results.VERSION,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine,
        environment=environment.environment(),
        noise=measuring.NOISE,
        peaks=found,
        roofs=tuple(roof for rates in (datasheet, reached) if (roof := _roof(rates))),
        rows=tuple(rows),
    )


def _roof(rates: roofline.Rates | None) -> Roof | None:
    """None where nothing is known of float32."""
    if rates is None or (peak := rates.peak("float32")) is None:
        return None
    far = rates.bandwidth(1 << 50)  # beyond any cache
    return Roof(source=rates.source, flops=peak[0], bandwidth=far)


def _machine(device: jax.Device, price: float | None) -> Machine:
    try:
        memory = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        memory = None
    driver = [str(getattr(device.client, "platform_version", ""))]
    kernel = pathlib.Path("/proc/driver/nvidia/version")
    if device.platform == "gpu" and kernel.exists():
        driver.append(kernel.read_text().splitlines()[0])
    return Machine(
        device=peaks.name_of(device),
        platform=device.platform,
        devices=1,
        host=peaks.host(),
        driver="; ".join(" ".join(line.split()) for line in driver if line),
        load=_load(),
        memory=memory,
        price=price,
    )


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
