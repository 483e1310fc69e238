"""Residual networks. Shapes: B batch, H height, W width, C channels."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Interval
from flax import nnx

from research.models.stochastic_depth import StochasticDepth


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """ResNet (He et al. 2016), function for function that of torchvision: strides are in the 3x3
    convolution of a bottleneck ("v1.5"), and every padding is symmetric.

    The defaults are ResNet-18; `layers=(3, 4, 6, 3), block="bottleneck"` is ResNet-50.
    """

    classes: Annotated[int, Ge(2)]
    channels: Annotated[int, Ge(1)] = 3
    """Of the images."""
    layers: tuple[Annotated[int, Ge(1)], ...] = (2, 2, 2, 2)
    """Blocks of each stage. From stage to stage the width doubles and the image is halved."""
    block: Literal["basic", "bottleneck"] = "basic"
    """basic: two 3x3 convolutions; bottleneck: 1x1, 3x3, and a 1x1 to four times the width."""
    width: Annotated[int, Ge(1)] = 64
    """Of the stem and of the first stage's 3x3 convolutions."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """imagenet: 7x7 with stride 2, then 3x3 max pooling with stride 2; cifar: 3x3 alone, for small
    images."""
    stem_width: Annotated[int, Ge(1)] | None = None
    """Of the stem; None: width."""
    first_stride: Literal[1, 2] = 1
    """Of the first stage; 2 halves its images: a stem alone then sees small images whole."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Share of the old running statistics that each step keeps: 1 - PyTorch's. Running variances
    are of the batch as it is, n in the denominator where PyTorch has n - 1."""
    stochastic_depth: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Rate at which the last block is left out; it rises linearly over the blocks (Huang et al.
    2016)."""

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"layers must be one or more stages of >= 1 blocks, not {self.layers}")

    def make(self, rngs: nnx.Rngs) -> "ResNet":
        return ResNet(self, rngs)


RESNET18 = ResNetConfig(classes=1000)
"""11,689,512 parameters."""
RESNET50 = ResNetConfig(classes=1000, layers=(3, 4, 6, 3), block="bottleneck")
"""25,557,032 parameters."""


def _conv(inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,  # "SAME" would pad one side only where the stride is 2
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        rngs=rngs,
    )


class Block(nnx.Module):
    """A residual branch, and the shortcut around it, projected where the shapes differ."""

    def __init__(
        self, config: ResNetConfig, inputs: int, width: int, stride: int, rngs: nnx.Rngs
    ) -> None:
        def norm(outputs: int, scale: float = 1.0) -> nnx.BatchNorm:
            init = nnx.initializers.constant(scale)
            return nnx.BatchNorm(outputs, momentum=config.momentum, scale_init=init, rngs=rngs)

        outputs = width * _expansion(config)
        if config.block == "basic":
            sizes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        else:
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.convs = nnx.List(_conv(*size, rngs) for size in sizes)
        # The last norm starts at zero, and with it every block as the identity (Goyal et al. 2017).
        last = len(sizes) - 1
        self.norms = nnx.List(norm(n, float(i < last)) for i, (_, n, _, _) in enumerate(sizes))
        projected = stride > 1 or inputs != outputs
        self.shortcut = _conv(inputs, outputs, 1, stride, rngs) if projected else None
        self.shortcut_norm = norm(outputs) if projected else None
        self.stochastic_depth = StochasticDepth(config.stochastic_depth)

    def __call__(self, x_BHWC: jax.Array, depth: float, rngs: nnx.Rngs | None = None) -> jax.Array:
        y = x_BHWC
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(jax.nn.relu(y) if i else y))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x_BHWC = self.shortcut_norm(self.shortcut(x_BHWC))
        return jax.nn.relu(x_BHWC + self.stochastic_depth(y, depth, rngs))


class ResNet(nnx.Module):
    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs) -> None:
        size, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        channels = config.stem_width or config.width
        self.stem = _conv(config.channels, channels, size, stride, rngs)
        self.stem_norm = nnx.BatchNorm(channels, momentum=config.momentum, rngs=rngs)
        self.pooled = config.stem == "imagenet"
        blocks = []
        for stage, count in enumerate(config.layers):
            width = config.width << stage
            for n in range(count):
                stride = 1 if n else (2 if stage else config.first_stride)
                blocks.append(Block(config, channels, width, stride, rngs))
                channels = width * _expansion(config)
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(channels, config.classes, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, C] -> logits [B, classes]."""
        x = jax.nn.relu(self.stem_norm(self.stem(x_BHWC)))
        if self.pooled:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for n, block in enumerate(self.blocks, 1):
            x = block(x, n / len(self.blocks), rngs)
        return self.head(jnp.mean(x, axis=(1, 2)))


def _expansion(config: ResNetConfig) -> int:
    return 4 if config.block == "bottleneck" else 1
