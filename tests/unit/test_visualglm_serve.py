"""Images through the server's APIs: taken where the model sees, refused with a reason where not, never fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="needs Pillow: pip install 'hanlin[vision]'")

from hanlin.serve.settings import ModelSpec, ServeConfig
from serving import app_client, events
from visualglm_directory import picture, write

FIRST, SECOND = (base64.b64encode(picture(n)).decode() for n in (1, 2))
URI = f"data:image/png;base64,{FIRST}"
OPTIONS = {"dtype": "float32", "packed_cache": False, "cache_max_entry_count": 64}


@pytest.fixture(scope="module")
def client(tmp_path_factory: Any) -> Iterator[Any]:
    path = write(tmp_path_factory.mktemp("visualglm") / "visualglm-6b")
    spec = ModelSpec(source=str(path), name="sees", options=OPTIONS)
    with app_client(ServeConfig(models=(spec,), legacy_chatglm=True)) as client:
        yield client


def openai(client: Any, *parts: Any, **more: Any) -> Any:
    content = [*parts, {"type": "text", "text": "你好"}]
    body = {"model": "sees", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "seed": 1, **more}
    return client.post("/v1/chat/completions", json=body)


def shown(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_all_apis_give_one_answer(client: Any) -> None:
    answer = openai(client, shown(URI), temperature=0).json()
    want = answer["choices"][0]["message"]["content"]
    other = openai(client, shown(f"data:image/png;base64,{SECOND}"), temperature=0).json()
    assert want != other["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
    chunks = events(openai(client, shown(URI), temperature=0, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == want
    source = {"type": "base64", "media_type": "image/png", "data": FIRST}
    turns = [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "你好"}]}]
    body = {"model": "sees", "messages": turns, "max_tokens": 8, "temperature": 0}
    assert client.post("/v1/messages", json=body).json()["content"][0]["text"] == want
    counted = client.post("/v1/messages/count_tokens", json={"model": "sees", "messages": turns}).json()
    assert counted["input_tokens"] == answer["usage"]["prompt_tokens"]
    options = {"temperature": 0, "num_predict": 8}
    asked = {"model": "sees", "messages": [{"role": "user", "content": "你好", "images": [FIRST]}], "options": options}
    told = client.post("/api/chat", json={**asked, "stream": False}).json()
    assert told["message"]["content"] == want
    asked = {"model": "sees", "prompt": "你好", "images": [FIRST], "options": options, "stream": False}
    assert client.post("/api/generate", json=asked).json()["response"] == want
    parts = [{"type": "input_image", "image_url": URI}, {"type": "input_text", "text": "你好"}]
    item = {"role": "user", "content": parts}
    body = {"model": "sees", "input": [item], "max_output_tokens": 8, "temperature": 0}
    output = client.post("/v1/responses", json=body).json()["output"]
    assert output[0]["content"][0]["text"] == want


def test_visualglms_own_api(client: Any) -> None:
    """`POST /` with `text` and `image`: the same words as elsewhere, its own names, its own defaults."""
    asked = {"text": "你好", "image": FIRST, "temperature": 0, "repetition_penalty": 1.2, "top_k": 30}
    long = openai(client, shown(URI), temperature=0, max_tokens=30, min_tokens=30).json()
    prompt, want = long["usage"]["prompt_tokens"], long["choices"][0]["message"]["content"]
    limits = {"max_length": prompt + 30, "min_length": prompt + 30}
    told = client.post("/", json={**asked, **limits, "history": []}).json()
    assert list(told) == ["result", "history", "status", "time"] and told["status"] == 200
    assert told["result"] == want and told["history"] == [["你好", want]]
    other = client.post("/", json={**asked, **limits, "image": SECOND, "history": None}).json()
    assert other["result"] != want
    again = client.post("/", json={**asked, "history": told["history"], "max_length": prompt + 60}).json()
    assert again["history"][:1] == told["history"] and len(again["history"]) == 2
    # A length shorter than the prompt still gives a token, and least is never more than most.
    assert client.post("/", json={**asked, "max_length": 1, "min_length": 10**6}).status_code == 200
    assert client.post("/", json={"text": "Hello", "max_length": prompt + 8}).status_code == 200
    # ChatGLM-6B's shape goes on as it was.
    assert "response" in client.post("/", json={"prompt": "你好", "max_length": prompt + 8}).json()
    for body, word in (
        ({**asked, "image": "/etc/passwd"}, "image"),
        ({**asked, "image": "????"}, "base64"),
        ({**asked, "top_p": 7}, "top_p"),
        ({"text": 7}, "text"),
        ({}, "prompt"),
        ({"image": FIRST}, "prompt"),
    ):
        answer = client.post("/", json=body)
        assert answer.status_code == 400 and word in answer.json()["error"]["message"], answer.text[:300]


def test_what_the_server_says_of_itself(client: Any) -> None:
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["input_modalities"] == ["text", "image"]
    assert "vision" in client.post("/api/show", json={"model": "sees"}).json()["capabilities"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a.png",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:image/png;base64,????",
        "data:image/png;base64,",
        "data:image/png;base64," + base64.b64encode(b"no image").decode(),
        None,
        7,
        ["a"],
    ],
)
def test_what_is_refused(client: Any, url: Any) -> None:
    for part in (
        shown(url),
        {"type": "image_url", "image_url": url} if isinstance(url, str) else {"type": "image_url"},
    ):
        answer = openai(client, part)
        assert answer.status_code == 400, answer.text
        assert "image" in answer.json()["error"]["message"]


def test_no_file_is_opened_for_a_request(client: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(1))
    part = {"type": "image", "image": str(secret)}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "a"}]}
    sourced = {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": str(secret)}}]}
    for path, body in (
        ("/v1/chat/completions", {"messages": [turn]}),
        ("/api/chat", {"messages": [turn]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": [str(secret)]}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": str(secret)}]}),
        ("/api/generate", {"prompt": "a", "images": [str(secret)]}),
        ("/v1/messages", {"max_tokens": 4, "messages": [sourced]}),
        ("/v1/messages", {"max_tokens": 4, "messages": [turn]}),
    ):
        answer = client.post(path, json={"model": "sees", **body})
        assert answer.status_code == 400, (path, answer.text)
        assert "image" in answer.text


def test_a_model_that_cannot_see(tmp_path: Path) -> None:
    import json

    import chatglm_directory as plain
    from visualglm_directory import config

    values = {k: v for k, v in config().items() if k not in ("eva_config", "qformer_config", "image_length")}
    path = plain.write(tmp_path / "chatglm-6b", values, plain.weights(values))
    (path / "ice_text.model").write_bytes(plain.tokenizer_model())
    (path / "tokenizer_config.json").write_text(json.dumps(plain.tokenizer_config()))
    with app_client(ServeConfig(models=(ModelSpec(source=str(path), name="sees", options=OPTIONS),))) as client:
        assert client.get("/v1/models").json()["data"][0]["input_modalities"] == ["text"]
        answer = openai(client, shown(URI))
        assert answer.status_code == 400 and "this model cannot see images" in answer.json()["error"]["message"]
        asked = {"model": "sees", "messages": [{"role": "user", "content": "你好", "images": [FIRST]}]}
        assert "this model cannot see images" in client.post("/api/chat", json=asked).json()["error"]
