"""What each primitive computes, by its name in the jaxpr.

A primitive is in one table here, or in the control flow of `count`, or unknown.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Rule = Callable[[Any], int]
"""Operations of an equation."""


def size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _shape(eqn: Any, operand: int = 0) -> tuple[int, ...]:
    return eqn.invars[operand].aval.shape


def floats(eqn: Any) -> bool:
    """Whether an equation computes with floating-point numbers: integers do no FLOPs."""
    return any(_is_float(getattr(v.aval, "dtype", None)) for v in eqn.invars)


def _is_float(dtype: Any) -> bool:
    # bfloat16 and the float8s are known by name alone; keys have no dtype of numpy's.
    return isinstance(dtype, np.dtype) and (dtype.kind in "fc" or "float" in dtype.name)


# ---- products: (FLOPs, FLOPs with those of a convolution on padding)


def _dot(eqn: Any) -> tuple[int, int]:
    (contract, _), _ = eqn.params["dimension_numbers"]
    flops = 2 * size(eqn.outvars[0]) * math.prod(_shape(eqn)[d] for d in contract)
    return flops, flops


def _ragged_dot(eqn: Any) -> tuple[int, int]:
    """Each row is multiplied once, by its group's matrix; groups are taken to cover all rows."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contract, *batch, *numbers.rhs_group_dimensions}
    columns = math.prod(n for d, n in enumerate(_shape(eqn, 1)) if d not in shared)
    flops = 2 * math.prod(_shape(eqn)) * columns
    return flops, flops


def _scaled(eqn: Any) -> tuple[int, int]:
    """[batch, m, k] by [batch, n, k], with scales."""
    flops = 2 * size(eqn.outvars[0]) * _shape(eqn)[-1]
    return flops, flops


def _conv(eqn: Any) -> tuple[int, int]:
    """2 x batch x output channels x input channels of a group x taps, over each spatial axis.

    A tap counts where it meets an element of the input: not padding, nor a hole of dilation. The
    gradients of a convolution are convolutions with the same pairs, and so count the same. With
    padding, every tap of every output counts; or of every input, where these are fewer, as in a
    transposed convolution.
    """
    numbers, p = eqn.params["dimension_numbers"], eqn.params
    lhs, rhs, out = _shape(eqn), _shape(eqn, 1), eqn.outvars[0].aval.shape
    valid = every = 2 * out[numbers.out_spec[0]] * math.prod(rhs[d] for d in numbers.rhs_spec[:2])
    for i, (low, _) in enumerate(p["padding"]):
        n, k = lhs[numbers.lhs_spec[2 + i]], rhs[numbers.rhs_spec[2 + i]]
        m = out[numbers.out_spec[2 + i]]
        valid *= _taps(
            n, k, m, low, p["window_strides"][i], p["rhs_dilation"][i], p["lhs_dilation"][i]
        )
        every *= min(m, n) * k
    return valid, every


