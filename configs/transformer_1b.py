"""A decoder of Sheared-LLaMA-1.3B's shape: planned, never trained here.

    python scripts/train.py configs/transformer_1b.py --workdir runs/transformer_1b

The shape is that of Xia et al. 2023 (https://arxiv.org/abs/2310.06694): 1,345,423,360 parameters.
They prune it from LLaMA-2-7B; here it starts from nothing, with LLaMA-2's rates (Touvron et al.
2023b, https://arxiv.org/abs/2307.09288), on 20 tokens a parameter (Hoffmann et al. 2022,
https://arxiv.org/abs/2203.15556), 1.05 million a batch. By XLA's compiler for CUDA, 8 H100 with
a copy each need 57 GB in a step, 16 of them for parameters and AdamW.

The data is text of yours at text/corpus below ERGON_DATA.
"""

from research.data.text import Text
from research.experiment import Experiment
from research.models.transformer import TransformerConfig
from research.optim import Optax, Optimizer
from research.tasks import NextToken

VOCAB = 32_000
PARAMETERS = 1_345_423_360


def config() -> Experiment:
    length, batch_size = 2048, 512
    steps = 20 * PARAMETERS // (batch_size * length)
    rate = {
        "init_value": 0.0,
        "peak_value": 3e-4,
        "warmup_steps": 2000,
        "decay_steps": steps,
        "end_value": 3e-5,
    }
    return Experiment(
        model=TransformerConfig(
            vocab=VOCAB,
            context=length,
            layers=24,
            heads=16,
            width=2048,
            feed_forward=5504,
            norm="rms",
            positions="rotary",
            mlp="swiglu",
            bias=False,
            tied=False,
            scan=True,
            remat="full",
        ),
        task=NextToken(),
        data=Text(
            train="text/corpus/train.txt",
            validation="text/corpus/valid.txt",
            tokens="bpe",
            vocab=VOCAB,
            length=length,
        ),
        optimizer=Optimizer(
            update=Optax(
                "adamw",
                {
                    "learning_rate": Optax("warmup_cosine_decay_schedule", rate),
                    "b2": 0.95,
                    "weight_decay": 0.1,
                },
            ),
            clip_norm=1.0,
        ),
        batch_size=batch_size,
        accumulate=2,
        precision="bfloat16",
        steps=steps,
        log_every=10,
        eval_every=1000,
        save_every=500,
    )
