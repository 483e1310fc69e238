"""Every config's training step, compiled for one TPU v5e and for one H100 that are not there:
it executes the model's products, but for differences whose cause is named."""

import dataclasses

import ahead
import pytest
from made import prepared
from test_configs import PLANNED, but, ids

from research import command, compute
from research.compute import causes

MOST = 64
"""Rows of a batch: of more of LeNet's, XLA for TPU searches for a minute, whatever it is asked."""

ALIKE = ("cnn_mnist", "lenet_mnist", "lstm_sst2", "mlp_titanic", "resnet_cifar10")
ALIKE += ("transformer_shakespeare",)
"""Of the models of other configs, on other data."""

# An output layer of one unit is 3 products of 32 x 32 x 1. XLA for GPU splits some products over
# the contracted axis, of 400, 120, 84 and 120, and fills it up to what the parts divide.
ONE_UNIT = {causes.REWRITTEN: -3 * 2 * 32 * 32}
# So are scores of attention, of rows x steps x width; the mean that they weigh is of a matrix and a
# vector, three times as well.
SCORES = {
    "lstm_sst2": {causes.REWRITTEN: -3 * 2 * 50 * 40 * (64 + 64)},
    "lstm_trec": {causes.REWRITTEN: -3 * 2 * 50 * 24 * (64 + 128)},
    "transformer_sst2": {causes.REWRITTEN: -3 * 2 * 64 * 48 * 64},
}
# Of two layers of 32, 2 heads and 64, scanned and recomputed, on 128 tokens in rows of 16: all but
# the last product.
AGAIN = 2 * 2 * 128 * (32 * 96 + 2 * 16 * 32 + 32 * 32 + 2 * 32 * 64)
RECOMPUTED = {"transformer_1b": 2, "transformer_7b": 32}
"""Parts of a batch."""
EXPECTED = {
    **{
        (name, target): {causes.RECOMPUTE: parts * AGAIN}
        for name, parts in RECOMPUTED.items()
        for target in ahead.TARGETS
    },
    **{(name, target): flops for name, flops in SCORES.items() for target in ahead.TARGETS},
    # The gradient of one hidden product, 20 steps of 20 x 200 x 800, is not computed by itself.
    ("lstm_ptb", "cuda"): {causes.REMOVED: -2 * 20 * 20 * 200 * 800},
    **{(name, at): ONE_UNIT for name in ("mlp_cancer", "mlp_titanic") for at in ahead.TARGETS},
    **{
        (name, "cuda"): {
            causes.PADDED: 2 * MOST * (16 * 120 + 8 * 84 + 12 * 120 + 8 * 400),
        }
        for name in ("lenet_digits", "lenet_mnist")
    },
    # Each client's convolution is a group of one. What is rewritten is said twice: TPU multiplies
    # some of those vectors after all.
    ("diloco_digits", "tpu"): {
        causes.GROUPED: 3469312,
        causes.REWRITTEN: -73728,
        causes.UNEXPLAINED: 73728,
    },
    # The dense layer's 3136 inputs become 3200.
    ("cnn_mnist", "cuda"): {causes.PADDED: 2 * MOST * 64 * 128},
}

# Batches of 20 and 50 rows are filled up by as much as the kernels that XLA for GPU picks ask for.
FILLED_UP = {("lstm_ptb", "cuda"), ("lstm_sst2", "cuda"), ("lstm_trec", "cuda")}
FILLED_UP |= {("lstm_1b", "cuda"), ("resnet50_imagenet", "cuda")}  # widths of 4 to 32


@pytest.mark.parametrize("target", ahead.TARGETS)
# Of what is planned one does, in bfloat16, scanned and recomputed.
@pytest.mark.parametrize("path", but(*PLANNED.keys() - {"transformer_1b"}, *ALIKE), ids=ids)
def test_the_compiled_step_does_the_models_products(path, target):
    e = command.load(path)
    e = dataclasses.replace(e, batch_size=min(e.batch_size or MOST, MOST))
    setup = prepared(e, ahead.devices(target, 1))
    traced = setup.step().trace(*setup.abstract_example())
    compiled = ahead.compile(traced, target)
    found = compute.report(traced, compiled=compiled, mesh=setup.mesh)
    assert found.program.exact, (found.program.unknown, found.program.reasons)
    assert not found.program.collectives
    causes_found = {d.cause: d.flops for d in found.differences}
    if (path.stem, target) in FILLED_UP:
        assert 0 < causes_found.pop(causes.PADDED) < 0.05 * found.count.model_flops
    if (path.stem, target) == ("resnet_digits", "cuda"):
        # Gradients of strided convolutions, their holes written out as zeros.
        assert list(causes_found) == [causes.FILLED]
    else:
        assert causes_found == EXPECTED.get((path.stem, target), {})
    assert found.rates[0].device == {"tpu": "TPU v5e", "cuda": "H100 SXM5 80GB"}[target]
    assert found.rooflines()[0][1].at_least > 0
