"""Interpolated character n-gram models with Witten-Bell or modified Kneser-Ney smoothing.

Both give token w after the context h of n - 1 tokens the probability

    p_n(w | h) = (s(hw) + e(h) q_{n-1}(w | h')) / (s(h) + e(h)),    q_0(w) = 1 / vocab,

with s the smoothed counts of the training text, s(h) = sum_w s(hw), e(h) the escape to the context
h' that lacks the oldest token of h, and q the model of that shorter context. Where h was never
seen, p_n = q_{n-1}. This is the interpolated form of Chen & Goodman (1998), "An empirical study of
smoothing techniques for language modeling", Harvard TR-10-98. With c the training counts:

Witten-Bell: s = c, e(h) is the number of distinct tokens seen after h, and q = p. Method C of
Witten & Bell (1991), "The zero-frequency problem", IEEE Trans. Inf. Theory 37(4).

Modified Kneser-Ney (Chen & Goodman): s = c - D(c) and e(h) = sum_w D(c(hw)), with D(0) = 0,
D(1) = D_1, D(2) = D_2, D(3 and more) = D_3, and for n_k the number of n-grams with count k

    D_k = k - (k + 1) Y n_{k+1} / n_k,    Y = n_1 / (n_1 + 2 n_2).

q_n is p_n with c(hw) the continuation count, the number of distinct tokens seen before hw, and n_k
counted from those. An order with some n_1 to n_4 zero or some D_k not positive takes 0.5, 1 and 1.5
for D_1 to D_3: `--discount_fallback` of KenLM's lmplz (Heafield et al. 2013, "Scalable modified
Kneser-Ney language model estimation", ACL).
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Literal, get_args

import numpy as np

Smoothing = Literal["witten-bell", "kneser-ney"]
SMOOTHINGS: tuple[Smoothing, ...] = get_args(Smoothing)


def _check_tokens(tokens: np.ndarray, vocab: int, name: str) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tokens.shape}")
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {tokens.dtype}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
        raise ValueError(f"{name} has tokens outside [0, {vocab})")
    return tokens.astype(np.int64)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D(0), D_1, D_2, D_3 of the n-grams of one order, from the counts of their counts."""
    n = np.bincount(np.minimum(counts, 5), minlength=6)[:5]
    if n[1:].all():
        k = np.arange(1, 4)
        d = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[2:] / n[1:4]
        if d.min() > 0:
            return np.array([0, *d])
    return np.array([0, 0.5, 1, 1.5])


def _interpolate(
    counts: np.ndarray, context: np.ndarray, gram: np.ndarray, q: np.ndarray, smoothing: Smoothing
) -> np.ndarray:
    """(n_tokens,) p_n from the (n_tokens,) q_{n-1}.

    counts, context: (n_grams,) the count of every n-gram and the id of its context.
    gram: (n_tokens,) the n-gram that ends with each token.
    """
    if smoothing == "kneser-ney":
        escape = _discounts(counts)[np.minimum(counts, 3)]
        kept = counts - escape
    else:
        escape, kept = counts > 0, counts
    h = context[gram]
    escape_h = np.bincount(context, escape)[h]
    total_h = np.bincount(context, kept)[h] + escape_h
    mixed = kept[gram] + escape_h * q
    return np.divide(mixed, total_h, out=q.copy(), where=total_h > 0)


def _probabilities_by_order(
    train: np.ndarray, validation: np.ndarray, vocab: int, smoothing: Smoothing
) -> Iterator[np.ndarray]:
    """Yield p_1, p_2, ... of every validation token, each of shape (len(validation),)."""
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing must be one of {', '.join(SMOOTHINGS)}, got {smoothing!r}")
    train = _check_tokens(train, vocab, "train")
    validation = _check_tokens(validation, vocab, "validation")
    n_train = len(train)
    text = np.concatenate([train, validation])
    p = q = np.full(len(validation), 1.0 / vocab)
    # The id of the (order - 1)-gram that ends just before each token. Renumbering the grams at
    # every order keeps the keys below len(text) * vocab, where vocab**order would overflow.
    context = np.zeros(len(text), dtype=np.int64)
    for order in count(1):
        keys, gram = np.unique(context * vocab + text, return_inverse=True)
        gram_context, last = keys // vocab, gram[n_train:]
        counts = np.bincount(gram[order - 1 : n_train], minlength=len(keys))
        # The first order - 1 tokens of each text would take their context from outside it. Those of
        # validation keep their p, and their q is not read again.
        complete = np.arange(len(validation)) >= order - 1
        p = np.where(complete, _interpolate(counts, gram_context, last, q, smoothing), p)
        yield p
        if smoothing == "kneser-ney":
            before = text[: max(n_train - order, 0)]
            preceded = np.unique(gram[order:n_train] * vocab + before) // vocab
            continuations = np.bincount(preceded, minlength=len(keys))
            q = _interpolate(continuations, gram_context, last, q, smoothing)
        else:
            q = p
        context = np.concatenate([[0], gram[:-1]])


def probabilities(
    train: np.ndarray,
    validation: np.ndarray,
    order: int,
    vocab: int,
    *,
    smoothing: Smoothing = "witten-bell",
) -> np.ndarray:
    """Probability of each validation token given the tokens before it in `validation`.

    Args:
        train: (n_train,) integer tokens in [0, vocab).
        validation: (n_validation,) integer tokens in [0, vocab).
        order: n of the n-gram; a token is conditioned on the n - 1 tokens before it. With only
            m < n - 1 before it in `validation`, its probability is p_{m+1}.
        vocab: alphabet size, tokens absent from `train` included.
        smoothing: one of SMOOTHINGS, as defined at the top of this file.

    Returns:
        (n_validation,) float64 probabilities, all positive.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    by_order = _probabilities_by_order(train, validation, vocab, smoothing)
    return next(islice(by_order, order - 1, None))


def bits_per_character(
    train: np.ndarray,
    validation: np.ndarray,
    order: int,
    vocab: int,
    *,
    smoothing: Smoothing = "witten-bell",
) -> float:
    """Mean of -log2 p over the validation tokens, in bits; arguments as in `probabilities`."""
    return table(train, validation, vocab, [order], smoothing=smoothing)[0][1]


def table(
    train: np.ndarray,
    validation: np.ndarray,
    vocab: int,
    orders: Iterable[int] = range(1, 8),
    *,
    smoothing: Smoothing = "witten-bell",
) -> list[tuple[int, float]]:
    """(order, bits per character) for each of `orders`, from one pass up to the largest."""
    orders = list(orders)
    if len(validation) == 0:
        raise ValueError("validation is empty")
    if not orders or min(orders) < 1:
        raise ValueError(f"orders must be at least 1 and not empty, got {orders}")
    by_order = _probabilities_by_order(train, validation, vocab, smoothing)
    bits = [-float(np.log2(p).mean()) for p in islice(by_order, max(orders))]
    return [(order, bits[order - 1]) for order in orders]