def _taps(n: int, k: int, m: int, low: int, stride: int, dilation: int, spread: int) -> int:
    """How many of m outputs by k taps meet one of n inputs, which lie `spread` apart.

    Output i and tap j meet where i stride + j dilation - low is one of 0, spread ... (n - 1)
    spread: for each j an interval of i, and of these one in every `period`.
    """
    if not n:
        return 0
    start = low - dilation * np.arange(k)
    common = math.gcd(stride, spread)
    period = spread // common
    residue = start // common * pow(stride // common, -1, period) % period
    first = np.maximum(0, -(-start // stride))
    last = np.minimum(m - 1, (start + (n - 1) * spread) // stride)
    first += (residue - first) % period
    met = np.maximum(0, (last - first) // period + 1)
    return int(met[start % common == 0].sum())


_PRODUCTS: dict[str, Callable[[Any], tuple[int, int]]] = {
    "dot_general": _dot,
    "scaled_dot": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "scaled_matmul": _scaled,
    "scaled_matmul_wrapper": _scaled,
}
PRODUCTS = frozenset(_PRODUCTS)


def product(eqn: Any) -> tuple[int, int]:
    """FLOPs of a product, without and with those on padding; 4 real ones make a complex one."""
    flops, dense = _PRODUCTS[eqn.primitive.name](eqn)
    parts = math.prod(2 if v.aval.dtype.kind == "c" else 1 for v in eqn.invars[:2])
    return flops * parts, dense * parts


def groups(eqn: Any) -> int:
    """Into how many groups of channels a convolution falls; 1 for other products."""
    return max(eqn.params.get(f"{kind}_group_count", 1) for kind in ("feature", "batch"))


def dtype(eqn: Any) -> str:
    """What a product multiplies: its dtype, or both, and the precision where one is asked for."""
    names = dict.fromkeys(str(v.aval.dtype) for v in eqn.invars[:2])
    precision = eqn.params.get("precision")
    each = precision if type(precision) is tuple else (precision,)
    asked = {_precision(p) for p in each} - {"DEFAULT", "None"}
    return "*".join(names) + (f":{'+'.join(sorted(asked))}" if asked else "")


def _precision(asked: Any) -> str:
    if hasattr(asked, "lhs_precision_type"):  # a jax.lax.DotAlgorithm
        types = (asked.lhs_precision_type, asked.rhs_precision_type, asked.accumulation_type)
        return f"{'_'.join(np.dtype(t).name for t in types)}_X{asked.num_primitive_operations}"
    return str(getattr(asked, "name", asked))


# ---- arithmetic: an operation an element


def _reduce(eqn: Any) -> int:
    return max(0, size(eqn.invars[0]) - size(eqn.outvars[0]))


def _window(eqn: Any) -> int:
    return size(eqn.outvars[0]) * (math.prod(eqn.params["window_dimensions"]) - 1)


def _select_and_scatter(eqn: Any) -> int:
    """For each window its comparisons, and the addition where it ends."""
    return size(eqn.invars[0]) * math.prod(eqn.params["window_dimensions"])


TRANSCENDENTAL: dict[str, Rule] = dict.fromkeys(
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf "
    "erf_inv erfc exp exp2 expm1 igamma igamma_grad_a igammac lgamma log log1p log2 logistic "
    "polygamma pow random_gamma regularized_incomplete_beta rsqrt sin sinh sqrt tan tanh "
    "zeta".split(),
    lambda eqn: size(eqn.outvars[0]),
)
ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(
        "_copysign abs add add_any and ceil clamp conj div eq eq_to floor ge gt integer_pow "
        "is_finite le le_to lt lt_to max min mul ne neg nextafter not one_minus_square or "
        "polynomial reciprocal rem round select_n sign square sub xor".split(),
        lambda eqn: size(eqn.outvars[0]),
    ),
    **dict.fromkeys(
        "argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum "
        "reduce_xor".split(),
        _reduce,
    ),
    **dict.fromkeys(
        "reduce_window reduce_window_max reduce_window_min reduce_window_sum "
        "select_and_gather_add".split(),
        _window,
    ),
    **dict.fromkeys("select_and_scatter select_and_scatter_add".split(), _select_and_scatter),
    **dict.fromkeys(
        "cumlogsumexp cummax cummin cumprod cumsum".split(), lambda eqn: size(eqn.invars[0])
    ),
    **dict.fromkeys(
        "scatter-add scatter-max scatter-min scatter-mul scatter-sub".split(),
        lambda eqn: size(eqn.invars[-1]),
    ),
    **dict.fromkeys("accum_grad_in_ref addupdate".split(), lambda eqn: size(eqn.invars[1])),
}

# ---- apart: leading terms of Golub and Van Loan, Matrix Computations, 4th ed.


def _matrices(eqn: Any) -> tuple[int, int, int]:
    """How many, their longer edge m and their shorter n."""
    *batch, rows, columns = _shape(eqn)
    return math.prod(batch), max(rows, columns), min(rows, columns)


def _cubic(thirds: int) -> Rule:
    """A multiple of n^3 / 3 a matrix."""

    def rule(eqn: Any) -> int:
        batch, n, _ = _matrices(eqn)
        return batch * thirds * n**3 // 3

    return rule


def _lu(eqn: Any) -> int:
    batch, m, n = _matrices(eqn)
    return batch * (3 * m - n) * n * n // 3


def _qr(eqn: Any) -> int:
    """Householder's, and its product with Q."""
    return 2 * _lu(eqn)


def _svd(eqn: Any) -> int:
    batch, m, n = _matrices(eqn)
    if not eqn.params.get("compute_uv", True):
        return batch * 4 * (3 * m - n) * n * n // 3
    return batch * (4 * m * m * n + 8 * m * n * n + 9 * n**3)


def _reflect(eqn: Any) -> int:
    """Q's reflectors over each column, or row, of another matrix."""
    batch, m, n = _matrices(eqn)
    others = _shape(eqn, 2)[-1 if eqn.params.get("left", True) else -2]
    return batch * 2 * n * (2 * m - n) * others


def _symmetric_product(eqn: Any) -> int:
    """One triangle of A A^T."""
    *batch, n, k = _shape(eqn)
    return math.prod(batch) * n * (n + 1) * k


def _sort(eqn: Any) -> int:
    """n log2 n comparisons a row."""
    shape, p = _shape(eqn), eqn.params
    axis = next((p[k] for k in ("dimension", "axis", "reduction_dimension") if k in p), -1)
    return round(math.prod(shape) * math.log2(max(shape[axis], 1))) if shape else 0


def _fft(eqn: Any) -> int:
    """5 n log2 n for complex numbers, half of it for real ones (Cooley and Tukey 1965)."""
    lengths, real = eqn.params["fft_lengths"], "RFFT" in eqn.params["fft_type"].name
    n = math.prod(lengths)
    batch = math.prod(_shape(eqn)[: len(_shape(eqn)) - len(lengths)])
    return round((2.5 if real else 5) * batch * n * math.log2(max(n, 1)))


APART: dict[str, Rule] = {
    **dict.fromkeys("approx_top_k sort top_k".split(), _sort),
    "fft": _fft,
    "cholesky": _cubic(1),
    "cholesky_update": lambda eqn: 2 * size(eqn.invars[0]),
    "eig": _cubic(75),
    "eigh": _cubic(27),
    "hessenberg": _cubic(10),
    "schur": _cubic(75),
    "tridiagonal": _cubic(4),
    "lu": _lu,
    **dict.fromkeys("geqp3 geqrf householder_product qr".split(), _qr),
    "ormqr": _reflect,
    "svd": _svd,
    "symmetric_product": _symmetric_product,
    "triangular_solve": lambda eqn: size(eqn.invars[1]) * _shape(eqn)[-1],
    "tridiagonal_solve": lambda eqn: 8 * size(eqn.invars[-1]),
}

# ---- nothing

FREE = frozenset(
    # Moves, names, types, bits and randomness.
    "add_dependency after_all axis_index bitcast bitcast_convert_type broadcast_in_dim "
    "broadcast_to check clz complex concatenate convert_element_type copy create_token device_put "
    "dim_as_value dimension_size dynamic_slice dynamic_update_slice einshape_lo empty empty2 "
    "from_edtype gather has_memory_space imag inspect_sharding iota iota_2x32_shape layout_cast "
    "layout_constraint lu_pivots_to_permutation mulhi name optimization_barrier pad philox2x32 "
    "philox4x32 pin platform_index population_count prng_join prng_random_bits prng_seed "
    "prng_split random_bits random_clone random_fold_in random_seed random_split random_unwrap "
    "random_wrap real reduce_precision remove_memory_space reshape reshard rev rng_bit_generator "
    "rng_uniform roll scatter shape_assertion shard_alike sharding_constraint shift_left "
    "shift_right_arithmetic shift_right_logical slice split squeeze stack stop_gradient "
    "threefry2x32 threefry4x32 tie tile to_edtype transpose unpin unstack "
    "with_memory_space_constraint xla_metadata_value zeros_like "
    # What is printed, and callbacks that give nothing back.
    "debug_callback debug_print print_layout trace_value "
    # References, and what moves them about in a kernel.
    "copy_gmem_to_smem copy_smem_to_gmem debug_barrier delay dma_start dma_wait empty_ref free_ref "
    "freeze get get_barrier_semaphore load masked_load masked_swap max_contiguous multiple_of "
    "new_ref num_programs program_id semaphore_read semaphore_signal semaphore_wait store swap "
    # Communication: bytes, which the compiled program tells.
    "all_gather all_gather_invariant all_gather_reduced all_to_all pbroadcast pmax pmin "
    "ppermute precv preduced psend psum psum_invariant pvary ragged_all_to_all reduce_scatter "
    "reduced_vary_cast reduced_vary_cast_p unreduced_pmax unreduced_pmin unreduced_psum "
    "unreduced_reduce_scatter vary_unreduced_cast vary_unreduced_cast_p".split()
)
