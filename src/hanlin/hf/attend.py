"""The Attend of this room: over a padded batch, a Transformers cache and an attention mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from hanlin.errors import RequestError

__all__ = ["CacheAttend"]


@dataclass
class CacheAttend:
    """Causal attention of N rows of S tokens each, packed row after row (T = N * S), over a Transformers cache.

    Attributes:
        rows: N.
        cache: holds what came before; None keeps nothing.
        past: tokens per row that the cache held before this call.
        mask: which tokens count: (N, past + S), nonzero for those that do; or a finished mask (N or 1, H or 1, S, C),
            boolean (True attends) or additive; or None.
        soft: for each layer keys and values (P, G, K) that every token sees, in front of all others.
        segments: (N, S), equal for tokens that may see each other, for sequences packed into a row; None is one each.
        eager: multiply out the probabilities, instead of one fused operation.
        probabilities: (N, H, S, C) of each layer when `eager`.
    """

    rows: int
    cache: Cache | None = None
    past: int = 0
    mask: Tensor | None = None
    soft: Sequence[tuple[Tensor, Tensor]] = ()
    segments: Tensor | None = None
    eager: bool = False
    probabilities: dict[int, Tensor] = field(default_factory=dict)
    _finished: dict[tuple[int, torch.device], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.dim() == 2 and bool(self.mask.all()):
            self.mask = None  # nothing is padded, and the causal shortcuts are open

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(self.rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (N, heads, S, K)
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)
        length, context = q.shape[2], k.shape[2]
        key = (context, q.device)
        if key not in self._finished:
            self._finished[key] = self._finish(length, context, q.device)
        mask = self._finished[key]
        if self.soft:
            k, v = (
                torch.cat((a.to(b.dtype).transpose(0, 1).expand(len(b), -1, -1, -1), b), 2)
                for a, b in zip(self.soft[layer], (k, v), strict=True)
            )
            assert mask is not None
            mask = F.pad(mask, (len(self.soft[layer][0]), 0), value=mask.dtype == torch.bool)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        if self.eager:
            out = self._multiply(layer, q, k, v, mask)
        else:
            causal = mask is None and length > 1
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def _finish(self, length: int, context: int, device: torch.device) -> Tensor | None:
        """The mask over all `context` keys; None where each token simply sees every key up to its own."""
        mask = self.mask
        if mask is not None and mask.dim() == 4:
            mask = mask[..., :context].to(device)
            return mask if mask.is_floating_point() else mask.bool()
        plain = mask is None and self.segments is None and not self.soft
        if plain and context == self.past + length and (length == 1 or self.past == 0) and not self.eager:
            return None
        place = torch.arange(self.past, self.past + length, device=device)[:, None]
        key = torch.arange(context, device=device)[None]
        seen = (key <= place)[None]
        if self.segments is not None:
            segments = self.segments.to(device)
            seen = seen & (segments[:, :, None] == segments[:, None, :])
        if mask is not None:
            if mask.shape != (self.rows, self.past + length):
                raise RequestError(
                    f"attention_mask is {tuple(mask.shape)}, but {self.rows} rows of {length} new tokens after "
                    f"{self.past} cached ones need {(self.rows, self.past + length)}"
                )
            counts = F.pad(mask.to(device).bool(), (0, context - mask.shape[1]))
            # A padding token sees itself, so that no softmax is over nothing.
            seen = (seen & counts[:, None, :]) | (key == place)[None]
        return seen[:, None]

    def _multiply(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).float()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights: Tensor = scores.softmax(-1).to(q.dtype)
        self.probabilities[layer] = weights
        return weights @ v
