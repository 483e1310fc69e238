"""Images changed on the device, against loops over images and against Pillow."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from research import UserError, augment, compute, parallel
from research.augment import OPERATIONS, Augment
from research.setup import prepare
from research.tasks import Classify

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, size=(200, 7, 9, 3)).astype(np.uint8)
IMAGES = jnp.float32(BYTES / 255)
KEY = jax.random.key(0)


def shifts(image, crop):
    """Every result of a crop: (dy, dx, mirrored) -> the image."""
    padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="reflect")
    places = range(2 * crop + 1)
    found = {}
    for dy, dx in itertools.product(places, places):
        window = padded[dy : dy + image.shape[0], dx : dx + image.shape[1]]
        found[dy, dx, False], found[dy, dx, True] = window, window[:, ::-1]
    return found


@pytest.mark.parametrize(("crop", "flip"), [(2, True), (3, False), (0, True)])
def test_crop_and_flip_draw_every_place_for_every_image(crop, flip):
    out = np.asarray(Augment(crop=crop, flip=flip)(IMAGES, KEY))
    drawn = []
    for image, made in zip(np.asarray(IMAGES), out, strict=True):
        match = [k for k, v in shifts(image, crop).items() if np.array_equal(v, made)]
        assert len(match) == 1
        drawn += match
    rows, columns, mirrored = map(set, zip(*drawn, strict=True))
    assert rows == columns == set(range(2 * crop + 1))
    assert mirrored == ({False, True} if flip else {False})
    if crop:  # each by itself
        assert len(set(drawn)) > 2 * crop + 1


def test_cutout_is_one_square_whose_centre_lies_anywhere():
    out = np.asarray(Augment(cutout=4)(IMAGES + 1, KEY))
    areas = set()
    for image, made in zip(np.asarray(IMAGES + 1), out, strict=True):
        hole = (made == 0).all(-1)
        assert np.array_equal(made[~hole], image[~hole])
        rows, columns = hole.any(1), hole.any(0)
        assert np.array_equal(hole, rows[:, None] & columns[None])
        assert 2 <= rows.sum() <= 4  # cut by the edge
        assert 2 <= columns.sum() <= 4
        areas.add((rows.tobytes(), columns.tobytes()))
    assert len(areas) > 40  # of 7 x 9


def operate(name, amount, images=IMAGES):
    n = len(images)
    return np.asarray(
        augment.operated(
            images, jnp.full(n, OPERATIONS.index(name)), jnp.full(n, amount, jnp.float32)
        )
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_amount_of_nothing_changes_nothing(name):
    if name != "autocontrast":
        np.testing.assert_allclose(operate(name, 0.0), IMAGES, atol=1e-6)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("amount", [0.8, -0.8])
def test_operations_stay_in_range_and_do_something(name, amount):
    out = operate(name, amount)
    assert out.min() >= 0
    assert out.max() <= 1
    assert np.array_equal(out, IMAGES) == (name == "identity")


def smooth(height=32, width=40):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + y / 9), np.cos(y / 7), np.sin(x / 11) * np.cos(y / 6)]
    return (np.stack(waves, -1) * 0.4 + 0.5).astype(np.float32)


def _turn(a, cos, sin):
    return cos * np.cos(a * np.pi / 6), sin * np.sin(a * np.pi / 6)


AFFINE = {
    "rotate": lambda a: (*_turn(a, 1, -1), 0, *_turn(a, 1, 1)[::-1], 0),
    "shear_x": lambda a: (1, 0.3 * a, 0, 0, 1, 0),
    "shear_y": lambda a: (1, 0, 0, 0.3 * a, 1, 0),
    "translate_x": lambda a: (1, 0, a * 40 / 3, 0, 1, 0),
    "translate_y": lambda a: (1, 0, 0, 0, 1, a * 32 / 3),
}


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("amount", [0.6, -1.0])
def test_what_moves_pixels_is_pillows_affine_transform(name, amount):
    image = smooth()
    height, width = image.shape[:2]
    a, b, c, d, e, f = AFFINE[name](amount)
    # About the middle; Pillow samples at pixels' centres.
    x, y = width / 2, height / 2
    matrix = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    expected = np.stack(
        [
            Image.fromarray(image[..., i]).transform(
                (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
            )
            for i in range(3)
        ],
        axis=-1,
    )
    found = operate(name, amount, jnp.asarray(image[None]))[0]
    # A pixel that lies between two may be rounded to either.
    assert np.mean(np.abs(found - expected) > 1e-6) < 0.02
    assert np.mean(np.abs(found - image) > 1e-6) > 0.3


def test_colours_are_changed_as_pillow_changes_them():
    image = Image.fromarray(BYTES[0])
    from PIL import ImageEnhance, ImageOps

    bright = np.asarray(ImageEnhance.Brightness(image).enhance(1 + 0.9 * 0.5)) / 255
    np.testing.assert_allclose(operate("brightness", 0.5)[0], bright, atol=1.01 / 255)
    posterized = np.asarray(ImageOps.posterize(image, 6)) / 255
    np.testing.assert_allclose(operate("posterize", -0.5)[0], posterized, atol=1e-6)
    solarized = np.asarray(ImageOps.solarize(image, 128)) / 255
    np.testing.assert_allclose(operate("solarize", 0.5)[0], solarized, atol=1e-6)
    grey = operate("colour", -1.0)[0]
    assert np.all(np.ptp(grey, axis=-1) <= 0.1 * np.ptp(IMAGES[0], axis=-1) + 1e-6)
    flat = operate("contrast", -1.0)[0]
    np.testing.assert_allclose(np.ptp(flat), 0.1 * np.ptp(IMAGES[0]), rtol=1e-4)
    full = operate("autocontrast", 0.5, IMAGES * 0.3 + 0.2)
    np.testing.assert_allclose(full.min(axis=(1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(full.max(axis=(1, 2, 3)), 1, atol=1e-6)


def test_images_draw_operations_of_their_own():
    same = jnp.repeat(IMAGES[:1], 300, axis=0)
    out = np.asarray(Augment(operations=1, magnitude=0.5)(same, KEY))
    kinds = {image.tobytes() for image in out}
    # One for the identity and for autocontrast, posterize and solarize, two for each other.
    assert 15 <= len(kinds) <= 2 * len(OPERATIONS)
    twice = np.asarray(Augment(operations=2, magnitude=0.5)(same, KEY))
    assert len({image.tobytes() for image in twice}) > 80


def test_steps_draw_anew_and_devices_agree():
    change = Augment(crop=2, flip=True, operations=1, cutout=2)
    experiment = tiny.resnet(task=Classify(augment=change), optimizer=tiny.sgd(0.0))
    losses = []
    for devices in (tiny.ONE, jax.devices()):
        setup = prepare(experiment, devices)
        step, state = setup.step(), setup.initial()
        losses.append([])
        for _ in range(3):
            batch = parallel.put(setup.splits["train"].batch(0, 16, 0), setup.mesh)
            state, metrics = step(state, batch, setup.root)
            losses[-1].append(float(metrics["loss"].mean()))
    assert len(set(losses[0])) == 3
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_evaluation_changes_nothing():
    batch = {"inputs": BYTES[:8, :, :, :1], "targets": np.arange(8) % 2}
    batch["weights"] = np.ones(8, np.float32)

    def model(x, rngs):
        return jnp.stack([x.mean(axis=(1, 2, 3)), x.max(axis=(1, 2, 3))], axis=1)

    changed = Classify(augment=Augment(operations=3, magnitude=1.0))
    assert Classify()(model, batch) == changed(model, batch)


def test_bytes_are_images_in_0_to_1():
    batch = {"inputs": jnp.asarray(BYTES[:8]), "targets": np.zeros(8, np.int32)}
    batch["weights"] = np.ones(8, np.float32)
    seen = []

    def model(x, rngs):
        seen.append(x)
        return jnp.zeros((8, 2))

    Classify()(model, batch)
    assert seen[0].dtype == jnp.float32
    np.testing.assert_allclose(seen[0], IMAGES[:8], rtol=1e-6)


def test_no_flop_is_lost_to_it():
    change = Augment(crop=2, flip=True, operations=2, cutout=2)
    setup = prepare(tiny.resnet(task=Classify(augment=change)), tiny.ONE)
    found = compute.report(setup.step().trace(*setup.abstract_example()))
    plain = prepare(tiny.resnet(), tiny.ONE)
    plain = compute.report(plain.step().trace(*plain.abstract_example()))
    assert found.program.exact
    assert found.count.model_flops == plain.count.model_flops


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        (Augment(crop=8), (8, 9, 1), "augment.crop must be < 8"),
        (Augment(cutout=9), (8, 9, 1), "augment.cutout must be <= 8"),
        (Augment(flip=True), (8,), "needs images"),
        (Augment(operations=1), (8, 9, 1), r"operations needs images in \[0, 1\], not in \[2, 2\]"),
    ],
)
def test_what_does_not_fit_the_images_is_said(change, shape, message):
    outputs = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    arrays = {"inputs": np.full((4, *shape), 2, np.float32), "targets": np.arange(4) % 3}
    with pytest.raises(UserError, match=message):
        Classify(augment=change).check(outputs, arrays)
    if change.operations:
        for inputs in (arrays["inputs"] / 2, arrays["inputs"].astype(np.uint8)):
            Classify(augment=change).check(outputs, {**arrays, "inputs": inputs})
