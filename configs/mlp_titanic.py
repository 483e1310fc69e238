"""MLP on Titanic."""

from research.data.table import Table
from research.experiment import Experiment, Target
from research.models.mlp import MLPConfig
from research.optim import Optax, Optimizer
from research.tasks import BinaryClassify


def config() -> Experiment:
    return Experiment(
        model=MLPConfig(features=18, sizes=(64, 32, 1), dropout=0.2),
        task=BinaryClassify(),
        data=Table(
            path="tables/titanic.csv",
            target="Survived",
            ignore=("PassengerId", "Name", "Ticket", "Cabin"),
            categories=("Pclass",),
        ),
        optimizer=Optimizer(update=Optax("adamw", {"learning_rate": 1e-3, "weight_decay": 0.1})),
        batch_size=32,
        steps=1000,
        log_every=100,
        target=Target(metric="accuracy", value=0.78, split="test"),
    )
