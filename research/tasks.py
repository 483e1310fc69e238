"""Tasks: what is asked of a model. (model, batch, rngs, carry) -> (loss, (metrics, carry)).

A metric is a `Mean`, a total and its weight, so that adding totals and weights over batches
gives the exact mean over a split, whatever the size of the last batch. A carry is what a
recurrent model keeps from one batch to the next, or None.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Interval
from flax import nnx

from research import UserError

Batch = Mapping[str, jax.Array]


class Mean(NamedTuple):
    """A mean that is still to be divided: total / weight, both float32 scalars."""

    total: jax.Array
    weight: jax.Array


Metrics = dict[str, Mean]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task calls the model in `outputs` and judges what it gave in `score`."""

    def __call__(
        self, model: Any, batch: Batch, rngs: nnx.Rngs | None = None, carry: Any = None
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """The mean loss of a batch (scalar), its metrics, and the carry after it.

        rngs: the streams that dropout draws from; None in evaluation.
        """
        outputs, carry = self.outputs(model, batch, rngs, carry)
        # The loss adds up many small numbers, whatever the model computes in.
        wide = jnp.promote_types(outputs.dtype, jnp.float32)
        metrics = self.score(outputs.astype(wide), batch)
        loss = metrics["loss"]
        return loss.total / jnp.maximum(loss.weight, 1e-9), (metrics, carry)

    def outputs(
        self, model: Any, batch: Batch, rngs: nnx.Rngs | None, carry: Any
    ) -> tuple[jax.Array, Any]:
        kwargs = {"lengths": batch["lengths"]} if "lengths" in batch else {}
        if carry is None:
            return model(batch["inputs"], rngs=rngs, **kwargs), None
        fresh = model.initial_carry(batch["inputs"].shape[0])
        reset = batch["reset"]
        carry = jax.tree.map(
            lambda new, old: jnp.where(reset.reshape(-1, *[1] * (old.ndim - 1)), new, old),
            fresh,
            carry,
        )
        return model(batch["inputs"], carry=carry, rngs=rngs, **kwargs)

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        """The metrics of a batch; "loss" is the one that is minimised."""
        raise NotImplementedError

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics as they are reported: the means, and what follows from them."""
        return means

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises UserError where a split's targets do not fit the model's outputs."""


def weighted(values: jax.Array, weights: jax.Array) -> Mean:
    """values [B, ...]; weights [B] or of more axes, each example's weight shared by its values."""
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    weights = jnp.broadcast_to(weights, values.shape)
    return Mean(jnp.sum(values.astype(weights.dtype) * weights), jnp.sum(weights))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """Cross-entropy of integer targets [B] against logits [B, classes]; loss in nats.

    The same over [B, T] and [B, T, classes].
    """

    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of each target spread evenly over all classes (Szegedy et al. 2016). Evaluated losses
    carry it too."""

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        targets, weights = batch["targets"], batch["weights"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets)
        if self.label_smoothing:
            spread = -jnp.mean(jax.nn.log_softmax(outputs), axis=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * spread
        hits = jnp.argmax(outputs, axis=-1) == targets
        return {"loss": weighted(losses, weights), "accuracy": weighted(hits, weights)}

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Mapping[str, np.ndarray]) -> None:
        labels = arrays["targets"] if "targets" in arrays else arrays["tokens"]
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"targets must be integers, not {labels.dtype}")
        if labels is arrays.get("targets") and labels.shape[1:] != outputs.shape[1:-1]:
            raise UserError(
                f"the model gives logits of {outputs.shape[1:]}, and targets are {labels.shape[1:]}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= outputs.shape[-1]:
            raise UserError(
                f"targets run from {low} to {high}, and the model gives {outputs.shape[-1]} logits"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Classify):
    """Cross-entropy of the next token at every step; targets [B, T], logits [B, T, vocab]."""

    unit: str = "token"
    """What a token is, for the name of the metric: bits_per_character, bits_per_word."""

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        metrics = super().score(outputs, batch)
        if self.label_smoothing:  # which the loss carries, and bits must not
            losses = optax.losses.softmax_cross_entropy_with_integer_labels
            metrics["nll"] = weighted(losses(outputs, batch["targets"]), batch["weights"])
        return metrics

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Adds bits a token, under the name of its unit, and perplexity."""
        nll = means.get("nll", means["loss"])
        perplexity = math.exp(min(nll, 700.0))
        return means | {f"bits_per_{self.unit}": nll / math.log(2), "perplexity": perplexity}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryClassify(Task):
    """Cross-entropy of targets [B] in {0, 1} against one logit [B, 1] under a sigmoid, in nats."""

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        logits, targets, weights = outputs[:, 0], batch["targets"], batch["weights"]
        losses = optax.losses.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
        hits = (logits > 0) == (targets == 1)
        return {"loss": weighted(losses, weights), "accuracy": weighted(hits, weights)}

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Mapping[str, np.ndarray]) -> None:
        targets = arrays["targets"]
        if outputs.shape[1:] != (1,):
            raise UserError(
                f"BinaryClassify reads 1 logit, and the model gives {outputs.shape[1:]}"
            )
        if targets.ndim != 1 or not set(np.unique(targets)) <= {0, 1}:
            raise UserError("BinaryClassify needs targets of 0 and 1, one an example")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regress(Task):
    """Mean squared error of targets [B, ...] against outputs of the same shape."""

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        mse = weighted(jnp.square(outputs - batch["targets"]), batch["weights"])
        return {"loss": mse, "mse": mse}

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Mapping[str, np.ndarray]) -> None:
        if outputs.shape[1:] != arrays["targets"].shape[1:]:
            raise UserError(
                f"the model gives outputs of {outputs.shape[1:]}, and targets are "
                f"{arrays['targets'].shape[1:]}"
            )
