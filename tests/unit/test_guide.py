"""Compiling constraints: what is refused, what a matcher allows, and what becomes of the odd cases."""

from __future__ import annotations

import functools
import gc
import json
import re
import threading
import weakref
from typing import Any

import jsonschema
import numpy as np
import pytest
from test_constraint import chained

from chat_samples import ByteTokenizer, parse
from hanlin.chat.chatml import ChatMLFormat
from hanlin.chat.internlm2 import InternLM2Format
from hanlin.errors import RequestError
from hanlin.guide import Grammars, Matcher
from hanlin.tokenizers import HFTokenizer, SentencePieceTokenizer
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.tokenizers.detokenizer import TokenTable
from hanlin.tokenizers.spm import known_added
from hanlin.tokenizers.spm_model import SpmModel
from hanlin.types import ChatFormat, Constraint, GuidesCalls, Tool
from tokenizer_samples import INTERNLM2, tiny_json, tiny_spm

TOOLS = (
    Tool(
        name="get_weather",
        parameters={
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "上海"]}, "unit": {"$ref": "#/$defs/unit"}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["celsius", "fahrenheit"]}},
        },
    ),
    Tool(name="now"),
    Tool(name="interpreter", kind="interpreter"),
)


@functools.cache
def internlm2() -> BaseTokenizer:
    model = SpmModel.parse(INTERNLM2.read_bytes(), INTERNLM2.name)
    return SentencePieceTokenizer(model, added=known_added(model))


def grammars(tokenizer: BaseTokenizer, size: int = 0) -> Grammars:
    return Grammars(tokenizer.table, tokenizer.encode, size or tokenizer.vocab_size)


@functools.cache
def real() -> Grammars:
    return grammars(internlm2())


@functools.cache
def bpe() -> Grammars:
    return grammars(HFTokenizer(tiny_json()))


def walk(matcher: Matcher, seed: int, most: int = 400, ends: float = 0.5) -> list[int]:
    """A reply of tokens drawn evenly from what is allowed; it ends where it may with a chance of `ends`."""
    rng, ids = np.random.default_rng(seed), []
    while len(ids) < most and not matcher.error and not (matcher.may_end and (matcher.over or rng.random() < ends)):
        ids.append(int(rng.choice(np.flatnonzero(matcher.allowed))))
        matcher.advance(ids[-1])
    return ids


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("regex", r"(?=a)b"), "look-around"),
        (Constraint("regex", r"(a)\1"), "backreferences"),
        (Constraint("regex", r"[^\s\S]"), "cannot be used"),
        (Constraint("grammar", "start: other"), 'unknown name: "other"'),
        (Constraint("grammar", "%import /etc/passwd\nstart: INT"), "Expected name"),
        (Constraint("json_schema", {"type": "text"}), "Invalid type"),
        (Constraint("json_schema", {"not": {}}), "not"),
        (Constraint("json_schema", {"type": "string", "format": "poem"}), "Unknown format: poem"),
        (Constraint("json_schema", {"$ref": "#"}), "cannot be used"),
        (Constraint("json_schema", {"type": "array", "items": False, "minItems": 1}), "nsatisfiable"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_runs(constraint: Constraint, says: str) -> None:
    with pytest.raises(RequestError, match="the constraint cannot be used") as caught:
        bpe().compile(constraint)
    assert says in str(caught.value) and "state" not in str(caught.value)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json_schema", chained(100, 4)),
        Constraint(
            "json_schema",
            {
                "$defs": {
                    str(i): {"allOf": [{"$ref": f"#/$defs/{min(i + 1, 199)}"} if i < 199 else {}, {"type": "object"}]}
                    for i in range(200)
                },
                "$ref": "#/$defs/0",
            },
        ),
        Constraint("grammar", 'start: r0\nr998: "z"\n' + "\n".join(f'r{i}: "x" r{i + 1} | "y"' for i in range(998))),
        Constraint("grammar", 'start: T0\nT998: "z"\n' + "\n".join(f'T{i}: "x" T{i + 1} | "y"' for i in range(998))),
        Constraint("json_schema", {"enum": list(range(10_000))}),
        Constraint("choice", tuple(f"value {i} 你好" for i in range(5000))),
        Constraint("regex", "(a{1,1000}){1,1000}"),
        Constraint("regex", "(a|b)*a(a|b){30}"),
    ],
    ids=["references", "allOf", "rules", "terminals", "enum", "choice", "repeats", "states"],
)
def test_the_largest_that_is_taken_neither_crashes_nor_stalls(constraint: Constraint) -> None:
    """References and rules are followed recursively: twice this many end a process with a common stack."""
    matcher = bpe().compile(constraint).matcher()
    walk(matcher, 0, 20)
    assert not matcher.error or "too" in matcher.error.lower()


