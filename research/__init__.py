"""Ergon: train CNNs, LSTMs and Transformers anywhere JAX runs, and account for every step."""


class UserError(ValueError):
    """A user's mistake: the message says in one line what, where and what would be right."""
