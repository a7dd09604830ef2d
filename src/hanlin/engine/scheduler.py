"""Who computes how many tokens in the next step. It knows no family, no phase and no memory but blocks."""

from __future__ import annotations

import itertools
from collections import deque

from hanlin.engine.blocks import BlockManager
from hanlin.engine.sequence import Sequence, Status

__all__ = ["Scheduled", "Scheduler"]

Scheduled = list[tuple[Sequence, int]]

# Rows of logits are (rows, V) float32: 256 of them are 95 MB for V = 92,544.
_SCORED_ROWS = 256
# Tokens of prompts that are computed at once even where steps are to be shorter: most questions are no longer.
_SHORT = 96
# So many times the budget are short prompts given that can be computed whole: a prompt's tokens cost a quarter less in
# large steps, and who waits for a first token waits less. Those who decode wait longer, but less often.
_TOGETHER = 3


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
        self._hurried = False  # whether the last step was for short prompts alone

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def decoding(self) -> int:
        """Running sequences whose prompts are computed."""
        return sum(s.remaining == 1 for s in self.running)

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

        All prompts together get `prompt_tokens` at most, so that nobody waits long for the next step.
        """
        chosen: Scheduled = []
        budget = self.max_step_tokens
        decoding = self.decoding
        if prompt_tokens is not None:
            budget = min(budget, decoding + max(1, prompt_tokens))
        shares = self._shares(max(0, budget - decoding), max(0, self.max_step_tokens - decoding))
        spare = budget - decoding - sum(shares.values())  # for guesses
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:  # preempted for an older one just now
                continue
            one = sequence.remaining == 1
            tokens = int(len(chosen) < self.max_step_tokens) if one else shares.get(sequence, 0)
            if tokens and self._make_room(sequence, sequence.computed + tokens, chosen):
                if one:
                    guesses = self._guesses(sequence, spare)
                    spare -= guesses
                    tokens += guesses
                chosen.append((sequence, tokens))
        for newcomer in [s for s in self.waiting if shares.get(s, 0)]:
            if len(self.running) >= self.max_sequences or not self._admit(newcomer, shares[newcomer]):
                break  # nobody overtakes one who waits for blocks
            chosen.append((newcomer, self._tokens(newcomer, shares[newcomer])))
        if self._hurried and not chosen:  # the short ones wait for blocks
            return self.schedule(prompt_tokens)
        assert chosen or self.idle or not any(s.ready() for s in self.waiting), "nobody can proceed"
        return chosen

    def _shares(self, budget: int, most: int) -> dict[Sequence, int]:
        """How many tokens of its prompt each sequence may compute: half of the budget for the oldest, the rest for the
        shortest first; and every other step is for short ones alone, if there are any. So a short prompt does not wait
        for the long ones before it, and no long one waits for ever.
        """
        hurried, self._hurried = self._hurried, False
        places = max(0, self.max_sequences - len(self.running))
        waiting = itertools.islice((s for s in self.waiting if s.ready()), places)
        needs = {s: s.remaining for s in self.running if s.remaining > 1}
        needs |= {s: len(s) - self.blocks.size * len(self.blocks.find(s)) for s in waiting}
        if not needs or not budget:
            return {}
        short = self._short(needs, min(most, max(_TOGETHER * budget, _SHORT)))
        self._hurried = not hurried and bool(short)
        if self._hurried:
            return short
        oldest = next(iter(needs))
        shares = {oldest: self._tokens(oldest, -(-budget // 2) if len(needs) > 1 else budget)}
        if not shares[oldest]:  # a prefix that is computed in one step, or never
            shares[oldest] = oldest.prefix_len - oldest.computed
        left = budget - shares[oldest]
        for sequence in sorted(needs, key=needs.__getitem__):
            if left <= 0:
                break
            if sequence is oldest:
                more = self._tokens(oldest, shares[oldest] + left)
            else:
                more = self._tokens(sequence, min(left, needs[sequence]))
            left -= more - shares.get(sequence, 0)
            shares[sequence] = more
        return shares

    def _short(self, needs: dict[Sequence, int], room: int) -> dict[Sequence, int]:
        """As many of the shortest as can be computed whole in `room` tokens."""
        short: dict[Sequence, int] = {}
        for sequence in sorted(needs, key=needs.__getitem__):
            tokens = self._tokens(sequence, needs[sequence])
            room -= tokens
            if room < 0 or tokens < needs[sequence]:
                break
            short[sequence] = tokens
        return short

    def _tokens(self, sequence: Sequence, budget: int) -> int:
        whole = max(0, sequence.prefix_len - sequence.computed)
        if whole > budget:
            return 0
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
