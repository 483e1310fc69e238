"""A small ResNet on CIFAR-10."""

from research.augment import Augment
from research.data.tfds import TFDS
from research.experiment import Experiment, Target
from research.models.resnet import ResNetConfig
from research.optim import Optax, Optimizer
from research.tasks import Classify


def config() -> Experiment:
    steps = 7000
    rate = {
        "init_value": 0.02,
        "peak_value": 0.2,
        "warmup_steps": steps // 5,
        "decay_steps": steps,
        "end_value": 0.0,
    }
    return Experiment(
        model=ResNetConfig(
            classes=10, layers=(1, 1, 1), width=64, stem="cifar", stem_width=32, first_stride=2
        ),
        task=Classify(label_smoothing=0.1, augment=Augment(crop=2, flip=True)),
        data=TFDS(name="cifar10"),
        optimizer=Optimizer(
            update=Optax(
                "sgd",
                {
                    "learning_rate": Optax("warmup_cosine_decay_schedule", rate),
                    "momentum": 0.9,
                    "nesterov": True,
                },
            ),
            l2=5e-4,
        ),
        batch_size=128,
        steps=steps,
        log_every=100,
        eval_split="test",
        eval_every=1000,
        save_every=500,
        target=Target(metric="accuracy", value=0.90, split="test"),
    )
