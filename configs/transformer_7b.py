"""A decoder of Llama-2-7B's shape, split over 8 devices: planned, never trained here.

    python scripts/train.py configs/transformer_7b.py --workdir runs/transformer_7b

Shape, rates, and batches of 4.2 million tokens, 2 trillion in all, are those of Touvron et al.
2023b (https://arxiv.org/abs/2307.09288): 6,738,415,616 parameters. By XLA's compiler for CUDA,
8 H100 need 47 GB each in a step, 10 of them for their parts of parameters and AdamW. More than 32
devices take fewer parts, as `--accumulate 8`, and their number must divide by 8.

The data is text of yours at text/corpus below ERGON_DATA.
"""

from research.data.text import Text
from research.experiment import Experiment
from research.models.transformer import TransformerConfig
from research.optim import Optax, Optimizer
from research.parallel import Parallel
from research.tasks import NextToken

VOCAB = 32_000


def config() -> Experiment:
    length, batch_size = 4096, 1024
    steps = 2 * 10**12 // (batch_size * length)
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
            layers=32,
            heads=32,
            width=4096,
            feed_forward=11_008,
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
        accumulate=32,
        parallel=Parallel(fsdp=8),
        precision="bfloat16",
        steps=steps,
        log_every=10,
        eval_every=5000,
        save_every=500,
    )