def test_a_chain_is_compiled_from_a_small_thread_too() -> None:
    before, failed, go = threading.stack_size(256 << 10), [], threading.Event()

    def work() -> None:
        go.wait()
        try:
            bpe().compile(Constraint("json_schema", chained(100, 4)))
        except RequestError as error:
            failed.append(error)

    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    go.set()
    thread.join()
    assert not failed and threading.stack_size() == before


def test_what_grows_too_complex_fails_by_itself_alone() -> None:
    hard, easy = Constraint("regex", r"(\w+\s?){1,300}"), Constraint("regex", "[a-z]{1,30}")
    ends = [walk(real().compile(hard).matcher(), 1, ends=0) for _ in range(2)]
    assert ends[0] == ends[1]  # what one reply had computed does not shorten the next one
    matcher = real().compile(hard).matcher()
    walk(matcher, 0, ends=0)
    assert "too many" in matcher.error
    assert re.fullmatch("[a-z]{1,30}", internlm2().decode(walk(real().compile(easy).matcher(), 0)))


def test_stopping_is_the_end_of_the_mask() -> None:
    matcher = bpe().compile(Constraint("choice", ("ab", "abb"))).matcher()
    assert not matcher.may_end and matcher.allowed.sum() == 1  # "ab": what is forced, as the tokenizer writes it
    assert not matcher.advance(next(i for i, t in enumerate(HFTokenizer(tiny_json()).table.texts) if t == b"ab"))
    assert matcher.may_end and matcher.allowed.sum() == 1
    assert matcher.advance(int(np.flatnonzero(matcher.allowed)[0])) and matcher.over
    empty = bpe().compile(Constraint("regex", "")).matcher()
    assert empty.over


def test_ids_of_no_text_and_of_structure_are_never_allowed() -> None:
    tokenizer = HFTokenizer(tiny_json(), rows=300)
    matcher = grammars(tokenizer, 320).compile(Constraint("regex", r"(?s:.)*")).matcher()
    assert matcher.allowed.shape == (320,) and matcher.may_end
    allowed = set(np.flatnonzero(matcher.allowed).tolist())
    assert not allowed & tokenizer.special_ids and max(allowed) < 263
    assert {ord("a"), 261, 262} - {i for i, t in enumerate(tokenizer.table.texts) if t == b"a"} <= allowed | {ord("a")}


def test_a_model_with_fewer_rows_than_the_tokenizer_has_ids() -> None:
    matcher = grammars(HFTokenizer(tiny_json()), 200).compile(Constraint("json_object")).matcher()
    assert matcher.allowed.shape == (200,) and matcher.allowed.any()


def test_digits_are_ascii_and_words_are_not() -> None:
    ids = walk(real().compile(Constraint("regex", r"\d{2,40}[\d]")).matcher(), 3)
    assert internlm2().decode(ids).isascii()
    assert real().compile(Constraint("regex", r"\w+")).matcher().allowed[internlm2().encode("你好")[0]]


def test_forced_text_is_written_as_the_tokenizer_does() -> None:
    text = 'The capital of France, "巴黎", is known.'
    matcher, ids = real().compile(Constraint("choice", (text,))).matcher(), []
    while not matcher.over:
        assert matcher.allowed.sum() >= 1
        ids += [int(np.flatnonzero(matcher.allowed)[0])] if not matcher.forced() else matcher.forced()
        for token in ids[len(ids) - (len(matcher.forced()) or 1) :]:
            matcher.advance(token)
    assert internlm2().decode(ids) == text
    assert ids == internlm2().encode(text)


@pytest.mark.parametrize("collapse", [False, True])
def test_a_tokenizer_that_drops_the_first_space(collapse: bool) -> None:
    """Replies begin with the space that it drops, as its models write them."""
    tokenizer = SentencePieceTokenizer(tiny_spm(dummy_prefix=True, remove_extra_spaces=collapse))
    compiled = grammars(tokenizer)
    for text in ("ab", "你好 a", "{}"):
        ids = walk(compiled.compile(Constraint("choice", (text,))).matcher(), 0)
        assert tokenizer.decode(ids) == text and tokenizer.table.texts[ids[0]].startswith(b" ")
    led = Constraint("choice", (" a",))
    if collapse:  # it cannot write this at all
        matcher = compiled.compile(led).matcher()
        walk(matcher, 0)
        assert "nothing that this model can write" in matcher.error
    else:
        assert tokenizer.decode(walk(compiled.compile(led).matcher(), 0)) == " a"


