"""FLOPs of compiled programs against sums done by hand; None where XLA does not know."""

import jax
import jax.numpy as jnp
import pytest

from research import compute, parallel


def flops(function, *shapes, **options):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return compute.xla_flops(jax.jit(function, **options).lower(*shapes).compile())


@pytest.mark.parametrize(("m", "k", "n"), [(16, 32, 64), (128, 128, 128), (1, 300, 7)])
def test_a_matrix_product_is_two_a_term(m, k, n):
    exact = 2 * m * k * n
    assert exact <= flops(jnp.matmul, (m, k), (k, n)) <= 1.1 * exact


def test_products_and_elementwise_operations_add():
    found = flops(lambda x, a, b: jnp.maximum(x @ a, 0) @ b, (32, 64), (64, 128), (128, 16))
    exact = 2 * 32 * 64 * 128 + 2 * 32 * 128 * 16 + 32 * 128
    assert exact <= found <= 1.1 * exact


@pytest.mark.parametrize("fsdp", [1, 8])
def test_flops_are_one_device_s(fsdp):
    mesh = parallel.Parallel(fsdp=fsdp).mesh(8)
    split = parallel.batched(mesh), parallel.replicated(mesh)
    found = flops(jnp.matmul, (64, 32), (32, 128), in_shardings=split)
    exact = 2 * 64 * 32 * 128 / 8
    assert exact <= found <= 1.1 * exact


UNKNOWN = {
    "scan": lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0],
    "fori": lambda x: jax.lax.fori_loop(0, 5, lambda _, c: c @ x, x),
    "while": lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c @ x, x),
    "cond": lambda x: jax.lax.cond(jnp.sum(x) > 0, lambda c: c @ c, lambda c: c + 1, x),
    "qr": jnp.linalg.qr,
    "callback": lambda x: jax.pure_callback(lambda v: v, x, x) @ x,
    "inner": lambda x: jax.jit(lambda y: jax.lax.map(lambda v: v * x[0], y))(x) @ x,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_loops_branches_and_custom_calls_have_no_figure(name):
    assert flops(UNKNOWN[name], (16, 16)) is None


def test_unrolled_loops_count_each_time():
    def unrolled(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5, unroll=5)[0]

    exact = 5 * 2 * 16**3
    assert exact <= flops(unrolled, (16, 16)) <= 1.1 * exact


@pytest.mark.parametrize("cost", [None, [], {}, {"flops": 0.0}, {"flops": -1.0}])
def test_what_xla_does_not_say_is_no_figure(cost):
    class Compiled:
        def as_text(self):
            return "ENTRY main { ROOT add = f32[] add(a, b) }"

        def cost_analysis(self):
            return cost

    assert compute.xla_flops(Compiled()) is None
