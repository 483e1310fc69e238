"""The LSTM by its own name, which stored runs and their checkpoints have."""

import dataclasses
from typing import Literal

from research.models.recurrent import RecurrentConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMConfig(RecurrentConfig):
    """Stacked LSTM over tokens or vectors, with dropout between layers (Zaremba et al. 2014)."""

    cell: Literal["lstm"] = "lstm"
