"""What a step would cost on a target that is not there: compiled for it, in this process.

Nothing runs. FLOPs, bytes and messages are read from the program, seconds predicted from it. That
it fits is the compiler's word on TPU and, on GPU, its account against the memory that JAX can use.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax

from research import UserError, compute, flags, flash
from research.bench import extrapolation
from research.compute import chips, links, predict, roofline, targets
from research.compute.report import Report
from research.data.outline import outlined
from research.experiment import Experiment
from research.setup import Setup, prepare

USABLE = 0.9
"""Of a GPU's memory, with XLA_PYTHON_CLIENT_MEM_FRACTION set to as much: CUDA and NCCL need the
rest. Without it JAX takes 0.75."""

Status = Literal["ok", "does not fit", "failed", "not installed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    needed: int | None
    usable: int | None
    qualifier: str
    """exact: the compiler's; estimated: its account against `USABLE`; lower bound: of temporaries
    alone, the compiler having looked no further."""

    @property
    def over(self) -> int | None:
        """How many bytes are missing; None: they are not, or it is not known."""
        if self.needed is None or self.usable is None or self.needed <= self.usable:
            return None
        return self.needed - self.usable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One target's answer. Figures are of one step; None: unavailable, for the status's reason."""

    target: str
    status: Status
    reason: str = ""
    extrapolated: str | None = None
    """From which target, that was compiled for; None: from none."""
    chip: str | None = None
    """Its key in chips.toml."""
    chips: int
    devices: int
    mesh: Mapping[str, int]
    """Axes of more than one device."""
    state: int
    """Bytes of parameters, optimizer state and all else that is kept, of one device: exact."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """By which it differs from the experiment that was asked for: found by a search."""
    attention: str | None = None
    """Which stood in the program; None: the model has none."""
    model_flops: int
    """Over all devices; the same on every target."""
    model_qualifier: str
    flops: int | None = None
    """Executed by one device."""
    recomputed: int | None = None
    """Of these, what was there before: recomputed layers, and products that flash attention makes
    again."""
    qualifier: str | None = None
    """Of what is executed and exchanged."""
    bytes: int | None = None
    """Moved by one device at the boundaries of fusions: estimated."""
    collectives: tuple[dict[str, Any], ...] = ()
    memory: Memory | None = None
    fits_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings with which it was found to fit, where it does not; none: none that were tried."""
    bounds: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Seconds by `rates`: compute, memory, links, at_least, overlapped, serial."""
    binds: str | None = None
    rates: str | None = None
    """Whose peaks and bandwidths those are, and their date."""
    step_seconds: Mapping[str, Any] | None = None
    """Predicted: value, low, high, qualifier, basis."""
    mfu: float | None = None
    """At the predicted time."""
    examples: int
    tokens: int | None
    """Of a step; None: its examples are no sequences of tokens."""
    compile_seconds: float | None = None
    """On this machine."""

    def json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        seconds = None if self.step_seconds is None else self.step_seconds["value"]
        for name in ("examples", "tokens"):
            n = found[name]
            found[f"{name}_per_second"] = n / seconds if n and seconds else None
        if self.memory is not None:
            found["memory"]["over"] = self.memory.over
        return found


def answer(e: Experiment, where: targets.Place, tries: int, search: int = 0) -> Row:
    """Compiles the step for a target, and where it does not fit tries what would.

    tries: compilations at most that look for it. search: compilations that look for the fastest
    settings that fit, which are the row's then. Raises UserError where the experiment's mesh, or
    its batch, does not suit so many devices.
    """
    e = outlined(e)
    row = compiled(e, where)
    smaller: dict[str, Any] = {}
    start = row
    if row.status == "does not fit":
        tried = _tried(e, where, list(_smaller(e, row))[:tries])
        start, smaller = next(((r, c) for r, c in tried if r.status == "ok"), (row, smaller))
    if not search:
        return dataclasses.replace(row, fits_with=smaller)
    return _fastest(e, where, start, smaller, search)


def changed(e: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """With other values of fields, by their dotted paths."""
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        inner = changed(getattr(e, first), {rest: value}) if rest else value
        given: dict[str, Any] = {first: inner}
        e = dataclasses.replace(e, **given)
    return e


def _tried(
    e: Experiment, where: targets.Place, candidates: list[dict[str, Any]]
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Rows of other settings, but for those that devices or batch rule out."""
    for changes in candidates:
        try:
            yield compiled(changed(e, changes), where), changes
        except (UserError, ValueError):
            continue


