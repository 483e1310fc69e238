"""Model FLOPs from the jaxpr: exact integers, by phase, module and dtype; nothing is compiled.

The walk goes through every equation once, dead code left out, and multiplies by the trips of the
loops around it. It sees the program as written: global shapes, before any compiler's rewriting.
"""

import dataclasses
import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from research.compute import rules
from research.compute.places import Place, named, of_stack, settle


@dataclasses.dataclass
class Count:
    """What one call of a function computes, over all devices."""

    matmul: Counter[tuple[str, str, str, bool]] = dataclasses.field(default_factory=Counter)
    """FLOPs of dot and convolution, 2 a multiply-add, valid taps only: by phase (forward,
    backward, recompute, optimizer), module, dtype, and whether causally masked."""
    dense_extra: int = 0
    """What convolutions add where taps on padding are counted too."""
    elementwise_flops: int = 0
    transcendentals: int = 0
    apart: Counter[str] = dataclasses.field(default_factory=Counter)
    """Operations of sort, fft, factorisations and the like, by primitive, each by its own rule."""
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)
    """Primitives without a rule, and how often each is met; they count nothing."""
    lower: list[str] = dataclasses.field(default_factory=list)
    """Why matmul_flops may be too small."""
    upper: list[str] = dataclasses.field(default_factory=list)
    """Why matmul_flops may be too large."""
    grouped: Counter[str] = dataclasses.field(default_factory=Counter)
    """FLOPs of convolutions in groups, by module; in `matmul` too."""
    devices: int = dataclasses.field(default=1, compare=False)
    """Of the mesh that the arguments, or a shard_map, are laid over."""
    _one: "Count | None" = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def per_device(self) -> "Count":
        """What one of the devices computes.

        In a shard_map what is written there; elsewhere, where the compiler divides the work, an
        even share: a lower bound, for it may repeat some on several devices. program() tells.
        """
        return self._one or self

    @property
    def matmul_flops(self) -> int:
        return self.matmul.total()

    @property
    def model_flops(self) -> int:
        """matmul_flops without recomputation."""
        return sum(n for (phase, *_), n in self.matmul.items() if phase != "recompute")

    @property
    def causal_flops(self) -> int | None:
        """model_flops with causally masked attention halved; None where nothing marks it."""
        masked = sum(n for (p, _, _, c), n in self.matmul.items() if c and p != "recompute")
        return self.model_flops - masked // 2 if masked else None

    @property
    def dense_flops(self) -> int:
        """matmul_flops with taps on padding counted too, as most tools do."""
        return self.matmul_flops + self.dense_extra

    @property
    def exact(self) -> bool:
        return not (self.lower or self.upper)

    @property
    def qualifier(self) -> str:
        """How matmul_flops is to be read: exact, lower bound, upper bound or estimated."""
        if self.lower and self.upper:
            return "estimated"
        return "lower bound" if self.lower else "upper bound" if self.upper else "exact"

    @property
    def by_phase(self) -> dict[str, int]:
        return self._by(0)

    @property
    def by_module(self) -> dict[str, int]:
        return self._by(1)

    @property
    def by_dtype(self) -> dict[str, int]:
        return self._by(2)

    def _by(self, index: int) -> dict[str, int]:
        found: Counter[str] = Counter()
        for key, flops in self.matmul.items():
            found[str(key[index])] += flops
        return dict(found)

    def _add(self, other: "Count", times: int, within: Place) -> None:
        if not times:
            return
        for (phase, module, dtype, causal), n in other.matmul.items():
            place = within.around(Place(phase, module, causal))
            self.matmul[place.phase, place.module, dtype, place.causal] += n * times
        for key, n in other.apart.items():
            self.apart[key] += n * times
        for key, n in other.unknown.items():
            self.unknown[key] += n * times
        for key, n in other.grouped.items():
            self.grouped[within.around(Place(module=key)).module] += n * times
        self.dense_extra += other.dense_extra * times
        self.elementwise_flops += other.elementwise_flops * times
        self.transcendentals += other.transcendentals * times
        self._doubt(other)

    def _doubt(self, other: "Count") -> None:
        self.lower += [reason for reason in other.lower if reason not in self.lower]
        self.upper += [reason for reason in other.upper if reason not in self.upper]


