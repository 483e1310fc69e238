"""Fine-tuning: the CNN of the digits 0 to 4 goes on with 40 examples of 5 to 9.

    python scripts/train.py configs/pretrain_digits.py --workdir runs/pretrain_digits
    for k in 0 1 2; do
        python scripts/train.py configs/finetune_digits.py --seed $k --data.split $k \
            --workdir runs/finetune_$k
    done

Three splits: test accuracy 94.4%, 97.8%, 97.8%; mean 96.7, standard deviation 1.9; target 90%. From
scratch (`--init_from.path None --init_from.fresh None`) 91.7%, 97.8%, 96.1%; mean 95.2. One run
takes 10 s on one CPU core, 2 s of it in its 200 steps.
"""

import dataclasses

from configs import probe_digits
from research.experiment import Experiment, Target
from research.models.cnn import CNNConfig
from research.optim import Group, Optax, Optimizer


def config() -> Experiment:
    """`probe_digits`, with the layers below the head trained too, at a tenth of its rate."""
    return dataclasses.replace(
        probe_digits.config(),
        target=Target(metric="accuracy", value=0.90, split="test"),
        model=CNNConfig(image=(16, 16, 1), classes=5, dropout=0.25),
        optimizer=Optimizer(
            update=Optax("adamw", {"learning_rate": 1e-2, "weight_decay": 0.01}),
            groups=(Group(match="^(?!head)", multiplier=0.1),),
        ),
    )
