"""GGUF files that Hanlin writes, run by llama.cpp: the same greedy tokens in float32, and the same cutting of texts?

    python benchmarks/gguf_interop.py --peer-python venv-llama/bin/python [--tokenizers DIRECTORY]

One model is trained (the default model, put in InternLM2's layout), the others are small with random weights. Real
tokenizers are needed for ChatGLM3 and GLM-4: `DIRECTORY` has `tokenizer_chatglm3.model` and `tokenizer_glm4.tiktoken`.
Each model is converted as by `hanlin convert --to gguf`, f32, and continues three prompts by 32 tokens in both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import hanlin
from hanlin.checkpoints.convert import convert
from hanlin.checkpoints.source import open_source
from hanlin.models.registry import build, read_config
from hanlin.tokenizers import load_tokenizer
from hanlin.tokenizers.gguf_files import gguf_to_files
from hanlin.tokenizers.to_gguf import gguf_keys

TOKENS = 32
_HERE = Path(__file__).parent
_INTERNLM2 = _HERE.parent / "tests" / "data" / "tokenizer_internlm2.model"
TEXTS = (
    "Hello  world 1234567\n",
    "床前明月光，疑是地上霜。👋",
    " def f(x):\n\treturn x ** 2  # it's\n\n",
    "IT'S 12345! Привет, мир. こんにちは",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|user|>\n你好<|assistant|>",
)
PROMPTS = ("Why is the sky blue?", "从前有座山，", "def fibonacci(n):\n")
_SIZES = {"hidden_size": 64, "num_attention_heads": 4}
_LLAMA = {
    **_SIZES,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 92544,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
_CHATGLM = {
    **_SIZES,
    "model_type": "chatglm",
    "ffn_hidden_size": 96,
    "num_layers": 3,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 8192,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "eos_token_id": 2,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model: its configuration and tokenizer file, or "" for the trained one."""

    name: str
    values: dict[str, Any]
    tokenizer: str = ""
    tokenizer_class: str = ""


