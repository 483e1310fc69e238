"""Every config's training step, compiled for one TPU v5e and for one H100 that are not there:
it executes the model's products, but for differences whose cause is named."""

import ahead
import pytest
from made import prepared
from test_configs import CONFIGS, ids

from research import command, compute
from research.compute import causes

# An output layer of one unit is 3 products of 32 x 32 x 1. XLA for GPU splits some products over
# the contracted axis, of 400, 120, 84 and 120, and fills it up to what the parts divide.
ONE_UNIT = {causes.REWRITTEN: -3 * 2 * 32 * 32}
EXPECTED = {
    ("mlp_cancer", "tpu"): ONE_UNIT,
    ("mlp_cancer", "cuda"): ONE_UNIT,
    ("lenet_digits", "cuda"): {
        causes.PADDED: 2 * 64 * (16 * 120 + 8 * 84 + 12 * 120 + 8 * 400),
    },
}


@pytest.mark.parametrize("target", ahead.TARGETS)
@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_the_compiled_step_does_the_models_products(path, target):
    setup = prepared(command.load(path), ahead.topology(target).devices[:1])
    traced = setup.step().trace(*setup.abstract_example())
    compiled = traced.lower(lowering_platforms=(target,)).compile()
    found = compute.report(traced, compiled=compiled, mesh=setup.mesh)
    assert found.program.exact, (found.program.unknown, found.program.reasons)
    assert not found.program.collectives
    causes_found = {d.cause: d.flops for d in found.differences}
    if (path.stem, target) == ("resnet_digits", "cuda"):
        # Gradients of strided convolutions, their holes written out as zeros.
        assert list(causes_found) == [causes.FILLED]
    else:
        assert causes_found == EXPECTED.get((path.stem, target), {})
    assert found.rates[0].device == {"tpu": "TPU v5e", "cuda": "H100 SXM5 80GB"}[target]
    assert found.rooflines()[0][1].at_least > 0
