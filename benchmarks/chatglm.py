"""ChatGLM-6B's shape in 4 bits, with random weights: memory and decode speed against chatglm.cpp.

    python benchmarks/chatglm.py --work WORK --tokenizer ice_text.model --peer-python venv-chatglm/bin/python

Ours is the released int4 layout (one scale a row, embedding and head in 16 bits); theirs is Q4_0, the usual one of
their converter, with one matrix for embedding and head, as it wants them. Files are made in WORK once (9 GB). Bars: at
most 5.2 GB of memory, which the model card tells of int4, and 1.3 times their speed.

Build the peer for this machine (by itself it uses AVX2 and no more; CMake's build type is Release, -O3):

    CMAKE_ARGS="-DCMAKE_POLICY_VERSION_MINIMUM=3.5 -DCMAKE_C_FLAGS=-march=native" venv/bin/pip install chatglm-cpp
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import report
import torch

from hanlin.bench.driver import Contender, EngineProcess
from hanlin.bench.peers import Peer
from hanlin.checkpoints.safetensors_writer import save_safetensors
from hanlin.errors import EngineError

VOCABULARY, WIDTH, INNER, HEADS, LAYERS, LENGTH = 130528, 4096, 16384, 32, 28, 2048
LINEARS = {
    "attention.query_key_value": (3 * WIDTH, WIDTH),
    "attention.dense": (WIDTH, WIDTH),
    "mlp.dense_h_to_4h": (INNER, WIDTH),
    "mlp.dense_4h_to_h": (WIDTH, INNER),
}
PEER = Peer(file=Path(__file__).with_name("chatglm_cpp_engine.py"), package="chatglm-cpp", reads=("ggml",))
MEMORY, SPEED = 5.2e9, 1.3


def rows(values: np.ndarray, count: int) -> np.ndarray:
    """A few random rows over and over: how fast a product is does not depend on its numbers."""
    return np.resize(values, (count, *values.shape[1:]))


def norms() -> Iterator[tuple[str, np.ndarray]]:
    for layer in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"transformer.layers.{layer}.{name}.weight", np.ones(WIDTH, np.float32)
            yield f"transformer.layers.{layer}.{name}.bias", np.zeros(WIDTH, np.float32)
    yield "transformer.final_layernorm.weight", np.ones(WIDTH, np.float32)
    yield "transformer.final_layernorm.bias", np.zeros(WIDTH, np.float32)


def make_ours(target: Path, tokenizer: Path) -> None:
    """A directory as `chatglm-6b-int4` is released."""
    draw = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        table = draw.standard_normal((512, WIDTH)).astype(np.float16) * np.float16(0.02)
        for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
            yield name, torch.from_numpy(rows(table, VOCABULARY))
        for layer in range(LAYERS):
            for name, (out, columns) in LINEARS.items():
                at = f"transformer.layers.{layer}.{name}"
                numbers = draw.integers(-128, 128, (512, columns // 2), dtype=np.int8)
                yield f"{at}.weight", torch.from_numpy(rows(numbers, out))
                yield f"{at}.weight_scale", torch.full((out,), columns**-0.5 / 4.6).half()
                yield f"{at}.bias", torch.zeros(out).half()
        for name, value in norms():
            yield name, torch.from_numpy(value).half()

    save_safetensors(target, tensors())
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "inner_hidden_size": INNER,
        "num_attention_heads": HEADS,
        "num_layers": LAYERS,
        "max_sequence_length": LENGTH,
        "quantization_bit": 4,
        "torch_dtype": "float16",
    }
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copyfile(tokenizer, target / "ice_text.model")


def make_theirs(target: Path, tokenizer: Path) -> None:
    """A file of chatglm.cpp's own kind, version 2: a record of sizes, the tokenizer, and tensors on 16-byte borders."""
    f32, q4_0, draw = 0, 2, np.random.default_rng(0)

    def blocks(out: int, columns: int) -> np.ndarray:
        few = draw.integers(0, 256, (512, columns // 32, 18), dtype=np.uint8)
        few[..., :2] = np.array([columns**-0.5 / 4.6], np.float16).view(np.uint8)
        return rows(few, out)

    def write(file: BinaryIO, name: str, shape: tuple[int, ...], kind: int, data: np.ndarray) -> None:
        file.write(struct.pack("<i", len(name)) + name.encode())
        file.write(struct.pack(f"<{2 + len(shape)}i", len(shape), *shape, kind))
        file.write(bytes(-file.tell() % 16) + data.tobytes())

    with target.open("wb") as file:
        file.write(b"ggml" + struct.pack("<i", 1))
        sizes = (q4_0, VOCABULARY, WIDTH, HEADS, HEADS, LAYERS, INNER)
        file.write(struct.pack("<8ififiii", 2, *sizes, 1e-5, 0, 10000.0, LENGTH, 130005, 3))
        pieces = tokenizer.read_bytes()
        file.write(struct.pack("<i", len(pieces)) + pieces)
        table = "transformer.word_embeddings.weight"
        write(file, table, (VOCABULARY, WIDTH), q4_0, blocks(VOCABULARY, WIDTH))
        values = dict(norms())
        for layer in range(LAYERS):
            at = f"transformer.layers.{layer}"
            for norm, linears in (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp")):
                for end in ("weight", "bias"):
                    write(file, f"{at}.{norm}.{end}", (WIDTH,), f32, values[f"{at}.{norm}.{end}"])
                for name, (out, columns) in LINEARS.items():
                    if name.startswith(linears):
                        write(file, f"{at}.{name}.weight", (out, columns), q4_0, blocks(out, columns))
                        write(file, f"{at}.{name}.bias", (out,), f32, np.zeros(out, np.float32))
        for end in ("weight", "bias"):
            name = f"transformer.final_layernorm.{end}"
            write(file, name, (WIDTH,), f32, values[name])


def made(path: Path, make: object, tokenizer: Path) -> Path:
    if not path.exists():
        print(f"making {path}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        make(unfinished, tokenizer)  # type: ignore[operator]
        unfinished.rename(path)
    return path


def asked(contender: Contender, work: Callable[..., Any], *arguments: Any) -> Any:
    """What an engine gives, or the end with its reason."""
    try:
        return work(*arguments)
    except EngineError as error:
        raise SystemExit(f"{contender.name}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="ChatGLM-6B's ice_text.model, of 130,344 pieces")
    parser.add_argument("--peer-python", help="that has chatglm-cpp; without it only ours is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="write no page")
    args = parser.parse_args()
    ours = made(args.work / "chatglm-6b.int4", make_ours, args.tokenizer)
    # A cache for the model's whole length, as theirs has.
    cache = LENGTH * LAYERS * 2 * WIDTH * 2
    contenders = [Contender(name="Hanlin", model=str(ours), options={"cache_bytes": cache})]
    if args.peer_python:
        theirs = made(args.work / "chatglm-6b.q4_0.ggml", make_theirs, args.tokenizer)
        contenders.append(Contender(name="chatglm.cpp", model=str(theirs), peer=PEER, python=args.peer_python))
    draw = np.random.default_rng(1)
    prompt = [*draw.integers(100, 60000, args.prompt - 2).tolist(), 130001, 130004]
    found: dict[str, list[tuple[float, float, int, float]]] = {}
    with contextlib.ExitStack() as stack:
        # Both stay loaded and take turns: whatever else goes on slows both.
        engines = [
            stack.enter_context(EngineProcess(contender, threads=args.threads, sequences=1, length=LENGTH))
            for contender in contenders
        ]
        for contender, engine in zip(contenders, engines, strict=True):
            asked(contender, engine.load)
            asked(contender, engine.generate, [prompt], 2)
        for number in range(args.repeats):
            for contender, engine in zip(contenders, engines, strict=True):
                times = asked(contender, engine.generate, [prompt], args.tokens)
                speed = times.tokens / (times.total - times.first)
                row = (speed, times.first, engine.peak_memory, engine.load_seconds)
                found.setdefault(contender.name, []).append(row)
                print(f"{number}: {contender.name}: {speed:.2f} tokens/s, {row[2] / 1e9:.2f} GB", flush=True)
    table, middle = [], {}
    for name, measured in found.items():
        speed, first, memory, start = (statistics.median(column) for column in zip(*measured, strict=True))
        middle[name] = (speed, memory)
        table.append([name, f"{speed:.2f}", f"{first:.2f}", f"{memory / 1e9:.2f}", f"{start:.1f}"])
    memory = middle["Hanlin"][1]
    verdict = [f"Memory: {memory / 1e9:.2f} GB, bar {MEMORY / 1e9} GB: {'met' if memory <= MEMORY else 'missed'}."]
    if args.peer_python:
        ratio = middle["Hanlin"][0] / middle["chatglm.cpp"][0]
        verdict.append(f"Speed: {ratio:.2f} times theirs, bar {SPEED}: {'met' if ratio >= SPEED else 'missed'}.")
    text = report.table(["engine", "tokens/s", f"{args.prompt} tokens in, s", "peak memory, GB", "load, s"], table)
    about = f"Random weights, {args.threads} threads, {args.tokens} tokens, medians of {args.repeats} turns."
    if args.print:
        print("\n\n".join((about, text, " ".join(verdict))))
    else:
        report.write("chatglm", "ChatGLM-6B's shape in 4 bits", about, text, " ".join(verdict))


if __name__ == "__main__":
    main()
