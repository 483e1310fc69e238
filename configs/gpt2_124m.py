"""GPT-2 124M (Radford et al. 2019) on OpenWebText, after nanoGPT: planned, never trained here.

    python scripts/train.py configs/gpt2_124m.py --workdir runs/gpt2_124m

Published: nanoGPT (https://github.com/karpathy/nanoGPT, config/train_gpt2.py) reaches a loss of
about 2.85 after 300 billion tokens, 4 days on 8 A100 40GB; its rates and decay are here, and as
many tokens, in batches of 524,288 where it has 491,520. The model has GPT-2's biases, which nanoGPT
leaves out, and nanoGPT's vocabulary: GPT-2's 50,257 filled up to a multiple of 128.

The data is text of yours at text/openwebtext below ERGON_DATA. Its byte pairs are trained on it,
and are not GPT-2's: losses compare roughly.
"""

from research.data.text import Text
from research.experiment import Experiment, Target
from research.models.transformer import TransformerConfig
from research.optim import Optax, Optimizer
from research.tasks import NextToken


def config() -> Experiment:
    length, batch_size = 1024, 512
    steps = 600_000 * 491_520 // (batch_size * length)
    rate = {
        "init_value": 0.0,
        "peak_value": 6e-4,
        "warmup_steps": 2000,
        "decay_steps": steps,
        "end_value": 6e-5,
    }
    return Experiment(
        model=TransformerConfig(
            vocab=50_304,
            context=length,
            layers=12,
            heads=12,
            width=768,
            scan=True,
        ),
        task=NextToken(),
        data=Text(
            train="text/openwebtext/train.txt",
            validation="text/openwebtext/valid.txt",
            tokens="bpe",
            vocab=50_257,
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
        accumulate=4,
        precision="bfloat16",
        steps=steps,
        log_every=100,
        eval_every=1000,
        save_every=1000,
        target=Target(metric="loss", value=2.85, split="validation", goal="min"),
    )
