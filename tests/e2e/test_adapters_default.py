"""Adapters on the real default model, as a user types it."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

import hanlin
from adapter_directory import halves, write_adapter
from hanlin.errors import CheckpointError, RequestError

pytestmark = pytest.mark.e2e
SKY = "Why is the sky blue?"
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random adapters of all linear layers but the head, which is tied here."""
    folder = tmp_path_factory.mktemp("adapters")
    with hanlin.load(cache_bytes=20 << 20) as llm:
        linears = {n: shape for n, shape in llm.requests.adapters.base.linears.items() if n != "lm_head"}
    return {
        name: write_adapter(folder / name, halves(linears, 16, seed, size=0.02), 16)
        for seed, name in enumerate(("red", "blue"))
    }


@pytest.fixture(scope="module")
def llm(adapters: dict[str, Path]) -> Any:
    with hanlin.load(cache_bytes=200 << 20, weights="float32", packed_cache=False, adapters=adapters) as model:
        yield model


def test_each_request_its_own_adapter(llm: hanlin.LLM) -> None:
    names = [None, "red", "blue"]
    alone = [llm.chat(SKY, adapter=name, **OPTIONS) for name in names]
    assert len({done.ids for done in alone}) == 3
    got: dict[int, Any] = {}

    def ask(number: int) -> None:
        got[number] = llm.chat(SKY, adapter=names[number % 3], **OPTIONS).ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(9)] == [done.ids for done in alone] * 3
    streamed = "".join(delta.text for delta in llm.stream(SKY, adapter="red", **OPTIONS))
    assert streamed == alone[1].text
    scores = [llm.score("The capital of France is Paris.", adapter=name)[0].total for name in names]
    assert len(set(scores)) == 3
    awaited = asyncio.run(hanlin.AsyncLLM(llm).chat(SKY, adapter="blue", **OPTIONS))
    assert awaited.ids == alone[2].ids


def test_merged_says_the_same(llm: hanlin.LLM, adapters: dict[str, Path]) -> None:
    live = llm.chat(SKY, adapter="red", **OPTIONS)
    with hanlin.load(cache_bytes=50 << 20, weights="float32", packed_cache=False, adapter=adapters["red"]) as merged:
        assert merged.chat(SKY, **OPTIONS).ids == live.ids


def test_unloading_while_a_reply_runs(llm: hanlin.LLM, adapters: dict[str, Path]) -> None:
    """New requests are refused at once; the running one ends as it would have, and then the memory comes back."""
    options = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    want = llm.chat(SKY, adapter="red", **options).text
    llm.load_adapter("again", adapters["red"])
    watched = weakref.ref(llm.adapters["again"])
    stream = llm.stream(SKY, adapter="again", **options)
    first = next(stream)
    llm.unload_adapter("again")
    with pytest.raises(RequestError, match=r"no adapter 'again' is loaded, only: blue, red\."):
        llm.chat(SKY, adapter="again")
    assert watched() is not None
    assert first.text + "".join(delta.text for delta in stream) == want
    del stream
    llm.chat(SKY, max_tokens=1)
    gc.collect()
    assert watched() is None


def test_lmdeploys_words(adapters: dict[str, Path]) -> None:
    from hanlin import GenerationConfig, PytorchEngineConfig, pipeline

    config = PytorchEngineConfig(adapters={"red": str(adapters["red"])}, session_len=1024, cache_bytes=50 << 20)
    with pipeline(backend_config=config) as pipe:
        short = GenerationConfig(max_new_tokens=12)
        plain, red = (pipe(SKY, gen_config=short, adapter_name=name).text for name in (None, "red"))
        assert plain != red
        pieces = pipe.stream_infer(SKY, gen_config=short, adapter_name="red")
        assert "".join(piece.text for piece in pieces) == red
        with pytest.raises(RequestError, match="no adapter 'green' is loaded"):
            pipe(SKY, adapter_name="green")


def test_a_broken_adapter_stops_loading(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    for options in ({"adapter": tmp_path}, {"adapters": {"x": tmp_path}}):
        with pytest.raises(CheckpointError, match="DoRA"):
            hanlin.load(cache_bytes=20 << 20, **options)


def test_the_command(llm: hanlin.LLM, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = [sys.executable, "-m", "hanlin", "chat", "-m", str(llm.path)]
    command = [*model, SKY, "--temperature", "0", "--max-tokens", "8"]
    plain, red = (
        subprocess.run(
            [*command, *more],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "HANLIN_HOME": str(tmp_path)},  # where packed weights are kept
        ).stdout
        for more in ([], ["--adapter", str(adapters["red"])])
    )
    assert plain.strip() and red.strip() and plain != red
