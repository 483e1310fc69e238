"""Model FLOPs from the jaxpr: exact integers, by phase, module and dtype; nothing is compiled.

The walk goes through every equation once, dead code left out, and multiplies by the trips of the
loops around it. It sees the program as written: global shapes, before any compiler's rewriting.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

CAUSAL = "causal"
"""The name of the scope in which attention that masks the future marks its products."""


@dataclasses.dataclass
class Count:
    """What one call of a function computes, over all devices."""

    matmul: Counter[tuple[str, str, str, bool]] = dataclasses.field(default_factory=Counter)
    """FLOPs of dot and convolution, 2 a multiply-add, valid taps only: by phase (forward,
    backward, recompute, optimizer), module, dtype, and whether causally masked."""
    dense_extra: int = 0
    """What convolutions add where every tap is counted, those on padding and holes too."""
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
        """matmul_flops with every tap of a convolution counted, as most tools do."""
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

    def _add(self, other: "Count", times: int) -> None:
        for name in ("matmul", "apart", "unknown"):
            for key, n in getattr(other, name).items():
                getattr(self, name)[key] += n * times
        for name in ("dense_extra", "elementwise_flops", "transcendentals"):
            setattr(self, name, getattr(self, name) + getattr(other, name) * times)
        self.lower += [reason for reason in other.lower if reason not in self.lower]
        self.upper += [reason for reason in other.upper if reason not in self.upper]


def count(fn: Any, *args: Any, **kwargs: Any) -> Count:
    """Counts a function at the given arguments (arrays or ShapeDtypeStructs), or a `Traced`.

    Raises ValueError, in one line, for what cannot be traced.
    """
    if not hasattr(fn, "jaxpr"):
        if not callable(fn):
            raise ValueError(f"count needs a function or a jax.stages.Traced, not {fn!r}")
        jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
        fn = jitted.trace(*args, **kwargs)
    jaxpr = _open(fn.jaxpr)
    found = Count()
    _walk(jaxpr, (True,) * len(jaxpr.outvars), "", found)
    return found


# ---- the walk


def _open(jaxpr: Any) -> Any:
    """The jaxpr itself: before jax 0.12 some come closed over their constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _walk(jaxpr: Any, live: Sequence[bool], stack: str, into: Count) -> None:
    _, alive = _liveness(jaxpr, tuple(live))
    for eqn, outs in zip(jaxpr.eqns, alive, strict=True):
        if outs is None:
            continue
        name = eqn.primitive.name
        inner = f"{stack}/{eqn.source_info.name_stack}"
        if name in _CONTROL:
            _CONTROL[name](eqn, outs, inner, into)
        elif name in _MATMUL:
            flops, dense = _MATMUL[name](eqn)
            into.matmul[(*_place(inner), _dtype(eqn), CAUSAL in _scopes(inner))] += flops
            into.dense_extra += dense - flops
        elif name in _TRANSCENDENTAL:
            into.transcendentals += _size(eqn.outvars[0])
        elif name in _ELEMENTWISE:
            into.elementwise_flops += _size(eqn.outvars[0]) if _floats(eqn) else 0
        elif name in _REDUCTION:
            into.elementwise_flops += _REDUCTION[name](eqn) if _floats(eqn) else 0
        elif name in _APART:
            into.apart[name] += _APART[name](eqn)
        elif name not in _FREE:
            into.unknown[name] += 1
            if name in _OPAQUE or list(_inner(eqn)):
                into.lower.append(f"{name}: what it computes cannot be seen")


def _size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _dtype(eqn: Any) -> str:
    """The dtype that a product multiplies in, and its precision where one is asked for."""
    precision = eqn.params.get("precision")
    name = str(eqn.invars[0].aval.dtype)
    if precision is None:
        return name
    both = precision if isinstance(precision, tuple) else (precision,)
    asked = {str(getattr(p, "name", p)) for p in both} - {"DEFAULT", "None"}
    return f"{name}:{'+'.join(sorted(asked))}" if asked else name


