"""A model that answers by rule, for tests of the chat verb; and a program that runs the command line with it.

python tests/unit/cli_chat_fake.py chat ...
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hanlin.errors import ContextLengthError, EngineError, ModelNotFoundError
from hanlin.types import Completion, Delta, Message, SamplingParams, Timings, ToolCall, Usage

MARKDOWN = """\
# Heading 标题

Some *emphasis*, `code`, and a [link](https://example.org/a).

| 名字 | number |
|---|---:|
| 甲 | 1 |
| 乙乙 | 22 |

1. first
2. second
   - nested 内层

```python
def greet(name: str) -> str:
    return f"你好, {name}"
```

> quoted 引用

床前明月光，
疑是地上霜。
"""


class FakeLLM:
    """Knows these questions; anything else it says back.

    count: numbers for ever, 50 a second. wait: nothing for a minute, and the file FAKE_LOG. boom: fails after a word.
    bug: fails otherwise. tool: a tool call. markdown, slow markdown: all kinds of blocks. long: 200 lines. full: as if
    the context were full. mute: nothing. context: how many messages came.
    """

    name = "fake"
    context_length = 60

    def __init__(self) -> None:
        self.default_sampling = SamplingParams(temperature=0.7, max_tokens=1000)
        self.chat_format = SimpleNamespace(name="plain", default_system="You are a fake.", stop_ids=())
        self.requests: list[tuple[list[Message], SamplingParams]] = []
        self.finished: list[str] = []
        self.closed = False

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def stats(self) -> dict[str, float]:
        return {"load_seconds": 0.25, "peak_memory_bytes": 123_000_000}

    def stream(self, messages: Sequence[Message], sampling: SamplingParams | None = None) -> Iterator[Delta]:
        sampling = sampling or self.default_sampling
        self.requests.append((list(messages), sampling))
        tokens = sum(len(m.content.split()) for m in messages)
        if tokens > self.context_length:
            raise ContextLengthError(f"the prompt has {tokens} tokens, the context {self.context_length}")
        return self._stream(messages[-1].content, len(messages), tokens, sampling)

    def _stream(self, question: str, sent: int, tokens: int, sampling: SamplingParams) -> Iterator[Delta]:
        said, calls = [], ()
        reason: Any = "stop"
        ended = "closed"
        try:
            for piece in self._pieces(question, sent):
                if len(said) == sampling.max_tokens:
                    reason = "length"
                    break
                said.append(piece)
                yield Delta(text=piece, ids=(len(said),))
            if question == "full":
                reason = "length"
            if question == "tool":
                calls = (ToolCall(name="search", arguments="{}"),)
                reason = "tool_calls"
            ended = "whole"
            yield Delta(
                done=Completion(
                    text="".join(said),
                    ids=tuple(range(len(said))),
                    finish_reason=reason,
                    tool_calls=calls,
                    usage=Usage(prompt_tokens=tokens, cached_tokens=tokens // 2, generated_tokens=len(said)),
                    timings=Timings(prompt=0.5, generation=0.5),
                    seed=sampling.seed or 7,
                )
            )
        finally:
            self.finished.append(ended)

    def _pieces(self, question: str, sent: int) -> Iterator[str]:
        if question == "count":
            for number in range(100_000):
                yield f"{number} "
                time.sleep(0.02)
        elif question == "wait":
            if log := os.environ.get("FAKE_LOG"):
                Path(log).touch()
            time.sleep(60)
        elif question == "boom":
            yield "Well"
            raise EngineError("the fake engine broke")
        elif question == "bug":
            raise ZeroDivisionError("a flaw")
        elif question == "context":
            yield f"{sent} messages"
        elif question == "long":
            for line in range(200):
                yield f"- line {line}\n"
                time.sleep(0.002)
        elif question in ("markdown", "slow markdown"):
            for start in range(0, len(MARKDOWN), 3):
                yield MARKDOWN[start : start + 3]
                time.sleep(0.03 if question.startswith("slow") else 0)
        elif question not in ("mute", "tool"):
            for index, word in enumerate(question.split(" ")):
                yield word if index == 0 else f" {word}"


def load(model: str | None = None, **options: Any) -> FakeLLM:
    """Stands in for `hanlin.load`."""
    if model is not None and "missing" in model:
        raise ModelNotFoundError(f"no model {model}")
    if loading := os.environ.get("FAKE_LOADING"):
        Path(loading).touch()
        time.sleep(60)
    options.pop("progress")(1, 1)
    llm = FakeLLM()
    llm.context_length = int(os.environ.get("FAKE_CONTEXT", "1000"))
    return llm


if __name__ == "__main__":
    import hanlin
    from hanlin.cli.main import main

    hanlin.load = load
    main()
