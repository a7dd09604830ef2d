"""What /v1/embeddings takes, and how vectors are packed."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np

from hanlin.serve.schemas.sampling import Body

__all__ = ["EmbeddingBody", "base64_of"]


class EmbeddingBody(Body):
    """`pooling` and `normalize` are this server's own; `user` is taken and has no effect."""

    model: str | None = None
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    user: Any = None


def base64_of(vector: list[float]) -> str:
    """Little-endian float32."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
