"""Several keys at one server, over HTTP: each has its own rate, and a place goes to who has the fewest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hanlin.serve.keys import KeyRing
from hanlin.serve.settings import Limits, ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import running_app

OPTIONS: dict[str, Any] = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 1024}
BODY: dict[str, Any] = {"prompt": "hi", "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("keys") / "tiny", num_hidden_layers=1)


@asynccontextmanager
async def clients(directory: Path, ring: KeyRing, **config: Any) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """One for each key, by its name; secrets are "secret-NAME"."""
    spec = ModelSpec(source=str(directory), name="tiny", options=OPTIONS)
    async with running_app(ServeConfig(models=(spec,), keys=ring, **config)) as app:
        transport = httpx.ASGITransport(app)
        made = {
            key.name: httpx.AsyncClient(
                transport=transport,
                base_url="http://127.0.0.1",
                timeout=60,
                headers={"Authorization": f"Bearer secret-{key.name}"},
            )
            for key in ring.keys
        }
        try:
            yield made
        finally:
            for client in made.values():
                await client.aclose()


async def ask(client: httpx.AsyncClient, tokens: int) -> httpx.Response:
    return await client.post("/v1/completions", json={**BODY, "max_tokens": tokens})


@pytest.mark.parametrize("rate", ["3 -", "- 60"])
def test_a_key_that_used_up_its_rate_waits_alone(directory: Path, tmp_path: Path, rate: str) -> None:
    """Three requests a minute, or sixty tokens, of which three requests use more."""
    file = tmp_path / "keys"
    file.write_text(f"alice:secret-alice {rate}\nbob:secret-bob\ncarol:secret-carol {rate}\n")

    async def work() -> None:
        async with clients(directory, KeyRing.read(file=file)) as by_name:
            for _ in range(3):
                assert (await ask(by_name["alice"], 20)).status_code == 200
            refused = await ask(by_name["alice"], 1)
            assert refused.status_code == 429, refused.text
            assert refused.json()["error"]["code"] == "rate_limit_exceeded" and "alice" in refused.text
            assert 0 < int(refused.headers["retry-after"]) <= 60
            for name in ("bob", "carol", "bob", "bob", "bob"):
                assert (await ask(by_name[name], 20)).status_code == 200

    asyncio.run(work())


def test_one_key_with_many_requests_does_not_hold_up_another(directory: Path) -> None:
    """One place: eight requests of one key wait, then comes one of another. It is answered second or third."""
    ring = KeyRing.read(given=["many:secret-many", "few:secret-few"])

    async def work() -> None:
        async with clients(directory, ring, limits=Limits(running=1, queued_requests=32)) as by_name:
            order: list[str] = []

            async def one(name: str) -> None:
                assert (await ask(by_name[name], 60)).status_code == 200
                order.append(name)

            first = [asyncio.ensure_future(one("many")) for _ in range(8)]
            while not order:  # they are at it
                await asyncio.sleep(0.001)
            await asyncio.gather(one("few"), *first)
            assert order.index("few") <= 3 and len(order) == 9

    asyncio.run(work())
