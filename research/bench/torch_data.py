"""A plain PyTorch DataLoader over the images of a TFDS directory."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from research.data.tfds import TFDS


class Images(Dataset):
    """Decodes by Pillow; shifts, mirrored at the edges, and flips, as `research.augment` does."""

    def __init__(self, source: Any, image: str, label: str, crop: int, flip: bool) -> None:
        self.source, self.image, self.label = source, image, label
        self.crop, self.flip = crop, flip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        row = self.source[i]
        pixels = np.asarray(Image.open(io.BytesIO(row[self.image])).convert("RGB"))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        height, width = image.shape[1:]
        if self.crop:
            image = torch.nn.functional.pad(image, (self.crop,) * 4, mode="reflect")
            y, x = torch.randint(0, 2 * self.crop + 1, (2,)).tolist()
            image = image[:, y : y + height, x : x + width]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, int(row[self.label])


def endless(
    data: TFDS, batch_size: int, workers: int, crop: int, flip: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches, epoch after epoch, made by `workers` processes that stay."""
    import tensorflow_datasets as tfds

    from research.data import files

    image, label = data.inputs or "image", data.targets or "label"
    source = tfds.data_source(
        data.name,
        data_dir=files.find(data.data_dir),
        split=data.train,
        decoders={image: tfds.decode.SkipDecoding()},
    )
    loader: Any = DataLoader(
        Images(source, image, label, crop, flip),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader
