"""What a model sees: images to embeddings, each once, and messages that name files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanlin import images
from hanlin.engine.sequence import Given
from hanlin.kernels.native import Context, Kind, PackedWeight
from hanlin.models.eva import Dense

__all__ = ["Vision", "opened"]

_KEPT = 64  # images; their embeddings are 0.5 MB each for VisualGLM-6B


class Vision:
    """A model's image encoder. Images are encoded one at a time, each once for as long as it is remembered; an image's
    embeddings depend on nothing but its bytes. May be used from several threads.

    Args:
        encoder: (1, 3, size, size) -> (1, tokens, D).
        context: multiplies by the large matrices, if not torch: then no number of threads changes a bit.
    """

    def __init__(self, encoder: nn.Module, size: int, context: Context | None) -> None:
        self._encoder, self._size = encoder, size
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[NDArray[np.float32], bytes]] = OrderedDict()
        if context is not None:
            for module in encoder.modules():
                for name, child in list(module.named_children()):
                    if isinstance(child, Dense):
                        setattr(module, name, NativeDense(child, context))
        place = next(encoder.parameters())
        self._device, self._dtype = place.device, place.dtype

    @property
    def kept(self) -> int:
        """How many images are remembered."""
        return len(self._known)

    def given(self, start: int, data: bytes) -> Given:
        """An image file in the place of the tokens from `start` on.

        Raises:
            RequestError: what `images.pixels` refuses.
        """
        name = blake2b(data, digest_size=32).digest()
        with self._lock:
            if name not in self._known:
                rows = self._encode(images.pixels(data, self._size))
                self._known[name] = rows, blake2b(rows.tobytes(), digest_size=32).digest()
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(name)
            rows, key = self._known[name]
        return Given(start, rows, key)

    @torch.inference_mode()
    def _encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        x = torch.from_numpy(pixels)[None].to(self._device, self._dtype)
        rows = cast(Tensor, self._encoder(x))[0].float().cpu().contiguous().numpy()
        rows.flags.writeable = False
        return rows


class NativeDense(nn.Module):
    """A `Dense` whose weight is packed for the CPU library; it takes the memory's place."""

    def __init__(self, dense: Dense, context: Context) -> None:
        super().__init__()
        kind = Kind.F32 if dense.weight.dtype == torch.float32 else Kind.BF16
        self._context = context
        self._weight = PackedWeight(kind, dense.out_features, dense.in_features)
        context.pack(self._weight, dense.weight.detach().contiguous())
        self._bias = dense.bias.detach().float().contiguous()
        dense.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float().flatten(0, -2).contiguous()
        out = torch.empty(len(rows), self._weight.out)
        self._context.linear(self._weight, rows, bias=self._bias, out=out)
        return out.view(*x.shape[:-1], -1)


def opened(messages: Any) -> Any:
    """Messages, or conversations of them, with what names a file or is Pillow's replaced by the image's bytes.

    For callers on this machine only: what a request from elsewhere says is never taken for a file's name.

    Raises:
        RequestError: no such file, or something that is no image.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        return messages
    return [_opened(item) if isinstance(item, Mapping) else opened(item) for item in messages]


def _opened(message: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        return message
    content = [
        {**part, "image": images.of(part["image"])}
        if isinstance(part, Mapping) and part.get("type") == "image" and "image" in part
        else part
        for part in parts
    ]
    return {**message, "content": content}
