"""Choosing the next token of each row, by itself: neighbours in the batch change nothing.

A row is the same whatever it was computed with, each function here sees one row of fixed length, and the random number
depends on (seed, place) alone: so a reply depends on its request alone.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from hanlin.engine.sequence import Sampled, Sequence
from hanlin.errors import EngineError, HanlinError, RequestError
from hanlin.types import SamplingParams

__all__ = ["choose", "logprob_of", "uniform"]

Row = NDArray[np.float32]
Wide = NDArray[np.float64]


def choose(row: Row, sequence: Sequence, best: int) -> Sampled | HanlinError | None:
    """The next token of one sequence, given its logits (V,) and the place of the largest; None when it must end."""
    if not np.isfinite(row[best]):
        return EngineError("the model's output is not a number: its weights are broken, or overflow in this dtype")
    sampling, guide = sequence.sampling, sequence.guide
    scores = adjusted(row, sequence)
    if guide is not None and (guide.error or scores.max() == -np.inf):
        if guide.may_end and not guide.error:
            return None
        return RequestError(f"the constraint cannot be met: {guide.error or 'all that it allows is forbidden'}")
    if sampling.temperature == 0:
        token = best if scores is row else int(scores.argmax())
    else:
        token = draw(scores, sampling, uniform(sequence.seed, len(sequence)))
    if sampling.logprobs is None:
        return Sampled(token)
    return Sampled(token, *logprob_of(row, token, sampling.logprobs))


def adjusted(row: Row, sequence: Sequence) -> Row:
    """The logits after all that forbids, favours or penalises tokens; the row itself where nothing does."""
    sampling, generated = sequence.sampling, sequence.generated
    repetition = sampling.repetition_penalty != 1
    counted = sampling.presence_penalty or sampling.frequency_penalty
    too_short = sequence.stop_ids and len(generated) < sampling.min_tokens
    if not (repetition or counted or too_short or sampling.logit_bias or sequence.bad_ids or sequence.guide):
        return row
    out = row.copy()
    if repetition:
        seen = np.fromiter({*sequence.prompt, *generated}, np.int64)
        values = out[seen]
        factor = np.float32(sampling.repetition_penalty)
        out[seen] = np.where(values > 0, values / factor, values * factor)
    if counted and generated:
        counts = Counter(generated)
        ids = np.fromiter(counts, np.int64)
        times = np.fromiter(counts.values(), np.float32)
        out[ids] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * times
    for token, bias in sampling.logit_bias.items():
        out[token] += np.float32(bias)
    for bad in sequence.bad_ids:
        lead = list(bad[:-1])
        if not lead or generated[-len(lead) :] == lead:
            out[bad[-1]] = -np.inf
    stops = list(sequence.stop_ids)
    if sequence.guide is not None:  # last, so that nothing lifts it
        ends = out[stops]
        np.copyto(out, -np.inf, where=~sequence.guide.allowed)
        out[stops] = ends if sequence.guide.may_end else -np.inf
    if too_short:
        out[stops] = -np.inf
    return out


def draw(scores: Row, sampling: SamplingParams, chance: float) -> int:
    """The token at which the cumulative probability passes `chance`, after temperature, top-k, top-p and min-p."""
    count = len(scores)
    if 0 < sampling.top_k < count:
        ids = np.argpartition(scores, count - sampling.top_k)[count - sampling.top_k :]
        ids.sort()
    else:
        ids = np.arange(count)
    weights = scores[ids].astype(np.float64) / max(sampling.temperature, 1e-6)
    weights = np.exp(weights - weights.max())
    if sampling.min_p > 0:
        keep = weights >= sampling.min_p  # the largest weight is 1
        ids, weights = ids[keep], weights[keep]
    if sampling.top_p < 1:
        ids, weights = nucleus(ids, weights, sampling.top_p)
    cumulative = np.cumsum(weights)
    return int(ids[min(np.searchsorted(cumulative, chance * cumulative[-1], side="right"), len(ids) - 1)])


def nucleus(ids: NDArray[np.int64], weights: Wide, top_p: float) -> tuple[NDArray[np.int64], Wide]:
    """The smallest set of the likeliest tokens that holds `top_p` of the weight; equal weights in order of ids."""
    goal = top_p * weights.sum()
    # Few tokens usually hold the mass: look among those that could, and at all only if that was not enough.
    likely = np.flatnonzero(weights >= 1e-4)
    if weights[likely].sum() < goal:
        likely = np.arange(len(ids))
    order = likely[np.argsort(-weights[likely], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order]), goal)) + 1
    chosen = np.sort(order[:count])
    return ids[chosen], weights[chosen]


def logprob_of(row: Row, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log softmax(row)[token], and the `top` likeliest (id, log-probability), the likeliest first."""
    wide = row.astype(np.float64)
    peak = wide.max()
    norm = peak + np.log(np.exp(wide - peak).sum())
    if not top:
        return float(wide[token] - norm), ()
    top = min(top, len(row))
    ids = np.argpartition(-wide, top - 1)[:top]
    ids = ids[np.lexsort((ids, -wide[ids]))]
    return float(wide[token] - norm), tuple((int(i), float(wide[i] - norm)) for i in ids)


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) that depends on (seed, place) alone, by the counter-based generator Philox."""
    bits = np.random.Philox(key=seed & (2**128 - 1), counter=place)
    return float(np.random.Generator(bits).random())
