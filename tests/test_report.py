import jax
import jax.numpy as jnp
import pytest

from research.compute import count, report


def two_layers(params, x):
    for name in ("a", "b"):
        with jax.named_scope(name), jax.named_scope("dense"):
            x = jnp.tanh(x @ params[name])
    return x.sum()


@pytest.fixture
def cost():
    params = {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 2))}
    return count(jax.grad(two_layers), params, jnp.ones((7, 3)))


def test_json_holds_the_closed_form(cost):
    found = report.to_json(cost)
    a, b = 2 * 7 * 3 * 5, 2 * 7 * 5 * 2
    assert found["model_flops"] == 2 * a + 3 * b  # no gradient of the input
    assert found["by_phase"] == {"forward": a + b, "backward": a + 2 * b}
    assert found["by_module"] == {"a.dense": 2 * a, "b.dense": 3 * b}
    assert found["qualifier"] == "exact"
    assert found["reasons"] == []


def test_a_parent_is_the_sum_of_what_it_holds():
    rows = report.tree({"a.x": 1, "a.y": 2, "b.x": 4, "": 8})
    assert rows == [
        *[("a", 3), ("  x", 1), ("  y", 2)],
        *[("b", 4), ("  x", 4)],
        ("(no module)", 8),
    ]


def test_text_says_how_far_a_figure_can_be_trusted():
    def step(x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y, x)

    cost = count(step, jnp.ones((4, 4)))
    assert "128  lower bound" in report.text(cost)
    assert "trips" in report.text(cost)
    assert report.line(cost).startswith("model FLOPs a step: 128 (lower bound)")
