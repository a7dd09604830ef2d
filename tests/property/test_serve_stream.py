"""Any split of a reply's tokens into deltas gives the text, calls and finish reasons of the answer given whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.aio import _joined
from hanlin.chat.chatml import ChatMLFormat
from hanlin.chat.internlm2 import InternLM2Format
from hanlin.engine.sequence import Sampled, Sequence
from hanlin.replies import Plain, Reply
from hanlin.requests import Job
from hanlin.serve.routes.openai_chat import ChatChunks, chat_answer
from hanlin.serve.routes.openai_common import Head
from hanlin.serve.routes.openai_completions import CompletionChunks, Opening, completion_answer
from hanlin.serve.schemas.chat import ChatBody
from hanlin.serve.schemas.completions import CompletionBody
from hanlin.serve.stream import event
from hanlin.tokenizers import load_tokenizer
from hanlin.types import Completion, Delta, ReplyParser, SamplingParams, TokenLogprob, Tool
from hf_directory import TOKENIZER, make_directory

TOOLS = (Tool(name="look"), Tool(name="interpreter", kind="interpreter"))
PROMPT = (1, 2, 3)
PIECES = (
    *("Hello", " world. ", "\n", "我爱北京天安门", "é🙂", "STOP", "ST", "<tool_call>", "</tool_call>", "<tool_"),
    '<tool_call>\n{"name": "look", "arguments": {"a": "世界"}}\n</tool_call>',
    '<tool_call>[{"name": "look", "arguments": {}}, {"name": "interpreter", "arguments": {"code": "1"}}]</tool_call>',
    '<|action_start|><|plugin|>\n{"name": "look", "parameters": {"a": ["\\ud800", 1]}}<|action_end|>',
    "<|action_start|><|interpreter|>\n```python\nprint('世')\n```<|action_end|>",
    *("<|action_start|>", "<|plugin|>", '{"name":', "<|action_end|>", "<|im_start|>"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assert TOKENIZER.is_file()
    return load_tokenizer(make_directory(tmp_path_factory.mktemp("model") / "tiny"))


@st.composite
def replies(draw: st.DrawFn, tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of replies: likely words, calls whole and broken, and any bytes."""
    piece = st.sampled_from(PIECES).map(lambda text: tokenizer.encode(text, parse_special=True))
    any_id = st.lists(st.integers(0, 400), max_size=3)  # the first ids of this vocabulary are bytes
    reply = st.lists(piece | any_id, max_size=6).map(lambda parts: [i for part in parts for i in part])
    return draw(st.lists(reply, min_size=count, max_size=count))


def deltas(tokenizer: Any, parser: ReplyParser, ids: list[int], index: int, sampling: SamplingParams) -> list[Delta]:
    """As the engine makes them: a delta a token, and one that is done."""
    out: list[Any] = []
    stop_ids = frozenset({2, 92542})
    reply = Reply(
        tokenizer=tokenizer,
        parser=parser,
        sampling=sampling,
        stop_ids=stop_ids,
        seed=5,
        index=index,
        stream=True,
        deliver=out.append,
    )
    sequence = Sequence(prompt=PROMPT, sampling=sampling, sink=reply, stop_ids=stop_ids)
    sequence.finish_reason = "length"
    for place, token in enumerate(ids):
        sequence.generated.append(token)
        top = ((token, -0.5), (7, -1.5))[: sampling.logprobs or 0]
        sequence.stop = reply.token(Sampled(token, None if sampling.logprobs is None else -0.5 - place, top))
        if sequence.stop is None and token in stop_ids:
            sequence.stop = token
        if sequence.stop is not None:
            sequence.finish_reason = "stop"
            break
    reply.finish(sequence)
    return out


def batches(draw: Any, streams: list[list[tuple[int, Delta]]]) -> list[list[tuple[int, Delta]]]:
    """The streams, interleaved and cut anyhow, each cut joined as for a caller who was busy."""
    queues, order, out = [list(stream) for stream in streams], [], []
    while any(queues):
        order.append(draw(st.sampled_from([queue for queue in queues if queue])).pop(0))
    while order:
        size = draw(st.integers(1, 12))
        out.append(_joined(order[:size]))
        del order[:size]
    return out


async def _sent(chunks: Any, given_batches: list[list[tuple[int, Delta]]]) -> bytes:
    async def coming() -> AsyncIterator[list[tuple[int, Delta]]]:
        for batch in given_batches:
            yield batch

    return b"".join([piece async for piece in chunks.pieces(coming())])


