"""What went wrong in other servers must not go wrong here: a test for each lesson, by the advisory's number."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hanlin.serve.app import create_app
from hanlin.serve.keys import KeyRing
from hanlin.serve.settings import Limits, ModelSpec, ServeConfig
from hf_directory import MARK, make_directory
from serving import asgi_client

Client = httpx.AsyncClient
Work = Callable[[Client], Coroutine[Any, Any, None]]

HI: list[Any] = [{"role": "user", "content": "hi"}]
ALICE, BOB = ({"Authorization": f"Bearer {secret}"} for secret in ("s3cret-a", "s3cret-b"))
HUGE = (2**31, 2**63, 10**30, -1, -(2**31), -(2**63))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Work], None]]:
    """Runs the requests of a test, each within 20 seconds; all share one application that two keys may use."""
    folder = tmp_path_factory.mktemp("cves")
    directory = make_directory(folder / "tiny", num_hidden_layers=1)
    (folder / "adapters").mkdir()
    (folder / "secret").mkdir()
    (folder / "adapters" / "link").symlink_to(folder / "secret", target_is_directory=True)
    options = {
        "cache_bytes": 4 << 20,
        "threads": 1,
        "packed_cache": False,
        "session_len": 256,
        "chat_template": "internlm2",
    }
    config = ServeConfig(
        models=(ModelSpec(source=str(directory), name="tiny", options=options),),
        keys=KeyRing.read(given=["alice:s3cret-a", "bob:s3cret-b"]),
        adapter_directory=folder / "adapters",
        limits=Limits(body_bytes=1 << 20),
    )
    loop, stack = asyncio.new_event_loop(), contextlib.AsyncExitStack()
    client = loop.run_until_complete(stack.enter_async_context(asgi_client(config)))
    client.headers.update(ALICE)
    yield lambda work: loop.run_until_complete(asyncio.wait_for(work(client), 20))
    loop.run_until_complete(stack.aclose())
    loop.close()


async def chat(client: Client, **changes: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 2, **changes})


async def alive(client: Client) -> None:
    """The server goes on answering."""
    answer = await chat(client)
    assert answer.status_code == 200, answer.text


def refused(answer: httpx.Response, *statuses: int) -> None:
    assert answer.status_code in (statuses or (400,)), (answer.status_code, answer.text[:300])
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["n", "best_of"])
def test_cve_2026_34756_many_replies(run: Any, field: str) -> None:
    async def work(client: Client) -> None:
        for value in (129, 10**6, *HUGE, 0):
            asked = {"prompt": "hi", "max_tokens": 1, field: value}
            refused(await client.post("/v1/completions", json=asked))
            if field == "n":
                refused(await chat(client, n=value))
        prompts = {"prompt": ["hi"] * 129, "max_tokens": 1}
        refused(await client.post("/v1/completions", json=prompts))
        await alive(client)

    run(work)


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": 2**31},
        {"stop": ["x"] * 17},
        {"stop": ["x" * 1025]},
        {"stop_token_ids": list(range(2000))},
        {"bad_words": ["x"] * 65},
        {"logit_bias": {str(i): 1 for i in range(2000)}},
        {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(300)]},
    ],
    ids=lambda changes: next(reversed(changes)),
)
def test_cve_2026_34756_other_bounds(run: Any, changes: dict[str, Any]) -> None:
    async def work(client: Client) -> None:
        refused(await chat(client, **changes))
        await alive(client)

    run(work)


def test_cve_2026_34756_sizes(run: Any) -> None:
    async def work(client: Client) -> None:
        refused(await chat(client, messages=[{"role": "user", "content": "x " * 20_000}]))
        refused(await chat(client, messages=[{"role": "user", "content": "x" * (1 << 20)}]), 413)
        refused(await client.get("/v1/models", headers={"x-a": "b" * 40_000}), 431)
        refused(await client.get("/v1/models", headers=[(f"x-{i}", "b") for i in range(120)]), 431)
        deep = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        refused(await client.post("/v1/chat/completions", content=deep))
        await alive(client)

    run(work)


@pytest.mark.parametrize(
    "field",
    [
        *("max_tokens", "max_completion_tokens", "min_tokens", "top_k", "top_logprobs", "n", "stop_token_ids"),
        *("presence_penalty", "repetition_penalty", "temperature", "top_p", "min_p", "logit_bias", "seed"),
    ],
)
def test_cve_2026_21869_numbers_out_of_range(run: Any, field: str) -> None:
    async def work(client: Client) -> None:
        for value in HUGE:
            given: Any = {"stop_token_ids": [value], "logit_bias": {str(value): 1}}.get(field, value)
            more = {"logprobs": True} if field == "top_logprobs" else {}
            answer = await chat(client, **{field: given, **more})
            fine = field in ("seed", "top_k", "max_tokens", "max_completion_tokens", "temperature")
            fine = fine or (field == "presence_penalty" and value == -1)
            assert answer.status_code == 400 or (fine and answer.status_code == 200), (value, answer.text[:300])
        await alive(client)

    run(work)


def test_cve_2026_21869_token_ids_out_of_range(run: Any) -> None:
    async def work(client: Client) -> None:
        for value in HUGE:
            for path, asked in (
                ("/v1/completions", {"prompt": [value], "max_tokens": 1}),
                ("/detokenize", {"tokens": [value]}),
                ("/score", {"input": [[value]]}),
                ("/v1/embeddings", {"input": [value]}),
            ):
                refused(await client.post(path, json=asked))
            options = {"num_predict": value, "num_ctx": value, "top_k": value, "repeat_last_n": value}
            for name, one in options.items():
                asked = {"model": "tiny", "prompt": "hi", "stream": False, "options": {"num_predict": 1, name: one}}
                assert (await client.post("/api/generate", json=asked)).status_code in (200, 400)
        await alive(client)

    run(work)


DEEP: Any = {"type": "string"}
for _ in range(90):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}


@pytest.mark.parametrize(
    "wanted",
    [
        {"structured_outputs": {"regex": "(" * 2000 + "a" + ")" * 2000}},
        {"structured_outputs": {"regex": "["}},
        {"structured_outputs": {"regex": "x" * 200_000}},
        {"structured_outputs": {"grammar": 'start: start start | "a'}},
        {"structured_outputs": {"choice": []}},
        {"guided_grammar": "start: " + "(" * 5000},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "("}}}},
        {"response_format": {"type": "json_schema", "json_schema": None}},
        {"response_format": {"type": "xml"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/a"}}}]},
        {"tools": [{"type": "function", "function": {"name": "", "parameters": {}}}]},
        {"tools": [{"type": "function", "function": []}]},
        {"tools": [{"type": "function"}]},
        {"tools": [{}]},
        {"tools": "x"},
    ],
    ids=lambda wanted: str(wanted)[:60],
)
def test_cve_2025_48944_schemas_regexes_and_tools(run: Any, wanted: dict[str, Any]) -> None:
    """Also CVE-2025-48942, -48943, -29770, -48887 and xgrammar's GHSA-9q5r-wfvf-rr7f and GHSA-rwxx-mrjm-wc2m."""

    async def work(client: Client) -> None:
        if "tools" in wanted:
            wanted.setdefault("tool_choice", "required")
        refused(await chat(client, **wanted))
        await alive(client)

    run(work)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(a{1,1000}){1,1000}{1,1000}", "(.*a){20}", r"(\w+\s?)*$"])
