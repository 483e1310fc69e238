"""Interpolated character n-gram language models with Witten-Bell smoothing.

The probability of token w after the context h of n - 1 tokens is

    p_n(w | h) = (c(hw) + T(h) p_{n-1}(w | h')) / (c(h) + T(h)),    p_0(w) = 1 / vocab,

with c the training counts, c(h) = sum_w c(hw), T(h) the number of distinct tokens seen after h,
and h' the context h without its oldest token. A context never seen in training leaves p_{n-1} as
it is. The escape weight T(h) / (c(h) + T(h)) is method C of Witten & Bell (1991), "The
zero-frequency problem", IEEE Trans. Inf. Theory 37(4); the recursion is the interpolated form
given by Chen & Goodman (1998), "An empirical study of smoothing techniques for language modeling",
Harvard TR-10-98.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice

import numpy as np


def _check_tokens(tokens: np.ndarray, vocab: int, name: str) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tokens.shape}")
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {tokens.dtype}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
        raise ValueError(f"{name} has tokens outside [0, {vocab})")
    return tokens.astype(np.int64)


def _probabilities_by_order(
    train: np.ndarray, validation: np.ndarray, vocab: int
) -> Iterator[np.ndarray]:
    """Yield p_1, p_2, ... of every validation token, each of shape (len(validation),)."""
    train = _check_tokens(train, vocab, "train")
    validation = _check_tokens(validation, vocab, "validation")
    n_train = len(train)
    text = np.concatenate([train, validation])
    position = np.concatenate([np.arange(n_train), np.arange(len(validation))])
    is_train = np.arange(len(text)) < n_train
    p = np.full(len(validation), 1.0 / vocab)
    # The id of the (order - 1)-gram that ends just before each token. Renumbering the grams at
    # every order keeps the keys below len(text) * vocab, where vocab**order would overflow.
    context = np.zeros(len(text), dtype=np.int64)
    for order in count(1):
        # The first order - 1 tokens of each text would take their context from outside it.
        complete = position >= order - 1
        keys, gram = np.unique(context * vocab + text, return_inverse=True)
        counts = np.bincount(gram[complete & is_train], minlength=len(keys))
        gram_context = keys // vocab
        h = context[n_train:]
        total = np.bincount(gram_context, counts)[h]
        types = np.bincount(gram_context, counts > 0)[h]
        mixed = (counts[gram[n_train:]] + types * p) / np.maximum(total + types, 1)
        p = np.where(complete[n_train:] & (total > 0), mixed, p)
        yield p
        context = np.concatenate([[0], gram[:-1]])


def probabilities(train: np.ndarray, validation: np.ndarray, order: int, vocab: int) -> np.ndarray:
    """Probability of each validation token given the tokens before it in `validation`.

    Args:
        train: (n_train,) integer tokens in [0, vocab).
        validation: (n_validation,) integer tokens in [0, vocab).
        order: n of the n-gram; a token is conditioned on the n - 1 tokens before it, or on as many
            as there are at the start of `validation`.
        vocab: alphabet size, tokens absent from `train` included.

    Returns:
        (n_validation,) float64 probabilities, all positive.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    by_order = _probabilities_by_order(train, validation, vocab)
    return next(islice(by_order, order - 1, None))


def bits_per_character(train: np.ndarray, validation: np.ndarray, order: int, vocab: int) -> float:
    """Mean of -log2 p over the validation tokens, in bits; arguments as in `probabilities`."""
    return table(train, validation, vocab, [order])[0][1]


def table(
    train: np.ndarray, validation: np.ndarray, vocab: int, orders: Iterable[int] = range(1, 8)
) -> list[tuple[int, float]]:
    """(order, bits per character) for each of `orders`, from one pass up to the largest."""
    orders = list(orders)
    if len(validation) == 0:
        raise ValueError("validation is empty")
    if not orders or min(orders) < 1:
        raise ValueError(f"orders must be at least 1 and not empty, got {orders}")
    by_order = _probabilities_by_order(train, validation, vocab)
    bits = [-float(np.log2(p).mean()) for p in islice(by_order, max(orders))]
    return [(order, bits[order - 1]) for order in orders]
