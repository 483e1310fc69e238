"""Models and setups as their configs make them, for the tests: shapes, parameters, data."""

import dataclasses
import functools
import importlib
import math
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from research import UserError, setup
from research.data import prepare
from research.data.outline import Outline
from research.data.splits import Examples
from research.data.tfds import TFDS
from research.models.recurrent import RecurrentConfig
from research.models.resnet import ResNetConfig
from research.models.transformer import TransformerConfig
from research.parallel import Parallel

LARGE = 20_000_000
"""Parameters. A config of more is planned for larger machines, and no data is here for it."""
SMALL = {
    TransformerConfig: {
        "vocab": 96,
        "context": 16,
        "layers": 2,
        "heads": 2,
        "width": 32,
        "feed_forward": 64,
    },
    RecurrentConfig: {"vocab": 96, "outputs": 96, "width": 32, "features": 16},
    ResNetConfig: {"layers": (1, 1), "width": 4},
}
"""What makes their models small, by class: what layers are of stays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """Another source's splits of noise: so many tokens by chance, or classes by turns."""

    data: Outline
    classes: int

    def load(self):
        rng = np.random.default_rng(0)

        def drawn(split):
            if not isinstance(split, Examples):
                tokens = rng.integers(self.classes, size=len(split.tokens))
                return dataclasses.replace(split, tokens=tokens.astype(np.int32))
            inputs, targets = split.rows["inputs"], split.rows["targets"]
            found = {"inputs": rng.integers(256, size=inputs.shape).astype(np.uint8)}
            found["targets"] = np.arange(targets.size, dtype=np.int32) % self.classes
            return Examples(found)

        return {name: drawn(split) for name, split in self.data.load().items()}


def large(experiment):
    return sum(p.size for p in jax.tree.leaves(abstract(experiment.model))) > LARGE


def small(experiment, devices):
    """A large experiment with a small model of the same kind, on noise, in batches of 8 rows a
    part. It keeps a mesh that the devices have."""
    kind = next(cls for cls in SMALL if isinstance(experiment.model, cls))
    model = dataclasses.replace(experiment.model, **SMALL[kind])
    rows, data = 8 * experiment.accumulate, experiment.data
    if isinstance(data, TFDS):
        # Sides that the shifts of `Augment` leave something of.
        data, classes = dataclasses.replace(data, size=(32, 32)), 10
    else:
        length = min(data.length, getattr(model, "context", data.length))
        data, classes = dataclasses.replace(data, length=length), model.vocab
    axes = math.prod(size or 1 for size in experiment.parallel.axes.values())
    spread = Parallel() if len(devices) % axes else experiment.parallel
    return dataclasses.replace(
        experiment,
        model=model,
        data=Noise(data=Outline(data=data, rows=rows), classes=classes),
        batch_size=rows,
        parallel=spread,
    )


def prepared(experiment, devices):
    """An experiment made ready, a large one small, on the first images of a large set; skips the
    test where real data is not there."""
    if large(experiment):
        return setup.prepare(small(experiment, devices), devices)
    if isinstance(experiment.data, TFDS):
        few = dataclasses.replace(experiment.data, train="train[:500]", test="test[:500]")
        experiment = dataclasses.replace(experiment, data=few)
    try:
        return setup.prepare(experiment, devices)
    except UserError as error:
        data = os.environ["ERGON_DATA"]
        if str(error).startswith("no data at") and not pathlib.Path(data).exists():
            pytest.skip(f"there is no data at {data}")
        raise


@functools.cache
def abstract(config):
    """The module as it is made, with shapes for arrays."""
    return nnx.eval_shape(lambda: config.make(nnx.Rngs(params=jax.random.key(0))))


@functools.cache
def initial(config):
    return nnx.to_pure_dict(nnx.state(config.make(nnx.Rngs(params=jax.random.key(0)))))


def scrambled(config):
    """Normal numbers for every parameter, biases and scales too."""
    return normal(nnx.to_pure_dict(nnx.state(abstract(config))))


def normal(shapes, scale=0.5):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, scale, p.shape)), shapes)


def images(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_kept_alone(sums, keep):
    """That residual branches, of which the nth adds 10^n / keep[n] where it is kept, are each kept
    with its own probability, and independently. sums [examples]: what they add up to."""
    rest, kept = np.array(sums, np.float64), np.empty((len(sums), len(keep)), bool)
    for n in reversed(range(len(keep))):
        kept[:, n] = rest > 0.9 * 10**n / keep[n]
        rest -= kept[:, n] * 10**n / keep[n]
    np.testing.assert_allclose(rest, 0, atol=1e-2)
    np.testing.assert_allclose(kept.mean(0), keep, atol=0.03)
    assert np.all(np.abs(np.corrcoef(kept.T) - np.eye(len(keep))) < 0.06)


BEASTS = {
    name: np.random.default_rng(n).integers(0, 256, size=(n, 6, 8, 3)).astype(np.uint8)
    for name, n in (("train", 40), ("test", 20))
}


def beasts(root):
    """A folder of TFDS data sets, of which one is: beasts, `BEASTS` in three classes by turns, in
    the order of the classes and in several files."""
    for split, found in BEASTS.items():
        for i, image in enumerate(found):
            where = root / "images" / split / ("ape", "bee", "cat")[i % 3]
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(where / f"{i:03}.png")
    options = prepare.Options(
        source=root / "images", kind="images", name="beasts", out=root / "tfds", shard_mb=0.002
    )
    prepare.prepare(options)
    return root / "tfds"


BUILDER = """
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(8, 8, 1))
        label = tfds.features.ClassLabel(num_classes=3)
        features = {"image": image, "other": image, "label": label, "kind": label}
        features |= {"x": tfds.features.Tensor(shape=(2,), dtype=np.float32)}
        features |= {"y": tfds.features.Scalar(dtype=np.float32)}
        features |= {"text": tfds.features.Text(), "title": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(SEED), "test": self._generate_examples(1)}

    def _generate_examples(self, seed):
        rng = np.random.default_rng(seed)
        for i in range(48):
            row = {"label": i % 3, "kind": i // 2 % 3, "x": np.float32([i % 3, -1])}
            row["y"] = float("nan" if i == 5 else i)
            row["text"] = " ".join(rng.choice(["to", "be", "or", "not"], 5))
            row["title"] = " ".join(rng.choice(["la", "li", "lo"], 5))
            for name in ("image", "other"):
                png = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(png, "png")
                png.seek(0)
                row[name] = png
            yield i, row
"""


def unprepared(root, name, seed=0):
    """Gives TFDS the code of a data set: two images, two labels, two texts, x, whose first number
    is the label, and y, which is no number in row 5."""
    package = root / f"code_{name}" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / f"{name}_dataset_builder.py").write_text(BUILDER.replace("SEED", str(seed)))
    sys.path.insert(0, str(package.parent))
    importlib.import_module(f"{name}.{name}_dataset_builder")


def data_set(root, name, features, splits):
    """Writes a TFDS data set of ArrayRecord, its rows in their order.

    features: as TFDS names them; splits: rows by split.
    """
    import tensorflow_datasets as tfds

    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name,
            version=tfds.core.Version("1.0.0"),
            data_dir=str(root / name / "1.0.0"),
            module_name=__name__,
        ),
        features=tfds.features.FeaturesDict(features),
    )
    (root / name / "1.0.0").mkdir(parents=True)
    writer = tfds.core.SequentialWriter(info, 1000, file_format="array_record")
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
