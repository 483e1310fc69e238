"""Ergon: train CNNs, LSTMs and Transformers anywhere JAX runs, and account for every step."""

from research import accelerators

accelerators.cpu_where_alone()


class UserError(ValueError):
    """A user's mistake: the message says in one line what, where and what would be right."""
