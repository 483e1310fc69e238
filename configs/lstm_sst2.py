"""An LSTM with attention on SST-2's sentences of film reviews, good or bad, from scratch.

    ERGON_DATA=../shared/data python scripts/train.py configs/lstm_sst2.py --workdir runs/lstm_sst2

Test: accuracy 0.821 (mean of seeds 0 to 2: 0.824, 0.819, 0.819); target 0.78; naive Bayes on words
and pairs 0.821. Everything was chosen on validation. Under a minute on 2 busy CPU cores.
"""

from research.data.text import LabelledText
from research.experiment import Experiment, Target
from research.models.lstm import LSTMConfig
from research.optim import Optax, Optimizer
from research.tasks import Classify

VOCAB = 7143
EPOCH = 138
"""Batches in the 6,920 training rows."""


def config() -> Experiment:
    steps = 6 * EPOCH
    rate = {
        "init_value": 0.0,
        "peak_value": 3e-3,
        "warmup_steps": EPOCH // 2,
        "decay_steps": steps,
        "end_value": 0.0,
    }
    return Experiment(
        model=LSTMConfig(
            vocab=VOCAB,
            width=64,
            dropout=0.5,
            head="sequence",
            attention="additive",
            uniform=0.1,
            outputs=2,
        ),
        task=Classify(),
        data=LabelledText(
            train="text/sst2/train.tsv",
            validation="text/sst2/valid.tsv",
            test="text/sst2/test.tsv",
            length=40,
            min_count=2,
        ),
        optimizer=Optimizer(
            update=Optax("adam", {"learning_rate": Optax("warmup_cosine_decay_schedule", rate)}),
            clip_norm=1.0,
        ),
        batch_size=50,
        steps=steps,
        log_every=69,
        eval_every=EPOCH,
        target=Target(metric="accuracy", value=0.78, split="test"),
    )
