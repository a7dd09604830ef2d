"""One step's work as plain arrays, the same for every runner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanlin.engine.scheduler import Scheduled
from hanlin.engine.sequence import Adapter

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """T packed tokens of S sequences.

    Attributes:
        ids: (T,) int32.
        positions: (P, T) int64.
        rope_lengths: (T,) int64, 0 where nothing depends on it; None when that is so everywhere.
        slots: (T,) int64, where in the pool each token's key and value go: block * block_size + place.
        query_start: (S + 1,) int32, where each sequence's tokens start in the packed row.
        context: (S,) int32, keys of each sequence, this step's included.
        block_table: (S, most blocks) int32, padded with 0.
        prefix_lens: (S,) int32, keys that see each other both ways.
        rows: (R,) int32, the packed rows whose logits are wanted.
        soft_slots: (N, P) int64, where the model's soft prefix goes of every sequence that begins.
        states: (N,) int32, those whose hidden states are wanted instead.
        adapters: (S,) of each sequence; empty when none has one.
        embeddings: (E, D) float32, what is given in place of embeddings; None for nothing.
        embedding_rows: (T,) int32, which of them is each token's, -1 for none.
    """

    ids: NDArray[np.int32]
    positions: NDArray[np.int64]
    rope_lengths: NDArray[np.int64] | None
    slots: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context: NDArray[np.int32]
    block_table: NDArray[np.int32]
    prefix_lens: NDArray[np.int32]
    rows: NDArray[np.int32]
    states: NDArray[np.int32]
    soft_slots: NDArray[np.int64]
    block_size: int
    adapters: tuple[Adapter | None, ...] = ()
    embeddings: NDArray[np.float32] | None = None
    embedding_rows: NDArray[np.int32] | None = None

    @classmethod
    def build(cls, scheduled: Scheduled, block_size: int) -> Batch:
        """Lay out what the scheduler chose. Of each sequence all rows are wanted, or those that end the known text."""
        counts = [n for _, n in scheduled]
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        ids: list[int] = []
        slots, positions, lengths = [], [], []
        soft: list[NDArray[np.int64]] = []
        rows: list[NDArray[np.int64]] = []
        states: list[NDArray[np.int64]] = []
        table = np.zeros((len(scheduled), max(len(s.blocks) for s, _ in scheduled)), np.int32)
        for index, (sequence, count) in enumerate(scheduled):
            first, last = sequence.computed, sequence.computed + count
            ids += sequence.tokens(first, last)
            table[index, : len(sequence.blocks)] = sequence.blocks
            slots.append(_slots(table[index], sequence.soft_len + first, sequence.soft_len + last, block_size))
            if sequence.soft_len and not first:
                soft.append(_slots(table[index], 0, sequence.soft_len, block_size))
            positions.append(sequence.positions(first, last))
            lengths.append(np.full(count, sequence.rope_length, np.int64))
            wanted = states if sequence.pool in ("last", "mean") else rows
            if sequence.needs_all:
                wanted.append(np.arange(starts[index], starts[index + 1]))
            elif last >= len(sequence):  # the last known token, and every guess behind it
                wanted.append(np.arange(starts[index + 1] - 1 - (last - len(sequence)), starts[index + 1]))
        rope = np.concatenate(lengths)
        embeddings, embedding_rows = _given(scheduled, starts)
        return cls(
            ids=np.asarray(ids, np.int32),
            positions=np.concatenate(positions, axis=1),
            rope_lengths=rope if rope.any() else None,
            slots=np.concatenate(slots),
            query_start=starts,
            context=np.asarray([s.soft_len + s.computed + n for s, n in scheduled], np.int32),
            block_table=table,
            prefix_lens=np.asarray([s.prefix_len and s.soft_len + s.prefix_len for s, _ in scheduled], np.int32),
            soft_slots=np.stack(soft) if soft else np.zeros((0, 0), np.int64),
            rows=_joined(rows),
            states=_joined(states),
            block_size=block_size,
            adapters=tuple(s.adapter for s, _ in scheduled) if any(s.adapter for s, _ in scheduled) else (),
            embeddings=embeddings,
            embedding_rows=embedding_rows,
        )


def _slots(blocks: NDArray[np.int32], first: int, last: int, size: int) -> NDArray[np.int64]:
    """The slots of places first..last of a sequence."""
    place = np.arange(first, last)
    return blocks[place // size].astype(np.int64) * size + place % size


def _given(
    scheduled: Scheduled, starts: NDArray[np.int32]
) -> tuple[NDArray[np.float32] | None, NDArray[np.int32] | None]:
    """`Batch.embeddings` and `Batch.embedding_rows`."""
    rows, parts, count = np.full(starts[-1], -1, np.int32), [], 0
    for (sequence, tokens), start in zip(scheduled, starts, strict=False):
        for given in sequence.given:
            first = max(given.start, sequence.computed)
            last = min(given.start + len(given.rows), sequence.computed + tokens)
            if first < last:
                parts.append(given.rows[first - given.start : last - given.start])
                place = start + first - sequence.computed
                rows[place : place + last - first] = np.arange(count, count + last - first)
                count += last - first
    return (np.concatenate(parts), rows) if parts else (None, None)


def _joined(rows: list[NDArray[np.int64]]) -> NDArray[np.int32]:
    return np.concatenate(rows).astype(np.int32) if rows else np.zeros(0, np.int32)