_SPM = {"tokenizer": _INTERNLM2.name, "tokenizer_class": "InternLM2Tokenizer"}
CASES = (
    Case(name="SmolLM2-135M-Instruct as InternLM2", values={}),
    Case(name="InternLM2", values={**_LLAMA, "model_type": "internlm2", "bias": False}, **_SPM),
    Case(name="InternLM2, biases", values={**_LLAMA, "model_type": "internlm2", "bias": True}, **_SPM),
    Case(
        name="InternLM",
        values={
            **{key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
            "model_type": "internlm",
            "bias": True,
            "rope_theta": 1e4,
        },
        **_SPM,
    ),
    Case(name="InternLM3", values={**_LLAMA, "model_type": "internlm3", "qkv_bias": True, "head_dim": 32}, **_SPM),
    Case(name="Llama, biases", values={**_LLAMA, "model_type": "llama", "attention_bias": True}, **_SPM),
    Case(name="Llama, tied, linear", values={
        **_LLAMA, "model_type": "llama", "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }, **_SPM),
    Case(name="Llama 3's RoPE", values={
        **_LLAMA, "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    }, **_SPM),
    Case(name="Qwen2", values={**_LLAMA, "model_type": "qwen2"}, **_SPM),
    Case(name="ChatGLM3", values={**_CHATGLM, "padded_vocab_size": 65024, "_name_or_path": "THUDM/chatglm3-6b"},
         tokenizer="tokenizer_chatglm3.model", tokenizer_class="ChatGLMTokenizer"),
    Case(name="ChatGLM2-32k", values={**_CHATGLM, "padded_vocab_size": 65024, "rope_ratio": 16,
                                      "_name_or_path": "THUDM/chatglm2-6b-32k"},
         tokenizer="tokenizer_chatglm3.model", tokenizer_class="ChatGLMTokenizer"),
    Case(name="GLM-4", values={**_CHATGLM, "padded_vocab_size": 151552, "rope_ratio": 500},
         tokenizer="tokenizer_glm4.tiktoken", tokenizer_class="ChatGLM4Tokenizer"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How many of the tokens and texts agree, of how many; `ends` are those that both stop at."""

    tokens: int
    of_tokens: int
    texts: int
    of_texts: int
    ends: tuple[int, ...]
    differing: tuple[str, ...]
    version: str


def make(case: Case, place: Path, tokenizers: Path | None) -> Path:
    """The model's directory.

    Raises:
        FileNotFoundError: there is no such tokenizer file.
    """
    if not case.tokenizer:
        return _trained(place)
    place.mkdir()
    file = _INTERNLM2 if case.tokenizer == _INTERNLM2.name else (tokenizers or Path()) / case.tokenizer
    shutil.copyfile(file, place / "tokenizer.model")
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": case.tokenizer_class}))
    (place / "config.json").write_text(json.dumps(case.values))
    model = build(read_config(case.values), dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if "norm" in name else noise * (1.0 if parameter.shape[0] > 1000 else 0.2)
    save_file(tensors, place / "model.safetensors")
    return place


def _trained(place: Path) -> Path:
    from hanlin import hub

    path = hub.resolve(None).path
    with open_source(path) as source:
        files = gguf_to_files(source.metadata)
    return convert(path, place, to="internlm2", files=files)


def ours(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens of our engine, in float32."""
    options = {"dtype": "float32", "weights": "float32", "kv_cache": "float32", "session_len": 512}
    with hanlin.load(model, **options) as llm:
        done = llm.generate([list(ids) for ids in prompts], temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return [list(reply.ids) for reply in done]


def measure(case: Case, place: Path, python: str, tokenizers: Path | None) -> Outcome:
    """Make, convert, run in both, compare."""
    directory = make(case, place / "model", tokenizers)
    tokenizer = load_tokenizer(directory)
    file = convert(directory, place / "model.gguf", to="gguf", outtype="f32", tokenizer=gguf_keys(tokenizer))
    prompts = [tokenizer.encode(text, add_special=True) for text in PROMPTS]
    names = ("<|im_end|>", "<|user|>", "<|observation|>")
    ends = {tokenizer.eos_id, *map(tokenizer.token_id, names)} & tokenizer.special_ids
    asked = {
        "model": str(file),
        "prompts": prompts,
        "tokens": TOKENS,
        "texts": TEXTS,
        "ends": sorted(ends),
        "threads": 1,
    }
    script = _HERE / "gguf_interop_peer.py"
    done = subprocess.run([python, str(script)], input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: llama.cpp failed:\n{done.stderr[-2000:]}")
    peer = json.loads(done.stdout)
    mine, again = ours(directory, prompts), ours(file, prompts)
    if mine != again:
        raise RuntimeError(f"{case.name}: our own engine does not go on alike from the directory and from the file")
    same = sum(
        a == b for reply, other in zip(mine, peer["replies"], strict=True) for a, b in zip(reply, other, strict=True)
    )
    differing = []
    for text, both in zip(TEXTS, peer["texts"], strict=True):
        for special, ids in zip((False, True), both, strict=True):
            if ids != tokenizer.encode(text, parse_special=special):
                differing.append(f"{text!r}{', special' if special else ''}")
    return Outcome(
        tokens=same,
        of_tokens=sum(map(len, mine)),
        texts=2 * len(TEXTS) - len(differing),
        of_texts=2 * len(TEXTS),
        ends=tuple(peer["ends"]),
        differing=tuple(differing),
        version=peer["version"],
    )


def rows(python: str, tokenizers: Path | None, note: Callable[[str], None]) -> Iterator[tuple[object, ...]]:
    """One row of the table a case."""
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            try:
                found = measure(case, Path(place), python, tokenizers)
            except FileNotFoundError as error:
                yield (case.name, "not measured", f"{Path(str(error.filename)).name} is not there", "")
                continue
        note(f"llama-cpp-python {found.version}")
        for text in found.differing:
            note(f"{case.name} cuts {text} otherwise")
        tokens, texts = f"{found.tokens} of {found.of_tokens}", f"{found.texts} of {found.of_texts}"
        yield (case.name, tokens, texts, ", ".join(map(str, found.ends)))


def main() -> None:
    import report

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--tokenizers", type=Path, help="a directory with ChatGLM3's and GLM-4's tokenizer files")
    options = parser.parse_args()
    notes: dict[str, None] = {}
    table = report.table(
        ("model", "the same greedy tokens", "texts cut the same", "ids that llama.cpp stops at"),
        list(rows(options.peer_python, options.tokenizers, notes.setdefault)),
    )
    report.write(
        "gguf-interop",
        "GGUF files that Hanlin writes, run by llama.cpp",
        "`hanlin convert --to gguf --outtype f32`, then three prompts continued by 32 tokens each, float32 weights and "
        "cache, in Hanlin (from the directory and from the file) and in llama.cpp. Texts are cut with special tokens "
        "read and not read. All models but the first have random weights.",
        table,
        "\n".join(f"* {note}" for note in notes),
    )


if __name__ == "__main__":
    main()
