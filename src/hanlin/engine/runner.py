"""What computes a step: the interface, and the plain torch one that runs the loaded module itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanlin.engine.attend import KVPool, PagedAttend
from hanlin.engine.batch import Batch
from hanlin.engine.sequence import Adapter
from hanlin.layers.embedding import Embedding
from hanlin.layers.invariant import make_invariant
from hanlin.layers.lora import LowRank, RowAdapters, attach
from hanlin.layers.rope import Positions
from hanlin.models.config import DecoderConfig
from hanlin.models.parts import HasParts, ModelParts
from hanlin.models.registry import Decoder

__all__ = ["Output", "Runner", "TorchRunner", "kv_bytes", "soft_prefix"]


class Output(NamedTuple):
    """Logits (R, V) of the rows, and hidden states (N, D) after the final norm, that a batch wants; float32."""

    logits: NDArray[np.float32]
    hidden: NDArray[np.float32]


class Runner(Protocol):
    """Computes steps over a pool of its own.

    `run` may be called from one thread at a time; the result is the caller's.
    """

    name: str
    vocab_size: int
    weight_bytes: int
    block_bytes: int  # of one block in all layers
    soft_len: int  # slots of the model's soft prefix, in front of every sequence's tokens

    def run(self, batch: Batch) -> Output:
        """Compute the batch's tokens."""

    def adapt(self, additions: Mapping[str, LowRank]) -> Adapter:
        """Additions by the name of a linear layer, in this runner's form. May be called from any thread, any time."""

    def close(self) -> None:
        """Give the pool back."""


@torch.inference_mode()
def soft_prefix(parts: ModelParts) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (P, G, K) of the model's soft prefix in every layer; empty when it has none."""
    return parts.prefix() if parts.prefix is not None else []


def kv_bytes(config: DecoderConfig, itemsize: float) -> int:
    """Bytes that one token takes in the pool."""
    return int(2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize)


class TorchRunner:
    """Runs the module: any device, any dtype; row-invariant on CPU when asked to be."""

    name = "torch"

    def __init__(self, model: nn.Module, *, blocks: int, block_size: int, invariant: bool) -> None:
        self._model = cast(Decoder, model)
        config = self._model.config
        weight = next(model.parameters())
        self.device, self.vocab_size = weight.device, config.vocab_size
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        self.block_bytes = kv_bytes(config, weight.dtype.itemsize) * block_size
        self.invariant = invariant and self.device.type == "cpu"
        if self.invariant:
            make_invariant(model)
        self._rows: RowAdapters | None = None
        parts = cast(HasParts, model).parts()
        self._embedding, self._soft = cast(Embedding, parts.embedding), soft_prefix(parts)
        self.soft_len = len(self._soft[0][0]) if self._soft else 0
        self._pool = KVPool(
            layers=config.num_layers,
            blocks=blocks,
            block_size=block_size,
            kv_heads=config.num_kv_heads,
            size=config.head_dim,
            dtype=weight.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def run(self, batch: Batch) -> Output:
        ids, rows, slots, places = (
            torch.from_numpy(x).to(self.device) for x in (batch.ids, batch.rows, batch.slots, batch.positions)
        )
        lengths = None if batch.rope_lengths is None else torch.from_numpy(batch.rope_lengths).to(self.device)
        attend = PagedAttend(self._pool, batch, slots, self.invariant)
        for mine in torch.from_numpy(batch.soft_slots).to(self.device):
            for layer, (k, v) in enumerate(self._soft):
                self._pool.k[layer][mine], self._pool.v[layer][mine] = k, v
        self._embedding.given = None
        if batch.embeddings is not None and batch.embedding_rows is not None:
            at = torch.from_numpy(np.flatnonzero(batch.embedding_rows >= 0)).to(self.device)
            self._embedding.given = at, torch.from_numpy(batch.embeddings).to(self.device)
        owners = np.repeat(np.arange(len(batch.context)), np.diff(batch.query_start))
        with self._told(batch, owners):
            hidden = self._model(ids, Positions(places, lengths), attend)
        states = hidden[torch.from_numpy(batch.states).to(self.device).long()].float().cpu().numpy()
        if not len(rows):
            return Output(np.zeros((0, self.vocab_size), np.float32), states)
        with self._told(batch, owners[batch.rows]):
            return Output(self._model.head(hidden[rows.long()]).cpu().numpy(), states)

    def adapt(self, additions: Mapping[str, LowRank]) -> Adapter:
        held = {name: low.to(self.device) for name, low in additions.items()}
        return Adapter(held=held, nbytes=sum(low.down.nbytes + low.up.nbytes for low in held.values()))

    @contextmanager
    def _told(self, batch: Batch, owners: NDArray[np.int64]) -> Iterator[None]:
        """Within it, the leaves know which rows of the call are whose: owners (rows,), a sequence each."""
        if not batch.adapters:
            yield
            return
        if self._rows is None:
            self._rows = RowAdapters()
            attach(cast(nn.Module, self._model), self._rows)
        runs, start = [], 0
        for adapter, rows in groupby(owners, lambda owner: batch.adapters[owner]):
            end = start + sum(1 for _ in rows)
            if adapter is not None:
                runs.append((start, end, adapter.held))
            start = end
        self._rows.runs = runs
        try:
            yield
        finally:
            self._rows.runs = ()

    def close(self) -> None:
        del self._pool