def _scopes(stack: str) -> list[str]:
    """The names of a name stack, without the transformations that wrap them."""
    names = re.sub(r"\w+\(|\)", "", stack).split("/")
    return [n for n in names if n and n not in ("rematted_computation", "checkpoint")]


def _place(stack: str) -> tuple[str, str]:
    """The phase and the module of an equation."""
    scopes = _scopes(stack)
    if "rematted_computation" in stack:
        phase = "recompute"
    elif "transpose(" in stack:
        phase = "backward"
    else:
        phase = "optimizer" if scopes[:1] == ["optimizer"] else "forward"
    return phase, ".".join(n for n in scopes if n != CAUSAL)


# ---- dead code

_Live = tuple[bool, ...]


def _liveness(jaxpr: Any, outs: _Live) -> tuple[_Live, list[_Live | None]]:
    """Which inputs the wanted outputs need, and, by equation, which of its outputs are needed
    (None: the equation is dead)."""
    wanted = {v for v, live in zip(jaxpr.outvars, outs, strict=True) if live and _is_var(v)}
    alive: list[_Live | None] = []
    for eqn in reversed(jaxpr.eqns):
        needed = tuple(_is_var(v) and v in wanted for v in eqn.outvars)
        if not any(needed) and not eqn.effects:
            alive.append(None)
            continue
        alive.append(needed)
        used = _needs(eqn, needed)
        wanted |= {v for v, live in zip(eqn.invars, used, strict=True) if live and _is_var(v)}
    return tuple(v in wanted for v in jaxpr.invars), alive[::-1]


def _is_var(v: Any) -> bool:
    return not hasattr(v, "val")


def _needs(eqn: Any, outs: _Live) -> _Live:
    """Which inputs of an equation its needed outputs depend on."""
    name, everything = eqn.primitive.name, (True,) * len(eqn.invars)
    if eqn.effects:
        return everything
    if name == "scan":
        return _scan_liveness(eqn, outs)[1]
    if name == "cond":
        used = [_liveness(_open(b), outs)[0] for b in eqn.params["branches"]]
        return (True, *(any(each) for each in zip(*used, strict=True)))
    body = _called(eqn)
    return everything if body is None else _liveness(body, outs)[0]


def _scan_liveness(eqn: Any, outs: _Live) -> tuple[_Live, _Live]:
    """The outputs of a scan's body that are needed in some trip, and the inputs of the scan."""
    consts, carry = _scan_arity(eqn)
    body = _open(eqn.params["jaxpr"])
    while True:
        ins, _ = _liveness(body, outs)
        carried = ins[consts : consts + carry]
        grown = tuple(a or b for a, b in zip(outs[:carry], carried, strict=True)) + outs[carry:]
        if grown == outs:
            return outs, ins
        outs = grown


def _scan_arity(eqn: Any) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = (len(group) for group in eqn.params["ft_in"].unpack())  # jax 0.12
    return consts, carry


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(each), "eqns"):
                yield _open(each)


def _called(eqn: Any) -> Any:
    """The body of an equation that runs one jaxpr once on its own inputs, or None."""
    if eqn.primitive.name not in _CALLS:
        return None
    bodies = [eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params]
    body = _open(bodies[0]) if bodies else None
    return body if body is not None and len(body.invars) == len(eqn.invars) else None


# ---- control flow


def _call(eqn: Any, outs: _Live, stack: str, into: Count) -> None:
    body = _called(eqn)
    if body is None:
        into.unknown[eqn.primitive.name] += 1
        into.lower.append(f"{eqn.primitive.name}: its body cannot be seen")
    else:
        _walk(body, outs, stack, into)


def _scan(eqn: Any, outs: _Live, stack: str, into: Count) -> None:
    body, found = _open(eqn.params["jaxpr"]), Count()
    _walk(body, _scan_liveness(eqn, outs)[0], stack, found)
    into._add(found, eqn.params["length"])


