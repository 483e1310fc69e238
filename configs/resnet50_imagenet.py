"""ResNet-50 (He et al. 2016), 90 epochs of ImageNet: planned, never trained here.

    python scripts/train.py configs/resnet50_imagenet.py --workdir runs/resnet50_imagenet

The rate, 0.1 for every 256 images after 5 epochs that begin at 0.1, and the decay of 1e-4 are those
of Goyal et al. 2017 (https://arxiv.org/abs/1706.02677), who reach 76.3% with steps of the rate;
here it falls as a cosine, and label smoothing is 0.1. They crop at random sizes and aspects, which
`Augment` cannot: images are brought to 224 x 224, shifted by up to 28 pixels and mirrored. What
that reaches is not known.

TFDS prepares imagenet2012 from archives of your own (https://www.tensorflow.org/datasets). It is
larger than `data.cache_gb`, and images are decoded as they are read: `benchmark.py input` says
whether a step waits for them.
"""

from research.augment import Augment
from research.data.tfds import TFDS
from research.experiment import Experiment
from research.models.resnet import RESNET50
from research.optim import Optax, Optimizer
from research.tasks import Classify

IMAGES = 1_281_167
"""Training images."""


def config() -> Experiment:
    batch_size, epochs, warmup = 1024, 90, 5
    epoch = IMAGES // batch_size
    rate = {
        "init_value": 0.1,
        "peak_value": 0.1 * batch_size / 256,
        "warmup_steps": warmup * epoch,
        "decay_steps": epochs * epoch,
        "end_value": 0.0,
    }
    return Experiment(
        model=RESNET50,
        task=Classify(label_smoothing=0.1, top=5, augment=Augment(crop=28, flip=True)),
        data=TFDS(name="imagenet2012", size=(224, 224), test="validation", threads=32),
        optimizer=Optimizer(
            update=Optax(
                "sgd",
                {
                    "learning_rate": Optax("warmup_cosine_decay_schedule", rate),
                    "momentum": 0.9,
                    "nesterov": True,
                },
            ),
            l2=1e-4,
        ),
        batch_size=batch_size,
        precision="bfloat16",
        steps=epochs * epoch,
        log_every=100,
        eval_split="test",
        eval_every=5 * epoch,
        save_every=epoch,
    )
