"""What a step costs, as written, as executed and as XLA reports it, as text and as JSON."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from research.compute import causes, links, roofline
from research.compute.count import Count, count, low, trace
from research.compute.program import Memory, Program, program

_ROLES = {
    "params": "parameters",
    "opt_state": "optimizer state",
    "model_state": "model state",
    "ema": "averaged parameters",
}
"""Of arguments by common names of theirs, or of their fields."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The ledger of one call of a function; str() is the page."""

    count: Count
    program: Program | None = None
    """None: not compiled."""
    xla_flops: float | None = None
    """XLA's cost_analysis, of one device."""
    rates: Sequence[roofline.Rates] = ()
    """Of the device: its datasheet's, and those measured."""
    seconds: float | None = None
    """Measured, of one call."""
    peak_bytes: int | None = None
    """The most that the device has held since it started, where it tells."""
    device: Any = dataclasses.field(default=None, repr=False, compare=False)
    """The jax.Device compiled for, or one of them."""

    def after(self, seconds: float) -> "Report":
        """With what was measured: seconds of one call, and the device's peak of memory by now."""
        return dataclasses.replace(self, seconds=seconds, peak_bytes=_peak_bytes(self.device))

    @property
    def devices(self) -> int:
        return self.program.devices if self.program else self.count.devices

    @property
    def link_rates(self) -> links.Links | None:
        return next((r.links for r in self.rates if r.links), None)

    @functools.cached_property
    def differences(self) -> list[causes.Difference]:
        """From model FLOPs to those executed, on all devices."""
        return causes.executed(self.count, self.program) if self.program else []

    @functools.cached_property
    def xla_differences(self) -> list[causes.Difference]:
        """From the FLOPs executed on one device to XLA's figure."""
        if self.program is None or self.xla_flops is None:
            return []
        return causes.reported(self.program, self.xla_flops)

    def rooflines(self) -> list[tuple[roofline.Rates, roofline.Roofline]]:
        return [(r, roofline.roofline(self.program, r)) for r in self.rates] if self.program else []

    def utilization(self, rates: roofline.Rates | None) -> dict[str, roofline.Figure]:
        """MFU, with causal attention halved too where it is marked, and HFU."""
        if self.seconds is None:
            return {}
        model = _model(self.count)
        asked = {"MFU": model}
        if self.count.causal_flops is not None:
            asked["MFU, causal attention halved"] = _model(self.count, causal=True)
        if self.program:
            each = self.program.by_dtype.items()
            asked["HFU"] = {dtype: n * self.devices for dtype, n in each}
        return {
            name: roofline.utilization(flops, self.seconds, self.devices, rates)
            for name, flops in asked.items()
        }

    @property
    def mfu(self) -> roofline.Figure:
        """By the first rates that are known, its datasheet's where there is one."""
        if self.seconds is None:
            return roofline.Figure(None, "no step was measured")
        return self.utilization(self.rates[0] if self.rates else None)["MFU"]

    def line(self) -> str:
        """For a log."""
        cost, total = self.count, max(self.count.matmul_flops, 1)
        shares = ", ".join(f"{k} {100 * n / total:.0f}%" for k, n in cost.by_phase.items())
        found = f"model FLOPs a step: {cost.model_flops:,} ({cost.qualifier}); {shares}"
        if self.program is None:
            return found
        ratio = self.program.matmul_flops * self.devices / max(cost.model_flops, 1)
        found += f"; executed {ratio:.3f} of them ({_qualifier(self.program)})"
        if memory := self.program.memory:
            found += f"; {_bytes(memory.total)} a device"
        return found

    def json(self) -> dict[str, Any]:
        """Every figure; integers are exact unless the qualifier beside them says not."""
        found = count_json(self.count)
        if self.count.devices > 1:
            found["per_device"] = count_json(self.count.per_device)
        if self.program:
            found["program"] = program_json(self.program, self.link_rates)
            found["differences"] = [dataclasses.asdict(d) for d in self.differences]
            found["xla"] = {
                "flops": self.xla_flops,
                "differences": [dataclasses.asdict(d) for d in self.xla_differences],
            }
            found["rooflines"] = [
                {"device": rates.device, "source": rates.source}
                | dataclasses.asdict(bounds)
                | {"binds": bounds.binds, "overlapped": bounds.overlapped, "serial": bounds.serial}
                for rates, bounds in self.rooflines()
            ]
        if self.seconds is not None:
            # JSON has no NaN; what is refused has its reason below.
            found["seconds"] = None if roofline.refused(self.seconds) else self.seconds
            found["utilization"] = [
                {"device": r.device, "source": r.source}
                | {name: dataclasses.asdict(f) for name, f in self.utilization(r).items()}
                for r in self.rates
            ]
        found["peak_bytes"] = self.peak_bytes
        return found

    def __str__(self) -> str:
        parts = [_totals(self.count)]
        if self.program:
            parts += [self._executed(self.program), _memory(self.program.memory, self.peak_bytes)]
            parts += [_moved(self.program, self.link_rates), self._times()]
        parts += [self.reached()]
        shares = {"module": tree(self.count.by_module), "dtype": list(self.count.by_dtype.items())}
        shares = {"phase": list(self.count.by_phase.items())} | shares
        for name, rows in shares.items():
            parts.append([f"by {name}", *_shares(rows, self.count.matmul_flops)])
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _executed(self, run: Program) -> list[str]:
        """Model, executed and XLA's figures, and what lies between them."""
        model, total = self.count.model_flops, run.matmul_flops * self.devices
        on = f"on {self.devices} devices" if self.devices > 1 else "on one device"
        ratio = f"{total / model:.3f} of model" if model else ""
        lines = [_row(f"executed, {on}", total, f"{_qualifier(run)}; {ratio}")]
        lines += _causes(self.differences)
        lines += [f"  {reason}" for reason in run.reasons]
        lines += [
            f"  {name} x{n}: what it computes is not known" for name, n in run.unknown.items()
        ]
        if self.xla_flops is None:
            return [*lines, f"{'XLA reports':42}{'unavailable':>22}  for this backend"]
        raw = round(self.xla_flops)
        ratio = f"{raw / run.matmul_flops:.3f} of executed" if run.matmul_flops else ""
        of = ", of one device" if self.devices > 1 else ""
        return [*lines, _row(f"XLA reports{of}", raw, ratio), *_causes(self.xla_differences)]

    def _times(self) -> list[str]:
        if not self.rates:
            unknown = roofline.utilization({}, 1, 1, None)
            return [f"times {unknown}"]
        lines = []
        for rates, bounds in self.rooflines():
            times = ", ".join(f"{name} {_time(s)}" for name, s in bounds.times.items() if s)
            lines += [
                f"on {rates.device} ({rates.source})",
                f"  {times}; {bounds.binds} binds",
                f"  estimated {_time(bounds.overlapped)} overlapped to {_time(bounds.serial)} one "
                f"after the other; at least {_time(bounds.at_least)}",
            ]
            if bounds.intensity is not None:
                lines.append(f"  {bounds.intensity:.1f} FLOPs a byte of main memory")
            if bounds.compute is None and self.program:
                lines.append(f"  no peak for {', '.join(self.program.by_dtype)}")
        return lines

    def reached(self) -> list[str]:
        """MFU and HFU in lines; none where nothing was measured."""
        if self.seconds is None:
            return []
        if reason := roofline.refused(self.seconds):
            return [f"time of a step unavailable: {reason}"]
        lines = [f"measured {_time(self.seconds)} a step"]
        if not self.rates:
            lines += [f"  {name} {f}" for name, f in self.utilization(None).items()]
        for rates in self.rates:
            found = self.utilization(rates).items()
            lines += [f"  {name} {f} of {rates.device}, {rates.source}" for name, f in found]
        return lines


