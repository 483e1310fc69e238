r"""Transformer on Tiny Shakespeare, by characters: nanoGPT's setting for a CPU, at twice its rate.

    for k in 0 1 2; do
        ERGON_DATA=../shared/data python scripts/train.py configs/transformer_shakespeare.py \
            --seed $k --workdir runs/transformer_shakespeare_$k
    done

Validation: loss 1.803, 1.816, 1.803 nats a character over all of the last tenth; mean of three
seeds 1.807, standard deviation 0.008; target 1.89. One run takes 3 min on one CPU core. At
nanoGPT's own rate, peak_value 1e-3: 1.903 and 1.902 (seeds 0 and 1), and its model and loop in
PyTorch 1.910; the 1.88 of its README is an estimate from 20 batches.
"""

from research.data.text import Text
from research.experiment import Experiment, Target
from research.models.transformer import TransformerConfig
from research.optim import Optax, Optimizer
from research.tasks import NextToken

VOCAB = 65


def config() -> Experiment:
    length, steps = 64, 2000
    rate = {
        "init_value": 0.0,
        "peak_value": 2e-3,
        "warmup_steps": 100,
        "decay_steps": steps,
        "end_value": 1e-4,
    }
    return Experiment(
        model=TransformerConfig(
            vocab=VOCAB,
            context=length,
            layers=4,
            heads=4,
            width=128,
            mlp="gelu_erf",
            bias=False,
        ),
        task=NextToken(unit="character"),
        data=Text(train="text/tinyshakespeare/input.txt", tokens="characters", length=length),
        optimizer=Optimizer(
            update=Optax(
                "adamw",
                {
                    "learning_rate": Optax("warmup_cosine_decay_schedule", rate),
                    "b2": 0.99,
                    "weight_decay": 0.1,
                },
            ),
            clip_norm=1.0,
        ),
        batch_size=12,
        steps=steps,
        log_every=50,
        eval_every=500,
        save_every=500,
        target=Target(metric="loss", value=1.89, split="validation", goal="min"),
    )
