"""A linear probe: how much of the digits 5 to 9 is in features learnt from 0 to 4, by 40 examples.

    python scripts/train.py configs/pretrain_digits.py --workdir runs/pretrain_digits
    for k in 0 1 2; do
        python scripts/train.py configs/probe_digits.py --seed $k --data.split $k \
            --workdir runs/probe_$k
    done

Three splits: test accuracy 91.1%, 85.6%, 92.8%; mean 89.8, standard deviation 3.8; target 80%. One
run takes 8 s on one CPU core, 0.3 s of it in its 200 steps. What it is measured against: the same
network trained on the 40 examples alone 95.2%, `finetune_digits` 96.7%, logistic regression on
their pixels 94.1%. These digits are almost linear in their pixels: the probe is here for its
mechanics.
"""

from research.data.bundled import Digits
from research.experiment import Experiment, Target
from research.init_from import InitFrom
from research.models.cnn import CNNConfig
from research.optim import Group, Optax, Optimizer
from research.tasks import Classify


def config() -> Experiment:
    return Experiment(
        # No dropout: the features are given.
        model=CNNConfig(image=(16, 16, 1), classes=5),
        task=Classify(),
        data=Digits(upscale=2, classes=(5, 6, 7, 8, 9), train=40),
        init_from=InitFrom(path="runs/pretrain_digits", fresh="^head"),
        optimizer=Optimizer(
            update=Optax("adamw", {"learning_rate": 1e-2, "weight_decay": 0.01}),
            groups=(Group(match="^(?!head)", frozen=True),),
        ),
        batch_size=40,
        steps=200,
        log_every=20,
        eval_every=100,
        target=Target(metric="accuracy", value=0.80, split="test"),
    )