def report(
    fn: Any,
    *args: Any,
    compiled: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    reference: Any = None,
    seconds: float | None = None,
    **kwargs: Any,
) -> Report:
    """Traces, counts, compiles and reads a function at the given arguments (arrays or
    ShapeDtypeStructs); or a jax.stages.Traced.

    compiled: what it was compiled to, where it was. mesh: to name the axes of collectives by.
    reference: a jax.stages.Traced of the same mathematics, whose model FLOPs count, where the
    function's own does more, or other, products for the sake of its devices.
    seconds: measured, of one call; gives MFU and HFU.

    Raises ValueError, in one line, for what cannot be traced.
    """
    traced = trace(fn, args, kwargs)
    compiled = traced.lower().compile() if compiled is None else compiled
    names = getattr(low(traced).jaxpr.jaxpr.debug_info, "arg_names", None)
    run = program(compiled, mesh, names)
    device = _device(compiled)
    found = [] if device is None else [roofline.datasheet(device), roofline.measured(device)]
    report = Report(
        count=count(traced if reference is None else reference),
        program=run,
        xla_flops=causes.xla_flops(compiled),
        rates=[rates for rates in found if rates],
        device=device,
    )
    return report if seconds is None else report.after(seconds)


def _device(compiled: Any) -> Any:
    """One of those compiled for."""
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        return min(sharding.device_set, key=lambda d: d.id)
    return None


def _peak_bytes(device: Any) -> int | None:
    """The most that a device has held since it started; None where it does not tell."""
    try:
        found = device.memory_stats() or {}
    except Exception:  # a device that is described, and not there, has none
        return None
    return found.get("peak_bytes_in_use")


