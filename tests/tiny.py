"""Experiments that train in a second, for the tests."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research import checkpoint, record
from research.data.packed import pack
from research.data.splits import Examples, Streams, Windows
from research.experiment import Experiment
from research.models.lstm import LSTMConfig
from research.models.mlp import MLPConfig
from research.models.resnet import ResNetConfig
from research.models.transformer import TransformerConfig
from research.models.vit import ViTConfig
from research.optim import Optax, Optimizer
from research.setup import prepare
from research.tasks import Classify, NextToken, Regress
from research.train import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """Points of three clusters, with a validation split that does not divide any batch."""

    rows: int = 64
    bad: bool = False

    def load(self):
        rng = np.random.default_rng(0)
        labels = np.arange(self.rows + 21) % 3
        points = rng.normal(size=(len(labels), 5)) + 2 * np.eye(5)[labels]
        if self.bad:
            points[self.rows // 2] = np.nan
        rows = {"inputs": points.astype(np.float32), "targets": labels.astype(np.int32)}
        cut = self.rows
        return {
            "train": Examples({k: v[:cut] for k, v in rows.items()}),
            "validation": Examples({k: v[cut:] for k, v in rows.items()}),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Noise of 8x8 in [0, 1], brighter in a third of its own for each of three classes."""

    def load(self):
        rng = np.random.default_rng(0)
        labels = np.arange(64 + 21) % 3
        images = rng.normal(size=(len(labels), 8, 8, 1))
        images += 2 * np.eye(3)[labels].repeat([3, 3, 2], axis=1)[:, None, :, None]
        images = 1 / (1 + np.exp(-images))
        rows = {"inputs": images.astype(np.float32), "targets": labels.astype(np.int32)}
        parts = {"train": slice(64), "validation": slice(64, None)}
        return {name: Examples({k: v[p] for k, v in rows.items()}) for name, p in parts.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """A periodic text with noise, of 7 tokens."""

    stream: bool = False

    def load(self):
        rng = np.random.default_rng(0)
        tokens = (np.arange(700) % 5 + rng.integers(0, 3, 700)).astype(np.int32)
        kind = Streams if self.stream else Windows
        return {"train": kind(tokens[:600], 8), "validation": kind(tokens[600:], 8)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Rows of up to 8 tokens, of 3 classes."""

    def load(self):
        tokens = np.arange(85 * 8).reshape(85, 8).astype(np.int32) % 7
        lengths = np.arange(85, dtype=np.int32) % 8 + 1
        rows = {"inputs": tokens, "lengths": lengths, "targets": tokens[:, 0] % 3}
        return {name: Examples(rows) for name in ("train", "validation")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """The same in documents of 1 to 20 tokens, packed into rows of 8."""

    def load(self):
        ends = np.cumsum(np.random.default_rng(1).integers(1, 21, 60))
        found = {}
        for name, split in Words().load().items():
            offsets = np.concatenate([[0], ends[ends < len(split.tokens)], [len(split.tokens)]])
            found[name] = pack(split.tokens, offsets, 8)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A model with running statistics."""

    def make(self, rngs):
        return Norm(rngs)


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.head(self.norm(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """outputs = w * inputs: gradients by hand."""

    def make(self, rngs):
        return Scale()


class Scale(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.full((5,), 0.5))

    def __call__(self, x, rngs=None):
        return x * self.w[None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Inputs are targets."""

    def load(self):
        x = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
        split = Examples({"inputs": x, "targets": 2 * x})
        return {"train": split, "validation": split}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """Targets that are affine in the inputs."""

    def load(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(64, 5)).astype(np.float32)
        y = (x @ rng.normal(size=(5, 3)) + rng.normal(size=3)).astype(np.float32)
        split = Examples({"inputs": x, "targets": y})
        return {"train": split, "validation": split}


ADAMW = Optimizer(update=Optax("adamw", {"learning_rate": 0.01, "weight_decay": 0.1}))


def sgd(rate, **fields):
    return Optimizer(update=Optax("sgd", {"learning_rate": rate}), **fields)


def mlp(**fields):
    given = {
        "model": MLPConfig(features=5, sizes=(8, 3), dropout=0.3),
        "task": Classify(),
        "data": Points(),
        "optimizer": ADAMW,
        "batch_size": 16,
        "steps": 12,
        "log_every": 1,
    }
    return Experiment(**given | fields)


def lstm(**fields):
    model = LSTMConfig(vocab=7, outputs=7, width=8, layers=2, dropout=0.2)
    return mlp(**{"model": model, "task": NextToken(), "data": Words(stream=True)} | fields)


def transformer(**fields):
    model = TransformerConfig(
        vocab=7, context=8, layers=2, heads=2, width=8, scan=True, dropout=0.2
    )
    return mlp(**{"model": model, "task": NextToken(), "data": Words()} | fields)


def packed(**fields):
    return transformer(**{"data": Documents()} | fields)


def resnet(**fields):
    model = ResNetConfig(
        classes=3, channels=1, layers=(1, 1), width=4, stem="cifar", stochastic_depth=0.2
    )
    return mlp(**{"model": model, "data": Images()} | fields)


def vit(**fields):
    model = ViTConfig(
        image=(8, 8, 1),
        classes=3,
        patch=4,
        layers=2,
        heads=2,
        width=8,
        dropout=0.2,
        stochastic_depth=0.2,
    )
    return mlp(**{"model": model, "data": Images()} | fields)


def norm(**fields):
    return mlp(**{"model": NormConfig()} | fields)


def scale(**fields):
    given = {"model": ScaleConfig(), "task": Regress(), "data": Identity(), "steps": 3}
    return mlp(**given | fields)


def lines(**fields):
    """Least squares: convex, with the least loss 0."""
    model = MLPConfig(features=5, sizes=(3,))
    return mlp(**{"model": model, "task": Regress(), "data": Lines()} | fields)


ONE = jax.devices()[:1]


def final_state(experiment, workdir, devices=ONE):
    """Trains, and reads the last checkpoint back."""
    setup = prepare(experiment, devices)
    train(setup, workdir, quiet=True)
    _, state = checkpoint.read(workdir / "checkpoints", None, setup.abstract, setup.shardings)
    return jax.device_get(state)


def flags():
    """XLA's of this process but for its eight devices, for processes that have their own."""
    return " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f)


def rows(workdir):
    """metrics.jsonl without the times."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in record.read_metrics(workdir)]
