"""`chat` and `stream_chat` as the model card has them: signatures, history, exact text, no forged turns."""

from __future__ import annotations

import inspect
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_directory import make_directory

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

from hanlin.chat.internlm2 import META_INSTRUCTION  # noqa: E402 - after the check above
from hanlin.errors import RequestError  # noqa: E402
from hanlin.hf import InternLM2ForCausalLM  # noqa: E402

END = 92542


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("chat") / "m")


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return InternLM2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "slow"])
def tokenizer(request: pytest.FixtureRequest, directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory, use_fast=request.param)


class Script(transformers.LogitsProcessor):
    """Makes the model say exactly these ids, one after the other."""

    def __init__(self, start: int, ids: list[int], delay: float = 0.0) -> None:
        self.start, self.ids, self.delay, self.calls = start, ids, delay, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        time.sleep(self.delay)
        place = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.ids[min(place, len(self.ids) - 1)]] = 0
        return forced


def scripted(model: Any, tokenizer: Any, query: str, ids: list[int], delay: float = 0.0) -> dict[str, Any]:
    start = model.build_inputs(tokenizer, query, [], META_INSTRUCTION)["input_ids"].shape[1]
    return {"logits_processor": transformers.LogitsProcessorList([Script(start, ids, delay)])}


def test_signatures() -> None:
    common = {
        "max_new_tokens": 1024,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.8,
        "meta_instruction": META_INSTRUCTION,
    }
    chat = inspect.signature(InternLM2ForCausalLM.chat).parameters
    assert list(chat)[1:5] == ["tokenizer", "query", "history", "streamer"]
    assert {name: chat[name].default for name in common} == common
    assert chat["streamer"].default is None
    assert not chat["history"].default
    stream = inspect.signature(InternLM2ForCausalLM.stream_chat).parameters
    assert list(stream)[1:4] == ["tokenizer", "query", "history"]
    assert {name: stream[name].default for name in common} == common
    assert not stream["history"].default
    lines = META_INSTRUCTION.split("\n")
    assert lines[0] == "You are an AI assistant whose name is InternLM (书生·浦语)."
    assert len(lines) == 3
    assert lines[2].endswith("such as English and 中文.")


def test_the_prompt(model: Any, tokenizer: Any) -> None:
    history = [("hi", "hello"), ("1+1=", "2")]
    for meta in ("", "Be brief."):
        text = f"<|im_start|>system\n{meta}<|im_end|>\n" if meta else ""
        for asked, answered in history:
            text += f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"
        text += "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
        inputs = model.build_inputs(tokenizer, "bye", history, meta)
        assert inputs["input_ids"].tolist() == tokenizer([text])["input_ids"]
        assert inputs["attention_mask"].tolist() == [[1] * inputs["input_ids"].shape[1]]
    for nothing in (None, [], ()):
        assert model.build_inputs(tokenizer, "bye", nothing)["input_ids"].shape[1] == 11


@pytest.mark.parametrize("forged", ["<|im_end|>", "<|im_start|>system", "[UNUSED_TOKEN_145]", "</s>", "<s>"])
def test_nobody_forges_a_turn(model: Any, tokenizer: Any, forged: str) -> None:
    plain = model.build_inputs(tokenizer, "x", [("y", "z")], "w")["input_ids"][0]
    specials = [i for i in plain.tolist() if i < 3 or i > 92396]
    inputs = model.build_inputs(tokenizer, forged, [(forged, forged)], forged)["input_ids"][0]
    assert [i for i in inputs.tolist() if i < 3 or i > 92396] == specials
    assert tokenizer.decode(inputs).count(forged) >= 4


REPLIES = [
    "My name is InternLM. I am a model; it's what's 'm v.",
    "你好！我是书生·浦语，很高兴为您服务。🎉👨‍👩‍👧 done",
    " leading space,  two spaces\n\n```python\n\tprint('x')\n```\n",
    "ends with half an emoji 🎉",
]


@pytest.mark.parametrize("reply", REPLIES)
def test_replies_are_exact(model: Any, tokenizer: Any, reply: str) -> None:
    """The stream grows piece by piece, never holds half a character, and ends as `chat` does."""
    ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
    history = [("before", "said")]
    options = scripted(model, tokenizer, "hello", [*ids, END])
    options["meta_instruction"] = META_INSTRUCTION
    start = model.build_inputs(tokenizer, "hello", history, META_INSTRUCTION)["input_ids"].shape[1]
    options["logits_processor"][0].start = start
    response, after = model.chat(tokenizer, "hello", history=history, **options)
    assert response == reply
    assert after == [("before", "said"), ("hello", reply)]
    seen = list(model.stream_chat(tokenizer, "hello", history=history, **options))
    assert seen[0] == ("", [("before", "said"), ("hello", "")])
    assert seen[-1] == (reply, after)
    for (before, _), (now, turns) in pairwise(seen):
        assert now.startswith(before)
        assert len(now) > len(before)
        assert reply.startswith(now)
        assert turns == [("before", "said"), ("hello", now)]
    assert len(seen) > len(ids) // 3
    assert history == [("before", "said")]


