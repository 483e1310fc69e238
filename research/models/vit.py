"""Vision Transformer. Shapes: B batch, H height, W width, C channels, T patches, D model width."""

import dataclasses
from typing import Annotated, Literal

import jax
from annotated_types import Ge, Gt
from flax import nnx

from research.models.cnn import Image, check_image
from research.models.encoder import Classifier, ClassifierConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ClassifierConfig):
    """ViT (Dosovitskiy et al. 2021): an encoder of an image's patches, row by row.

    The function is torchvision's; the initial weights are GPT-2's.
    """

    image: Image
    patch: Annotated[int, Ge(1)]
    """Height and width of a patch."""
    pooling: Literal["mean", "cls", "attention"] = "cls"
    epsilon: Annotated[float, Gt(0)] = 1e-6
    mlp: Literal["gelu", "gelu_erf", "swiglu"] = "gelu_erf"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image(self.image)
        if any(n % max(self.patch, 1) for n in self.image[:2]):
            raise ValueError(f"image {self.image} does not divide into patches of {self.patch}")

    def make(self, rngs: nnx.Rngs) -> "ViT":
        return ViT(self, rngs)


VIT_S16 = ViTConfig(image=(224, 224, 3), classes=1000, patch=16, layers=12, heads=6, width=384)
"""22,050,664 parameters."""
VIT_B16 = dataclasses.replace(VIT_S16, heads=12, width=768)
"""86,567,656 parameters."""
VIT_TINY = ViTConfig(image=(32, 32, 3), classes=10, patch=4, layers=6, heads=3, width=192)
"""For images of 32x32."""


class ViT(Classifier):
    def __init__(self, config: ViTConfig, rngs: nnx.Rngs) -> None:
        height, width, channels = config.image
        patch = (config.patch, config.patch)
        self.patches = nnx.Conv(
            channels, config.width, patch, strides=patch, padding="VALID", rngs=rngs
        )
        super().__init__(config, (height // config.patch) * (width // config.patch), rngs)

    def __call__(self, x_BHWC: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, C] -> logits [B, classes]."""
        x = self.patches(x_BHWC)
        return self._classify(x.reshape(x.shape[0], -1, x.shape[-1]), None, rngs)
