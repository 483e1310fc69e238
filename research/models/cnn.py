"""Convolutional networks for small images. Shapes: B batch, H height, W width, C channels."""

import dataclasses
import itertools
from typing import Annotated, Literal

import jax
from annotated_types import Ge, Interval
from flax import nnx

Image = tuple[int, int, int]
"""Height, width, channels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeNetConfig:
    """LeNet-5 (LeCun et al. 1998) as it is taught now: ReLU, max pooling, full connections.

    32x32x1 has 61,706 parameters; for 28x28 set `padding="SAME"`, which pads the first
    convolution only and gives the same network.
    """

    image: Image = (32, 32, 1)
    classes: Annotated[int, Ge(2)] = 10
    padding: Literal["VALID", "SAME"] = "VALID"
    """Of the first convolution."""

    def __post_init__(self) -> None:
        check_image(self.image)
        edge = 0 if self.padding == "SAME" else 4
        if min(((n - edge) // 2 - 4) // 2 for n in self.image[:2]) < 1:
            raise ValueError(f"image {self.image} is too small for LeNet-5: give it 32x32")

    def make(self, rngs: nnx.Rngs) -> "LeNet":
        return LeNet(self, rngs)


class LeNet(nnx.Module):
    def __init__(self, config: LeNetConfig, rngs: nnx.Rngs) -> None:
        height, width, channels = config.image
        edge = 0 if config.padding == "SAME" else 4
        h, w = (((n - edge) // 2 - 4) // 2 for n in (height, width))
        self.conv1 = nnx.Conv(channels, 6, (5, 5), padding=config.padding, rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.dense1 = nnx.Linear(h * w * 16, 120, rngs=rngs)
        self.dense2 = nnx.Linear(120, 84, rngs=rngs)
        self.head = nnx.Linear(84, config.classes, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, C] -> logits [B, classes]."""
        x = _pool(jax.nn.relu(self.conv1(x_BHWC)))
        x = _pool(jax.nn.relu(self.conv2(x)))
        x = x.reshape(x.shape[0], -1)
        x = jax.nn.relu(self.dense1(x))
        x = jax.nn.relu(self.dense2(x))
        return self.head(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """3x3 convolutions, each followed by 2x2 max pooling, then one dense layer and the classes."""

    image: Image
    classes: Annotated[int, Ge(2)]
    channels: tuple[int, ...] = (32, 64)
    dense: Annotated[int, Ge(1)] = 128
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Before the dense layer and before the classes."""

    def __post_init__(self) -> None:
        check_image(self.image)
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must be one or more widths >= 1, not {self.channels}")
        if min(self.image[:2]) >> len(self.channels) < 1:
            raise ValueError(
                f"image {self.image} cannot be halved {len(self.channels)} times: "
                "use fewer channels or a larger image"
            )

    def make(self, rngs: nnx.Rngs) -> "CNN":
        return CNN(self, rngs)


class CNN(nnx.Module):
    def __init__(self, config: CNNConfig, rngs: nnx.Rngs) -> None:
        height, width, channels = config.image
        halvings = len(config.channels)
        widths = (channels, *config.channels)
        self.convs = nnx.List(
            nnx.Conv(m, n, (3, 3), kernel_init=nnx.initializers.he_normal(), rngs=rngs)
            for m, n in itertools.pairwise(widths)
        )
        flat = (height >> halvings) * (width >> halvings) * widths[-1]
        init = nnx.initializers.he_normal()
        self.dense = nnx.Linear(flat, config.dense, kernel_init=init, rngs=rngs)
        self.head = nnx.Linear(config.dense, config.classes, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x_BHWC: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, C] -> logits [B, classes]."""
        x = x_BHWC
        for conv in self.convs:
            x = _pool(jax.nn.relu(conv(x)))
        x = self.dropout(x.reshape(x.shape[0], -1), rngs=rngs)
        x = self.dropout(jax.nn.relu(self.dense(x)), rngs=rngs)
        return self.head(x)


def _pool(x_BHWC: jax.Array) -> jax.Array:
    return nnx.max_pool(x_BHWC, (2, 2), strides=(2, 2))


def check_image(image: Image) -> None:
    if min(image) < 1:
        raise ValueError(f"image must be (height, width, channels), each >= 1, not {image}")
