"""Real data that ships with the packages Ergon needs anyway: nothing is downloaded."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import numpy as np
from annotated_types import Ge

from research.data.splits import Examples, Streams, Windows


def _three_ways(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of train (70%), validation (10%) and test (20%), stratified by label."""
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels
    )
    train, validation = train_test_split(
        rest, test_size=0.125, random_state=seed, stratify=labels[rest]
    )
    return {"train": train, "validation": validation, "test": test}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's handwritten digits: 1,797 images of 8x8, ten classes (UCI ML repository).

    inputs: [batch, 8 * upscale, 8 * upscale, 1] in [0, 1]; targets: [batch] int32.
    """

    upscale: Annotated[int, Ge(1)] = 1
    """Each pixel becomes a square of this many: 4 gives the 32x32 that LeNet-5 reads."""
    split: Annotated[int, Ge(0)] = 0
    """Seed of the division into splits."""
    classes: tuple[int, ...] = tuple(range(10))
    """The digits that are there; targets are their places in this list."""
    train: Annotated[int, Ge(1)] | None = None
    """Training images kept, of the first of the split; None: all."""

    def __post_init__(self) -> None:
        if len(set(self.classes)) < 2 or not set(self.classes) <= set(range(10)):
            raise ValueError(f"classes must be two or more of 0 to 9, not {self.classes}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes has a digit twice: {self.classes}")

    def load(self) -> Mapping[str, Examples]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        there = np.isin(digits.target, self.classes)
        images = (digits.images[there] / 16).astype(np.float32)
        images = images.repeat(self.upscale, axis=1).repeat(self.upscale, axis=2)[..., None]
        place = {digit: i for i, digit in enumerate(self.classes)}
        labels = np.array([place[digit] for digit in digits.target[there]], np.int32)
        rows = _three_ways(labels, self.split)
        rows["train"] = rows["train"][: self.train]
        return {
            name: Examples({"inputs": images[index], "targets": labels[index]})
            for name, index in rows.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreastCancer:
    """scikit-learn's breast-cancer table: 569 rows of 30 numbers, benign or malignant.

    inputs: [batch, 30], standardised with the training rows' mean and deviation; targets: [batch]
    int32, 1 = benign. (Wolberg, Street and Mangasarian 1995, UCI ML repository.)
    """

    split: Annotated[int, Ge(0)] = 0
    """Seed of the division into splits."""

    def load(self) -> Mapping[str, Examples]:
        from sklearn.datasets import load_breast_cancer

        table = load_breast_cancer()
        labels = table.target.astype(np.int32)
        rows = _three_ways(labels, self.split)
        train = table.data[rows["train"]]
        inputs = ((table.data - train.mean(0)) / train.std(0)).astype(np.float32)
        return {
            name: Examples({"inputs": inputs[index], "targets": labels[index]})
            for name, index in rows.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonReference:
    """The Python language reference, by characters, as `pydoc_data.topics` ships it.

    About 465,000 characters on Python 3.11; the text differs between Python versions, so a run
    records its fingerprint. The first 90% train, the rest validate. inputs, targets: [batch,
    length] int32, a character's number in `alphabet()`.
    """

    length: Annotated[int, Ge(1)]
    """Characters predicted in a row of a batch."""
    stream: bool = False
    """True: rows continue from batch to batch, for models that carry their state."""

    @staticmethod
    def text() -> str:
        from pydoc_data.topics import topics

        return "".join(topics[name] for name in sorted(topics))

    @classmethod
    def alphabet(cls) -> str:
        return "".join(sorted(set(cls.text())))

    @classmethod
    def tokens(cls) -> dict[str, np.ndarray]:
        number = {character: i for i, character in enumerate(cls.alphabet())}
        tokens = np.array([number[c] for c in cls.text()], np.int32)
        cut = len(tokens) * 9 // 10
        return {"train": tokens[:cut], "validation": tokens[cut:]}

    def load(self) -> Mapping[str, Windows | Streams]:
        kind = Streams if self.stream else Windows
        return {name: kind(tokens, self.length) for name, tokens in self.tokens().items()}
