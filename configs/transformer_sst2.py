r"""A Transformer encoder of one layer on SST-2's sentences of film reviews, from scratch.

    ERGON_DATA=../shared/data python scripts/train.py configs/transformer_sst2.py \
        --workdir runs/transformer_sst2

Test: accuracy 0.813 (mean of seeds 0 to 2: 0.811, 0.819, 0.809); target 0.76; naive Bayes on words
and pairs 0.821. Everything was chosen on validation. Under a minute on 2 busy CPU cores.
"""

from research.data.text import LabelledText
from research.experiment import Experiment, Target
from research.models.encoder import EncoderConfig
from research.optim import Optax, Optimizer
from research.tasks import Classify

VOCAB = 7143
EPOCH = 108
"""Batches in the 6,920 training rows."""


def config() -> Experiment:
    length, steps = 48, 4 * EPOCH
    rate = {
        "init_value": 0.0,
        "peak_value": 1e-3,
        "warmup_steps": EPOCH // 2,
        "decay_steps": steps,
        "end_value": 0.0,
    }
    return Experiment(
        model=EncoderConfig(
            vocab=VOCAB,
            context=length,
            layers=1,
            heads=4,
            width=64,
            feed_forward=128,
            dropout=0.5,
            pooling="attention",
            classes=2,
        ),
        task=Classify(),
        data=LabelledText(
            train="text/sst2/train.tsv",
            validation="text/sst2/valid.tsv",
            test="text/sst2/test.tsv",
            length=length,
            min_count=2,
        ),
        optimizer=Optimizer(
            update=Optax("adam", {"learning_rate": Optax("warmup_cosine_decay_schedule", rate)}),
            clip_norm=1.0,
        ),
        batch_size=64,
        steps=steps,
        log_every=54,
        eval_every=EPOCH,
        target=Target(metric="accuracy", value=0.76, split="test"),
    )