def _smaller(e: Experiment, row: Row) -> Iterator[dict[str, Any]]:
    """Settings that need less memory and change no number, those that cost least first: parts of a
    batch, as many as make room, more devices that share the state, and layers recomputed."""
    fsdp = row.devices // (e.parallel.tensor * e.parallel.pipeline * e.parallel.context)
    split = {"parallel.fsdp": fsdp, "parallel.replica": 1, "parallel.data": None}
    shares: list[dict[str, Any]] = [{}]
    if fsdp > e.parallel.fsdp:
        shares.append(split)
    needed, usable = (row.memory.needed, row.memory.usable) if row.memory else (None, None)
    more = 2
    if needed and usable:
        room = usable - row.state
        if room < usable // 8:  # the state leaves none
            shares = shares[1:] or shares
            room = usable - row.state * e.parallel.fsdp // fsdp
        more = 2 ** max(math.ceil(math.log2(max(needed - row.state, 1) / max(room, 1))), 1)
    for times in (more, 2 * more):
        for share in shares:
            yield share | {"accumulate": e.accumulate * times}
    if getattr(e.model, "remat", None) == "none":
        for times in (1, more):
            yield shares[-1] | {"model.remat": "full", "accumulate": e.accumulate * times}
    if shares[0]:
        yield split


def _fastest(
    e: Experiment, where: targets.Place, row: Row, changes: Mapping[str, Any], most: int
) -> Row:
    """From settings to the fastest of their neighbours, until none is faster."""
    best, at, seen = row, dict(changes), {json.dumps(changes, sort_keys=True)}
    while True:
        near: list[dict[str, Any]] = []
        for more in _neighbours(changed(e, at), best.devices):
            key = json.dumps(at | more, sort_keys=True)
            if key not in seen and len(near) < most:
                seen.add(key)
                near.append(at | more)
        most -= len(near)
        found = [pair for pair in _tried(e, where, near) if pair[0].status == "ok"]
        if not found:
            break
        row, changes = min(found, key=lambda pair: _time(pair[0]))
        if best.status == "ok" and _time(row) >= _time(best):
            break
        best, at = row, dict(changes)
    return dataclasses.replace(best, settings=at)


def _time(row: Row) -> float:
    return float("inf") if row.step_seconds is None else float(row.step_seconds["value"])


