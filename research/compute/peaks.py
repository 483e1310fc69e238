"""What one of this machine's devices reaches: rates of products and of memory, measured and kept.

A datasheet tells what a chip is sold for, and a CPU has none; these figures are its own, as reached
through XLA. They are of one device on one day, kept by device and by version of jax.
"""

import dataclasses
import datetime
import importlib.metadata
import math
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.compute import kept

DTYPES = tuple("float32 float32:HIGHEST bfloat16 float16 float64 int8".split())
_FAILURES = (RuntimeError, TypeError, ValueError)  # XLA's own errors are RuntimeErrors.
_MOST_TRIPS = 10**7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """Of one device. Raises ValueError for rates that are not positive and finite."""

    device: str
    """jax.Device.device_kind; of a CPU, its model and the number of cores that XLA may use."""
    platform: str
    versions: Mapping[str, str] = dataclasses.field(hash=False)
    """Of jax and jaxlib."""
    date: str
    """Of measuring, YYYY-MM-DD."""
    matmul: Mapping[str, float] = dataclasses.field(hash=False)
    """FLOP/s, 2 a multiply-add, by dtype and precision as `rules.dtype` spells them."""
    bandwidth: tuple[tuple[int, float], ...]
    """Bytes of a working set, ascending, and bytes/s of a triad over it, reads and writes."""

    def __post_init__(self) -> None:
        rates = [*self.matmul.values(), *(rate for _, rate in self.bandwidth)]
        sizes = [size for size, _ in self.bandwidth]
        if not (self.matmul and sizes) or sizes != sorted(set(sizes)):
            raise ValueError("peaks need rates of products, and of working sets in ascending order")
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ValueError("peaks must be positive and finite")

    @property
    def memory_bandwidth(self) -> float:
        """Bytes/s over the largest working set: main memory's, where no cache holds as much."""
        return self.bandwidth[-1][1]

    @property
    def key(self) -> kept.Key:
        return kept.Key(self.device, self.platform, self.versions)

    def bandwidth_at(self, size: int) -> float:
        """Bytes/s that a program which streams over `size` bytes is not expected to exceed.

        The highest rate at a working set of that size or more, or at the next smaller one. A
        program that returns to a part of its bytes may run at that part's rate.
        """
        start = max((measured for measured, _ in self.bandwidth if measured <= size), default=0)
        return max(rate for measured, rate in self.bandwidth if measured >= start)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A body run over x again and again inside one jitted call, x its only result.

    Each trip reads the x that the trip before wrote, so that none can be left out, hoisted or
    merged with another. A call is given a copy of x to write over, and copies nothing itself.
    """

    body: Callable[[jax.Array, jax.Array], jax.Array]
    x: jax.Array
    a: jax.Array
    work: int
    """FLOPs, or bytes read and written, of one trip."""

    def jitted(self, trips: int) -> jax.stages.Wrapped:
        def run(x: jax.Array, a: jax.Array) -> jax.Array:
            return lax.fori_loop(0, trips, lambda _, x: self.body(x, a), x)

        return jax.jit(run, donate_argnums=0)

    def compile(self, trips: int) -> jax.stages.Compiled:
        return self.jitted(trips).lower(self.x, self.a).compile()

    def seconds(self, compiled: jax.stages.Compiled) -> float:
        """Of one call, until its result is there."""
        x = jnp.copy(self.x).block_until_ready()
        start = time.perf_counter()
        compiled(x, self.a).block_until_ready()
        return time.perf_counter() - start

    def rate(self, seconds: float, repeats: int) -> float:
        """Work a second, the best of `repeats` calls that last at least about `seconds` each.

        Raises RuntimeError where no number of trips lasts that long: the work is not being done.
        """
        trips = 1
        while True:
            if trips > _MOST_TRIPS:
                raise RuntimeError("more trips take no longer: their work is not done")
            compiled = self.compile(trips)
            self.seconds(compiled)  # A first call also loads the program.
            took = self.seconds(compiled)
            if took >= 0.8 * seconds:
                break
            # A hundredfold at most: a short call is mostly its start.
            trips = math.ceil(trips * min(100, 1.1 * seconds / max(took, 1e-9)))
        return trips * self.work / min([took, *(self.seconds(compiled) for _ in range(repeats))])


def products(name: str, n: int, device: jax.Device) -> Loop:
    """Two products of n x n matrices a trip, named as in `Peaks.matmul`; int8 adds up in int32.

    With one a trip, x would be copied: a product cannot be written over what it reads.
    Raises TypeError or ValueError for a dtype that jax lacks, or has only with x64 enabled.
    """
    dtype, _, asked = name.partition(":")
    kind = jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(kind) != kind:
        raise ValueError("needs jax_enable_x64")
    integer = jnp.issubdtype(kind, jnp.integer)
    # Not None, which would be whatever jax_default_matmul_precision says.
    precision = lax.Precision(asked.lower() or "default")

    def operands() -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(0)
        if integer:
            x, a = jax.random.randint(key, (2, n, n), -127, 128, kind)
            return x, a
        # Hartley's matrix: dense, and orthogonal up to rounding, so that x neither overflows nor
        # vanishes in thousands of products. Both would change the time of one.
        i = jnp.arange(n, dtype=jnp.int32)
        angle = (i[:, None] * i[None, :] % n).astype(jnp.float32) * (2 * math.pi / n)
        a = (jnp.cos(angle) + jnp.sin(angle)) / math.sqrt(n)
        return jax.random.normal(key, (n, n), jnp.float32).astype(kind), a.astype(kind)

    def product(x: jax.Array, a: jax.Array) -> jax.Array:
        wide = jnp.int32 if integer else None
        return jnp.matmul(x, a, precision=precision, preferred_element_type=wide).astype(kind)

    def body(x: jax.Array, a: jax.Array) -> jax.Array:
        # The barrier keeps (x a) a from becoming x (a a), half of which is the same every trip.
        return product(lax.optimization_barrier(product(x, a)), a)

    x, a = _on(device, operands)
    return Loop(body, x, a, work=2 * 2 * n**3)


def triad(size: int, device: jax.Device) -> Loop:
    """x = a + x / 2 in float32 over two arrays of `size` bytes together.

    It reads two arrays and writes one, over the one that it read: a third array would make a CPU's
    cache fetch, uncounted, what is about to be overwritten.
    """

    def operands() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(size // 8, jnp.float32), jnp.ones(size // 8, jnp.float32)

    x, a = _on(device, operands)
    return Loop(lambda x, a: a + 0.5 * x, x, a, work=3 * 4 * (size // 8))


def _on(device: jax.Device, function: Callable[[], Any]) -> Any:
    return jax.jit(function, out_shardings=jax.sharding.SingleDeviceSharding(device))()


def measure(
    device: jax.Device | None = None,
    say: Callable[[str], None] = lambda line: None,
    *,
    dtypes: Sequence[str] = DTYPES,
    sizes: Sequence[int] | None = None,
    working_sets: Sequence[int] | None = None,
    seconds: float = 0.05,
    repeats: int = 10,
) -> Peaks:
    """Measures a device, by default this process's first; `say` is told each figure.

    A rate is the best of `repeats` calls of `seconds` each, and of the `sizes` of square matrices:
    a peak is a maximum, as other programs, a cold clock or small matrices only ever slow a device
    down; a mean would measure them too. The sizes end where one product outlasts a call by far. A
    dtype that the device does not multiply is left out, as are working sets beyond its memory.
    On a CPU that other programs keep busy throughout every rate is too low: a load is told.
    Raises what the device raised where not one dtype, or not the least working set, can be done.
    """
    device = device or jax.local_devices()[0]
    cpu = device.platform == "cpu"
    sizes = sizes or ((512, 1024, 2048) if cpu else (2048, 4096, 8192, 16384))
    working_sets = working_sets or [2**k for k in range(18, 29 if cpu else 31, 2)]
    load = os.getloadavg()[0] if cpu and hasattr(os, "getloadavg") else 0.0
    if load > _cores() / 2:
        say(f"other programs are running (load {load:.1f}): rates may be too low")
    matmul: dict[str, float] = {}
    failure: Exception | None = None
    for name in dtypes:
        for n in sorted(sizes):
            if name in matmul and 4 * n**3 / matmul[name] > 4 * seconds:
                break
            try:
                rate = products(name, n, device).rate(seconds, repeats)
            except _FAILURES as error:
                failure = error
                say(f"{name} {n}: none ({str(error).partition(chr(10))[0]})")
                break
            say(f"{name} {n}: {rate / 1e9:,.1f} GFLOP/s")
            matmul[name] = max(rate, matmul.get(name, 0))
    if failure and not matmul:
        raise failure
    bandwidth: list[tuple[int, float]] = []
    for size in sorted(working_sets):
        try:
            rate = triad(size, device).rate(seconds, repeats)
        except RuntimeError as error:
            if not bandwidth:
                raise
            say(f"{size} bytes: none ({str(error).partition(chr(10))[0]})")
            break
        say(f"{size} bytes: {rate / 1e9:,.1f} GB/s")
        bandwidth.append((size, rate))
    return Peaks(
        device=name_of(device),
        platform=device.platform,
        versions=_versions(),
        date=datetime.date.today().isoformat(),
        matmul=matmul,
        bandwidth=tuple(bandwidth),
    )


def name_of(device: jax.Device) -> str:
    """`Peaks.device`."""
    return host() if device.platform == "cpu" else device.device_kind


def host() -> str:
    """The CPU's model and the number of cores that XLA may use."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    model = found[1] if found else platform.processor() or platform.machine()
    cores = _cores()
    return f"{model}, {cores} core{'s' * (cores > 1)}"


