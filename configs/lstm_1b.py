"""An LSTM of 2 x 8,192 cells on the One Billion Word benchmark: planned, never trained here.

    python scripts/train.py configs/lstm_1b.py --workdir runs/lstm_1b

After Jozefowicz et al. 2016 (https://arxiv.org/abs/1602.02410), whose largest LSTM has as many
cells: AdaGrad at 0.2, 20 steps, no state reset. Theirs pass 1,024 numbers on, a projection of the
8,192 cells, to the next step, and score 793,471 words against as many. Here there is no projection:
a layer's hidden state has 8,192 numbers, and 32,768 byte pairs are scored against them all,
1,140,948,992 parameters. Their 32 workers, of 128 rows each, update one after another; here one
update has all 4,096 rows. They clip the gradients of the LSTM alone, here all.

The data is text of yours at text/lm1b below ERGON_DATA, of which Chelba et al. 2013
(https://arxiv.org/abs/1312.3005) give the sentences, shuffled. Perplexity a byte pair is not theirs
a word.
"""

from research.data.text import Text
from research.experiment import Experiment
from research.models.lstm import LSTMConfig
from research.optim import Optax, Optimizer
from research.tasks import NextToken

VOCAB = 32_768


def config() -> Experiment:
    return Experiment(
        model=LSTMConfig(
            vocab=VOCAB,
            features=1024,
            width=8192,
            layers=2,
            dropout=0.25,
            uniform=0.05,
            outputs=VOCAB,
        ),
        task=NextToken(),
        data=Text(
            train="text/lm1b/train.txt",
            validation="text/lm1b/valid.txt",
            tokens="bpe",
            vocab=VOCAB,
            length=20,
            rows="streams",
        ),
        optimizer=Optimizer(update=Optax("adagrad", {"learning_rate": 0.2}), clip_norm=1.0),
        batch_size=128 * 32,
        precision="bfloat16",
        steps=100_000,
        log_every=100,
        eval_every=5000,
        save_every=5000,
    )
