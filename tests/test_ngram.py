"""Tests of the n-gram baselines against hand and brute-force values."""

import math
import sys
from collections import Counter

import numpy as np
import pytest

from research.bench.ngram import SMOOTHINGS, bits_per_character, probabilities, table
from research.data.bundled import PythonReference

both = pytest.mark.parametrize("smoothing", SMOOTHINGS)


def witten_bell(train: list[int], context: list[int], token: int, vocab: int) -> float:
    """Witten-Bell by recursion over explicit scans of the training text."""
    n = len(context)
    lower = witten_bell(train, context[1:], token, vocab) if n else 1 / vocab
    followers = [train[i + n] for i in range(len(train) - n) if train[i : i + n] == context]
    if not followers:
        return lower
    types = len(set(followers))
    return (followers.count(token) + types * lower) / (len(followers) + types)


def grams(train: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(train[i : i + n]) for i in range(len(train) - n + 1)]


def kneser_ney(
    train: list[int], context: list[int], token: int, vocab: int, continuation: bool = False
) -> float:
    """Modified Kneser-Ney by recursion over dictionaries of counts."""
    n = len(context) + 1
    lower = kneser_ney(train, context[1:], token, vocab, True) if context else 1 / vocab
    if continuation:
        counts = Counter(gram[1:] for gram in set(grams(train, n + 1)))
    else:
        counts = Counter(grams(train, n))
    n1, n2, n3, n4 = (sum(c == k for c in counts.values()) for k in (1, 2, 3, 4))
    discount = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        d1, d2, d3 = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        if d1 > 0 and d2 > 0 and d3 > 0:
            discount = {0: 0.0, 1: d1, 2: d2, 3: d3}
    after = {gram[-1]: c for gram, c in counts.items() if list(gram[:-1]) == context}
    if not after:
        return lower
    escape = sum(discount[min(c, 3)] for c in after.values())
    c = after.get(token, 0)
    return (c - discount[min(c, 3)] + escape * lower) / sum(after.values())


brute_force = {"witten-bell": witten_bell, "kneser-ney": kneser_ney}


def python_reference() -> tuple[np.ndarray, np.ndarray, int]:
    tokens = PythonReference.tokens()
    return tokens["train"], tokens["validation"], len(PythonReference.alphabet())


# Train "aab" over {a, b, c}, validation "abca": a without context, b after a, c after b, which
# nothing follows in train, and a after c, which train lacks.
@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [
        # c(a) = 2, c(b) = 1 and two types:
        #   p_1(a) = (2 + 2/3) / 5 = 8/15,  p_1(b) = (1 + 2/3) / 5 = 1/3,  p_1(c) = 2/15.
        # After a come a and b, once each: p_2(b | a) = (1 + 2/3) / (2 + 2) = 5/12.
        ("witten-bell", [8 / 15, 5 / 12, 2 / 15, 8 / 15]),
        # No order has all of n_1 to n_4, so D is 0.5, 1, 1.5:
        #   p_1(a) = (2 - 1 + 1.5/3) / 3 = 1/2.
        # Only a comes before a, and only a before b, so each continues one token:
        #   q_1(a) = q_1(b) = (1 - 0.5 + 1/3) / 2 = 5/12,  q_1(c) = (1/3) / 2 = 1/6.
        # After a come a and b, once each: p_2(b | a) = (1 - 0.5 + 5/12) / 2 = 11/24.
        ("kneser-ney", [1 / 2, 11 / 24, 1 / 6, 5 / 12]),
    ],
)
def test_hand_computed_bigram(smoothing: str, expected: list[float]) -> None:
    train, validation = np.array([0, 0, 1]), np.array([0, 1, 2, 0])
    p = probabilities(train, validation, 2, 3, smoothing=smoothing)
    np.testing.assert_allclose(p, expected, rtol=1e-12)
    bits = -sum(math.log2(p) for p in expected) / 4
    assert bits_per_character(train, validation, 2, 3, smoothing=smoothing) == pytest.approx(
        bits, abs=1e-12
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # n_1..n_4 = 4, 2, 1, 1: Y = 1/2 and D = 0.5, 1.25, 1. The escape 6.5 is 0.65 per token.
        ([1, 1, 1, 1, 2, 2, 3, 4, 0, 0], [1.15] * 4 + [1.4] * 2 + [2.65, 3.65] + [0.65] * 2),
        # n_1..n_4 = 3, 1, 2, 1 would give D_2 = 2 - 3 (3/5) 2 < 0: 0.5, 1, 1.5 take its place.
        # The escape 7 is 1 per token.
        ([1, 1, 1, 2, 3, 3, 4], [1.5] * 3 + [2] + [2.5] * 2 + [3.5]),
        # n_4 = 0 would give D_3 = 3, all of the count.
        ([1, 1, 2, 3], [0.5 + 3.5 / 4] * 2 + [1 + 3.5 / 4, 1.5 + 3.5 / 4]),
    ],
    ids=["estimated", "negative", "zero_count_of_counts"],
)
def test_hand_computed_kneser_ney_discounts(counts: list[int], expected: list[float]) -> None:
    tokens = np.arange(len(counts))
    train = np.repeat(tokens, counts)
    p = [
        probabilities(train, np.array([w]), 1, len(counts), smoothing="kneser-ney")[0]
        for w in tokens
    ]
    np.testing.assert_allclose(p, np.array(expected) / sum(counts), rtol=1e-12)


