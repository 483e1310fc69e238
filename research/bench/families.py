"""What the suite measures: a config of every family, at settings that a version of it fixes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research import command
from research.experiment import Experiment, Target
from research.optim import Optax

VOCAB = 128
"""Of the text models, in place of the text's own alphabet, which a new Python may make larger."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A config, and what of it is fixed anew so that it reaches a target in a minute."""

    config: str
    steps: int
    eval_every: int
    target: Target
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def experiment(self) -> Experiment:
        base = command.load(self.config)
        return dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, **self.model),  # type: ignore[type-var]
            optimizer=dataclasses.replace(
                base.optimizer, update=_decaying(base.optimizer.update, self.steps)
            ),
            steps=self.steps,
            eval_every=self.eval_every,
            log_every=self.eval_every,
            eval_split=self.target.split,
            save_every=None,
            target=self.target,
        )


def _decaying(update: Any, steps: int) -> Any:
    """An update whose learning rate decays over so many steps, where it decays."""
    rate = update.kwargs["learning_rate"]
    if not isinstance(rate, Optax):
        return update
    shorter = dataclasses.replace(rate, kwargs={**rate.kwargs, "decay_steps": steps})
    return dataclasses.replace(update, kwargs={**update.kwargs, "learning_rate": shorter})


def _accuracy(value: float) -> Target:
    return Target(metric="accuracy", value=value, split="validation")


_BITS = Target(metric="bits_per_character", value=2.47, split="validation", goal="min")
"""That of a 3-gram, as the quickstart's: docs/performance.md."""
FAMILIES = {
    "mlp": Family(config="configs/mlp_cancer.py", steps=600, eval_every=25, target=_accuracy(0.96)),
    "cnn": Family(config="configs/cnn_digits.py", steps=400, eval_every=25, target=_accuracy(0.97)),
    "resnet": Family(
        config="configs/resnet_digits.py", steps=400, eval_every=25, target=_accuracy(0.97)
    ),
    "lstm": Family(
        config="configs/lstm_text.py",
        steps=250,
        eval_every=25,
        target=_BITS,
        model={"vocab": VOCAB, "outputs": VOCAB},
    ),
    "transformer": Family(
        config="configs/transformer_text.py",
        steps=250,
        eval_every=25,
        target=_BITS,
        model={"vocab": VOCAB},
    ),
}
