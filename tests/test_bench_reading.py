"""What the making of batches costs: what is slow is seen to be, and both loaders read the same."""

import dataclasses
import time

import numpy as np
import pytest
import tiny
from made import beasts

from research import UserError
from research.augment import Augment
from research.bench import reading
from research.data.splits import Examples
from research.data.tfds import TFDS
from research.tasks import Classify


@dataclasses.dataclass(frozen=True)
class Slow(Examples):
    def batch(self, *args):
        time.sleep(0.003)
        return super().batch(*args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    slow: bool

    def load(self):
        found = tiny.mlp().data.load()
        kind = Slow if self.slow else Examples
        return {name: kind(split.rows) for name, split in found.items()}


def test_waiting_is_seen_where_batches_are_slow():
    slow, quick = (
        reading.measure(tiny.mlp(data=Source(slow=slow)), seconds=0.6, devices=tiny.ONE)
        for slow in (True, False)
    )
    assert slow.waiting > 0.5 > quick.waiting
    assert slow.supply < 16 / 0.003
    assert quick.supply > 2 * slow.supply
    for found in (slow, quick):
        assert found.error > 0
        # A batch's bytes are as many a second as its examples are.
        batch = tiny.mlp().data.load()["train"].batch(0, 16, 0)
        size = sum(array.nbytes for array in batch.values()) / 16
        assert found.megabytes * 1e6 == pytest.approx(found.supply * size)


def test_waiting_is_seen_where_a_block_lasts_many_rounds():
    wide = dataclasses.replace(tiny.mlp().model, sizes=(2000, 2000, 3))
    slow, quick = (
        reading.measure(tiny.mlp(model=wide, data=Source(slow=slow)), 0.3, 0.01, tiny.ONE)
        for slow in (True, False)
    )
    assert slow.waiting > quick.waiting + 0.1
    assert slow.supply < 16 / 0.003


@dataclasses.dataclass(frozen=True)
class Threaded(Examples):
    threads = 2

    def batch(self, *args):
        time.sleep(0.05)
        return super().batch(*args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ahead:
    def load(self):
        return {name: Threaded(split.rows) for name, split in tiny.mlp().data.load().items()}


def test_what_was_made_ahead_is_no_supply(monkeypatch):
    steps = reading._steps

    def then_wait(*args):
        found = steps(*args)
        time.sleep(0.3)
        return found

    # 5 batches a round: with 4 that were there before, the fifth alone would have to be made.
    monkeypatch.setattr(reading, "_steps", then_wait)
    found = reading.measure(tiny.mlp(data=Ahead()), 1e-6, 1e-6, tiny.ONE)
    assert found.supply < 1.5 * 2 * 16 / 0.05
    assert found.waiting > 0.5


def test_time_is_needed():
    with pytest.raises(UserError, match="input needs time, not 0 seconds"):
        reading.measure(tiny.mlp(), seconds=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return TFDS(name="beasts", data_dir=str(beasts(tmp_path_factory.mktemp("beasts"))))


def test_pytorchs_loader_reads_the_same_images(images):
    torch = pytest.importorskip("torch")
    from research.bench import torch_data

    feed = torch_data.endless(images, 8, 0, crop=0, flip=False)
    theirs = [next(feed) for _ in range(5)]
    found = torch.cat([x for x, _ in theirs]).permute(0, 2, 3, 1).numpy()
    ours = images.load()["train"].rows
    assert {x.tobytes() for x in np.uint8(np.round(255 * found))} == {
        x.tobytes() for x in ours["inputs"]
    }
    labels = {x.tobytes(): y for x, y in zip(ours["inputs"], ours["targets"], strict=True)}
    for x, y in theirs:
        for image, label in zip(np.uint8(np.round(255 * x.numpy())), y.numpy(), strict=True):
            assert labels[image.transpose(1, 2, 0).tobytes()] == label


def test_pytorchs_loader_shifts_and_flips(images):
    pytest.importorskip("torch")
    from research.bench import torch_data

    feed = torch_data.endless(images, 8, 0, crop=1, flip=True)
    seen = {x.numpy().tobytes() for _ in range(20) for x in next(feed)[0]}
    assert len(seen) > 80  # of 40 images


def test_loaders_are_timed_side_by_side(images):
    pytest.importorskip("torch")
    task = Classify(augment=Augment(crop=1, flip=True))
    found = reading.loaders(
        tiny.resnet(task=task, data=images, batch_size=8), 1, 2, workers=0, rest=0
    )
    assert min(dataclasses.astuple(found)) > 0
    with pytest.raises(UserError, match=r"images that task.augment changes"):
        reading.loaders(tiny.resnet(data=images))
