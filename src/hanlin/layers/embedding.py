"""The table of token embeddings."""

from __future__ import annotations

from torch import nn

__all__ = ["Embedding"]


class Embedding(nn.Embedding):
    """Rows of a table by id: ids (...) -> (..., D). The table is filled by whoever builds the model.

    Torch would draw it from a normal distribution, and drawing on the meta device imports its whole compiler: seconds.
    """

    def reset_parameters(self) -> None:
        """Leave the table as it is."""
