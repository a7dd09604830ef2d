"""Guessing the next tokens, to check several in one step.

The reply's bytes never change: every token is still chosen by the model, with its own random number, and a guess only
decides whether that takes a step of its own.

Sources: prompt lookup (Saxena 2023); speculative sampling with a draft model (Leviathan et al. 2022), here with exact
match instead of rejection, so that a seed keeps its reply.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from hanlin.engine.batch import Batch
from hanlin.engine.blocks import BlockManager
from hanlin.engine.runner import Runner
from hanlin.engine.sequence import Sequence, Status

__all__ = ["Drafter", "ModelDrafter", "PromptLookup"]

_LONGEST = 16  # guesses at once
_ROWS = 48  # rows of a step that are still nearly free
_FEW = 8  # sequences; where more decode together, a guess costs what it saves
_REST = 64  # tokens without a guess after guessing badly


class Drafter(Protocol):
    """Puts guesses into `Sequence.draft`; the engine checks as many as fit the step."""

    def propose(self, sequences: list[Sequence]) -> None:
        """`sequences` are those that decode, each with one token to compute."""


class Appetite:
    """How much to guess for one sequence: more while it goes well, nothing for a while after it went badly."""

    def __init__(self) -> None:
        self._rate, self._seen, self._resume = 0.25, (0, 0), 0

    def length(self, sequence: Sequence) -> int:
        proposed, accepted = sequence.proposed, sequence.accepted
        new, right = proposed - self._seen[0], accepted - self._seen[1]
        self._seen = (proposed, accepted)
        if new:
            self._rate = 0.6 * self._rate + 0.4 * right / new
            if self._rate < 0.15:
                self._resume = len(sequence) + _REST
                self._rate = 0.25
        if len(sequence) < self._resume:
            return 0
        left = (sequence.sampling.max_tokens or 1 << 30) - len(sequence.generated) - 1
        return max(0, min(left, _LONGEST, 2 + int(self._rate * _LONGEST)))


class Guide:
    """What a drafter keeps for each sequence, forgotten with the sequence."""

    def __init__(self) -> None:
        self._appetites: weakref.WeakKeyDictionary[Sequence, Appetite] = weakref.WeakKeyDictionary()

    def lengths(self, sequences: list[Sequence]) -> dict[Sequence, int]:
        """How many guesses each may have; together no more than a step takes lightly."""
        share = (_ROWS - len(sequences)) // max(1, len(sequences)) if len(sequences) <= _FEW else 0
        wanted = {s: self._appetites.setdefault(s, Appetite()).length(s) for s in sequences}
        return {s: min(length, share) for s, length in wanted.items()}


class PromptLookup:
    """Guesses that the text goes on as it did after the last few tokens came before: copying, quoting, code, tables."""

    def __init__(self, longest: int = 5, shortest: int = 3) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._guide = Guide()
        self._places: weakref.WeakKeyDictionary[Sequence, Index] = weakref.WeakKeyDictionary()

    def propose(self, sequences: list[Sequence]) -> None:
        for sequence, length in self._guide.lengths(sequences).items():
            index = self._places.setdefault(sequence, Index(self._sizes))
            index.read(sequence)
            sequence.draft = index.next_tokens(length) if length else []


class Index:
    """Where every run of a few tokens came last in one sequence, kept up as it grows."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def read(self, sequence: Sequence) -> None:
        """Take in what is new. The run at the very end is not entered, or it would find itself."""
        done = len(self._tokens)
        self._tokens += sequence.tokens(done, len(sequence))
        for end in range(max(done, 1), len(self._tokens)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(self._tokens[end - size : end])] = end

    def next_tokens(self, count: int) -> list[int]:
        for size in self._sizes:
            end = self._ends.get(tuple(self._tokens[-size:]))
            if end is not None:
                return self._tokens[end : end + count]
        return []


class ModelDrafter:
    """Guesses with a small model of the same vocabulary, greedily, over a pool of its own."""

    def __init__(self, runner: Runner, *, blocks: int, block_size: int, max_tokens: int) -> None:
        self._runner, self._size, self._most = runner, block_size, max_tokens
        self._blocks = BlockManager(blocks, block_size, caching=False)
        self._guide = Guide()
        self._shadows: dict[Sequence, Sequence] = {}

    def propose(self, sequences: list[Sequence]) -> None:
        for gone in [s for s in self._shadows if s.status is Status.FINISHED]:
            self._blocks.release(self._shadows.pop(gone))
        lengths = self._guide.lengths(sequences)
        active = {s: self._shadow(s) for s, length in lengths.items() if length}
        active = {s: shadow for s, shadow in active.items() if self._catch_up(shadow, lengths[s])}
        for sequence, shadow in active.items():
            sequence.draft = shadow.generated[len(sequence) - len(shadow.prompt) :]

    def _shadow(self, sequence: Sequence) -> Sequence:
        """The small model's view of a sequence, its text up to date; what it had guessed wrong is computed anew."""
        shadow = self._shadows.get(sequence)
        if shadow is None:
            shadow = Sequence(
                prompt=sequence.prompt,
                sampling=sequence.sampling,
                sink=sequence.sink,
                positions=sequence.positions,
                prefix_len=sequence.prefix_len,
            )
            self._shadows[sequence] = shadow
        same = 0
        for mine, true in zip(shadow.generated, sequence.generated, strict=False):
            if mine != true:
                break
            same += 1
        shadow.computed = min(shadow.computed, len(shadow.prompt) + same)
        shadow.generated = list(sequence.generated)
        return shadow

    def _catch_up(self, shadow: Sequence, length: int) -> bool:
        """Compute what is known and then `length` greedy tokens more; False when its pool is full."""
        if not self._blocks.extend(shadow, len(shadow) + length):
            self._blocks.release(shadow)
            return False
        for _ in range(length):
            while True:
                count = max(min(shadow.remaining, self._most), shadow.prefix_len - shadow.computed)
                logits = self._runner.run(Batch.build([(shadow, count)], self._size)).logits
                shadow.computed += count
                if not shadow.remaining:
                    break
            shadow.generated.append(int(logits[-1].argmax()))
        return True