@both
@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_matches_brute_force(order: int, smoothing: str) -> None:
    rng = np.random.default_rng(order)
    vocab = 5
    train = rng.integers(0, vocab - 1, 300)
    validation = rng.integers(0, vocab, 80)
    expected = [
        brute_force[smoothing](
            train.tolist(), validation[max(0, i - order + 1) : i].tolist(), token, vocab
        )
        for i, token in enumerate(validation.tolist())
    ]
    p = probabilities(train, validation, order, vocab, smoothing=smoothing)
    np.testing.assert_allclose(p, expected, rtol=1e-12)


@both
@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "context",
    [[0, 1, 2, 0], [2, 0, 1, 2], [1, 1, 1, 1], [6, 6, 6, 6], [6, 0, 1, 2], [0, 6], []],
    ids=["seen", "seen_shifted", "unseen_gram", "unseen_token", "seen_suffix", "short", "empty"],
)
def test_sums_to_one_over_the_vocabulary(order: int, context: list[int], smoothing: str) -> None:
    vocab = 7
    train = np.array([0, 1, 2, 0, 1, 3, 2, 0, 1, 2, 0, 4, 5] * 3)
    p = [
        probabilities(train, np.array([*context, w]), order, vocab, smoothing=smoothing)[-1]
        for w in range(vocab)
    ]
    assert min(p) > 0
    assert sum(p) == pytest.approx(1, abs=1e-12)


@both
@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_sums_to_one_on_real_text(order: int, smoothing: str) -> None:
    train, validation, vocab = python_reference()
    train, context = train[:20_000], validation[:300]
    p = [
        probabilities(train, np.array([*context, w]), order, vocab, smoothing=smoothing)[-1]
        for w in range(vocab)
    ]
    assert min(p) > 0
    assert sum(p) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [("witten-bell", (2 + 3 / 3) / (10 + 3)), ("kneser-ney", (2 - 1 + 4 / 3) / 10)],
)
def test_first_validation_tokens_do_not_see_the_training_text(
    smoothing: str, expected: float
) -> None:
    # 1 always follows 0, and train ends in 0; only a context carried over would favour 1.
    train = np.array([0, 1, 2, 2, 2, 0, 1, 2, 2, 0])
    first = [
        probabilities(train, np.array([1]), order, 3, smoothing=smoothing)[0] for order in (1, 2, 3)
    ]
    np.testing.assert_allclose(first, expected, rtol=1e-12)


@both
def test_periodic_sequence_costs_nearly_nothing(smoothing: str) -> None:
    sequence = np.tile([0, 1, 2, 1], 2000)
    bits = dict(table(sequence, sequence[:400], 3, [1, 2, 3], smoothing=smoothing))
    # The token after 1 is fair between 0 and 2 until two tokens of context settle it.
    assert bits[1] == pytest.approx(1.5, abs=0.01)
    assert bits[2] == pytest.approx(0.5, abs=0.02)
    assert bits[3] < 0.01


@both
def test_uniform_tokens_cost_log2_vocab(smoothing: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 32, 120_000)
    bits = bits_per_character(tokens[:100_000], tokens[100_000:], 1, 32, smoothing=smoothing)
    assert bits == pytest.approx(5, abs=0.005)


@pytest.mark.parametrize(
    ("smoothing", "p_1", "p_2"),
    [
        # p_1 = (1/4) / (10 + 1). After the context 0 (nine followers) the escape is taken once
        # more, with weight 1/10.
        ("witten-bell", 1 / 44, 1 / 440),
        # p_1 = 1.5 (1/4) / 10. Only 0 comes before 0, so q_1 = 0.5 (1/4) / 1, and the escape
        # from the context 0 has weight 1.5/9.
        ("kneser-ney", 3 / 80, 1 / 48),
    ],
)
def test_unseen_token_costs_its_share_of_the_escape(smoothing: str, p_1: float, p_2: float) -> None:
    train = np.zeros(10, dtype=np.int64)
    bits = bits_per_character(train, np.array([3]), 1, 4, smoothing=smoothing)
    assert bits == pytest.approx(-math.log2(p_1))
    assert probabilities(train, np.array([0, 3]), 2, 4, smoothing=smoothing)[1] == pytest.approx(
        p_2
    )


