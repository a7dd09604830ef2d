"""How much memory a conversion takes: a model of InternLM2-7B's shape, random, through `hanlin convert`.

    python benchmarks/convert.py WORK [--layers 32] [--to llama --to internevo] [--keep]

WORK needs three times the model's size (15.5 GB with 32 layers). Memory is what the process and its children hold at
most, resident, looked at every 50 ms, and the system's own record of the process. Times say nothing on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from report import table, write
from safetensors.torch import save_file

from hanlin.models.registry import build, read_config

_SHARD = 2 << 30
_MOST = 3 * 1000**3
_FURTHER = {"internevo": ["--tp", "2", "--pp", "2", "--no-adapt-hf"], "gguf": ["--outtype", "q8_0"]}
_FURTHER["hanlin"] = ["--weights", "int4"]
_NAMES = {"gguf": "to-gguf.gguf"}


def configuration(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": 92544,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def make(path: Path, layers: int, tokenizer: Path | None) -> int:
    """Write the model in shards; its bytes."""
    path.mkdir(parents=True)
    values = configuration(layers)
    (path / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, path / "tokenizer.model")
    noise = (0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).bfloat16()
    shapes = [(name, p.shape) for name, p in build(read_config(values), dtype=torch.float32).named_parameters()]
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    total = size = number = 0

    def flush() -> None:
        nonlocal number, size
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(held, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
        held.clear()
        size = 0

    for turn, (name, shape) in enumerate(shapes):
        count = shape.numel()
        if size + 2 * count > _SHARD:
            flush()
        # Every tensor starts elsewhere in the noise, so that no two are alike.
        noisy = noise.roll(-7919 * turn).repeat(-(-count // len(noise)))[:count].reshape(shape)
        held[name] = noisy + 1 if "norm" in name else noisy
        size, total = size + 2 * count, total + 2 * count
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def resident(pid: int) -> int:
    """Bytes that it holds now."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def measure(words: list[str]) -> tuple[int, int, float]:
    """The most that the tree and the process itself held, in bytes, and seconds."""
    began, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "hanlin", *words])
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        most = max(most, sum(map(resident, family(process.pid))))
        time.sleep(0.05)
    if status:
        raise SystemExit(f"hanlin {' '.join(words)} failed")
    return most, usage.ru_maxrss * 1024, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--to", action="append", help="may be given several times")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model, which gguf needs")
    parser.add_argument("--keep", action="store_true", help="leave the model, not the results")
    asked = parser.parse_args()
    source = asked.work / "model"
    weights = source.glob("*.safetensors") if source.is_dir() else None
    total = sum(file.stat().st_size for file in weights) if weights else make(source, asked.layers, asked.tokenizer)
    rows = []
    for to in asked.to or ["llama", "internevo"]:
        target = asked.work / _NAMES.get(to, f"to-{to}")
        words = ["convert", str(source), str(target), "--to", to, *_FURTHER.get(to, [])]
        tree, own, seconds = measure(words)
        files = [target] if target.is_file() else [file for file in target.iterdir() if file.is_file()]
        written = sum(file.stat().st_size for file in files)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        said = " ".join(["--to", to, *_FURTHER.get(to, [])])
        rows.append((said, written / 1e9, tree / 1e9, own / 1e9, seconds, "yes" if max(tree, own) <= _MOST else "no"))
    if not asked.keep:
        shutil.rmtree(source)
    head = ("convert", "GB written", "GB of the tree", "GB of the process", "s", "<= 3 GB")
    about = f"InternLM2-7B's shape with {asked.layers} layers, random, {total / 1e9:.1f} GB of bfloat16 in shards."
    write("convert", "Memory of conversions", about, table(head, rows), "Every result was read again and compared.")


if __name__ == "__main__":
    main()
