"""Batch files: every line answered exactly once, whatever interrupts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from hanlin.errors import ConfigError, RequestError
from hanlin.serve.batch import plan, run
from hanlin.serve.settings import ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import running_app

OPTIONS = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 128}


def line(name: str, **changes: Any) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}
    return json.dumps(request) + "\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("batch") / "tiny", num_hidden_layers=1)


def answers(directory: Path, source: Path, target: Path, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Run the batch, cancelled after so many answers; what the output then holds."""

    async def go() -> None:
        spec = ModelSpec(source=str(directory), name="m", options=OPTIONS)
        async with running_app(ServeConfig(models=(spec,), page=False)) as app:
            told: list[bool] = []

            def tell(good: bool) -> None:
                told.append(good)
                if len(told) == stop_after:
                    work.cancel()

            work = asyncio.ensure_future(run(app, plan(source, target), at_once=3, told=tell))
            await asyncio.gather(work, return_exceptions=True)

    asyncio.run(go())
    return [json.loads(text) for text in target.read_text(encoding="utf-8").splitlines()]


def test_interrupted_batches_go_on_and_nothing_is_answered_twice(directory: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = [f"q{n}" for n in range(12)]
    source.write_text("".join(map(line, names)) + "\n\n")
    first = answers(directory, source, target, stop_after=4)
    assert 4 <= len(first) < 12
    with target.open("ab") as file:
        file.write(b'{"custom_id": "q11", "respo')  # the machine went down here
    whole = answers(directory, source, target)
    assert sorted(answer["custom_id"] for answer in whole) == sorted(names)
    assert whole[: len(first)] == first
    assert all(a["response"]["status_code"] == 200 and a["error"] is None for a in whole)
    texts = {a["response"]["body"]["choices"][0]["message"]["content"] for a in whole}
    assert len(texts) == 1, "one request, one answer"
    assert plan(source, target).offsets == ()


def test_a_line_that_fails_does_not_stop_the_others(directory: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wrong = {"model": "m", "messages": []}
    source.write_text(
        line("a", body=wrong) + line("b") + line("c", url="/v1/embeddings", body={"model": "m", "input": "x"})
    )
    got = {answer["custom_id"]: answer for answer in answers(directory, source, target)}
    assert got["a"]["response"]["status_code"] == 400 and "messages" in got["a"]["error"]["message"]
    assert got["b"]["response"]["body"]["object"] == "chat.completion"
    assert len(got["c"]["response"]["body"]["data"][0]["embedding"]) == 32


def test_all_bad_lines_are_named_before_anything_runs(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [line("a"), line("a"), "{", "[]\n", line("b", url="/v1/files"), line("c", method="GET"), line("", body=3)]
    source.write_text("\n".join(lines))
    with pytest.raises(RequestError) as caught:
        plan(source, tmp_path / "out.jsonl")
    text = str(caught.value)
    assert "line 2" in text and "custom_id 'a' is that of line 1" in text
    for word in ("not JSON", "not a JSON object", "url must", "method must", "custom_id must", "body must"):
        assert word in text


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    target.write_text('{"custom_id": "other"}\n')
    with pytest.raises(ConfigError, match="answers other requests"):
        plan(source, target)
    target.write_text("a poem\n")
    with pytest.raises(ConfigError, match="no output of a batch"):
        plan(source, target)
    assert target.read_text() == "a poem\n"
    with pytest.raises(ConfigError):
        plan(tmp_path / "none", tmp_path / "out2.jsonl")
    source.write_text("x" * 2000)
    with pytest.raises(RequestError, match="longer than"):
        plan(source, tmp_path / "out3.jsonl", line_bytes=1000)