def test_cve_2025_48887_regexes_that_explode_elsewhere(run: Any, pattern: str) -> None:
    async def work(client: Client) -> None:
        answer = await chat(client, structured_outputs={"regex": pattern}, max_tokens=40)
        assert answer.status_code in (200, 400), answer.text
        await alive(client)

    run(work)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was connected to, or looked up."""
    tried: list[Any] = []

    def refuse(*given: Any, **_: Any) -> Any:
        tried.append(given[1:] or given)
        raise OSError("no connection is to be made")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://example.org\\@127.0.0.1/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,iVBORw0KGgo=",
        "gopher://127.0.0.1:1/",
    ],
)
def test_cve_2026_33626_nothing_is_fetched(run: Any, no_network: list[Any], url: str) -> None:
    """Also CVE-2025-6242, CVE-2026-24779, CVE-2026-25960, CVE-2026-22773 and CVE-2026-22778: there are no media."""

    async def work(client: Client) -> None:
        for part in (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "file", "file": {"file_id": url}},
        ):
            refused(await chat(client, messages=[{"role": "user", "content": [part]}]))
        part = {"type": "input_image", "image_url": url}
        refused(await client.post("/v1/responses", json={"input": [{"role": "user", "content": [part]}]}))
        source = {"type": "image", "source": {"type": "url", "url": url}}
        asked: Any = {"max_tokens": 1, "messages": [{"role": "user", "content": [source]}]}
        assert (await client.post("/v1/messages", json=asked)).status_code == 400
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "x", "images": [url]}], "stream": False}
        assert (await client.post("/api/chat", json=asked)).status_code == 400
        schema = {"type": "object", "properties": {"a": {"$ref": url}}, "required": ["a"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        refused(await chat(client, response_format=wanted))
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        refused(await chat(client, tools=[tool], tool_choice="required"))
        await alive(client)

    run(work)
    assert no_network == []


@pytest.mark.parametrize("template", ["{{ 1/0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ ''.__class__ }}"])
def test_cve_2025_61620_templates_of_requests(run: Any, template: str) -> None:
    """Also CVE-2025-62426, CVE-2026-5760 and CVE-2024-34359."""

    async def work(client: Client) -> None:
        plain = (await chat(client, temperature=0)).json()["usage"]["prompt_tokens"]
        refused(await chat(client, chat_template=template))
        refused(await chat(client, documents=[{"title": "a", "text": template}]))
        for name in ("tokenize", "add_generation_prompt", "chat_template", "enable_thinking"):
            answer = await chat(client, temperature=0, chat_template_kwargs={name: template})
            assert answer.json()["usage"]["prompt_tokens"] == plain, "of no effect"
        told = await client.post("/apply-template", json={"messages": HI, "chat_template": template})
        assert template not in told.text and told.status_code == 200
        await alive(client)

    run(work)


def test_cve_2025_62164_tensors_in_requests(run: Any) -> None:
    async def work(client: Client) -> None:
        refused(await client.post("/v1/completions", json={"prompt_embeds": "gAR9lC4="}))
        asked = {"prompt": "hi", "prompt_embeds": "gAR9lC4=", "max_tokens": 1}
        refused(await client.post("/v1/completions", json=asked))
        refused(await chat(client, prompt_embeds=["gAR9lC4="]))

    run(work)


def test_cve_2024_28224_rebinding(run: Any) -> None:
    async def work(client: Client) -> None:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
            for path in ("/", "/health", "/v1/models", "/api/tags"):
                assert (await client.get(path, headers={"Host": host})).status_code == 403
        assert (await client.get("/api/tags", headers={"Origin": "http://evil.example"})).status_code == 403

    run(work)


def test_cve_2025_46570_another_key_cannot_feel_what_is_cached(run: Any) -> None:
    words = " ".join(f"word{i}" for i in range(24))

    async def work(client: Client) -> None:
        async def cached(key: dict[str, str], **changes: Any) -> int:
            messages = [{"role": "system", "content": words}, *HI]  # the usual system prompt is cached already
            answer = await client.post(
                "/v1/chat/completions", json={"messages": messages, "max_tokens": 1, **changes}, headers=key
            )
            assert answer.status_code == 200, answer.text
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert await cached(ALICE) == 0
        assert await cached(ALICE) > 0
        assert await cached(BOB) == 0, "Bob would learn what Alice has asked"
        assert await cached(ALICE, cache_salt="x") == 0

    run(work)


OPEN = {"/health"}


def test_cve_2025_63389_every_route_asks_for_a_key(run: Any) -> None:
    """Also what debugging and development leave open elsewhere."""

    async def work(client: Client) -> None:
        del client.headers["authorization"]
        try:
            routes = create_app(ServeConfig(legacy_chatglm=True)).openapi()["paths"]
            more = (
                "/docs",
                "/redoc",
                "/openapi.json",
                "/metrics",
                "/debug",
                "/reset_prefix_cache",
                "/sleep",
                "/",
                "/x",
            )
            for path in (*routes, *more):
                methods = routes.get(path, {"get": None})
                for method in methods:
                    answer = await client.request(method, path.replace("{", "").replace("}", ""))
                    assert (answer.status_code == 401) == (path not in OPEN), (method, path, answer.status_code)
        finally:
            client.headers.update(ALICE)
        for path in ("/docs", "/redoc", "/debug", "/collective_rpc", "/reset_prefix_cache", "/api/push", "/api/create"):
            for method in ("GET", "POST"):
                assert (await client.request(method, path)).status_code in (404, 405, 501), path

    run(work)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc", "..", ".", "link", "link/", "adapters/../secret", "\x00", "..\\secret", "~", "http://x/y"],
)
def test_cve_2024_37032_adapters_outside(run: Any, name: str) -> None:
    """Also CVE-2024-45436 and CVE-2024-39719 to -39722."""

    async def work(client: Client) -> None:
        answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": name})
        refused(answer, 400, 404)

    run(work)


@pytest.mark.parametrize(
    "path",
    [
        "/page/..%2f..%2fsettings.py",
        "/page/%2e%2e/%2e%2e/settings.py",
        "/page/../../settings.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/..%5c..%5csettings.py",
        "/page/index.html%00",
        "/page/",
    ],
)
def test_cve_2024_37032_files_outside_the_page(run: Any, path: str) -> None:
    async def work(client: Client) -> None:
        answer = await client.get(httpx.URL("http://127.0.0.1").copy_with(raw_path=path.encode()))
        assert answer.status_code in (307, 404), answer.text[:200]
        assert "root:" not in answer.text and "ServeConfig" not in answer.text

    run(work)


def test_cve_2025_59425_keys_are_compared_by_their_hashes() -> None:
    """Whatever is guessed, every key's whole hash is compared, so no prefix is worth anything."""
    ring = KeyRing.read(given=["alice:s3cret-a", "bob:s3cret-b"])
    assert ring.find("s3cret-a") == ring.keys[0] and ring.find("s3cret-b") == ring.keys[1]
    for guess in ("", "s", "s3cret-", "s3cret-aa", "s3cret-a\x00", "S3CRET-A", "é", "\ud800"):
        assert ring.find(guess) is None
    assert "s3cret" not in repr(ring)


