"""LSTM on Penn Treebank, by words: the small network of Zaremba et al. (2014), without dropout.

    ERGON_DATA=../shared/data python scripts/train.py configs/lstm_ptb.py --workdir runs/lstm_ptb

Test: perplexity 114.54 and 114.12 (seeds 0 and 1, all that were run), mean 114.33; target, the
paper's: 114.5. It is evaluated as the paper does, in one stream; in 20, which each start from
nothing, seed 0 has 114.72. 67 min on one CPU core.

The paper's gradients are of a loss that is summed over 20 steps: its rate of 1 and its clip at 5
are 20 and 0.25 for a mean over tokens.
"""

from research.data.text import Text
from research.experiment import Experiment, Target
from research.models.lstm import LSTMConfig
from research.optim import Optax, Optimizer
from research.tasks import NextToken

VOCAB = 10_000
EPOCH = 2323
"""Batches in the 929,589 training tokens."""


def config() -> Experiment:
    length, epochs, constant = 20, 13, 4
    halved = {str(EPOCH * epoch): 0.5 for epoch in range(constant, epochs)}
    rate = {"init_value": 1.0 * length, "boundaries_and_scales": halved}
    return Experiment(
        model=LSTMConfig(vocab=VOCAB, width=200, layers=2, uniform=0.1, outputs=VOCAB),
        task=NextToken(unit="word"),
        data=Text(
            train="text/ptb/train.txt",
            validation="text/ptb/valid.txt",
            test="text/ptb/test.txt",
            tokens="words",
            vocab=VOCAB,
            length=length,
            rows="streams",
        ),
        optimizer=Optimizer(
            update=Optax("sgd", {"learning_rate": Optax("piecewise_constant_schedule", rate)}),
            clip_norm=5.0 / length,
        ),
        batch_size=20,
        steps=EPOCH * epochs,
        log_every=100,
        eval_every=EPOCH,
        eval_batch_size=1,
        save_every=EPOCH,
        target=Target(metric="perplexity", value=114.5, split="test", goal="min"),
    )
