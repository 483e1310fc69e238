"""Tasks: what is asked of a model. (model, batch, rngs, carry) -> (loss, (metrics, carry)).

A metric is a `Mean`, a total and its weight, so that adding totals and weights over batches
gives the exact mean over a split, whatever the size of the last batch. What is no mean, such as
AUC, is computed from what `gather` keeps of every batch of an evaluation. A carry is what a
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
from annotated_types import Ge, Gt, Interval
from flax import nnx

from research import UserError, metrics, mixing
from research.augment import Augment

Batch = Mapping[str, jax.Array]
GIVEN = ("lengths", "segments", "positions")
"""What a model is given beside its inputs, where the batch has it."""


class Mean(NamedTuple):
    """A mean that is still to be divided: total / weight, both float32 scalars."""

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """0 where there is no weight."""
        return self.total / jnp.maximum(self.weight, 1e-9)


Metrics = dict[str, Mean]
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task calls the model in `outputs` and judges what it gave in `score`.

    Training minimises the loss of a call; evaluation uses `outputs`, `score` and `gather` alone.
    """

    def rows_apart(self) -> bool:
        """Whether the loss is a mean over examples, each of its own row and its own draws alone.

        Devices may then go through the parts of a batch (`accumulate`) by themselves, and add up
        once. Say so of a new task where it is so.
        """
        return False

    def __call__(
        self, model: Any, batch: Batch, rngs: nnx.Rngs | None = None, carry: Any = None
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """The mean loss of a batch (scalar), its metrics, and the carry after it.

        rngs: the streams that dropout draws from; None in evaluation.
        """
        outputs, carry = self.outputs(model, batch, rngs, carry)
        found = self.score(outputs, batch)
        return found["loss"].mean(), (found, carry)

    def outputs(
        self, model: Any, batch: Batch, rngs: nnx.Rngs | None, carry: Any
    ) -> tuple[jax.Array, Any]:
        """What the model gives, in float32 whatever it computes in, and the carry after it."""
        kwargs = {name: batch[name] for name in GIVEN if name in batch}
        inputs = pixels(batch["inputs"])
        if carry is None:
            return _wide(model(inputs, rngs=rngs, **kwargs)), None
        fresh = model.initial_carry(inputs.shape[0])
        reset = batch["reset"]
        carry = jax.tree.map(
            lambda new, old: jnp.where(reset.reshape(-1, *[1] * (old.ndim - 1)), new, old),
            fresh,
            carry,
        )
        outputs, carry = model(inputs, carry=carry, rngs=rngs, **kwargs)
        return _wide(outputs), carry

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        """The metrics of a batch; "loss" is the one that is minimised."""
        raise NotImplementedError

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics as they are reported: the means, and what follows from them."""
        return means

    def gather(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """What an evaluation keeps of a batch: arrays whose first axis is joined over batches."""
        return {}

    def gathered(self, arrays: Arrays) -> dict[str, float]:
        """Further metrics of a split, from all that was gathered; NaN where one is undefined.

        Called only where something was. A row of weight 0 is padding, and not to be counted.
        """
        return {}

    def tables(self, arrays: Arrays) -> dict[str, list[Any]]:
        """What is no number, from all that was gathered: nested lists, for reports."""
        return {}

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Arrays) -> None:
        """Raises UserError where a split's targets do not fit the model's outputs."""


def pixels(inputs: jax.Array) -> jax.Array:
    """Images of bytes in [0, 1]; other inputs as they are."""
    return inputs.astype(jnp.float32) / 255 if inputs.dtype == jnp.uint8 else inputs


def skipped(batch: Batch) -> Metrics:
    """The share of bad rows (tokens, in a text), where the data skips them; padding apart."""
    if "bad" not in batch:
        return {}
    bad = batch["bad"].astype(batch["weights"].dtype)
    return {"bad": Mean(jnp.sum(bad), jnp.sum(bad) + jnp.sum(batch["weights"]))}


def _wide(outputs: jax.Array) -> jax.Array:
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def weighted(values: jax.Array, weights: jax.Array) -> Mean:
    """values [B, ...]; weights [B] or of more axes, each example's weight shared by its values."""
    weights = shared(weights, values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(weights.dtype)
    return Mean(jnp.sum(values * weights), jnp.sum(weights))


def shared(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weights [B] or of more axes in the shape of values [B, ...]."""
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    return jnp.broadcast_to(weights, values.shape)


def confidences(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """What calibration and confusion need of logits [..., classes]; one row an example."""
    targets = batch["targets"]
    log_p = jax.nn.log_softmax(logits)
    return {
        "confidence": jnp.exp(jnp.max(log_p, axis=-1)),
        "predicted": jnp.argmax(logits, axis=-1),
        "targets": targets,
        "weights": shared(batch["weights"], targets),
        "classes": jnp.full((1,), logits.shape[-1]),  # one row a batch
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Classes(Task):
    """What classifying has in common, in two classes and in many."""

    gamma: Annotated[float, Ge(0)] = 0.0
    """Focal loss (Lin et al. 2017): an example's loss is scaled by (1 - p)^gamma, where p is the
    probability of its target."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the loss, which is divided by the sum of its examples' weights; the
    focal loss's alpha is (1 - alpha, alpha). Evaluated losses carry it, and gamma, too."""

    def __post_init__(self) -> None:
        if self.class_weights is not None and not all(w > 0 for w in self.class_weights):
            raise UserError(f"task.class_weights must be > 0, not {self.class_weights}")

    def rows_apart(self) -> bool:
        return True

    def balanced(self, batch: Batch) -> jax.Array:
        """The weights of losses: the examples', times those of their classes."""
        targets, weights = batch["targets"], batch["weights"]
        if self.class_weights is None:
            return weights
        of_class = jnp.asarray(self.class_weights, weights.dtype)[targets.astype(jnp.int32)]
        return shared(weights, targets) * of_class

    def gathered(self, arrays: Arrays) -> dict[str, float]:
        right = arrays["predicted"] == arrays["targets"]
        given = (arrays["confidence"], right, arrays["weights"])
        return {"ece": metrics.calibration_error(*map(np.ravel, given))}

    def tables(self, arrays: Arrays) -> dict[str, list[Any]]:
        targets, predicted, weights = (
            np.ravel(arrays[k]) for k in ("targets", "predicted", "weights")
        )
        counts = metrics.confusion(targets, predicted, weights, int(arrays["classes"][0]))
        return {"confusion_matrix": counts.tolist()}

    def check_classes(self, classes: int) -> None:
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UserError(
                f"task.class_weights has {len(self.class_weights)} weights, "
                f"and there are {classes} classes"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CrossEntropy(_Classes):
    """Cross-entropy of integer targets [...] against logits [..., classes]; loss in nats."""

    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of each target spread evenly over all classes (Szegedy et al. 2016). Evaluated losses
    carry it too."""
    top: Annotated[int, Ge(2)] | None = None
    """Also the share of targets among so many highest logits, as top_5; None: not counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma and self.label_smoothing:
            raise UserError("task.gamma and task.label_smoothing cannot be combined")

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        targets, weights = batch["targets"], batch["weights"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets)
        if self.label_smoothing:
            spread = -jnp.mean(jax.nn.log_softmax(outputs), axis=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * spread
        if self.gamma:
            losses = jnp.exp(self.gamma * _log_wrong(outputs, targets)) * losses
        hits = jnp.argmax(outputs, axis=-1) == targets
        found = {
            "loss": weighted(losses, self.balanced(batch)),
            "accuracy": weighted(hits, weights),
        }
        if self.top is not None:
            found[f"top_{self.top}"] = weighted(_rank(outputs, targets) < self.top, weights)
        return found

    def gather(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return confidences(outputs, batch)

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Arrays) -> None:
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
        self.check_classes(outputs.shape[-1])
        if self.top is not None and self.top >= outputs.shape[-1]:
            raise UserError(f"task.top = {self.top} of {outputs.shape[-1]} classes is always right")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(_CrossEntropy):
    """Targets [B] against logits [B, classes]; the same over [B, T] and [B, T, classes]."""

    augment: Augment | None = None
    """What training images are changed by; None: nothing."""
    mixup: Annotated[float, Ge(0)] = 0.0
    """Train on pairs of examples added in shares drawn from Beta(mixup, mixup) (Zhang et al. 2018);
    0: off. The paper's images: 0.2."""
    cutmix: Annotated[float, Ge(0)] = 0.0
    """Train on images with a box of another, its area drawn from Beta(cutmix, cutmix) (Yun et al.
    2019); 0: off. The paper's: 1. With mixup too, each batch is mixed by one of them."""

    def rows_apart(self) -> bool:
        return not (self.mixup or self.cutmix)

    def __call__(
        self, model: Any, batch: Batch, rngs: nnx.Rngs | None = None, carry: Any = None
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        if rngs is None or not (self.augment or self.mixup or self.cutmix):
            return super().__call__(model, batch, rngs, carry)
        inputs, weights = pixels(batch["inputs"]), batch["weights"]
        if self.augment is not None:
            inputs = self.augment(inputs, rngs.dropout())
        if not (self.mixup or self.cutmix):
            return super().__call__(model, {**batch, "inputs": inputs}, rngs, carry)
        inputs, share = mixing.mixed(inputs, weights, rngs.dropout(), self.mixup, self.cutmix)
        outputs, carry = self.outputs(model, {**batch, "inputs": inputs}, rngs, carry)
        own = {**batch, "weights": weights * share}
        other = {"targets": batch["targets"][::-1], "weights": weights * (1 - share)}
        found = jax.tree.map(jnp.add, self.score(outputs, own), self.score(outputs, other))
        return found["loss"].mean(), (found, carry)

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Arrays) -> None:
        super().check(outputs, arrays)
        wanted = {"augment": self.augment, "mixup": self.mixup, "cutmix": self.cutmix}
        names = [name for name, value in wanted.items() if value]
        if not names:
            return
        inputs, targets = arrays.get("inputs"), arrays["targets"]
        numbers = inputs is not None and (
            np.issubdtype(inputs.dtype, np.floating) or inputs.dtype == np.uint8
        )
        if inputs is None or not numbers or "lengths" in arrays:
            raise UserError(
                f"task.{names[0]} needs images, or other inputs of floating point of one length"
            )
        if targets.ndim != 1:
            raise UserError(f"task.{names[0]} needs one target an example")
        if self.cutmix and inputs.ndim < 3:
            raise UserError("task.cutmix needs images, inputs of [height, width, ...]")
        if self.augment is not None:
            self.augment.check(inputs)


def _classes_of(logits: jax.Array) -> jax.Array:
    """Each logit's class."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _log_wrong(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log(1 - p) of the targets' probabilities, and its gradient, also where p rounds to 1."""
    is_target = _classes_of(logits) == targets[..., None]
    others = jnp.where(is_target, -jnp.inf, logits)
    return jax.nn.logsumexp(others, axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def _rank(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Places of the targets' logits, from 0; of equals the first class is first, as in argmax."""
    targets = targets[..., None]
    of_target = jnp.take_along_axis(logits, targets, axis=-1)
    earlier = _classes_of(logits) < targets
    return jnp.sum((logits > of_target) | ((logits == of_target) & earlier), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(_CrossEntropy):
    """Cross-entropy of the next token at every step; targets [B, T], logits [B, T, vocab]."""

    unit: str = "token"
    """What a token is, for the name of the metric: bits_per_character, bits_per_word."""

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        found = super().score(outputs, batch)
        # Which the loss carries, and bits must not.
        if self.label_smoothing or self.gamma or self.class_weights is not None:
            losses = optax.losses.softmax_cross_entropy_with_integer_labels
            found["nll"] = weighted(losses(outputs, batch["targets"]), batch["weights"])
        return found

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Adds bits a token, under the name of its unit, and perplexity."""
        nll = means.get("nll", means["loss"])
        perplexity = math.exp(min(nll, 700.0))
        return means | {f"bits_per_{self.unit}": nll / math.log(2), "perplexity": perplexity}

    def gather(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Nothing: a text is too long to be kept, and its vocabulary too large for a table."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryClassify(_Classes):
    """Cross-entropy of targets [B] in {0, 1} against one logit [B, 1] under a sigmoid, in nats."""

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        logits, targets = outputs[:, 0], batch["targets"]
        losses = optax.losses.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
        if self.gamma:
            log_wrong = jax.nn.log_sigmoid(jnp.where(targets == 1, -logits, logits))
            losses = jnp.exp(self.gamma * log_wrong) * losses
        hits = (logits > 0) == (targets == 1)
        return {
            "loss": weighted(losses, self.balanced(batch)),
            "accuracy": weighted(hits, batch["weights"]),
        }

    def gather(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        # The same two classes under a softmax; logits, for probabilities near 1 round together.
        found = confidences(jnp.concatenate([jnp.zeros_like(outputs), outputs], axis=-1), batch)
        return found | {"scores": outputs[:, 0]}

    def gathered(self, arrays: Arrays) -> dict[str, float]:
        area = metrics.auc(arrays["scores"], arrays["targets"], arrays["weights"])
        return {"auc": area} | super().gathered(arrays)

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Arrays) -> None:
        targets = arrays["targets"]
        if outputs.shape[1:] != (1,):
            raise UserError(
                f"BinaryClassify reads 1 logit, and the model gives {outputs.shape[1:]}"
            )
        if targets.ndim != 1 or not set(np.unique(targets)) <= {0, 1}:
            raise UserError("BinaryClassify needs targets of 0 and 1, one an example")
        self.check_classes(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regress(Task):
    """Mean squared error of targets [B, ...] against outputs of the same shape."""

    huber: Annotated[float, Gt(0)] | None = None
    """Minimise Huber's loss (1964) instead: half the square of errors up to this size, which grows
    linearly beyond it. None: the square."""

    def rows_apart(self) -> bool:
        return True

    def score(self, outputs: jax.Array, batch: Batch) -> Metrics:
        errors, weights = outputs - batch["targets"], batch["weights"]
        mse = weighted(jnp.square(errors), weights)
        loss = mse
        if self.huber is not None:
            loss = weighted(optax.losses.huber_loss(errors, delta=self.huber), weights)
        return {"loss": loss, "mse": mse, "mae": weighted(jnp.abs(errors), weights)}

    def gather(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """The sums of `metrics.r2`, one row a batch; the last axis of targets is outputs."""
        targets, weights = batch["targets"], batch["weights"]
        errors = outputs - targets
        if targets.ndim == weights.ndim:
            targets, errors = targets[..., None], errors[..., None]
        y, errors = (a.reshape(-1, a.shape[-1]) for a in (targets, errors))
        w = shared(weights, targets[..., 0]).reshape(-1, 1)
        about = y[:1]  # and not the mean, which the compiler may compute twice and differently
        return {
            "weight": jnp.sum(w)[None],
            "about": about,
            "first": jnp.sum(w * (y - about), axis=0, keepdims=True),
            "square": jnp.sum(w * jnp.square(y - about), axis=0, keepdims=True),
            "residual": jnp.sum(w * jnp.square(errors), axis=0, keepdims=True),
        }

    def gathered(self, arrays: Arrays) -> dict[str, float]:
        names = ("weight", "about", "first", "square", "residual")
        return {"r2": metrics.r2(*(arrays[name] for name in names))}

    def check(self, outputs: jax.ShapeDtypeStruct, arrays: Arrays) -> None:
        if outputs.shape[1:] != arrays["targets"].shape[1:]:
            raise UserError(
                f"the model gives outputs of {outputs.shape[1:]}, and targets are "
                f"{arrays['targets'].shape[1:]}"
            )