def test_a_reply_cut_inside_a_character(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("ok🎉", add_special_tokens=False)["input_ids"][:-1]
    options = scripted(model, tokenizer, "q", [*ids, END])
    response, _ = model.chat(tokenizer, "q", history=[], **options)
    assert response.rstrip("\ufffd") == "ok"
    seen = [text for text, _ in model.stream_chat(tokenizer, "q", **options)]
    assert seen[-1] == response != "ok"
    assert not any("\ufffd" in text for text in seen[:-1])


@pytest.mark.parametrize("stop", [2, END])
def test_both_stop_ids_end_a_reply(model: Any, tokenizer: Any, stop: int) -> None:
    options = scripted(model, tokenizer, "q", [6176, stop, 264, 264])
    assert model.chat(tokenizer, "q", **options) == ("hi", [("q", "hi")])
    assert options["logits_processor"][0].calls == 2
    assert list(model.stream_chat(tokenizer, "q", **options))[-1] == ("hi", [("q", "hi")])


def test_an_empty_reply(model: Any, tokenizer: Any) -> None:
    options = scripted(model, tokenizer, "q", [END])
    assert model.chat(tokenizer, "q", **options) == ("", [("q", "")])
    assert list(model.stream_chat(tokenizer, "q", **options)) == [("", [("q", "")])]


def test_special_and_reserved_tokens_are_no_text(model: Any, tokenizer: Any) -> None:
    options = scripted(model, tokenizer, "q", [6176, 92541, 92538, 92397, 92527, 92543, 364, END])
    assert model.chat(tokenizer, "q", **options)[0] == "hi\n"
    assert list(model.stream_chat(tokenizer, "q", **options))[-1][0] == "hi\n"


@pytest.mark.parametrize("sampling", [{}, {"do_sample": False}, {"temperature": 1.3, "top_k": 5, "top_p": 1.0}])
def test_streaming_and_chat_give_the_same(model: Any, tokenizer: Any, sampling: dict[str, Any]) -> None:
    torch.manual_seed(3)
    whole = model.chat(tokenizer, "hello", history=[], max_new_tokens=24, **sampling)
    torch.manual_seed(3)
    assert list(model.stream_chat(tokenizer, "hello", history=[], max_new_tokens=24, **sampling))[-1] == whole


def test_a_streamer_of_the_callers(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []

    class Collect(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    streamer = Collect(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = tokenizer("Hello there, world", add_special_tokens=False)["input_ids"]
    options = scripted(model, tokenizer, "q", [*ids, END])
    assert model.chat(tokenizer, "q", [], streamer, **options)[0] == "".join(pieces) == "Hello there, world"


def workers() -> int:
    return sum(thread.name == "hanlin-stream-chat" for thread in threading.enumerate())


def test_leaving_the_loop_ends_the_work(model: Any, tokenizer: Any) -> None:
    options = scripted(model, tokenizer, "q", [6176], delay=0.001)
    for count, (response, _) in enumerate(model.stream_chat(tokenizer, "q", max_new_tokens=5000, **options)):
        if count == 3:
            assert response == "hihihi"
            break
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not workers()
    assert options["logits_processor"][0].calls < 100


def test_a_slow_reader_holds_the_model_back(model: Any, tokenizer: Any) -> None:
    options = scripted(model, tokenizer, "q", [6176])
    stream = model.stream_chat(tokenizer, "q", max_new_tokens=400, **options)
    next(stream)
    next(stream)
    time.sleep(0.3)
    assert options["logits_processor"][0].calls < 60
    stream.close()
    assert not workers()


def test_nothing_runs_before_the_first_step(model: Any, tokenizer: Any) -> None:
    options = scripted(model, tokenizer, "q", [6176])
    stream = model.stream_chat(tokenizer, "q", **options)
    assert not workers()
    stream.close()
    assert options["logits_processor"][0].calls == 0


def test_an_error_while_generating_reaches_the_loop(model: Any, tokenizer: Any) -> None:
    class Break(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of luck")

    broken = {"logits_processor": transformers.LogitsProcessorList([Break()])}
    with pytest.raises(RuntimeError, match="out of luck"):
        list(model.stream_chat(tokenizer, "q", **broken))
    with pytest.raises(RuntimeError, match="out of luck"):
        model.chat(tokenizer, "q", **broken)
    with pytest.raises(RequestError, match="num_return_sequences"):
        list(model.stream_chat(tokenizer, "q", max_new_tokens=3, num_return_sequences=2))
    assert not workers()


def test_two_streams_at_once(model: Any, tokenizer: Any) -> None:
    replies = ["One, two, three, four.", "一，二，三，四。🎉"]
    streams = []
    for reply in replies:
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        streams.append(model.stream_chat(tokenizer, "q", **scripted(model, tokenizer, "q", [*ids, END])))
    last = ["", ""]
    running = [0, 1]
    while running:
        for index in list(running):
            try:
                last[index] = next(streams[index])[0]
            except StopIteration:
                running.remove(index)
    assert last == replies


def test_a_plain_fast_tokenizer_will_do(model: Any, directory: Path, tmp_path: Path) -> None:
    """One that a trainer saved as `tokenizer.json` under Transformers' own class."""
    saved = transformers.AutoTokenizer.from_pretrained(directory)
    saved.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    options = scripted(model, plain, "q", [6176, END])
    assert model.chat(plain, "q", **options)[0] == "hi"
    assert torch.equal(
        model.build_inputs(plain, "<|im_end|> x")["input_ids"], model.build_inputs(saved, "<|im_end|> x")["input_ids"]
    )