@both
@pytest.mark.parametrize("n_train", [0, 1, 2])
def test_training_text_shorter_than_the_order(n_train: int, smoothing: str) -> None:
    train, validation = [0, 1][:n_train], [0, 1, 2, 0, 1]
    expected = [
        brute_force[smoothing](train, validation[max(0, i - 3) : i], token, 8)
        for i, token in enumerate(validation)
    ]
    p = probabilities(
        np.array(train, dtype=np.int64), np.array(validation), 4, 8, smoothing=smoothing
    )
    np.testing.assert_allclose(p, expected, rtol=1e-12)
    if n_train == 0:
        np.testing.assert_allclose(p, 1 / 8)


@both
def test_large_vocabulary_and_order_do_not_overflow(smoothing: str) -> None:
    # vocab**order is about 2**160 here.
    tokens = np.tile(np.array([0, 60_000, 7, 65_535]), 50)
    p = probabilities(tokens, tokens[:40], 10, 65_536, smoothing=smoothing)
    context, token = tokens[30:39].tolist(), int(tokens[39])
    expected = brute_force[smoothing](tokens.tolist(), context, token, 65_536)
    assert p[39] == pytest.approx(expected, rel=1e-12)


@both
def test_table_matches_single_orders_in_the_order_asked(smoothing: str) -> None:
    rng = np.random.default_rng(1)
    train, validation = rng.integers(0, 4, 200), rng.integers(0, 4, 50)
    assert table(train, validation, 4, iter([3, 1]), smoothing=smoothing) == [
        (order, bits_per_character(train, validation, order, 4, smoothing=smoothing))
        for order in (3, 1)
    ]
    default = table(train, validation, 4, smoothing=smoothing)
    assert [order for order, _ in default] == list(range(1, 8))


@both
@pytest.mark.parametrize(
    ("train", "validation", "order", "match"),
    [
        ([0, 1], [0], 0, "at least 1"),
        ([0, 1], [], 2, "empty"),
        ([0, 2], [0], 1, "train has tokens outside"),
        ([0, 1], [-1], 1, "validation has tokens outside"),
        ([[0, 1]], [0], 1, "one-dimensional"),
        ([0.0, 1.0], [0], 1, "integers"),
    ],
)
def test_rejects_bad_input(
    train: list, validation: list, order: int, match: str, smoothing: str
) -> None:
    with pytest.raises(ValueError, match=match):
        bits_per_character(np.array(train), np.array(validation), order, 2, smoothing=smoothing)


def test_rejects_unknown_smoothing() -> None:
    with pytest.raises(ValueError, match="witten-bell, kneser-ney"):
        bits_per_character(np.array([0]), np.array([0]), 1, 2, smoothing="laplace")


def test_real_text_band() -> None:
    witten_bell, kneser_ney = (
        dict(table(*python_reference(), range(1, 9), smoothing=s)) for s in SMOOTHINGS
    )
    assert 2.3 < witten_bell[3] < 2.65
    assert 1.75 < witten_bell[5] < 2.1
    assert 1.6 < kneser_ney[5] < 1.95
    assert 1.45 < kneser_ney[8] < 1.85
    # Past the best order the counts are too sparse for Witten-Bell's escape weight.
    assert witten_bell[5] < witten_bell[6] < witten_bell[7] < witten_bell[8]
    assert sorted(kneser_ney, key=kneser_ney.__getitem__, reverse=True) == list(range(1, 9))
    assert all(kneser_ney[order] < witten_bell[order] for order in range(2, 9))


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the text differs by Python version")
@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [
        ("witten-bell", [4.671, 3.345, 2.470, 2.026, 1.905, 1.932, 2.000, 2.076]),
        ("kneser-ney", [4.671, 3.342, 2.445, 1.939, 1.739, 1.673, 1.645, 1.618]),
    ],
)
def test_python_3_11_reference_values(smoothing: str, expected: list[float]) -> None:
    # Measured on 3.11.7; the tolerance leaves room for edits of the text in other patch releases.
    bits = [b for _, b in table(*python_reference(), range(1, 9), smoothing=smoothing)]
    assert bits == pytest.approx(expected, abs=0.01)