def test_cve_2026_22807_code_beside_a_served_model_is_never_run(tmp_path: Path) -> None:
    """Also CVE-2025-66448, CVE-2026-27893, CVE-2026-46432 and CVE-2026-46517: there is no switch that would run it."""
    directory = make_directory(tmp_path / "tiny", num_hidden_layers=1)  # `auto_map`, and modules that leave a mark
    assert "auto_map" in (directory / "config.json").read_text() and list(directory.glob("*.py"))
    options = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 256}
    spec = ModelSpec(source=str(directory), name="tiny", options={**options, "chat_template": "internlm2"})

    async def work() -> None:
        async with asgi_client(ServeConfig(models=(spec,))) as client:
            await alive(client)

    asyncio.run(work())
    assert not (directory / MARK).exists()


def test_cve_2025_25183_nobody_outside_can_construct_a_prefix() -> None:
    """Names of cached blocks are keyed with a secret of each engine: the same ids have other names elsewhere."""
    from hanlin.engine.blocks import BlockManager

    managers = [BlockManager(8, 16) for _ in range(2)]
    keys = [manager._key for manager in managers]
    assert keys[0] != keys[1] and min(map(len, keys)) >= 32


# Lessons that are not of the server alone are tested where they belong.
ELSEWHERE = {
    "CVE-2025-67729, CVE-2025-32434, CVE-2026-24747: unpickling": (
        "unit/test_checkpoint_bin.py",
        ("test_nothing_in_the_file_runs", "test_programs_that_build_objects_are_unsafe"),
    ),
    "ShadowMQ, CVE-2026-3059, -3060, -7301, -26220: pickle between processes, eval": (
        "structure/test_rooms.py",
        ("test_no_foreign_code_can_run",),
    ),
    "CVE-2025-9141: eval in a parser of tool calls": (
        "property/test_glm_chat.py",
        ("test_anything_else_is_no_call",),
    ),
    "CVE-2026-5760, CVE-2024-34359: templates of model files": (
        "unit/test_chat_sandbox.py",
        ("test_nothing_of_pythons_is_reachable", "test_hungry_templates_are_stopped"),
    ),
    "CVE-2024-21802 and others, CVE-2025-53630, CVE-2026-27940, -33298, -7482: sizes in GGUF files": (
        "unit/test_checkpoint_gguf.py",
        ("test_lies_are_refused", "test_every_misplaced_tensor_is_named", "test_every_truncation_is_refused"),
    ),
    "CVE-2024-37032, CVE-2024-45436: names that lead outside": (
        "unit/test_hub_huggingface.py",
        ("test_names_that_lead_outside_are_refused_before_anything_is_fetched",),
    ),
    "CVE-2025-51471: a token for another host than the hub": (
        "unit/test_hub_modelscope.py",
        ("test_the_token_goes_to_the_hub_alone",),
    ),
    "CVE-2025-29770, GHSA-rwxx-mrjm-wc2m: grammars without bounds": (
        "unit/test_guide.py",
        ("test_what_cannot_be_met_is_refused_before_anything_runs", "test_tables_are_given_back"),
    ),
    "CVE-2025-25183, CVE-2025-46570: prefixes that are shared": (
        "property/test_engine_promises.py",
        ("test_salts_do_not_share",),
    ),
    "CVE-2024-28224, CVE-2025-63389: other addresses without a key": (
        "unit/test_serve_guard.py",
        ("test_dns_rebinding_is_refused", "test_other_addresses_need_a_key_at_start"),
    ),
}


@pytest.mark.parametrize("lesson", ELSEWHERE)
def test_lessons_that_are_tested_elsewhere_still_are(lesson: str) -> None:
    file, names = ELSEWHERE[lesson]
    text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    assert [name for name in names if f"def {name}(" not in text] == []