def received(chunks: Any, given_batches: list[list[tuple[int, Delta]]]) -> list[dict[str, Any]]:
    """What a client reads."""
    text = asyncio.run(_sent(chunks, given_batches)).decode()  # strictly UTF-8
    lines = [line for line in text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def of_choice(chunks: list[dict[str, Any]], index: int) -> Iterator[dict[str, Any]]:
    return (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


@pytest.mark.parametrize("chat_format", [InternLM2Format, ChatMLFormat])
@settings(deadline=None, max_examples=60)
@given(data=st.data(), logprobs=st.sampled_from([None, 0, 1]), legacy=st.booleans(), end=st.sampled_from([[], [92542]]))
def test_chat(
    tokenizer: Any, chat_format: Any, data: st.DataObject, logprobs: int | None, legacy: bool, end: list[int]
) -> None:
    sampling = SamplingParams(stop=("STOP",), logprobs=logprobs, n=2)
    function = {"name": "look"}
    offered = {"functions": [function]} if legacy else {"tools": [{"type": "function", "function": function}]}
    body = ChatBody(
        messages=[{"role": "user", "content": "x"}], stream=True, stream_options={"include_usage": True}, **offered
    )
    parser = chat_format(tokenizer).parser
    streams = [
        [(0, delta) for delta in deltas(tokenizer, parser(TOOLS), [*ids, *end], index, sampling)]
        for index, ids in enumerate(data.draw(replies(tokenizer, 2)))
    ]
    done = [stream[-1][1].done for stream in streams]
    head, jobs = Head(id="chatcmpl-a", model="m", fingerprint="f"), [Job(ids=PROMPT, sampling=sampling)]
    whole = chat_answer(head, body, [d for d in done if d is not None], jobs)
    got = received(ChatChunks.of(head, body, jobs), batches(data.draw, streams))
    usage = got.pop()
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    json.dumps(whole, ensure_ascii=False).encode()  # strictly UTF-8
    for choice in whole["choices"]:
        mine = list(of_choice(got, choice["index"]))
        parts = [c["delta"] for c in mine]
        assert parts[0] == {"role": "assistant", "content": ""}
        message = choice["message"]
        text = "".join(p.get("content", "") for p in parts)
        assert text == (message["content"] or "") and "STOP" not in text
        calls: list[dict[str, Any]] = []
        for call in [call for p in parts for call in p.get("tool_calls", ())]:
            assert call.pop("index") == len(calls)
            calls.append(call)
        assert calls == message.get("tool_calls", [])
        assert len({call["id"] for call in calls}) == len(calls)
        for call in calls:
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
        assert [p["function_call"] for p in parts if "function_call" in p] == [
            message[k] for k in ("function_call",) if k in message
        ]
        assert (message["content"] is None) == (not text and bool(calls or "function_call" in message))
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        tokens = [token for c in mine if c["logprobs"] for token in c["logprobs"]["content"]]
        assert tokens == ((choice["logprobs"] or {}).get("content") or [])


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text() | st.sampled_from(["", '"', "\\", "\ud800", '"content":""'])),
    model=st.text() | st.just('"delta":{"content":""}'),
    logprobs=st.sampled_from([None, 1]),
    options=st.sampled_from([None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]),
    ids=st.booleans(),
)
def test_a_chunk_has_the_bytes_that_writing_it_as_json_gives(
    texts: list[str], model: str, logprobs: int | None, options: Any, ids: bool
) -> None:
    body = ChatBody(
        messages=[{"role": "user", "content": "x"}], stream=True, stream_options=options, return_token_ids=ids
    )
    head = Head(id="chatcmpl-a", model=model, fingerprint="f")
    jobs = [Job(ids=PROMPT, sampling=SamplingParams(logprobs=logprobs, n=2))]
    given_batches = []
    for place, text in enumerate(texts):
        shown = () if logprobs is None else (TokenLogprob(id=place, text=text, logprob=-1.0),)
        given_batches.append([(0, Delta(text=text, ids=(place,), logprobs=shown, index=place % 2))])
    plain = ChatChunks.of(head, body, jobs)
    expected = b"".join(event(chunk) for [(_, delta)] in given_batches for chunk in plain.chunks(delta))
    assert asyncio.run(_sent(ChatChunks.of(head, body, jobs), given_batches)).startswith(expected)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), logprobs=st.sampled_from([None, 0, 1]), echo=st.booleans(), end=st.sampled_from([[], [2]]))
def test_completions(tokenizer: Any, data: st.DataObject, logprobs: int | None, echo: bool, end: list[int]) -> None:
    sampling = SamplingParams(stop=("STOP",), logprobs=logprobs, n=2)
    body = CompletionBody(prompt=["a", "b"], n=2, logprobs=logprobs, echo=echo)
    streams: list[list[tuple[int, Delta]]] = []
    for number in range(2):
        for index, ids in enumerate(data.draw(replies(tokenizer, 2))):
            plain = Plain(tokenizer, skip_special=True)
            made = deltas(tokenizer, plain, [*ids, *end], index, sampling)
            streams.append([(number, delta) for delta in made])
    done: list[Completion] = [d for stream in streams if (d := stream[-1][1].done) is not None]
    head = Head(id="cmpl-a", model="m", fingerprint="f")
    openings = [Opening(ids=PROMPT, tokenizer=tokenizer, skip_special=True, text="世" * echo) for _ in range(2)]
    whole = completion_answer(head, body, openings, done)
    got = received(CompletionChunks(head=head, body=body, openings=openings), batches(data.draw, streams))
    for choice in whole["choices"]:
        mine = list(of_choice(got, choice["index"]))
        text = "".join(c["text"] for c in mine)
        assert text == choice["text"] and "STOP" not in text
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name, values in (choice["logprobs"] or {}).items():
            assert [v for c in mine if c["logprobs"] for v in c["logprobs"][name]] == values
