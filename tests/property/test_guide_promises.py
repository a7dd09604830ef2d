"""A constrained reply meets its constraint unless it is cut, and is the same however it was computed."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_promises import RUNNER_PARAMS, RUNNERS, answer, request, run

from hanlin.calls import Calls
from hanlin.engine.engine import Engine, EngineLimits
from hanlin.engine.sequence import Sampled, Sequence
from hanlin.errors import RequestError
from hanlin.guide import Grammars
from hanlin.tokenizers import HFTokenizer, SentencePieceTokenizer
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.types import Constraint, SamplingParams, Tool
from tokenizer_samples import tiny_json, tiny_spm

VOCABULARY = 288  # more than any of these tokenizers has
TOKENIZERS = {
    "spm": lambda: SentencePieceTokenizer(tiny_spm()),
    "spm-prefix": lambda: SentencePieceTokenizer(tiny_spm(dummy_prefix=True)),
    "spm-collapse": lambda: SentencePieceTokenizer(tiny_spm(dummy_prefix=True, remove_extra_spaces=True)),
    "bpe": lambda: HFTokenizer(tiny_json()),
}


@functools.cache
def tokenizer_of(kind: str) -> BaseTokenizer:
    return TOKENIZERS[kind]()


@functools.cache
def grammars_of(kind: str) -> Grammars:
    tokenizer = tokenizer_of(kind)
    return Grammars(tokenizer.table, tokenizer.encode, VOCABULARY)


def guided(kind: str, constraint: Constraint, model: Any, sampling: SamplingParams, seed: int) -> Sequence:
    matcher = grammars_of(kind).compile(constraint).matcher()
    sequence = request([5, 6, 7, 8], sampling, model, stop_ids=frozenset({260 if kind == "bpe" else 2}), guide=matcher)
    sequence.seed = seed
    return sequence


def engine_of(model: Any, make: Any, drafter: Any = None, blocks: int = 40) -> Engine:
    limits = EngineLimits(blocks=blocks, block_size=16, max_context=256)
    return Engine(make(model, blocks, 16), limits, drafter)


class Guesser:
    """A drafter that knows what is coming, most of the time."""

    def __init__(self, truth: dict[Sequence, list[int]]) -> None:
        self.truth, self.rng = truth, np.random.default_rng(1)

    def propose(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            told = self.truth[sequence][len(sequence.generated) :][: self.rng.integers(0, 5)]
            sequence.draft = [t if self.rng.random() < 0.8 else int(self.rng.integers(0, VOCABULARY)) for t in told]


NAMES = st.sampled_from(["a", "ab", "你好", "b c", 'q"t', "x\\y\n"])
LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.integers(0, 5).map(lambda n: {"type": "string", "maxLength": n}),
    st.tuples(st.integers(-50, 50), st.integers(0, 100)).map(
        lambda r: {"type": "integer", "minimum": r[0], "maximum": r[0] + r[1]}
    ),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["integer", "null"], "multipleOf": 3, "minimum": -30, "maximum": 300},
            {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2},
            {"enum": ["a", 1, None, "你好", [1, "b"]]},
            {"const": {"a": ["ab", 2.5]}},
            {"type": "string", "pattern": "^[ab]{1,3}$"},
            {"type": "string", "format": "date"},
        ]
    ),
)


def branches(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda a: {"type": "array", "items": a[0], "minItems": a[1], "maxItems": a[1] + a[2]}
    )
    objects = st.tuples(st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 7)).map(
        lambda o: {
            "type": "object",
            "properties": o[0],
            "required": [name for i, name in enumerate(o[0]) if o[1] >> i & 1],
            "additionalProperties": False,
        }
    )
    choices = st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several})
    return st.one_of(arrays, objects, choices)


SCHEMAS = st.recursive(LEAVES, branches, max_leaves=5).map(lambda schema: Constraint("json_schema", schema))
EXPRESSIONS = st.sampled_from(
    [r"\d{3}-\d{4}", r"[ab]{0,9}", r"(a|ab)(你好|\n| )*", r"(?i)yes|no", r"[^a]{2,5}", r" ?a +b", r"/\*.{0,3}\*/"]
).map(lambda text: Constraint("regex", text))
CHOICES = st.lists(NAMES, min_size=1, max_size=4).map(lambda texts: Constraint("choice", texts))
CONSTRAINTS = st.one_of(SCHEMAS, EXPRESSIONS, CHOICES, st.just(Constraint("json_object")))


def check(constraint: Constraint, text: str) -> None:
    """Raises unless the text meets the constraint."""
    value = constraint.value
    if constraint.kind in ("json_schema", "json_object"):
        schema = json.loads(str(value)) if value else {"type": "object"}
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    elif constraint.kind == "choice":
        assert text in value
    else:
        assert re.fullmatch(str(value), text), (value, text)


def text_of(kind: str, sequence: Sequence) -> str:
    ids = [i for i in sequence.generated if i not in sequence.stop_ids]
    return tokenizer_of(kind).decode(ids, skip_special=False)


SAMPLINGS = st.sampled_from(
    [
        SamplingParams(temperature=1.0, max_tokens=60),
        SamplingParams(temperature=1.0, top_p=0.8, max_tokens=60, logit_bias={2: 100.0, 70: 1e6}),
        SamplingParams(temperature=0.0, max_tokens=40, repetition_penalty=1.3, min_tokens=3),
        SamplingParams(temperature=2.0, top_k=5, max_tokens=60, ignore_eos=True, logprobs=1),
    ]
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("runner", [p for p in RUNNER_PARAMS if p.id in ("torch-float32", "float32")])
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(constraints=st.lists(CONSTRAINTS, min_size=1, max_size=3), sampling=SAMPLINGS, seed=st.integers(0, 2**40))
def test_replies_meet_their_constraints(
    tiny: Any, kind: str, runner: str, constraints: list[Constraint], sampling: SamplingParams, seed: int
) -> None:
    dtype, make = RUNNERS[runner]
    model = tiny("internlm2", dtype, vocab_size=VOCABULARY)
    alone = []
    for constraint in constraints:
        engine = engine_of(model, make)
        sequence = guided(kind, constraint, model, sampling, seed)
        if sampling.ignore_eos:
            sequence.stop_ids = frozenset()
        engine.add(sequence)
        run(engine)
        alone.append(sequence)
        text = text_of(kind, sequence)
        if sequence.finish_reason == "stop":
            check(constraint, text)
        else:
            assert sequence.finish_reason == "length" and len(sequence.generated) == sampling.max_tokens
        assert not set(sequence.generated[:-1]) & sequence.stop_ids
    together = [guided(kind, constraint, model, sampling, seed) for constraint in constraints]
    for sequence, other in zip(together, alone, strict=True):
        sequence.stop_ids = other.stop_ids
    truth = {mine: other.generated for mine, other in zip(together, alone, strict=True)}
    engine = engine_of(model, make, Guesser(truth), blocks=7)  # too few: some are preempted
    for sequence in together:
        engine.add(sequence)
    run(engine)
    assert [answer(sequence) for sequence in together] == [answer(sequence) for sequence in alone]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_most_replies_come_to_an_end(tiny: Any, kind: str) -> None:
    """The property above would hold of replies that are all cut."""
    model = tiny("internlm2", vocab_size=VOCABULARY)
    schema = {
        "type": "object",
        "properties": {"ab": {"type": "array", "items": {"enum": ["你好", "a"]}, "maxItems": 3}, "b": {"const": " b"}},
        "required": ["ab", "b"],
        "additionalProperties": False,
    }
    _, make = RUNNERS["torch-float32"]
    engine, ended = engine_of(model, make), 0
    for constraint in (Constraint("json_schema", schema), Constraint("choice", ["a b", "你好吗"])):
        several = [guided(kind, constraint, model, SamplingParams(max_tokens=200), seed) for seed in range(4)]
        for sequence in several:
            engine.add(sequence)
        run(engine)
        for sequence in several:
            check(constraint, text_of(kind, sequence))
        ended += sum(sequence.finish_reason == "stop" for sequence in several)
    assert ended == 8


def test_logprobs_are_the_models_own(tiny: Any) -> None:
    model = tiny("internlm2", vocab_size=VOCABULARY)
    _, make = RUNNERS["torch-float32"]
    free, bound = engine_of(model, make), engine_of(model, make)
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=3)
    without = request([5, 6, 7, 8], sampling, model)
    free.add(without)
    run(free)
    with_guide = guided("spm", Constraint("choice", ["你好"]), model, sampling, 0)
    bound.add(with_guide)
    run(bound)
    (one,), (other,) = without.sink.got, with_guide.sink.got  # type: ignore[attr-defined]
    assert isinstance(one, Sampled) and one.top == other.top and other.logprob < one.logprob


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.text(max_size=6),
                st.sampled_from(
                    "type json json_schema schema regex choice grammar $ref multipleOf function name".split()
                ),
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=JSON, option=st.sampled_from(["response_format", "structured_outputs", "guided_json", "guided_grammar"]))
def test_reading_requests_raises_nothing_else(value: Any, option: str) -> None:
    for read in (
        lambda: Constraint.take({option: value}),
        lambda: Calls.take((Tool(name="a"),), {"tool_choice": value, "parallel_tool_calls": value}),
        lambda: Constraint("json_schema", value),
    ):
        try:
            read()
        except RequestError as error:
            assert str(error)