def _neighbours(e: Experiment, devices: int) -> Iterator[dict[str, Any]]:
    """Settings one step away that change no number."""
    for name in ("fsdp", "tensor"):
        size = getattr(e.parallel, name)
        for other in {size * 2, size // 2} - {0, size}:
            if devices % other == 0 and (name == "fsdp" or hasattr(e.model, "heads")):
                yield {f"parallel.{name}": other, "parallel.data": None}
    if (remat := getattr(e.model, "remat", None)) is not None:
        yield {"model.remat": "none" if remat == "full" else "full"}
    for parts in {e.accumulate * 2, e.accumulate // 2} - {0}:
        yield {"accumulate": parts}


def compiled(e: Experiment, where: targets.Place) -> Row:
    """A row for just these settings; where there are too many devices, extrapolated from fewer."""
    target = targets.TARGETS[where.kind]
    few = extrapolation.fewer(e, where)
    setup, stood_in = _prepared(few)
    kind = chips.match(setup.mesh.devices.flat[0].device_kind, target.platform, None)
    traced = setup.step().trace(*setup.abstract_example())
    reference = setup.reference()
    lowered = traced.lower(lowering_platforms=(target.platform,))
    start = time.perf_counter()
    refused: Memory | None = None
    try:
        program = _compile(lowered, options(target.platform))
    except jax.errors.JaxRuntimeError as error:
        refused = exhausted(str(error))
        if refused is None:
            raise
        found = Report(count=compute.count(reference or traced))
    else:
        spent = time.perf_counter() - start
        found = compute.report(traced, compiled=program, mesh=setup.mesh, reference=reference)
    found, read = few.grown(found, setup), tokens(setup.first["inputs"])
    row = Row(
        target=str(where),
        status="ok",
        extrapolated=str(few.place) if few.times > 1 else None,
        chip=None if kind is None else kind.key,
        chips=where.chips,
        devices=setup.mesh.size * few.times,
        mesh={k: n for k, n in few.sizes(setup.mesh).items() if n > 1},
        state=_state(setup),
        model_flops=found.count.model_flops,
        model_qualifier=found.count.qualifier,
        examples=setup.batch_size * few.times,
        tokens=read and read * few.times,
    )
    if refused is not None:
        if few.times > 1 and refused.qualifier == "exact":
            refused = dataclasses.replace(refused, qualifier="estimated")
        reason = "; ".join(filter(None, ["refused by the compiler", stood_in]))
        return dataclasses.replace(row, status="does not fit", reason=reason, memory=refused)
    assert found.program is not None
    memory = _memory(found.program, target, kind)
    exact = found.program.exact
    if few.times > 1:
        exact, memory = False, dataclasses.replace(memory, qualifier="estimated")
    times, unknown = _times(found, setup)
    large = "" if memory.over is None else "by the compiler's account of its memory"
    return dataclasses.replace(
        row,
        status="does not fit" if large else "ok",
        reason="; ".join(filter(None, [large, stood_in, unknown])),
        attention=_attention(found),
        flops=found.program.matmul_flops,
        recomputed=found.program.recomputed,
        qualifier="exact" if exact else "estimated",
        bytes=found.program.bytes,
        collectives=tuple(links.to_json(c, found.link_rates) for c in found.program.collectives),
        memory=memory,
        compile_seconds=spent,
        **times,
    )


def _prepared(few: extrapolation.Fewer) -> tuple[Setup, str]:
    """With attention that the target has, and why it is not the one that was asked for."""
    devices = targets.devices(few.place)
    try:
        return prepare(few.experiment, devices), ""
    except flash.Unsuited as error:
        plain = dataclasses.replace(few.experiment, attention="xla")
        return prepare(plain, devices), f"XLA's stands in: {error}"


def _times(found: Report, setup: Setup) -> tuple[dict[str, Any], str]:
    """What a row says of time, and why it says no more."""
    assert found.program is not None
    if not found.rates:
        return {}, "no peak is known of this device"
    here = setup.mesh.devices.flat[0].platform == "cpu"
    calibration = predict.load(setup.mesh.devices.flat[0]) if here else None
    rates = roofline.of_peaks(calibration.peaks) if calibration else found.rates[0]
    bounds = roofline.roofline(found.program, rates)
    times = {
        "bounds": {
            "compute": bounds.compute,
            "memory": bounds.memory,
            "links": bounds.communication,
            "at_least": bounds.at_least,
            "overlapped": bounds.overlapped,
            "serial": bounds.serial,
        },
        "binds": bounds.binds,
        "rates": f"{rates.device}, {rates.source}",
    }
    try:
        step = predict.predict(found.program, rates, calibration)
    except ValueError as error:
        return times, str(error)
    mfu = found.after(step.seconds).utilization(rates)["MFU"]
    seconds = {"value": step.seconds, "low": step.low, "high": step.high}
    said = {"qualifier": "estimated", "basis": step.basis}
    return times | {"step_seconds": seconds | said, "mfu": mfu.value}, ""


def options(platform: str) -> dict[str, Any]:
    """As the scripts have users' programs compiled; but products are the libraries' alone: which
    of them a kernel of Triton would do faster is found by timing, and there is nothing to time."""
    if platform != "cuda":
        return {}
    given = {name.lstrip("-"): json.loads(value) for name, value in flags.CUDA.items()}
    return given | {"xla_gpu_enable_triton_gemm": False}


_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_TEMPORARIES = re.compile(
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)


def _compile(lowered: Any, given: dict[str, Any]) -> Any:
    """With those of the options that this version of jax takes for a device that is not there:
    0.12 knows some of CUDA's only where the device is."""
    while True:
        try:
            return lowered.compile(given)
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"No such compile option: '(\w+)'", str(error))
            if found is None or found[1] not in given:
                raise
            given = {name: value for name, value in given.items() if name != found[1]}


def exhausted(report: str) -> Memory | None:
    """What XLA for TPU says of a program that is too large; None: it says another thing."""
    if not report.startswith("RESOURCE_EXHAUSTED"):
        return None
    for pattern, qualifier in ((_USED, "exact"), (_TEMPORARIES, "lower bound")):
        if found := pattern.search(report):
            scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            needed, usable = (int(float(found[i]) * scale[found[i + 1]]) for i in (1, 3))
            return Memory(needed=needed, usable=usable, qualifier=qualifier)
    return Memory(needed=None, usable=None, qualifier="unavailable")


def _state(setup: Setup) -> int:
    pairs = zip(*map(jax.tree.leaves, (setup.abstract, setup.shardings)), strict=True)
    return sum(math.prod(p.shard_shape(x.shape)) * x.dtype.itemsize for x, p in pairs)


def _memory(program: compute.Program, target: Any, kind: chips.Chip | None) -> Memory:
    needed = program.memory.total if program.memory else None
    if target.platform == "cuda":
        return Memory(needed=needed, usable=int(USABLE * target.memory), qualifier="estimated")
    usable = kind.memory_bytes if kind else None
    return Memory(needed=needed, usable=usable, qualifier="exact")


def _attention(found: Report) -> str | None:
    if not any("attention" in name for name in found.count.by_module):
        return None
    products = found.program.products if found.program else ()
    kinds = (product.kind for product in products if product.flash)
    return next((flash.NAMES["tpu" if "splash" in kind else "cuda"] for kind in kinds), "XLA")


def tokens(inputs: Any) -> int | None:
    """Of a batch's inputs; None: they are no sequences of tokens."""
    return int(inputs.size) if inputs.ndim == 2 and inputs.dtype.kind in "iu" else None
