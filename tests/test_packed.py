"""Packed by tokens that are their own places in the text; and that none sees another."""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from made import abstract, scrambled

from research import UserError, compute
from research.data import splits
from research.data.packed import Packed, best_fit, index, pack
from research.models.transformer import TransformerConfig
from research.tasks import NextToken

# Documents (how many, and the longest), a row and a batch, from one prediction to many.
SIZES = list(itertools.product([1, 2, 7, 30], [2, 5, 23], [1, 4, 8], [1, 3]))


def lengths_of(count, longest):
    """Documents of every length, some of one token and some of none; one is the longest."""
    sizes = np.random.default_rng((count, longest)).integers(0, longest + 1, count)
    return np.concatenate([sizes[1:], [longest]])


def made(count, longest, length, bad=None):
    """Packed documents whose tokens are their places, and the number of each token's document."""
    sizes = lengths_of(count, longest)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return pack(np.arange(offsets[-1]), offsets, length, bad), np.repeat(np.arange(count), sizes)


def predictable(document):
    """Tokens that have one before them in their document."""
    return np.flatnonzero(np.diff(document) == 0) + 1


def every(batches):
    batches = list(batches)
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


@pytest.mark.parametrize(("count", "longest", "length", "batch_size"), SIZES)
def test_every_token_but_the_first_of_its_document_is_predicted_once(
    count, longest, length, batch_size
):
    split, document = made(count, longest, length)
    expected = predictable(document)
    whole, rows = every(split.evaluation(batch_size)), len(split.rows) - 1
    assert len(split) == len(expected) == whole["weights"].sum()
    # An epoch that a batch may begin in, and end in.
    steps = [split.batch(step, batch_size, seed=1) for step in range(-(-rows // batch_size))]
    epoch = {k: v[:rows] for k, v in every(steps).items()}
    for seen in (whole, epoch):
        assert all(v.shape[1:] == (length,) for v in seen.values())
        counted = seen["weights"] == 1
        np.testing.assert_array_equal(np.sort(seen["targets"][counted]), expected)
        np.testing.assert_array_equal(seen["inputs"][counted], seen["targets"][counted] - 1)


@pytest.mark.parametrize(("count", "longest", "length", "batch_size"), SIZES)
def test_a_segment_is_one_document_whole_unless_longer_than_a_row(
    count, longest, length, batch_size
):
    split, document = made(count, longest, length)
    seen = {k: v[: len(split.rows) - 1] for k, v in every(split.evaluation(batch_size)).items()}
    np.testing.assert_array_equal(seen["segments"] > 0, seen["weights"] == 1)
    predictions = np.bincount(document[predictable(document)], minlength=count)
    pieces = np.zeros(count, int)
    for inputs, segments, positions in zip(
        seen["inputs"], seen["segments"], seen["positions"], strict=True
    ):
        filled = segments[segments > 0]
        np.testing.assert_array_equal(segments[: len(filled)], filled)  # padding is at the end
        assert list(dict.fromkeys(filled)) == list(range(1, filled.max() + 1))
        for number in range(1, filled.max() + 1):
            own = inputs[segments == number]
            np.testing.assert_array_equal(own, own[0] + np.arange(len(own)))
            np.testing.assert_array_equal(positions[segments == number], np.arange(len(own)))
            (of,) = set(document[own])
            pieces[of] += 1
            assert len(own) in (length, predictions[of], predictions[of] % length)
    np.testing.assert_array_equal(pieces, -(-predictions // length))


@pytest.mark.parametrize(("count", "longest", "length", "batch_size"), SIZES)
def test_shares_are_the_whole_batch(count, longest, length, batch_size):
    split, _ = made(count, longest, length)
    cut = batch_size // 2
    batches = list(split.evaluation(batch_size))
    for i, whole in enumerate(batches):
        for part in (slice(0, cut), slice(cut, batch_size)):
            shares = (
                (split.batch(i, batch_size, 3), split.batch(i, batch_size, 3, part)),
                (whole, split.evaluation(batch_size, part)[i]),
            )
            for full, share in shares:
                assert share.keys() == full.keys()
                for name in full:
                    np.testing.assert_array_equal(share[name], full[name][part], strict=True)


def test_bad_tokens_are_seen_and_not_predicted():
    document = made(30, 23, 8)[1]
    bad = np.arange(len(document)) % 3 == 0
    split, _ = made(30, 23, 8, bad)
    seen = every(split.evaluation(4))
    expected = predictable(document)
    good = seen["targets"][seen["weights"] == 1]
    np.testing.assert_array_equal(np.sort(good), expected[~bad[expected]])
    np.testing.assert_array_equal(np.sort(seen["targets"][seen["bad"]]), expected[bad[expected]])
    assert bad[seen["inputs"][seen["weights"] == 1]].any()


@pytest.mark.parametrize("length", [64, 100])
def test_no_row_overflows_and_few_places_are_left(length):
    sizes = np.random.default_rng(0).integers(1, length + 1, 500)
    row = best_fit(sizes, length)
    filled = np.bincount(row, weights=sizes)
    assert 0 < filled.min() <= filled.max() <= length
    # No two rows would fit into one.
    assert np.sort(filled)[:2].sum() > length
    np.testing.assert_array_equal(best_fit(sizes, length), row)


def test_the_tightest_room_is_taken():
    # 4 fits beside 6 alone, and 3 beside 7, or beside 6 with a place left.
    assert best_fit(np.array([6, 3, 7, 4]), 10).tolist() == [1, 0, 0, 1]
    assert best_fit(np.array([5, 5, 5]), 5).tolist() == [0, 1, 2]
    assert best_fit(np.array([], int), 5).tolist() == []


def test_pages_and_paragraphs_fill_more_than_95_percent():
    sizes = np.random.default_rng(0).lognormal(5.5, 1.2, 200_000).astype(int)
    found = index(np.concatenate([[0], np.cumsum(sizes)]), 2048)
    split = Packed(np.empty(0), 2048, **found)
    assert split.efficiency > 0.99
    assert split.efficiency == len(split) / ((len(found["rows"]) - 1) * 2048)


def test_the_time_to_pack_grows_with_the_number_of_documents_and_no_faster():
    def lines(count):
        """Lines of Python that are run, none of which goes through rows."""
        sizes, found = np.random.default_rng(0).integers(1, 257, count), 0

        def trace(frame, event, arg):
            nonlocal found
            found += event == "line"
            return trace if frame.f_code is best_fit.__code__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            best_fit(sizes, 256)
        finally:
            sys.settrace(before)
        return found

    few, many = lines(1_000), lines(8_000)
    assert few > 1_000 * 5
    assert many < 8.5 * few


def test_an_index_can_be_kept_and_mapped(tmp_path):
    split, _ = made(30, 23, 8)
    offsets = np.concatenate([[0], np.cumsum(lengths_of(30, 23))])
    for name, array in index(offsets, 8).items():
        np.save(tmp_path / f"{name}.npy", array)
    mapped = {p.stem: np.load(p, mmap_mode="r") for p in tmp_path.glob("*.npy")}
    again = Packed(split.tokens, 8, **mapped)
    assert splits.fingerprint({"train": again}) == splits.fingerprint({"train": split})
    for name, array in split.batch(2, 4, 0).items():
        np.testing.assert_array_equal(again.batch(2, 4, 0)[name], array, strict=True)


def test_fingerprints_tell_boundaries_apart():
    tokens = np.arange(12)
    marks = {
        splits.fingerprint({"train": pack(tokens, np.array(offsets), 4, bad)})
        for offsets, bad in [
            ([0, 12], None),
            ([0, 5, 12], None),
            ([0, 6, 12], None),
            ([0, 6, 12], tokens == 3),
        ]
    }
    assert len(marks) == 4


def test_check_says_how_much_is_needed():
    split = pack(np.arange(12), np.array([0, 6, 12]), 5)
    split.check(2)
    with pytest.raises(UserError, match="batch_size 3 exceeds the 2 rows of 5 tokens"):
        split.check(3)
    for offsets in ([0], [0, 0], [0, 1, 2, 2]):
        nothing = pack(np.arange(2), np.array(offsets), 5)
        assert len(nothing) == nothing.efficiency == 0
        with pytest.raises(UserError, match="no document of two tokens"):
            nothing.check(1)


# What a model makes of packed rows.

GPT2 = TransformerConfig(vocab=11, context=8, layers=2, heads=4, width=16)
MODELS = {
    f"{positions}, {'scan' if scan else 'unrolled'}, remat {remat}": dataclasses.replace(
        GPT2, positions=positions, scan=scan, remat=remat, kv_heads=2
    )
    for positions, scan, remat in [
        ("learned", False, "none"),
        ("rotary", False, "none"),
        ("learned", True, "none"),
        ("rotary", True, "full"),
        ("rotary", False, "dots"),
    ]
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
TOKENS = np.asarray([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]], np.int32)
SEGMENTS = np.asarray([[1, 1, 1, 2, 3, 3, 3, 0], [1, 1, 1, 2, 2, 2, 2, 2]], np.int32)
POSITIONS = np.asarray([[0, 1, 2, 0, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 3, 4]], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, segments=None, positions=None):
    model = nnx.merge(nnx.graphdef(abstract(config)), params)
    return model(tokens, segments=segments, positions=positions)


@every_model
def test_a_document_in_a_row_is_the_document_alone(config):
    """Its logits, and what it adds to the gradients."""
    params = scrambled(config)

    @jax.jit
    def found(params, weights, *given):
        def loss(params):
            logits = logits_of(config, params, *given)
            return jnp.sum(jnp.square(logits) * weights[..., None]), logits

        grads, logits = jax.grad(loss, has_aux=True)(params)
        return logits, grads

    for row, number, length in [(0, 1, 3), (0, 3, 3), (1, 1, 3), (1, 2, 5)]:
        own = np.equal(SEGMENTS, number) & (np.arange(2) == row)[:, None]
        logits, grads = found(params, np.float32(own), TOKENS, SEGMENTS, POSITIONS)
        alone = found(params, np.ones((1, length), np.float32), TOKENS[own][None])
        for a, b in zip(*map(jax.tree.leaves, ((logits[own], grads), alone)), strict=True):
            b = b.reshape(a.shape)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


class Given(nnx.Module):
    """An embedding whose vectors are given, so that one can differentiate by them."""

    def __init__(self, embed, vectors):
        self.embed, self.vectors = embed, vectors

    def __call__(self, tokens):
        return self.vectors

    def attend(self, x):
        return self.embed.attend(x)


@every_model
def test_no_step_depends_on_another_document(config):
    def logits(vectors):
        model = nnx.merge(nnx.graphdef(abstract(config)), scrambled(config))
        model.embed = Given(model.embed, vectors)
        return model(TOKENS, segments=SEGMENTS, positions=POSITIONS).sum(axis=-1)

    vectors = np.random.default_rng(1).normal(size=(2, 8, 16)).astype(np.float32)
    jacobian = np.abs(jax.jit(jax.jacrev(logits))(vectors)).sum(axis=-1)  # [2, 8, 2, 8]
    for row in range(2):
        same = SEGMENTS[row][:, None] == SEGMENTS[row][None]
        np.testing.assert_array_equal(jacobian[row, :, row] != 0, same & np.tri(8, dtype=bool))
        assert not jacobian[row, :, 1 - row].any()
    assert np.isfinite(jacobian).all()  # of padding too


def test_a_row_of_one_document_is_what_it_was():
    for config in (GPT2, dataclasses.replace(GPT2, positions="rotary")):
        params, whole = scrambled(config), np.ones_like(SEGMENTS)
        positions = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
        found = logits_of(config, params, TOKENS, whole, positions)
        np.testing.assert_allclose(found, logits_of(config, params, TOKENS), rtol=1e-5, atol=1e-5)


def test_the_task_gives_the_model_what_keeps_documents_apart():
    params, batch = scrambled(GPT2), {"inputs": TOKENS}
    apart = {"segments": SEGMENTS, "positions": POSITIONS}
    model = functools.partial(logits_of, GPT2, params)
    for given in ({}, apart):
        found, _ = NextToken().outputs(
            lambda tokens, rngs, **kwargs: model(tokens, **kwargs), batch | given, None, None
        )
        np.testing.assert_array_equal(found, model(TOKENS, **given))
    assert not np.allclose(model(TOKENS), model(TOKENS, **apart))


def test_packing_changes_no_model_flops():
    params = scrambled(GPT2)
    model = functools.partial(logits_of, GPT2)
    plain = compute.count(model, params, TOKENS)
    packed = compute.count(model, params, TOKENS, SEGMENTS, POSITIONS)
    assert packed.model_flops == plain.model_flops
    assert packed.causal_flops == plain.causal_flops < plain.model_flops
