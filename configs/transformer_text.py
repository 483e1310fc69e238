"""Transformer on the Python reference, by characters.

    python scripts/train.py configs/transformer_text.py --workdir runs/transformer_text

Validation: 1.659 bits per character on Python 3.11 (one seed); target 1.90, the best Witten-Bell
n-gram of any order. 5.9 min on 2 CPU cores.
"""

from research.data.bundled import PythonReference
from research.experiment import Experiment, Target
from research.models.transformer import TransformerConfig
from research.optim import Optax, Optimizer
from research.tasks import NextToken


def config() -> Experiment:
    length, steps = 128, 2000
    rate = {
        "init_value": 0.0,
        "peak_value": 2e-3,
        "warmup_steps": 100,
        "decay_steps": steps,
        "end_value": 1e-4,
    }
    return Experiment(
        model=TransformerConfig(
            vocab=len(PythonReference.alphabet()),
            context=length,
            layers=4,
            heads=4,
            width=128,
            norm="rms",
            positions="rotary",
            mlp="swiglu",
            feed_forward=344,
            bias=False,
            dropout=0.1,
        ),
        task=NextToken(unit="character"),
        data=PythonReference(length=length),
        optimizer=Optimizer(
            update=Optax(
                "adamw",
                {"learning_rate": Optax("warmup_cosine_decay_schedule", rate), "weight_decay": 0.1},
            ),
            clip_norm=1.0,
        ),
        batch_size=16,
        steps=steps,
        log_every=50,
        eval_every=500,
        save_every=500,
        target=Target(metric="bits_per_character", value=1.90, split="validation", goal="min"),
    )
