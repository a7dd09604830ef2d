"""One step's work as plain arrays, the same for every runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanlin.engine.scheduler import Scheduled
from hanlin.engine.sequence import Adapter, arange_positions

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
        counts = np.asarray([n for _, n in scheduled], np.int64)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        first = np.asarray([s.computed for s, _ in scheduled], np.int64)
        soft = np.asarray([s.soft_len for s, _ in scheduled], np.int64)
        table = np.zeros((len(scheduled), max(len(s.blocks) for s, _ in scheduled)), np.int32)
        ids: list[int] = []
        rows: list[int] = []
        states: list[int] = []
        for index, (sequence, count) in enumerate(scheduled):
            last = sequence.computed + count
            ids += sequence.tokens(sequence.computed, last)
            table[index, : len(sequence.blocks)] = sequence.blocks
            wanted = states if sequence.pool in ("last", "mean") else rows
            end = int(starts[index + 1])
            if sequence.needs_all:
                wanted += range(end - count, end)
            elif last >= len(sequence):  # the last known token, and every guess behind it
                wanted += range(end - 1 - (last - len(sequence)), end)
        owner = np.repeat(np.arange(len(scheduled)), counts)
        place = np.arange(starts[-1]) + np.repeat(first - starts[:-1], counts)  # of each token in its sequence
        lengths = np.asarray([s.rope_length for s, _ in scheduled], np.int64)
        soft_places = np.arange(soft.max())
        begun = [_slots(table, i, soft_places, block_size) for i in np.flatnonzero((soft > 0) & (first == 0))]
        embeddings, embedding_rows = _given(scheduled, starts)
        return cls(
            ids=np.asarray(ids, np.int32),
            positions=_positions(scheduled, place),
            rope_lengths=np.repeat(lengths, counts) if lengths.any() else None,
            slots=_slots(table, owner, place + soft[owner], block_size),
            query_start=starts,
            context=(soft + first + counts).astype(np.int32),
            block_table=table,
            prefix_lens=np.asarray([s.prefix_len and s.soft_len + s.prefix_len for s, _ in scheduled], np.int32),
            soft_slots=np.asarray(begun, np.int64).reshape(len(begun), int(soft.max())),
            rows=np.asarray(rows, np.int32),
            states=np.asarray(states, np.int32),
            block_size=block_size,
            adapters=tuple(s.adapter for s, _ in scheduled) if any(s.adapter for s, _ in scheduled) else (),
            embeddings=embeddings,
            embedding_rows=embedding_rows,
        )


def _positions(scheduled: Scheduled, place: NDArray[np.int64]) -> NDArray[np.int64]:
    if all(s.positions is arange_positions for s, _ in scheduled):
        return place[None]
    return np.concatenate([s.positions(s.computed, s.computed + n) for s, n in scheduled], axis=1)


def _slots(table: NDArray[np.int32], owner: Any, place: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The slots of places in sequences; `owner` says whose, by its row of the table."""
    blocks: NDArray[np.int64] = table[owner, place // size].astype(np.int64)
    return blocks * size + place % size


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
