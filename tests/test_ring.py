"""Ring attention against attention by its definition, on eight devices, in double precision."""

import defined
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import ring
from research.parallel import BATCH, Parallel

B, T, K, G, WIDTH = 4, 32, 2, 3, 4


def given():
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(B, T, n, WIDTH)) for n in (K * G, K, K, K * G))
    return q, k, v, g, np.cumsum(rng.random((B, T)) < 0.1, axis=1).astype(np.int32)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "mesh", [{"context": 2}, {"context": 8}, {"context": 2, "data": 2, "tensor": 2}]
)
def test_it_is_attention_and_so_is_its_gradient(mesh, causal, segmented):
    with jax.enable_x64(True):
        q, k, v, g, segments = given()
        spread = Parallel(**{"data": 1} | mesh)
        devices = jax.devices()[: int(np.prod(list(mesh.values())))]
        made = spread.mesh(B, devices)
        around = ring.Ring(made, BATCH[0])
        places = ring.order(T, mesh["context"]) if causal else np.arange(T)

        def parts(q, k, v):
            given = (x[:, places] for x in (q, k, v))
            of = segments[:, places] if segmented else None
            out = around(*given, (of, of) if segmented else None, causal=causal)
            return out[:, np.argsort(places)]

        def whole(q, k, v):
            same = (segments[:, :, None] == segments[:, None, :])[:, None]
            return defined.attention(q, k, v, same if segmented else None, causal)

        for found, wanted in zip(*(both(f, q, k, v, g) for f in (parts, whole)), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_parts_are_not_rounded_before_they_are_added_up():
    """Of bfloat16 no more is lost than its own rounding of what comes out and of the weights."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 512, 2, 16)), jnp.bfloat16) for _ in range(3))
    around = ring.Ring(Parallel(data=1, context=8).mesh(2), BATCH[0])
    found = jax.jit(lambda *given: around(*given))(q, k, v).astype(jnp.float32)
    wanted = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    lost = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
    assert lost < 2.4e-3


def both(f, q, k, v, g):
    def run(q, k, v, g):
        out, back = jax.vjp(f, q, k, v)
        return out, *back(g)

    return jax.jit(run)(q, k, v, g)


def test_devices_have_places_from_both_ends():
    np.testing.assert_array_equal(ring.order(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    assert sorted(ring.order(48, 8)) == list(range(48))
