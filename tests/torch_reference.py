"""What the tests against PyTorch share: weights and arrays stay in this repository's layout, are
PyTorch's leaves there, and are turned to PyTorch's layout in the reference."""

import jax
import numpy as np
import pytest


def leaves(tree):
    """The tree with PyTorch's tensors, each a leaf that takes a gradient."""
    torch = pytest.importorskip("torch")
    return jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), tree)


def gradients(tree):
    return jax.tree.map(lambda x: x.grad.numpy(), tree)


def close(found, expected, tolerance=1e-5):
    """Equal to within `tolerance` of each array's largest number, or of 1 where it is larger."""

    def check(a, b):
        a, b = (np.asarray(x.detach() if hasattr(x, "detach") else x) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(check, found, expected)
