"""The optimizers that are compared, each as it is customarily set, and one run of each."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from research.experiment import Experiment
from research.models.cnn import CNNConfig
from research.models.transformer import TransformerConfig
from research.optim import Group, Optax, Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """An optimizer as it is compared."""

    rate: float
    """The customary learning rate, in the middle of the grid."""
    make: Callable[[Any, Experiment], Optimizer]
    """(learning rate or its schedule, the config it trains) -> the optimizer."""
    batch: Literal["config's", "whole", "one"] = "config's"
    constant: bool = False
    """Whether the rate stays after the warm-up, where that of others falls to 0."""


def _decay(base: Experiment) -> float:
    """The config's decoupled weight decay."""
    update = base.optimizer.update
    return update.kwargs.get("weight_decay", 0.0) if isinstance(update, Optax) else 0.0


def _plain(name: str, **kwargs: Any) -> Callable[[Any, Experiment], Optimizer]:
    return lambda rate, _: Optimizer(update=Optax(name, {"learning_rate": rate, **kwargs}))


def _decayed(name: str, **kwargs: Any) -> Callable[[Any, Experiment], Optimizer]:
    return lambda rate, base: _plain(name, **kwargs, weight_decay=_decay(base))(rate, base)


def _sam(rate: Any, base: Experiment) -> Optimizer:
    """Over momentum, as Foret et al. (2021) have it."""
    return dataclasses.replace(_plain("sgd", momentum=0.9)(rate, base), sam_rho=0.05)


MATRICES: dict[type, dict[str, Any]] = {
    CNNConfig: {"convs/": [[-4, -3, -2], -1]},
    TransformerConfig: {"qkv/kernel": [-4, [-3, -2, -1]]},
}
"""Kernels of each model that are matrices of other axes than the last two: Muon's axes by path."""


def _muon(rate: Any, base: Experiment) -> Optimizer:
    """Muon for the hidden layers' matrices, AdamW for embeddings, the last layer and vectors."""
    # Of an update's size that is AdamW's (Liu et al. 2025), so that one rate does for both.
    axes = MATRICES.get(type(base.model), {}) | {"kernel": [-2, -1]}
    muon = {"muon_weight_dimension_numbers": axes, "weight_decay": _decay(base)}
    muon["consistent_rms"] = 0.2
    hidden = Group(
        match=r"^(?!head|output).*kernel",
        update=Optax("contrib.muon", {"learning_rate": rate, **muon}),
    )
    return dataclasses.replace(_decayed("adamw")(rate, base), groups=(hidden,))


def _schedule_free(rate: Any, base: Experiment) -> Optimizer:
    # Not contrib.schedule_free_adamw, whose weight decay takes no mask.
    inner = Optax("adamw", {"learning_rate": rate, "b1": 0.0, "weight_decay": _decay(base)})
    return _plain("contrib.schedule_free", base_optimizer=inner)(rate, base)


PLAIN = Method(rate=0.3, make=_plain("sgd"))
METHODS = {
    "sgd, full batch": Method(rate=0.3, make=_plain("sgd"), batch="whole"),
    "sgd, mini-batch": PLAIN,
    "sgd, single example": Method(rate=0.03, make=_plain("sgd"), batch="one"),
    "momentum": Method(rate=0.1, make=_plain("sgd", momentum=0.9)),
    "nesterov": Method(rate=0.1, make=_plain("sgd", momentum=0.9, nesterov=True)),
    "adagrad": Method(rate=0.03, make=_plain("adagrad")),
    "rmsprop": Method(rate=3e-3, make=_plain("rmsprop")),
    "adam": Method(rate=3e-3, make=_plain("adam")),
    "adamw": Method(rate=3e-3, make=_decayed("adamw")),
    "lamb": Method(rate=0.01, make=_decayed("lamb")),
    "lars": Method(rate=1.0, make=_plain("lars")),
    "lion": Method(rate=1e-3, make=_decayed("lion")),
    # By default it would factor no matrix of models this small.
    "adafactor": Method(rate=0.03, make=_plain("adafactor", min_dim_size_to_factor=16)),
    "muon": Method(rate=3e-3, make=_muon),
    "schedule-free adamw": Method(rate=0.01, make=_schedule_free, constant=True),
    "sam, momentum": Method(rate=0.1, make=_sam),
}


def planned(base: Experiment, method: Method, rate: float, steps: int, seed: int) -> Experiment:
    """The run of a method on a config: its peak rate, updates and seed; the rest is the config's.

    The rate rises from 0 for a twentieth of the steps, and falls to 0 on a cosine.
    """
    rising: dict[str, Any] = {"init_value": 0.0, "peak_value": rate, "warmup_steps": steps // 20}
    if not method.constant:
        falling = {"decay_steps": steps, "end_value": 0.0}
        shape = Optax("warmup_cosine_decay_schedule", rising | falling)
    elif steps // 20:
        shape = Optax("warmup_constant_schedule", rising)
    else:  # without a step of warm-up optax would stay at 0
        shape = Optax("constant_schedule", {"value": rate})
    optimizer = dataclasses.replace(
        method.make(shape, base),
        clip_norm=base.optimizer.clip_norm,
        no_decay=base.optimizer.no_decay,
    )
    batch = base.batch_size
    if method.batch != "config's":
        split = base.data.load()["train"]
        # One pass over it, on text in rows of the model's length.
        whole = len(split) // getattr(split, "length", 1)
        batch = whole if method.batch == "whole" else 1
    return dataclasses.replace(
        base,
        optimizer=optimizer,
        steps=steps,
        batch_size=batch,
        seed=seed,
        log_every=max(1, steps // 20),
    )