def test_tables_are_given_back() -> None:
    compiled = grammars(HFTokenizer(tiny_json()))
    compiled.compile(Constraint("json_object")).matcher()
    gone = weakref.ref(compiled)
    del compiled
    gc.collect()
    assert gone() is None


def test_one_grammar_gives_many_matchers() -> None:
    grammar = bpe().compile(Constraint("choice", ("a", "b")), 2)
    several = [grammar.matcher() for _ in range(4)]
    several[0].advance(int(np.flatnonzero(several[0].allowed)[0]))
    assert len({id(m) for m in several}) == 4 and all(m.allowed.sum() == 2 for m in several[1:])


def test_several_threads_compile_at_once() -> None:
    compiled, done = grammars(HFTokenizer(tiny_json())), []

    def work() -> None:
        done.append(compiled.compile(Constraint("json_object")).matcher().allowed.sum())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8 and len(set(done)) == 1


def test_tables_of_texts_equal_decoding() -> None:
    """What a table says an id adds is what decoding it gives, over whole vocabularies."""
    for tokenizer in (internlm2(), HFTokenizer(tiny_json()), SentencePieceTokenizer(tiny_spm(dummy_prefix=True))):
        table: TokenTable = tokenizer.table
        lead = tokenizer.encode("a")[-1:]
        for token, text in enumerate(table.texts):
            if token in table.special_ids or token in table.restart_ids:
                continue
            want = "a" + text.decode("utf-8", "replace")
            got = tokenizer.decode([*lead, token])
            assert got == want or (b"\xef\xbf\xbd" in got.encode() and got[:1] == "a"), (token, text, got)


def called(chat_format: ChatFormat, tools: tuple[Tool, ...], names: list[str], parallel: bool, seed: int) -> Any:
    assert isinstance(chat_format, GuidesCalls)
    constraint = Constraint("grammar", chat_format.tool_grammar(tools, names, parallel=parallel))
    ids = walk(real().compile(constraint).matcher(), seed)
    return parse(chat_format.parser(tools), ids)


@pytest.mark.parametrize("seed", range(6))
def test_internlm2_must_call(seed: int) -> None:
    chat_format = InternLM2Format(internlm2())
    text, calls, _ = called(chat_format, TOOLS, ["get_weather", "now"], False, seed)
    assert text == "" and len(calls) == 1 and calls[0].name in ("get_weather", "now")
    if calls[0].name == "get_weather":
        jsonschema.validate(json.loads(calls[0].arguments), dict(TOOLS[0].parameters))
    else:
        assert calls[0].arguments == "{}"


def test_internlm2_must_run_code_or_call_several() -> None:
    chat_format = InternLM2Format(internlm2())
    grammar = chat_format.tool_grammar(TOOLS, ["interpreter"], parallel=False)
    matcher = real().compile(Constraint("grammar", grammar)).matcher()
    code = "<|action_start|><|interpreter|>\n```python\nprint('你好')\n```<|action_end|>"
    ids = internlm2().encode(code, parse_special=True)
    assert [matcher.advance(token) for token in ids][-1] and not matcher.error
    _, (call,), _ = parse(chat_format.parser(TOOLS), ids)
    assert (call.kind, call.name, call.arguments) == ("interpreter", "interpreter", "print('你好')")
    counts = {len(called(chat_format, TOOLS[:2], ["get_weather", "now"], True, seed)[1]) for seed in range(12)}
    assert 1 in counts and max(counts) > 1


def test_calls_between_tags() -> None:
    tokenizer = ByteTokenizer(("<|im_start|>", "<|im_end|>", "<tool_call>"))  # one tag is a token, the other is text
    grammar = ChatMLFormat(tokenizer).tool_grammar(TOOLS, ["now"], parallel=False)
    assert f"<[{tokenizer.token_id('<tool_call>')}]>" in grammar and '"</tool_call>"' in grammar
    plain = HFTokenizer(tiny_json())
    names = ChatMLFormat(ByteTokenizer()).tool_grammar(TOOLS, ["interpreter", "now"], parallel=True)
    matcher = grammars(plain).compile(Constraint("grammar", names)).matcher()
    two = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    two += '<tool_call>\n{"name": "interpreter", "arguments": {"code": "1"}}\n</tool_call>'
    for letter in two.encode():  # ids of this tokenizer are letters in another order
        matcher.advance(next(i for i, t in enumerate(plain.table.texts) if t == bytes([letter])))
    assert matcher.may_end and not matcher.error
