"""The table of token embeddings."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Embedding"]


class Embedding(nn.Embedding):
    """Rows of a table by id: ids (...) -> (..., D). The table is filled by whoever builds the model.

    Torch would draw it from a normal distribution, and drawing on the meta device imports its whole compiler: seconds.

    Attributes:
        given: (places (E,), rows (E, D)) that stand in for those of ids, counted flat, set from outside for one call.
    """

    given: tuple[Tensor, Tensor] | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        if self.given is None:
            return x
        return x.flatten(0, -2).index_copy(0, self.given[0], self.given[1].to(x.dtype)).view(x.shape)

    def reset_parameters(self) -> None:
        """Leave the table as it is."""
