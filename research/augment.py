"""Images changed at random, on the device, inside the jitted step.

Shapes: B batch, H height, W width, C channels. Values are in [0, 1].
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Interval

from research import UserError

OPERATIONS = (
    "identity brightness contrast colour posterize solarize autocontrast "
    "rotate shear_x shear_y translate_x translate_y"
).split()
"""Of RandAugment's, those that need no histogram."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """What training images go through, in this order; every image draws its own."""

    crop: Annotated[int, Ge(0)] = 0
    """Shift by up to so many pixels either way; what comes in is mirrored at the edge."""
    flip: bool = False
    """Mirror left and right, one image in two."""
    operations: Annotated[int, Ge(0)] = 0
    """RandAugment's N (Cubuk et al. 2020): operations, drawn with replacement, in a row."""
    magnitude: Annotated[float, Interval(ge=0, le=1)] = 0.3
    """RandAugment's M, as a share of the greatest: their 9 of 30 is 0.3."""
    cutout: Annotated[int, Ge(0)] = 0
    """Side of a square that is set to 0, its centre anywhere (DeVries and Taylor 2017)."""

    def check(self, inputs: np.ndarray) -> None:
        """Raises UserError where a split's inputs are no images that this can change."""
        if inputs.ndim != 4:
            raise UserError("task.augment needs images, inputs of [height, width, channels]")
        side = min(inputs.shape[1:3])
        if self.crop >= side:
            raise UserError(f"task.augment.crop must be < {side}, the images' side")
        if self.cutout > side:
            raise UserError(f"task.augment.cutout must be <= {side}, the images' side")
        if self.operations and inputs.dtype != np.uint8 and (inputs.min() < 0 or inputs.max() > 1):
            raise UserError(
                f"task.augment.operations needs images in [0, 1], not in "
                f"[{inputs.min():g}, {inputs.max():g}]"
            )

    def __call__(self, x_BHWC: jax.Array, key: jax.Array) -> jax.Array:
        place, change, cut = jax.random.split(key, 3)
        if self.crop or self.flip:
            x_BHWC = _moved(x_BHWC, self.crop, self.flip, place)
        for k in jax.random.split(change, self.operations) if self.operations else ():
            x_BHWC = _operated(x_BHWC, self.magnitude, k)
        return _cut(x_BHWC, self.cutout, cut) if self.cutout else x_BHWC


def _moved(x_BHWC: jax.Array, crop: int, flip: bool, key: jax.Array) -> jax.Array:
    """Shifts and mirrors by choosing rows and columns: one gather."""
    batch, height, width, _ = x_BHWC.shape
    vertical, horizontal, mirrored = jax.random.split(key, 3)

    def places(key: jax.Array, length: int) -> jax.Array:
        shift_B1 = jax.random.randint(key, (batch, 1), -crop, crop + 1)
        at = jnp.abs(shift_B1 + jnp.arange(length)[None])
        return length - 1 - jnp.abs(length - 1 - at)

    rows_BH, columns_BW = places(vertical, height), places(horizontal, width)
    if flip:
        turn_B1 = jax.random.bernoulli(mirrored, shape=(batch, 1))
        columns_BW = jnp.where(turn_B1, columns_BW[:, ::-1], columns_BW)
    return _at(x_BHWC, rows_BH[:, :, None], columns_BW[:, None, :])


def _at(x_BHWC: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Pixels at rows and columns, which broadcast to [B, H, W] and lie inside."""
    batch = jnp.arange(x_BHWC.shape[0])[:, None, None]
    return x_BHWC.at[batch, rows, columns].get(mode="promise_in_bounds")


def _cut(x_BHWC: jax.Array, side: int, key: jax.Array) -> jax.Array:
    def inside(key: jax.Array, length: int) -> jax.Array:
        start_B1 = jax.random.randint(key, (x_BHWC.shape[0], 1), 0, length) - side // 2
        at = jnp.arange(length)[None]
        return (at >= start_B1) & (at < start_B1 + side)

    vertical, horizontal = jax.random.split(key)
    rows_BH, columns_BW = inside(vertical, x_BHWC.shape[1]), inside(horizontal, x_BHWC.shape[2])
    hole_BHW1 = (rows_BH[:, :, None] & columns_BW[:, None, :])[..., None]
    return jnp.where(hole_BHW1, 0, x_BHWC)


def _operated(x_BHWC: jax.Array, magnitude: float, key: jax.Array) -> jax.Array:
    choose, turn = jax.random.split(key)
    chosen_B = jax.random.randint(choose, x_BHWC.shape[:1], 0, len(OPERATIONS))
    sign_B = jnp.where(jax.random.bernoulli(turn, shape=x_BHWC.shape[:1]), 1.0, -1.0)
    return operated(x_BHWC, chosen_B, magnitude * sign_B)


def operated(x_BHWC: jax.Array, chosen_B: jax.Array, amount_B: jax.Array) -> jax.Array:
    """One of `OPERATIONS` on each image, by its number, to an amount in [-1, 1].

    The greatest are RandAugment's: 30 degrees, shears of 0.3, shifts of a third, factors of 1 +-
    0.9, 4 bits, and every pixel inverted.
    """

    def of(name: str) -> jax.Array:
        return jnp.where(chosen_B == OPERATIONS.index(name), amount_B, 0.0)[:, None, None]

    height, width = x_BHWC.shape[1:3]
    y_1H1 = (jnp.arange(height) - (height - 1) / 2)[None, :, None]
    x_11W = (jnp.arange(width) - (width - 1) / 2)[None, None, :]
    angle = of("rotate") * math.pi / 6
    rows = jnp.cos(angle) * y_1H1 + (jnp.sin(angle) + 0.3 * of("shear_y")) * x_11W
    columns = jnp.cos(angle) * x_11W + (0.3 * of("shear_x") - jnp.sin(angle)) * y_1H1
    rows = jnp.round(rows + of("translate_y") * height / 3 + (height - 1) / 2).astype(jnp.int32)
    columns = columns + of("translate_x") * width / 3 + (width - 1) / 2
    columns = jnp.round(columns).astype(jnp.int32)
    there = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    inside = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    moved_BHWC = jnp.where(there[..., None], _at(x_BHWC, *inside), 0)

    axes = tuple(range(1, x_BHWC.ndim))
    chosen_B111, amount_B111 = chosen_B.reshape(-1, 1, 1, 1), amount_B.reshape(-1, 1, 1, 1)
    factor = 1 + 0.9 * amount_B111
    grey = jnp.mean(x_BHWC, axis=-1, keepdims=True)
    mean = jnp.mean(x_BHWC, axis=axes, keepdims=True)
    low = jnp.min(x_BHWC, axis=axes, keepdims=True)
    high = jnp.max(x_BHWC, axis=axes, keepdims=True)
    step = jnp.exp2(jnp.round(4 * jnp.abs(amount_B111)))
    made = {
        "identity": x_BHWC,
        "brightness": x_BHWC * factor,
        "contrast": mean + factor * (x_BHWC - mean),
        "colour": grey + factor * (x_BHWC - grey),
        "posterize": jnp.floor(jnp.round(255 * x_BHWC) / step) * step / 255,
        "solarize": jnp.where(x_BHWC <= 1 - jnp.abs(amount_B111), x_BHWC, 1 - x_BHWC),
        "autocontrast": (x_BHWC - low) / jnp.maximum(high - low, 1 / 255),
    }
    chosen = [
        jnp.broadcast_to(chosen_B111 == OPERATIONS.index(name), x_BHWC.shape) for name in made
    ]
    return jnp.clip(jnp.select(chosen, list(made.values()), moved_BHWC), 0, 1)
