"""Who computes how many tokens in the next step. It knows no family, no phase and no memory but blocks."""

from __future__ import annotations

from collections import deque

from hanlin.engine.blocks import BlockManager
from hanlin.engine.sequence import Sequence, Status

__all__ = ["Scheduled", "Scheduler"]

Scheduled = list[tuple[Sequence, int]]

# Rows of logits are (rows, V) float32: 256 of them are 95 MB for V = 92,544.
_SCORED_ROWS = 256


class Scheduler:
    """First come, first served, with chunked prompts and recomputation of the latest when blocks run out.

    Prompt, chunk, decode and draft-verify differ in the number of tokens only; the first `prefix_len` tokens of a
    sequence are never split over two steps.
    """

    def __init__(self, blocks: BlockManager, *, max_sequences: int, max_step_tokens: int) -> None:
        assert max_sequences >= 1 and max_step_tokens >= 1
        self.blocks = blocks
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give its blocks back."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        self.blocks.release(sequence)
        sequence.status = Status.FINISHED

    def schedule(self, prompt_tokens: int | None = None) -> Scheduled:
        """Choose the next step: running sequences, oldest first, then new ones as blocks and places allow.

        While somebody decodes, all prompts together get `prompt_tokens` at most, so that he does not wait long.
        """
        chosen: Scheduled = []
        budget = self.max_step_tokens
        decoding = sum(s.remaining == 1 for s in self.running)
        if decoding and prompt_tokens is not None:
            budget = min(budget, decoding + max(1, prompt_tokens))
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:  # preempted for an older one just now
                continue
            one = sequence.remaining == 1
            decoding -= one
            # a long prompt leaves room for the younger ones that only decode
            tokens = self._tokens(sequence, budget if one else budget - decoding)
            if tokens and self._make_room(sequence, sequence.computed + tokens, chosen):
                budget -= tokens
                if one:
                    guesses = self._guesses(sequence, budget - decoding)
                    budget -= guesses
                    tokens += guesses
                chosen.append((sequence, tokens))
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            newcomer = next((s for s in self.waiting if s.ready()), None)
            if newcomer is None or not self._admit(newcomer, budget):
                break
            tokens = self._tokens(newcomer, budget)
            chosen.append((newcomer, tokens))
            budget -= tokens
        assert chosen or self.idle or not any(s.ready() for s in self.waiting), "nobody can proceed"
        return chosen

    def _tokens(self, sequence: Sequence, budget: int) -> int:
        whole = max(0, sequence.prefix_len - sequence.computed)
        if whole > budget:
            # A prefix longer than any step's budget is computed alone rather than never.
            return whole if budget == self.max_step_tokens else 0
        limit = min(budget, _SCORED_ROWS) if sequence.score_prompt else budget
        return max(whole, min(sequence.remaining, limit))

    def _guesses(self, sequence: Sequence, budget: int) -> int:
        """How much of its draft a decoding sequence may check: never at the cost of anybody's blocks or budget."""
        spare = self.blocks.free - len(self.running)
        room = (len(sequence.blocks) + max(0, spare)) * self.blocks.size - sequence.soft_len - len(sequence)
        del sequence.draft[max(0, min(budget, room)) :]
        self.blocks.extend(sequence, len(sequence) + len(sequence.draft))
        return len(sequence.draft)

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        if not sequence.blocks:
            self.blocks.adopt(sequence, self.blocks.find(sequence))
        tokens = self._tokens(sequence, budget)
        # A newcomer leaves one block for each running sequence to grow into, lest it be preempted at once.
        spare = len(self.running)
        fits = self.blocks.need(sequence, len(sequence)) + spare <= self.blocks.free
        if not tokens or (self.running and not fits) or not self.blocks.extend(sequence, sequence.computed + tokens):
            self.blocks.release(sequence)
            return False
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return True

    def _make_room(self, sequence: Sequence, tokens: int, chosen: Scheduled) -> bool:
        """Give `sequence` blocks for `tokens` tokens, taking them from the latest arrivals; False if it had to go."""
        while not self.blocks.extend(sequence, tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
            assert all(other is not victim for other, _ in chosen), "an older sequence was preempted for a younger one"
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        sequence.status = Status.WAITING
        sequence.draft = []
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)