def count(fn: Any, *args: Any, **kwargs: Any) -> Count:
    """Counts a function at the given arguments (arrays or ShapeDtypeStructs), or a `Traced`.

    Raises ValueError, in one line, for what cannot be traced.
    """
    traced = trace(fn, args, kwargs)
    closed = low(traced).jaxpr
    walk = _Walk()
    found = walk.whole(closed)
    devices = max(
        [
            walk.devices,
            *(_mesh_size(getattr(v.aval, "sharding", None)) for v in _open(closed).invars),
            *_placed(getattr(traced, "_params", {})),
        ]
    )
    if devices > 1:
        one = _Walk(devices).whole(closed)
        found = dataclasses.replace(found, devices=devices, _one=one)
    return found


def low(traced: Any) -> Any:
    """The same program in primitives that lower by themselves; it cannot be compiled."""
    return traced.lojax if getattr(traced.jaxpr, "is_high", False) else traced


def trace(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A jax.stages.Traced. Raises ValueError, in one line, for what cannot be traced."""
    if not callable(fn) and not hasattr(fn, "jaxpr"):
        raise ValueError(f"count needs a function or a jax.stages.Traced, not {fn!r}")
    if hasattr(fn, "jaxpr") and (args or kwargs):
        raise ValueError("a jax.stages.Traced has its arguments: count takes no others with it")
    traced = fn
    try:
        if not hasattr(fn, "jaxpr"):
            jitted = isinstance(fn, jax.stages.Wrapped) and hasattr(fn, "trace")
            traced = (fn if jitted else jax.jit(fn)).trace(*args, **kwargs)
            traced = getattr(traced, "traced", traced)  # nnx.jit wraps what jax.jit gives
        low(traced)  # may raise too; jax keeps what it gives
        return traced
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
        name = getattr(fn, "__name__", type(fn).__name__)
        raise ValueError(f"{name} cannot be traced: {type(error).__name__}: {reason}") from error


def _mesh_size(sharding: Any) -> int:
    """Devices of a sharding's mesh; 1 where it has none."""
    return getattr(getattr(sharding, "mesh", None), "size", 1) or 1


def _placed(params: Any) -> list[int]:
    """Devices of the meshes that a jit places its arguments and results on."""
    places = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    return [_mesh_size(place) for place in places]


# ---- jaxprs

_Live = tuple[bool, ...]
_Known = tuple[int | None, ...]
"""The values of integer scalars that the program itself tells."""


def _open(jaxpr: Any) -> Any:
    """The jaxpr itself: before jax 0.12 some come closed over their constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _is_var(v: Any) -> bool:
    return not hasattr(v, "val")


def _integer(value: Any) -> int | None:
    """A constant's value where it is an integer scalar."""
    if np.ndim(value) or not _whole(getattr(value, "dtype", None)):
        return None
    return int(value)


def _whole(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "iub"


def _either(a: _Live, b: _Live) -> _Live:
    return tuple(x or y for x, y in zip(a, b, strict=True))


def _keeps(eqn: Any) -> bool:
    """Whether an equation stays though nothing reads what it gives."""
    harmless = {"NamedAxisEffect", "ReadEffect", "InternalMutableArrayEffect"}
    return any(type(effect).__name__ not in harmless for effect in eqn.effects)


_BODIES = ("jaxpr", "call_jaxpr", "call", "callee", "fwd_jaxpr")
_CALLS = frozenset(
    "call closed_call composite compute_on custom_jvp_call custom_partitioning custom_vjp_call "
    "custom_vmap_call eval_jaxpr jit linear_call remat2 remat_opt shard_map "
    "xla_metadata_call".split()
)


def _called(eqn: Any) -> tuple[Any, Sequence[int]] | None:
    """The body of an equation that runs one once, and which inputs of the equation it takes."""
    if eqn.primitive.name == "custom_linear_solve":
        lengths = eqn.params["const_lengths"]
        start = lengths.matvec + lengths.vecmat
        consts, rest = range(start, start + lengths.solve), range(sum(lengths), len(eqn.invars))
        return _open(eqn.params["jaxprs"].solve), [*consts, *rest]
    if eqn.primitive.name not in _CALLS:
        return None
    bodies = [_open(eqn.params[name]) for name in _BODIES if name in eqn.params]
    if not bodies or len(bodies[0].invars) != len(eqn.invars):
        return None
    return bodies[0], range(len(eqn.invars))


def _scan_arity(eqn: Any) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = (len(group) for group in eqn.params["ft_in"].unpack())  # jax 0.12
    return consts, carry


def _while_arity(eqn: Any) -> tuple[int, int]:
    """Numbers of constants of the test and of the body of a while loop."""
    return eqn.params["cond_nconsts"], eqn.params["body_nconsts"]


# ---- the walk


class _Walk:
    """Counts a program; a body that is called again in the same way is not walked again."""

    def __init__(self, share: int = 0) -> None:
        """share: count one device's part, an even one of so many; 0 counts the whole."""
        self._used: dict[Any, tuple[_Live, list[_Live | None]]] = {}
        self._counts: dict[Any, Count] = {}
        self._share = share
        self.devices = 1
        """Of the largest mesh met."""

    def whole(self, closed: Any) -> Count:
        """All that a jaxpr, closed over its constants, gives."""
        jaxpr = _open(closed)
        constants = [_integer(c) for c in closed.consts]
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        outs, unknown = (True,) * len(jaxpr.outvars), (None,) * len(jaxpr.invars)
        found = self.count(jaxpr, outs, unknown, values)
        forward = {module for phase, module, *_ in found.matmul if phase == "forward"}
        matmul: Counter[tuple[str, str, str, bool]] = Counter()
        grouped: Counter[str] = Counter()
        for (phase, module, dtype, causal), flops in found.matmul.items():
            place = settle(Place(phase, module, causal), forward)
            matmul[place.phase, place.module, dtype, place.causal] += flops
        for module, flops in found.grouped.items():
            grouped[named(module, forward)] += flops
        return dataclasses.replace(found, matmul=matmul, grouped=grouped)

    def count(self, jaxpr: Any, outs: _Live, known: _Known, values: Any = None) -> Count:
        """What it takes to compute the wanted outputs, from inputs of which some are known."""
        key = id(jaxpr), outs, known, self._share
        if key not in self._counts:
            self._counts[key] = self._count(jaxpr, outs, known, dict(values or {}))
        return self._counts[key]

    def _count(self, jaxpr: Any, outs: _Live, known: _Known, values: dict[Any, Any]) -> Count:
        found = Count()
        values.update(zip(jaxpr.invars, known, strict=True))
        for eqn, needed in zip(jaxpr.eqns, self._liveness(jaxpr, outs)[1], strict=True):
            if needed is None:
                continue
            name, place = eqn.primitive.name, of_stack(str(eqn.source_info.name_stack))
            given = tuple(values.get(v) if _is_var(v) else _integer(v.val) for v in eqn.invars)
            if name in _FOLDED and None not in given and _whole(eqn.outvars[0].aval.dtype):
                result = np.array(_FOLDED[name](*given) % (1 << 64), np.uint64)
                values[eqn.outvars[0]] = int(result.astype(eqn.outvars[0].aval.dtype))
            if name in rules.PRODUCTS:
                flops, dense = map(self._part, rules.product(eqn))
                if flops:
                    key = place.phase, place.module, rules.dtype(eqn), place.causal
                    found.matmul[key] += flops
                    if rules.groups(eqn) > 1:
                        found.grouped[place.module] += flops
                    if self._share > 1:
                        found._doubt(Count(lower=[_EVEN]))
                found.dense_extra += dense - flops
            elif name in rules.TRANSCENDENTAL:
                each = rules.TRANSCENDENTAL[name](eqn) * rules.floats(eqn)
                found.transcendentals += self._part(each)
            elif name in rules.ELEMENTWISE:
                each = rules.ELEMENTWISE[name](eqn) * rules.floats(eqn)
                found.elementwise_flops += self._part(each)
            elif name in rules.APART:
                found.apart[name] += self._part(rules.APART[name](eqn))
            elif name == "sharding_constraint":
                self.devices = max(self.devices, _mesh_size(eqn.params["sharding"]))
            elif name not in rules.FREE:
                body, times = self._inside(eqn, needed, given)
                found._add(body, times, place)
        return found

    def _part(self, operations: int) -> int:
        """One device's share of what the compiler divides."""
        return -(-int(operations) // max(self._share, 1))

    def _shard_map(self, eqn: Any, outs: _Live, given: _Known) -> tuple[Count, int]:
        """The body, which is one device's share, on all devices; or on one, where the axes that
        are not manual yet divide it further."""
        mesh, share = eqn.params["mesh"], self._share
        self.devices = max(self.devices, mesh.size)
        times = math.prod(mesh.shape[a] for a in eqn.params["newly_manual_axes"])
        self._share = share // times
        found = self.count(_open(eqn.params["jaxpr"]), outs, given)
        self._share = share
        return found, 1 if share else times

    def _inside(self, eqn: Any, outs: _Live, given: _Known) -> tuple[Count, int]:
        """What control flow runs, and how often."""
        name = eqn.primitive.name
        if name == "shard_map":
            return self._shard_map(eqn, outs, given)
        self.devices = max(self.devices, *_placed(eqn.params), 1)
        if (called := _called(eqn)) is not None:
            body, taken = called
            return self.count(body, outs, tuple(given[i] for i in taken)), 1
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, outs, given)
        reason = f"{name}: what it computes is not known"
        return Count(unknown=Counter([name]), lower=[reason]), 1

    def _scan(self, eqn: Any, outs: _Live, given: _Known) -> tuple[Count, int]:
        body, consts = _open(eqn.params["jaxpr"]), _scan_arity(eqn)[0]
        known = given[:consts] + (None,) * (len(body.invars) - consts)
        return self.count(body, self._scan_liveness(eqn, outs)[0], known), eqn.params["length"]

    def _while(self, eqn: Any, outs: _Live, given: _Known) -> tuple[Count, int]:
        tested, consts = _while_arity(eqn)
        body, test = _open(eqn.params["body_jaxpr"]), _open(eqn.params["cond_jaxpr"])
        carry = (None,) * (len(body.invars) - consts)
        live = self._while_liveness(eqn, outs)[0]
        trips = _trips(eqn, given)
        found = Count()
        for part, wanted, known in (
            (body, live, given[tested : tested + consts] + carry),
            (test, (True,), given[:tested] + carry),
        ):
            found._add(self.count(part, wanted, known), 1, Place())
        if trips is None and found.matmul_flops:
            reason = "while: the number of trips depends on data; one is counted"
            found._doubt(Count(lower=[reason]))
        return found, 1 if trips is None else trips

    def _cond(self, eqn: Any, outs: _Live, given: _Known) -> tuple[Count, int]:
        bodies = [_open(branch) for branch in eqn.params["branches"]]
        if given[0] is not None:
            bodies = [bodies[given[0]]]
        branches = [self.count(body, outs, given[1:]) for body in bodies]
        most = max(
            branches, key=lambda c: (c.matmul_flops, c.elementwise_flops + c.transcendentals)
        )
        found = Count()
        found._add(most, 1, Place())
        for branch in branches:
            found.unknown |= branch.unknown
            found._doubt(branch)
        costs = {c.matmul_flops for c in branches}
        if len(costs) > 1:
            reason = f"cond: branches of {min(costs):,} to {max(costs):,}; the most counts"
            found._doubt(Count(upper=[reason]))
        return found, 1

    def _pallas_call(self, eqn: Any, outs: _Live, given: _Known) -> tuple[Count, int]:
        """The kernel, once for each point of its grid."""
        grid = eqn.params["grid_mapping"].grid
        found, _ = self._all(eqn, outs, given)
        if not all(isinstance(n, int | np.integer) for n in grid):
            reason = "pallas_call: its grid depends on data; one point is counted"
            found._doubt(Count(lower=[reason]))
        return found, math.prod(int(n) for n in grid if isinstance(n, int | np.integer))

    def _all(self, eqn: Any, outs: _Live, given: _Known) -> tuple[Count, int]:
        """A body over references: all of it, once."""
        body, found = _open(eqn.params["jaxpr"]), Count()
        live, known = (True,) * len(body.outvars), (None,) * len(body.invars)
        found._add(self.count(body, live, known), 1, Place())
        return found, 1

    # ---- dead code

    def _liveness(self, jaxpr: Any, outs: _Live) -> tuple[_Live, list[_Live | None]]:
        """Which inputs the wanted outputs need, and, by equation, which of its outputs are needed
        (None: the equation is dead)."""
        key = id(jaxpr), outs
        if key not in self._used:
            wanted = {v for v, live in zip(jaxpr.outvars, outs, strict=True) if live and _is_var(v)}
            alive: list[_Live | None] = []
            for eqn in reversed(jaxpr.eqns):
                needed = tuple(v in wanted for v in eqn.outvars)
                if not any(needed) and not _keeps(eqn):
                    alive.append(None)
                    continue
                alive.append(needed)
                used = self._needs(eqn, needed)
                wanted |= {v for v, u in zip(eqn.invars, used, strict=True) if u and _is_var(v)}
            self._used[key] = tuple(v in wanted for v in jaxpr.invars), alive[::-1]
        return self._used[key]

    def _needs(self, eqn: Any, outs: _Live) -> _Live:
        """Which inputs of an equation its needed outputs depend on."""
        name = eqn.primitive.name
        if name == "scan":
            return self._scan_liveness(eqn, outs)[1]
        if name == "while":
            return self._while_liveness(eqn, outs)[1]
        if name == "cond":
            branches = [self._liveness(_open(b), outs)[0] for b in eqn.params["branches"]]
            return (True, *functools.reduce(_either, branches))
        if (called := _called(eqn)) is None:
            return (True,) * len(eqn.invars)
        body, taken = called
        used = dict(zip(taken, self._liveness(body, outs)[0], strict=True))
        return tuple(used.get(i, False) for i in range(len(eqn.invars)))

    def _scan_liveness(self, eqn: Any, outs: _Live) -> tuple[_Live, _Live]:
        """The outputs of a scan's body that are needed in some trip, and the inputs of the scan."""
        consts, carry = _scan_arity(eqn)
        body = _open(eqn.params["jaxpr"])
        while True:
            ins = self._liveness(body, outs)[0]
            grown = _either(outs[:carry], ins[consts : consts + carry])
            if grown == outs[:carry]:
                return outs, ins[:consts] + grown + ins[consts + carry :]
            outs = grown + outs[carry:]

    def _while_liveness(self, eqn: Any, outs: _Live) -> tuple[_Live, _Live]:
        """The same for a while loop, whose test is always needed."""
        tested, consts = _while_arity(eqn)
        body, test = _open(eqn.params["body_jaxpr"]), _open(eqn.params["cond_jaxpr"])
        asked = self._liveness(test, (True,))[0]
        outs = _either(outs, asked[tested:])
        while True:
            ins = self._liveness(body, outs)[0]
            grown = _either(outs, ins[consts:])
            if grown == outs:
                return outs, asked[:tested] + ins[:consts] + outs
            outs = grown


_CONTROL: dict[str, Callable[[_Walk, Any, _Live, _Known], tuple[Count, int]]] = {
    "scan": _Walk._scan,
    "while": _Walk._while,
    "cond": _Walk._cond,
    "pallas_call": _Walk._pallas_call,
    "run_scoped": _Walk._all,
    "run_state": _Walk._all,
}
_EVEN = "an even share: how the compiler divides the work is not told before it compiles"
_FOLDED: dict[str, Callable[..., int]] = {
    "convert_element_type": int,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "clamp": lambda low, x, high: min(max(low, x), high),
}
"""What may be done to a loop's bound, or a branch's index, on its way."""


def _trips(eqn: Any, given: _Known) -> int | None:
    """Trips of `i = start; while i < stop: i += step` (or >, -=) with all three known, or None."""
    tested, consts = _while_arity(eqn)
    body, test = _open(eqn.params["body_jaxpr"]), _open(eqn.params["cond_jaxpr"])
    start, olds = given[tested + consts :], body.invars[consts:]
    if len(test.eqns) != 1 or test.eqns[0].primitive.name not in _ORDER:
        return None

    def fixed(var: Any, invars: list[Any], constants: _Known) -> int | None:
        """The value of what no trip changes."""
        if not _is_var(var):
            return _integer(var.val)
        if var not in invars:
            return None
        at = invars.index(var) - len(constants)
        if at < 0:
            return constants[at]
        return start[at] if body.outvars[at] is olds[at] else None

    def step(at: int) -> int | None:
        """What a trip adds to a carried value."""
        for each in body.eqns:
            if body.outvars[at] in each.outvars and each.primitive.name in ("add", "sub"):
                first, second = each.invars
                sign = 1 if each.primitive.name == "add" else -1
                if first is not olds[at] and sign == 1:
                    first, second = second, first
                by = fixed(second, body.invars, given[tested : tested + consts])
                return sign * by if first is olds[at] and by is not None else None
        return None

    left, right = test.eqns[0].invars
    up, more = _ORDER[test.eqns[0].primitive.name]
    for moving, still, sign in ((left, right, up), (right, left, -up)):
        if moving not in test.invars[tested:]:
            continue
        at = test.invars.index(moving) - tested
        begin, stop, by = start[at], fixed(still, test.invars, given[:tested]), step(at)
        if begin is None or stop is None or by is None:
            continue
        distance = sign * (stop - begin) + more
        if distance <= 0:
            return 0
        if sign * by > 0:
            return -(-distance // (sign * by))
    return None


_ORDER = {"lt": (1, 0), "le": (1, 1), "gt": (-1, 0), "ge": (-1, 1)}
"""The direction in which a loop runs while a comparison holds, and how far beyond the bound."""