def _cores() -> int:
    """XLA starts as many threads as this process may run on; macOS has no affinity."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}


def to_json(peaks: Peaks) -> dict[str, Any]:
    return dataclasses.asdict(peaks)


def from_json(data: Any) -> Peaks:
    """Raises ValueError for what `to_json` did not give."""
    try:
        return Peaks(
            device=str(data["device"]),
            platform=str(data["platform"]),
            versions={str(k): str(v) for k, v in data["versions"].items()},
            date=datetime.date.fromisoformat(data["date"]).isoformat(),
            matmul={str(k): float(v) for k, v in data["matmul"].items()},
            bandwidth=tuple((int(size), float(rate)) for size, rate in data["bandwidth"]),
        )
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not peaks: {type(error).__name__}: {error}") from error


def save(peaks: Peaks) -> pathlib.Path:
    """Writes the file that `load` reads and returns its path; OSError where it cannot."""
    return kept.write("peaks", peaks.key, to_json(peaks))


def load(device: jax.Device | None = None) -> Peaks | None:
    """What was saved of this device, by default this process's first, under these versions of jax
    and jaxlib; None where nothing was, or where it cannot be read."""
    key = key_of(device or jax.local_devices()[0])
    try:
        found = from_json(kept.read("peaks", key))
    except (OSError, ValueError):
        return None
    return found if found.key == key else None


def key_of(device: jax.Device) -> kept.Key:
    return kept.Key(name_of(device), device.platform, _versions())
