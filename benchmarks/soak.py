"""Half an hour of clients that behave, misbehave and vanish, against a real server. Is anything lost, stuck or wrong?

    python benchmarks/soak.py [--seconds 1800] [--clients 12] [--seed 1] [--patience 120] [--no-write]

Every well-formed request must get the bytes that it gets on a quiet server. At the end nothing may run or wait, all
blocks of the cache must be free, and memory must be back where it was after the warm-up. On a machine that is busy with
other things, more `--patience` keeps what is slow from being called stuck; figures of time mean nothing there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PATIENCE = 120.0  # seconds after which an answer is called stuck
KEYS = ("alice:key-a", "bob:key-b", "carol:key-c")
SLACK = 64 << 20  # bytes by which memory may end above the warm-up: heaps keep what they had at their fullest

TEXTS = (
    "Why is the sky blue?",
    "Tell me a story about a fox.",
    "你好，介绍一下你自己。",
    "Write a poem on rain 🌧 and a list of three fruits.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14",
    "Summarise: " + "the quick brown fox jumps over the lazy dog. " * 40,
)


@dataclass
class Tally:
    """What happened."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def check(self, good: bool, kind: str, what: object) -> None:
        self.done[kind] += 1
        if not good:
            self.wrong.append(f"{kind}: {str(what)[:300]}")