def _model(cost: Count, causal: bool = False) -> dict[str, int]:
    """Model FLOPs by dtype; causally masked ones halved where asked."""
    found: Counter[str] = Counter()
    for (phase, _, dtype, masked), n in cost.matmul.items():
        if phase != "recompute":
            found[dtype] += n // 2 if causal and masked else n
    return dict(found)


def count_json(cost: Count) -> dict[str, Any]:
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


def program_json(run: Program, rates: links.Links | None = None) -> dict[str, Any]:
    """Of one device; rates: of its links, by which messages have their seconds."""
    return {
        "devices": run.devices,
        "matmul_flops": run.matmul_flops,
        "qualifier": _qualifier(run),
        "reasons": run.reasons,
        "unknown": dict(run.unknown),
        "by_dtype": run.by_dtype,
        "bytes": run.bytes,
        "bytes_by_space": {str(space): n for space, n in run.bytes_by_space.items()},
        "compulsory_bytes": run.compulsory,
        "collectives": [links.to_json(c, rates) for c in run.collectives],
        "memory": run.memory and dataclasses.asdict(run.memory) | {"total": run.memory.total},
    }


def _qualifier(run: Program) -> str:
    if run.exact:
        return "exact"
    return "lower bound" if run.unknown and not run.reasons else "estimated"


# ---- the page


def _row(name: str, n: int, words: str) -> str:
    return f"{name:42}{n:>22,}  {words}".rstrip()


def _totals(cost: Count) -> list[str]:
    causal, words = cost.causal_flops, cost.qualifier
    rows = [("model FLOPs", cost.model_flops, words)]
    if causal is not None:
        rows.append(("causal attention halved", causal, words))
    if cost.matmul_flops != cost.model_flops:
        rows.append(("with recomputation, as written", cost.matmul_flops, words))
    if cost.dense_extra:
        rows.append(("with every tap of convolutions", cost.dense_flops, "on padding too"))
    if cost.devices > 1:
        one = cost.per_device
        rows.append((f"of one device of {cost.devices}", one.model_flops, one.qualifier))
    rows.append(("elementwise FLOPs", cost.elementwise_flops, "apart"))
    rows.append(("transcendentals", cost.transcendentals, "apart"))
    rows += [(name, n, "apart, by its own rule") for name, n in cost.apart.items()]
    lines = [_row(*row) for row in rows]
    lines += [f"  {reason}" for reason in (*cost.lower, *cost.upper)]
    if cost.unknown:
        lines.append("no rule for: " + ", ".join(f"{k} x{n}" for k, n in cost.unknown.items()))
    return lines


def _causes(differences: Sequence[causes.Difference]) -> list[str]:
    lines = []
    for d in differences:
        where = f"  ({', '.join(d.modules)})" if any(d.modules) else ""
        lines.append(f"  {d.flops:+,}  {d.cause}{where}")
    return lines


def _memory(memory: Memory | None, peak: int | None) -> list[str]:
    if memory is None:
        return ["memory: unavailable for this backend"]
    held: Counter[str] = Counter()
    for name, n in memory.arguments_by.items():
        held[_ROLES.get(name.split(".")[-1], name)] += n
    outputs = memory.outputs - memory.aliased
    # A list, for an argument may be called code.
    parts = [*held.items(), ("temporaries (activations)", memory.temporaries)]
    parts += [("results not in place of arguments", outputs), ("code", memory.code)]
    lines = [f"memory of a device, {_bytes(memory.total)}, by the compiler's account"]
    lines += [f"  {name:40}{n:>22,}" for name, n in parts if n]
    if peak is not None:
        lines.append(f"  {'measured, since the device started':40}{peak:>22,}")
    return lines


def _moved(run: Program, rates: links.Links | None) -> list[str]:
    lines = [f"moved by a device: {_bytes(run.bytes)}, at least {_bytes(run.compulsory)}"]
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in (links.to_json(c, rates) for c in run.collectives):
        over = " + ".join(each["span"] or ())
        key = each["kind"], each["axes"], each["group_size"], over
        alike.setdefault(key, []).append(each)
    sums = {key: links.together(sent) for key, sent in alike.items()}
    for key, (moved, messages, seconds) in sorted(sums.items(), key=lambda s: -s[1][0]):
        kind, axes, group, over = key
        line = f"  {kind} over {'*'.join(axes) if axes else '?'} ({group} devices): "
        line += f"{_bytes(moved)} in {messages:,} messages"
        if over and seconds is not None:
            line += f", {_time(seconds)} over {over}, estimated"
        lines.append(line)
    return lines


def _shares(rows: Sequence[tuple[str, int]], total: int) -> list[str]:
    return [f"  {name:40}{n:>22,}  {100 * n / max(total, 1):5.1f}%" for name, n in rows]


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


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