def _while(eqn: Any, outs: _Live, stack: str, into: Count) -> None:
    body, found = _open(eqn.params["body_jaxpr"]), Count()
    _walk(body, (True,) * len(body.outvars), stack, found)
    test = _open(eqn.params["cond_jaxpr"])
    _walk(test, (True,) * len(test.outvars), stack, found)
    trips = _trips(eqn, test, body)
    if trips is None and found.matmul_flops:
        found.lower.append("while: the number of trips depends on data; one is counted")
    into._add(found, 1 if trips is None else trips)


def _trips(eqn: Any, test: Any, body: Any) -> int | None:
    """Trips of `i = start; while i < stop: i += step`, all three constants; else None."""
    if len(test.eqns) != 1 or test.eqns[0].primitive.name not in ("lt", "le", "gt", "ge"):
        return None
    tested, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carried = eqn.invars[tested + body_consts :]

    def value(var: Any) -> int | None:
        if not _is_var(var):
            return int(var.val)
        if var in test.invars[:tested]:
            outer = eqn.invars[test.invars.index(var)]
            return None if _is_var(outer) else int(outer.val)
        return None

    left, right = test.eqns[0].invars
    if (
        not _is_var(left)
        or left not in test.invars[tested:]
        or test.outvars[0] not in (test.eqns[0].outvars)
    ):
        return None
    index = test.invars.index(left) - tested
    start, stop = carried[index], value(right)
    new, old = body.outvars[index], body.invars[body_consts + index]
    steps = [e for e in body.eqns if new in e.outvars]
    if _is_var(start) or stop is None or len(steps) != 1 or steps[0].primitive.name != "add":
        return None
    first, second = steps[0].invars
    if first is not old or _is_var(second):
        return None
    begin, step = int(start.val), int(second.val)
    sign = {"lt": 0, "le": 1, "gt": 0, "ge": -1}[test.eqns[0].primitive.name]
    return None if step == 0 else max(0, -(-(stop + sign - begin) // step))


def _cond(eqn: Any, outs: _Live, stack: str, into: Count) -> None:
    branches = []
    for branch in eqn.params["branches"]:
        branches.append(Count())
        _walk(_open(branch), outs, stack, branches[-1])
    most = max(branches, key=lambda c: (c.matmul_flops, c.elementwise_flops + c.transcendentals))
    costs = {c.matmul_flops for c in branches}
    if len(costs) > 1:
        most.upper.append(f"cond: branches of {min(costs):,} to {max(costs):,}; the most counts")
    into._add(most, 1)


def _shard_map(eqn: Any, outs: _Live, stack: str, into: Count) -> None:
    """The body is one device's share: every device of the manual axes runs it."""
    found, mesh = Count(), eqn.params["mesh"]
    _walk(_open(eqn.params["jaxpr"]), outs, stack, found)
    axes = eqn.params.get("manual_axes", mesh.axis_names)
    into._add(found, math.prod(mesh.shape[a] for a in axes))


def _pallas_call(eqn: Any, outs: _Live, stack: str, into: Count) -> None:
    """The kernel, once for each point of its grid."""
    found, grid = Count(), eqn.params["grid_mapping"].grid
    body = _open(eqn.params["jaxpr"])
    _walk(body, (True,) * len(body.outvars), stack, found)
    if not all(isinstance(n, int) for n in grid):
        found.lower.append("pallas_call: its grid depends on data; one point is counted")
    into._add(found, math.prod(n if isinstance(n, int) else 1 for n in grid))


_CALLS = frozenset(
    "jit pjit closed_call core_call call remat2 checkpoint custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr custom_vmap_call named_call custom_lin composite linear_call "
    "eval_jaxpr xla_metadata_call".split()
)
_CONTROL: dict[str, Callable[[Any, _Live, str, Count], None]] = {
    **dict.fromkeys(_CALLS, _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
}

# ---- products: (FLOPs over valid taps, FLOPs over all taps)


def _dot(eqn: Any) -> tuple[int, int]:
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    flops = 2 * _size(eqn.outvars[0]) * math.prod(shape[d] for d in contract)
    return flops, flops


def _ragged_dot(eqn: Any) -> tuple[int, int]:
    """Every row belongs to at most one group, so that each is multiplied once."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, rhs_contract), (_, rhs_batch) = numbers.dot_dimension_numbers
    lhs, rhs = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    taken = {*rhs_contract, *rhs_batch, *numbers.rhs_group_dimensions}
    flops = 2 * math.prod(lhs) * math.prod(n for d, n in enumerate(rhs) if d not in taken)
    return flops, flops


def _conv(eqn: Any) -> tuple[int, int]:
    """2 x batch x output channels x input channels of a group x taps, over each spatial axis.

    A tap is valid where it meets an element of the input: not padding, nor a hole of dilation. The
    gradients of a convolution are convolutions with the same pairs, and so count the same.
    """
    numbers, p = eqn.params["dimension_numbers"], eqn.params
    lhs, rhs = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    out = eqn.outvars[0].aval.shape
    features_out, features_in = rhs[numbers.rhs_spec[0]], rhs[numbers.rhs_spec[1]]
    channels = 2 * out[numbers.out_spec[0]] * features_out * features_in
    valid = every = channels
    for i, (low, _) in enumerate(p["padding"]):
        n, k = lhs[numbers.lhs_spec[2 + i]], rhs[numbers.rhs_spec[2 + i]]
        m = out[numbers.out_spec[2 + i]]
        at = np.arange(m)[:, None] * p["window_strides"][i] - low
        at = at + np.arange(k)[None] * p["rhs_dilation"][i]
        step = p["lhs_dilation"][i]
        valid *= int(((at >= 0) & (at <= (n - 1) * step) & (at % step == 0)).sum())
        every *= m * k
    return valid, every


def _scaled(eqn: Any) -> tuple[int, int]:
    """[batch, m, k] by [batch, n, k], with scales."""
    flops = 2 * _size(eqn.outvars[0]) * eqn.invars[0].aval.shape[-1]
    return flops, flops


_MATMUL: dict[str, Callable[[Any], tuple[int, int]]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "scaled_matmul": _scaled,
    "scaled_matmul_wrapper": _scaled,
}

# ---- everything else

_TRANSCENDENTAL = frozenset(
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf "
    "erf_inv erfc exp exp2 expm1 igamma igamma_grad_a igammac lgamma log log1p log2 logistic polygamma pow "
    "random_gamma regularized_incomplete_beta rsqrt sin sinh sqrt tan tanh zeta".split()
)
_ELEMENTWISE = frozenset(
    "abs add add_any and ceil clamp conj div eq eq_to floor ge gt integer_pow is_finite le le_to "
    "lt lt_to max min mul ne neg nextafter not one_minus_square or polynomial reciprocal rem round "
    "select_n sign square sub xor".split()
)


def _floats(eqn: Any) -> bool:
    """Whether an equation computes with floating-point numbers: integers do no FLOPs."""
    return any(np.issubdtype(_np_dtype(v), np.inexact) for v in eqn.invars)


def _np_dtype(var: Any) -> Any:
    dtype = getattr(var.aval, "dtype", np.dtype(bool))
    # bfloat16 and the float8s are numpy extensions, and keys are not numbers.
    return np.float32 if "float" in str(dtype) else dtype if isinstance(dtype, np.dtype) else bool


def _reduce(eqn: Any) -> int:
    return _size(eqn.invars[0]) - _size(eqn.outvars[0])


def _window(eqn: Any) -> int:
    return _size(eqn.outvars[0]) * (math.prod(eqn.params["window_dimensions"]) - 1)


def _last(eqn: Any) -> int:
    return _size(eqn.invars[-1])


_REDUCTION: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax "
        "argmin".split(),
        _reduce,
    ),
    **dict.fromkeys(
        "reduce_window_sum reduce_window_max reduce_window_min select_and_gather_add "
        "select_and_scatter_add".split(),
        _window,
    ),
    **dict.fromkeys(
        "cumsum cumprod cummax cummin cumlogsumexp".split(), lambda eqn: _size(eqn.invars[0])
    ),
    **dict.fromkeys("scatter-add scatter-sub scatter-mul scatter-max scatter-min".split(), _last),
}


def _square(eqn: Any) -> tuple[int, int]:
    """Number of matrices and their edge."""
    shape = eqn.invars[0].aval.shape
    return math.prod(shape[:-2]), min(shape[-2:])


def _cubic(factor: float) -> Callable[[Any], int]:
    """factor x n^3 a matrix: leading terms of Golub and Van Loan, Matrix Computations, 4th ed."""

    def rule(eqn: Any) -> int:
        batch, n = _square(eqn)
        return round(factor * batch * n**3)

    return rule


def _tall(eqn: Any) -> int:
    """2 n^2 (m - n / 3): Householder's QR, and its product with Q."""
    *batch, m, n = eqn.invars[0].aval.shape
    m, n = max(m, n), min(m, n)
    return round(math.prod(batch) * 2 * n * n * (m - n / 3))


def _sort(eqn: Any) -> int:
    """n log2 n comparisons a row."""
    shape = eqn.invars[0].aval.shape
    n = shape[eqn.params.get("dimension", -1)] if shape else 1
    return round(math.prod(shape) * math.log2(max(n, 2)))


def _fft(eqn: Any) -> int:
    """5 n log2 n for complex numbers, half of it for real ones (Cooley and Tukey 1965)."""
    lengths, real = eqn.params["fft_lengths"], "RFFT" in str(eqn.params["fft_type"]).upper()
    batch = math.prod(eqn.invars[0].aval.shape[: -len(lengths)])
    n = math.prod(lengths)
    return round((2.5 if real else 5) * batch * n * math.log2(max(n, 2)))


_APART: dict[str, Callable[[Any], int]] = {
    "sort": _sort,
    "top_k": _sort,
    "approx_top_k": _sort,
    "fft": _fft,
    "cholesky": _cubic(1 / 3),
    "lu": _cubic(2 / 3),
    "eigh": _cubic(9),
    "eig": _cubic(25),
    "svd": _cubic(21),
    "hessenberg": _cubic(10 / 3),
    "tridiagonal": _cubic(4 / 3),
    "schur": _cubic(25),
    "qr": _tall,
    "geqrf": _tall,
    "geqp3": _tall,
    "householder_product": _tall,
    "triangular_solve": lambda eqn: _size(eqn.invars[1]) * eqn.invars[0].aval.shape[-1],
    "tridiagonal_solve": lambda eqn: 8 * _size(eqn.invars[-1]),
}

_FREE = frozenset(
    # Moves, names, types and randomness: no floating-point arithmetic.
    "after_all axis_index bitcast_convert_type broadcast_in_dim broadcast_to check concatenate "
    "convert_element_type copy copy_p create_token device_put dimension_size dynamic_slice "
    "dynamic_update_slice empty empty2 from_edtype gather get imag inspect_sharding iota "
    "iota_2x32_shape layout_constraint name optimization_barrier pad philox2x32 philox4x32 "
    "platform_index program_id num_programs pvary random_bits random_clone random_fold_in "
    "random_seed random_split random_unwrap random_wrap real reduce_precision reshape reshard rev "
    "rng_bit_generator rng_uniform scatter shape_assertion shard_alike sharding_constraint slice "
    "split squeeze stack stop_gradient swap threefry2x32 threefry4x32 tie tile to_edtype transpose "
    "unstack with_memory_space_constraint clz population_count shift_left shift_right_arithmetic "
    "shift_right_logical mulhi lu_pivots_to_permutation debug_callback debug_print "
    # Communication: bytes, which the compiled program tells.
    "all_gather all_gather_invariant all_to_all pbroadcast pmax pmin ppermute precv psend psum "
    "psum_invariant ragged_all_to_all reduce_scatter pcast vary_unreduced_cast "
    "reduced_vary_cast".split()
)
_OPAQUE = frozenset(
    "pure_callback io_callback ffi_call custom_call call_exported custom_partitioning cudnn_fusion "
    "dot_product_attention_fwd dot_product_attention_bwd dot_product_attention_fwd_wrapper "
    "dot_product_attention_bwd_wrapper triton_kernel_call tpu_custom_call core_map run_state "
    "mpmd_map".split()
)