class Server:
    """`hanlin serve` in a process of its own."""

    def __init__(self, log: Path, *flags: str, patience: float = PATIENCE) -> None:
        command = [sys.executable, "-m", "hanlin", "serve", "--port", "0", "--page", "--log-level", "warning"]
        keys = {"HANLIN_API_KEYS": ",".join(KEYS)}
        self.patience = patience
        self.log = log.open("w+", encoding="utf-8")
        self.process = subprocess.Popen([*command, *flags], stderr=self.log, env={**os.environ, **keys})
        until = time.monotonic() + patience
        while "Hanlin serves at " not in (said := log.read_text(encoding="utf-8")):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server has not started:\n{said}")
            time.sleep(0.1)
        self.url = said.split("Hanlin serves at ")[1].split()[0]

    @property
    def memory(self) -> int:
        """Resident bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def end(self) -> int:
        """Ask it to end; its exit status."""
        self.process.terminate()
        status = self.process.wait(self.patience)
        self.log.close()
        return status


class Client:
    """One of many: at each turn it does one of the things that clients do."""

    def __init__(self, url: str, seed: int, tally: Tally, truth: dict[str, Any], patience: float) -> None:
        self.url, self.tally, self.truth, self.patience = url, tally, truth, patience
        self.random = random.Random(seed)
        self.http = httpx.AsyncClient(base_url=url, timeout=patience, headers=self._key())

    def _key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.random.choice(KEYS).split(':')[1]}"}

    async def turns(self, until: float) -> None:
        acts = (
            [self.chat] * 6
            + [self.stream] * 6
            + [self.vanish] * 4
            + [self.cancel] * 3
            + [
                self.messages,
                self.complete,
                self.embed,
                self.malformed,
                self.malformed,
                self.oversize,
                self.greedy_regex,
            ]
            + [self.stranger, self.slow_reader, self.half_request, self.tokens]
        )
        async with self.http:
            while time.monotonic() < until:
                self.http.headers.update(self._key())
                act, began = self.random.choice(acts), time.monotonic()
                try:
                    await asyncio.wait_for(act(), self.patience)
                except asyncio.TimeoutError:
                    self.tally.check(False, act.__name__, f"stuck for {self.patience:g} s")
                except httpx.HTTPError as error:
                    self.tally.check(False, act.__name__, repr(error))
                self.tally.slowest = max(self.tally.slowest, time.monotonic() - began)

    def _request(self) -> tuple[str, dict[str, Any]]:
        name = self.random.choice([name for name in self.truth if name.startswith("chat")])
        return name, json.loads(name.removeprefix("chat"))

    async def chat(self) -> None:
        name, body = self._request()
        answer = await self.http.post("/v1/chat/completions", json=body)
        self._same(
            name, answer, answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"], "chat"
        )

    async def stream(self) -> None:
        name, body = self._request()
        text, finished = "", False
        async with self.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                finished |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:]).get("choices", ()):
                        text += choice["delta"].get("content") or ""
        self._same(name, answer, finished and text, "stream")

    def _same(self, name: str, answer: httpx.Response, text: object, kind: str) -> None:
        if answer.status_code == 429:
            self.tally.check("retry-after" in answer.headers, "busy", answer.headers)
        else:
            self.tally.check(
                text == self.truth[name], kind, f"{answer.status_code} {text!r} is not {self.truth[name]!r}"
            )

    async def vanish(self) -> None:
        _, body = self._request()
        body |= {"stream": True, "max_tokens": 400}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            left = self.random.randrange(8)
            async for _ in answer.aiter_lines():
                left -= 1
                if left < 0:
                    break
        self.tally.check(answer.status_code in (200, 429), "vanish", answer.status_code)

    async def cancel(self) -> None:
        _, body = self._request()
        work = asyncio.ensure_future(self.http.post("/v1/chat/completions", json={**body, "max_tokens": 500, "n": 3}))
        await asyncio.sleep(self.random.random() * 0.3)
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        self.tally.check(True, "cancel", "")

    async def messages(self) -> None:
        body = {"model": "x", "max_tokens": 8, "messages": [{"role": "user", "content": self.random.choice(TEXTS)}]}
        answer = await self.http.post("/v1/messages", json={**body, "model": "smollm2"})
        self.tally.check(answer.status_code in (200, 429), "messages", answer.text)

    async def complete(self) -> None:
        body = {
            "model": "smollm2",
            "prompt": [self.random.choice(TEXTS)] * 3,
            "max_tokens": 6,
            "echo": True,
            "logprobs": 1,
        }
        answer = await self.http.post("/v1/completions", json=body)
        self.tally.check(answer.status_code in (200, 429), "complete", answer.text)

    async def embed(self) -> None:
        answer = await self.http.post("/v1/embeddings", json={"model": "smollm2", "input": "fox"})
        if answer.status_code == 200:
            self.tally.check(answer.json()["data"][0]["embedding"] == self.truth["embed"], "embed", "other numbers")
        else:
            self.tally.check(answer.status_code == 429, "embed", answer.text)

    async def tokens(self) -> None:
        answer = await self.http.post("/tokenize", json={"prompt": self.random.choice(TEXTS)})
        self.tally.check(answer.status_code == 200, "tokens", answer.text)

    async def malformed(self) -> None:
        user = {"role": "user", "content": "x"}
        bodies: tuple[bytes, ...] = (
            b"",
            b"{",
            b"[" * 5000,
            b"null",
            b'{"model":"smollm2","messages":"x"}',
            b"\xff\xfe",
            json.dumps({"model": "smollm2", "messages": [user], "temperature": -1, "n": 10**9}).encode(),
            json.dumps({"model": "smollm2", "messages": [user], "response_format": {"type": "json_schema"}}).encode(),
            json.dumps({"model": "smollm2", "messages": [user], "logit_bias": {"x": 1}}).encode(),
            json.dumps({"model": "none", "messages": [user]}).encode(),
            json.dumps({"model": "smollm2", "messages": [{"role": "user", "content": "x " * 20000}]}).encode(),
            json.dumps({"model": "smollm2", "messages": [user], "structured_outputs": {"regex": "(a*"}}).encode(),
        )
        answer = await self.http.post("/v1/chat/completions", content=self.random.choice(bodies))
        self.tally.check(400 <= answer.status_code < 500, "malformed", f"{answer.status_code} {answer.text}")

    async def greedy_regex(self) -> None:
        """Legal, and made to be slow: it must end all the same."""
        turns = [{"role": "user", "content": "x"}]
        wanted = {"regex": self.random.choice(("(a*)*" * 300, "(.*a){30}", "([a-z]{1,50} ){1,200}"))}
        body = {"model": "smollm2", "messages": turns, "max_tokens": 16, "structured_outputs": wanted}
        answer = await self.http.post("/v1/chat/completions", json=body)
        self.tally.check(answer.status_code in (200, 400, 429), "greedy regex", answer.text)

    async def oversize(self) -> None:
        with contextlib.suppress(httpx.WriteError):  # the server need not read it all
            answer = await self.http.post("/v1/chat/completions", content=b" " * (9 << 20))
            self.tally.check(answer.status_code == 413, "oversize", answer.status_code)

    async def stranger(self) -> None:
        answer = await self.http.get("/v1/models", headers={"Authorization": "Bearer guess"})
        self.tally.check(answer.status_code == 401, "stranger", answer.status_code)

    async def slow_reader(self) -> None:
        _, body = self._request()
        async with self.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            async for _ in answer.aiter_raw(16):
                await asyncio.sleep(0.02 * self.random.random())
        self.tally.check(answer.status_code in (200, 429), "slow reader", answer.status_code)

    async def half_request(self) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        whole = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
        writer.write(whole[: self.random.randrange(1, len(whole))])
        await writer.drain()
        await asyncio.sleep(self.random.random() * 0.2)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        self.tally.check(True, "half request", reader)


async def quiet_answers(url: str, patience: float) -> dict[str, Any]:
    """What a quiet server answers: the truth."""
    headers = {"Authorization": "Bearer key-a"}
    truth: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=url, timeout=patience, headers=headers) as http:
        for number, text in enumerate(TEXTS):
            for temperature in (0, 0.8):
                turns = [{"role": "user", "content": text}]
                body = {
                    "model": "smollm2",
                    "messages": turns,
                    "temperature": temperature,
                    "seed": 7,
                    "max_tokens": 24 + number,
                }
                answer = (await http.post("/v1/chat/completions", json=body)).json()
                truth["chat" + json.dumps(body)] = answer["choices"][0]["message"]["content"]
        answer = (await http.post("/v1/embeddings", json={"model": "smollm2", "input": "fox"})).json()
        truth["embed"] = answer["data"][0]["embedding"]
    return truth


def metrics(url: str) -> dict[str, float]:
    text = httpx.get(url + "/metrics", headers={"Authorization": "Bearer key-a"}, timeout=PATIENCE).text
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.split("{")[0].removeprefix("hanlin:"): float(value) for name, value in rows}


async def crowd(
    url: str, seconds: float, clients: int, seed: int, truth: dict[str, Any], patience: float = PATIENCE
) -> Tally:
    tally, until = Tally(), time.monotonic() + seconds
    await asyncio.gather(*(Client(url, seed * 1000 + n, tally, truth, patience).turns(until) for n in range(clients)))
    return tally


def soak(
    log: Path, *, seconds: float, clients: int = 12, seed: int = 1, warm: float = 10.0, patience: float = PATIENCE
) -> tuple[Tally, dict[str, Any]]:
    """Run it all; what happened, and figures of the end. Whatever was wrong is in `Tally.wrong`."""
    flags = ("--cache-size", "256M", "--max-queued-requests", "8", "--max-concurrent-requests", "8")
    server = Server(log, *flags, patience=patience)
    try:
        truth = asyncio.run(quiet_answers(server.url, patience))
        asyncio.run(crowd(server.url, min(warm, seconds), clients, seed + 1, truth, patience))
        before, touched = server.memory, metrics(server.url)["kv_cache_touched_bytes"]
        tally = asyncio.run(crowd(server.url, seconds, clients, seed, truth, patience))
        time.sleep(1.0)  # what vanished last ends within a step
        after, now = server.memory, metrics(server.url)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            tally.check(now[name] == 0, "left behind", f"{name} = {now[name]}")
        cache = int(now["kv_cache_touched_bytes"] - touched)  # blocks take memory when they are first used
        more = after - before - cache
        tally.check(more <= SLACK, "memory", f"{more / 2**20:.0f} MiB more than after the warm-up, the cache apart")
        again = asyncio.run(quiet_answers(server.url, patience))
        tally.check(again == truth, "the same afterwards", "other answers")
        tally.check(server.process.poll() is None, "alive", "the server has ended")
    finally:
        status = server.end()
    tally.check(status == 0, "exit", status)
    errors = [line for line in log.read_text(encoding="utf-8").splitlines() if " ERROR " in line or "Traceback" in line]
    tally.check(not errors, "log", errors[:3])
    return tally, {
        "memory before": before,
        "memory after": after,
        "cache": cache,
        "generated": now["generation_tokens_total"],
    }


def main() -> int:
    from report import table, write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warm", type=float, default=10, help="seconds of the same before memory is measured first")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds until an answer is called stuck")
    parser.add_argument("--log", type=Path, default=Path("soak.log"))
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    wanted = {name: getattr(given, name) for name in ("seconds", "clients", "seed", "warm", "patience")}
    tally, end = soak(given.log, **wanted)
    rows = table(("what clients did", "times"), sorted(tally.done.items()))
    about = (
        f"{given.clients} clients for {given.seconds:.0f} s: {sum(tally.done.values())} acts, "
        f"{len(tally.wrong)} wrong; slowest {tally.slowest:.1f} s. Generated {end['generated']:.0f} tokens. Memory "
        f"{end['memory before'] / 2**20:.0f} MiB after the warm-up, {end['memory after'] / 2**20:.0f} MiB at the end, "
        f"{end['cache'] / 2**20:.0f} MiB of that in blocks of the cache that were first used since."
    )
    wrong = "\n".join(f"- {line}" for line in tally.wrong[:50])
    if given.no_write:
        print(about, rows, wrong, sep="\n")
    else:
        write("soak", "A soak with faults", about, rows, wrong or "Nothing went wrong.")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
