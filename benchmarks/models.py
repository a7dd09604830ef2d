"""Model files for the benchmarks, made once and kept: quantised by llama.cpp, unpacked by Transformers, or random.

    python benchmarks/models.py DIRECTORY [NAME ...]

Random models have the shape of InternLM2 under Llama's names, which every engine reads; the arithmetic is the same. How
fast a product is does not depend on the numbers in it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hanlin import hub

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "tokenizer_internlm2.model"
CONTEXT = 32768


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model: blocks, width, query and key heads, and the inner width of the MLP."""

    blocks: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int = 92544

    @property
    def embedding_bytes(self) -> int:
        """Of the Q4_0 embedding, of which a step reads next to nothing."""
        return self.vocabulary * self.width // 32 * 18


SHAPES = {
    "internlm2-1.8b": Shape(blocks=24, width=2048, heads=16, kv_heads=8, inner=8192),
    "internlm2-7b": Shape(blocks=32, width=4096, heads=32, kv_heads=8, inner=14336),
}

# llama.cpp's own quantiser, run where it is installed.
QUANTISE = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
options.allow_requantize = True
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), options))
"""


def quantised(target: Path, *, kind: str, python: str) -> None:
    """The default model in another kind: good for its speed, not for its answers, for it was in 4 bits before."""
    source = hub.resolve().path
    done = subprocess.run([python, "-c", QUANTISE, str(source), str(target), kind], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} could not quantise {source}:\n{done.stderr[-2000:]}")


def unpacked(target: Path) -> None:
    """The default model as a directory in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = hub.resolve().path
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    config = read.config
    del config.quantization_config  # with it, nothing can be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def shuffled(target: Path) -> None:
    """The default model in float32 with its channels in another order: the same function of the same numbers.

    In the file they are on a grid of 4 bits in groups of 32 columns; here the groups are mixed, as if they never had
    been. The loud channels stay loud, so that methods that look at inputs have the same task.
    """
    import json

    import torch

    from hanlin.checkpoints.safetensors_writer import save_safetensors
    from hanlin.compress.source import Original
    from hanlin.tokenizers.gguf_files import gguf_to_files

    path, draw = hub.resolve().path, torch.Generator().manual_seed(0)
    with Original(path) as original:
        config = original.config
        width = torch.randperm(config.hidden_size, generator=draw)
        heads = config.num_heads // config.num_kv_heads
        tensors = {}
        for name, _ in original.model.named_parameters():
            value = original.load(name)
            if name.endswith(("q_proj.weight", "k_proj.weight", "embed_tokens.weight")):
                value = value[:, width]
            elif name.endswith("norm.weight"):
                value = value[width]
            tensors[name] = value
        for layer in range(config.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            within = torch.stack(
                [torch.randperm(config.head_dim, generator=draw) for _ in range(config.num_kv_heads)]
            ) + torch.arange(0, config.num_kv_heads * config.head_dim, config.head_dim).unsqueeze(1)
            # Query head h looks at key and value head h // heads.
            base = torch.arange(config.num_kv_heads).repeat_interleave(heads)
            spread = within[base] + ((torch.arange(config.num_heads) - base) * config.head_dim).unsqueeze(1)
            inner = torch.randperm(config.intermediate_size, generator=draw)
            for name, rows, columns in (
                (f"{attention}.v_proj.weight", within.flatten(), width),
                (f"{attention}.o_proj.weight", width, spread.flatten()),
                (f"{mlp}.gate_proj.weight", inner, width),
                (f"{mlp}.up_proj.weight", inner, width),
                (f"{mlp}.down_proj.weight", width, inner),
            ):
                tensors[name] = tensors[name][rows][:, columns].contiguous()
        values = original.configuration() | {"torch_dtype": "float32"}
        kept = {name: value.contiguous() for name, value in tensors.items()}
        save_safetensors(target, kept.items())
        (target / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
        original.write_others(target, gguf_to_files(original.source.metadata, name=str(path)))


def random_gguf(target: Path, *, shape: Shape, kind: str) -> None:
    """A model of random blocks. As llama.cpp quantises it, the head of a Q4_0 file is in Q6_K.

    All layers share their numbers, so that writing takes little memory; the file holds them apart.
    """
    import gguf
    import numpy as np
    import sentencepiece

    draw = np.random.default_rng(0)
    # (bytes of a block, its values, where its scale stands, the spread of what is scaled)
    layouts = {"Q4_0": (18, 32, 0, 4.6), "Q8_0": (34, 32, 0, 74.0), "Q6_K": (210, 256, 208, 74.0 * 18.5)}

    def blocks(rows: int, columns: int, kind: str) -> np.ndarray:
        size, values, at, spread = layouts[kind]
        few = draw.integers(0, 256, (min(rows, 512), columns // values, size), dtype=np.uint8)
        scale = np.array([columns**-0.5 / spread], np.float16).view(np.uint8)
        few[..., at : at + 2] = scale
        return np.resize(few, (rows, columns // values, size)).reshape(rows, -1)

    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_block_count(shape.blocks)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    pieces = sentencepiece.SentencePieceProcessor(str(TOKENIZER))
    known = range(pieces.get_piece_size())
    unused = shape.vocabulary - len(known)
    types = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in known]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in known] + [f"<unused {i}>" for i in range(unused)])
    writer.add_token_scores([pieces.get_score(i) for i in known] + [0.0] * unused)
    writer.add_token_types(types + [5] * unused)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, data: np.ndarray, kind: str) -> None:
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    keys = shape.width // shape.heads * shape.kv_heads
    sizes = {
        "attn_q": (shape.width, shape.width),
        "attn_k": (keys, shape.width),
        "attn_v": (keys, shape.width),
        "attn_output": (shape.width, shape.width),
        "ffn_gate": (shape.inner, shape.width),
        "ffn_up": (shape.inner, shape.width),
        "ffn_down": (shape.width, shape.inner),
    }
    shared = {name: blocks(*size, kind) for name, size in sizes.items()}
    ones = np.ones(shape.width, np.float32)
    add("token_embd.weight", blocks(shape.vocabulary, shape.width, kind), kind)
    for layer in range(shape.blocks):
        for name, data in shared.items():
            add(f"blk.{layer}.{name}.weight", data, kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    head = "Q6_K" if kind == "Q4_0" else kind
    add("output.weight", blocks(shape.vocabulary, shape.width, head), head)
    writer.add_tensor("output_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def makers(python: str) -> Mapping[str, Callable[[Path], None]]:
    """From a file's name to what makes it; `python` has llama-cpp-python."""
    return {
        "smollm2-135m.Q4_0.gguf": partial(quantised, kind="Q4_0", python=python),
        "smollm2-135m.Q8_0.gguf": partial(quantised, kind="Q8_0", python=python),
        "smollm2-135m.bfloat16": unpacked,
        "smollm2-135m.shuffled": shuffled,
        **{
            f"{name}.{kind}.gguf": partial(random_gguf, shape=shape, kind=kind)
            for name, shape in SHAPES.items()
            for kind in ("Q4_0", "Q8_0")
        },
    }


def made(work: Path, name: str, python: str) -> Path:
    """The file or directory of that name in `work`, made if it isn't there."""
    path = work / name
    if not path.exists():
        print(f"making {path}", file=sys.stderr)
        work.mkdir(parents=True, exist_ok=True)
        unfinished = work / f"unfinished-{name}"
        makers(python)[name](unfinished)
        unfinished.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", help="by default all")
    parser.add_argument("--llama-cpp", default=sys.executable, metavar="PYTHON", help="that has llama-cpp-python")
    given = parser.parse_args()
    known = makers(given.llama_cpp)
    unknown = [name for name in given.names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}. Known: {', '.join(known)}")
    for name in given.names or known:
        print(made(given.directory, name, given.llama_cpp))


if __name__ == "__main__":
    main()
