"""How near the families come to what recorded them or runs them too, and what ChatGLM-6B's shape needs of memory.

    python benchmarks/families.py [--work DIR]

With `--work`, a directory of ChatGLM-6B's true shape is made there from random 4-bit numbers (5 GB, kept), and two
rounds of chat are held with it in a process of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).parents[1] / "tests"
SHARED = Path(__file__).parents[2] / "shared"
sys.path.insert(0, str(TESTS))  # directories as released are made by what the tests make them with

LIMIT, PREFIX_LIMIT, MEMORY_LIMIT = 1e-5, 2e-4, 5.2e9
ROUNDS = ("你好，请介绍一下你自己。", "What can you tell me about the city of Beijing?")


def _load(path: Path, **options: Any) -> Any:
    from hanlin.checkpoints.load import load_model

    return load_model(path, dtype=torch.float32, device=torch.device("cpu"), **options)


def _causal(model: Any, ids: Tensor) -> Tensor:
    from hanlin.layers.attend import PackedAttend
    from hanlin.layers.rope import Positions

    length = len(ids)
    rope = model.config.rope
    fixed = torch.full((length,), rope.dynamic_length(length))
    places = Positions(torch.arange(length)[None], fixed if fixed.any() else None)
    return model(ids, places, PackedAttend([length]))  # type: ignore[no-any-return]


@torch.no_grad()
def recorded(work: Path) -> Iterator[tuple[object, ...]]:
    """The official code's outputs of one block, through the loading path."""
    import chatglm2_directory as two
    import chatglm_directory as one
    from hanlin.layers.attend import PackedAttend
    from hanlin.layers.rope import Positions
    from hanlin.models.registry import layout_of

    golden = SHARED / "assets" / "golden"
    ids = {"mask_token_id": 3, "gmask_token_id": 1, "bos_token_id": 2, "eos_token_id": 4}
    sizes = {"num_attention_heads": 8, "num_layers": 1, "vocab_size": 5}
    for name, length, bar in (("glm_model", 0, LIMIT), ("glm_ptuning_v2_model", 5, PREFIX_LIMIT)):
        tensors, soft, steps = one.read_golden(golden / f"{name}.data", length)
        tensors["lm_head.weight"] = torch.zeros(5, 32)
        path, prefix = one.write(work / name, one.config(**sizes, **ids), tensors), None
        if soft is not None:
            prefix = work / f"{name}-prefix"
            prefix.mkdir()
            table = soft.permute(2, 0, 1, 3, 4).reshape(length, -1)
            torch.save({"transformer.prefix_encoder.embedding.weight": table}, prefix / "pytorch_model.bin")
        loaded = _load(path, prefix=prefix)
        rule, parts = layout_of(loaded.config), loaded.model.parts()
        assert rule is not None
        text: list[int] = []
        worst = largest = 0.0
        for new, want in steps:
            text += new.tolist()
            context, positions = rule(text)
            attend = PackedAttend([len(text)], [context], parts.prefix() if parts.prefix else None)
            got = loaded.model(torch.tensor(text), Positions(torch.from_numpy(positions(0, len(text)))), attend)
            worst = max(worst, float((got[-len(new) :] - want).abs().max()))
            largest = max(largest, float(want.abs().max()))
        yield name, f"{worst:.1e}", f"{bar:.0e}", f"{largest:.1f}"
    tensors, steps = two.read_golden(golden / "glm2_model.data")
    tensors["transformer.output_layer.weight"] = torch.zeros(5, 32)
    shape = {"num_attention_heads": 8, "kv_channels": 4, "num_layers": 1, "padded_vocab_size": 5}
    model = _load(two.write(work / "glm2", two.config(**shape), tensors)).model
    whole = torch.cat([new for new, _ in steps])
    want = torch.cat([hidden for _, hidden in steps])
    worst = float((_causal(model, whole) - want).abs().max())
    yield "glm2_model", f"{worst:.1e}", f"{LIMIT:.0e}", f"{float(want.abs().max()):.1f}"


@torch.no_grad()
def glm(work: Path) -> Iterator[tuple[object, ...]]:
    """GLM-4 in its first format and in Transformers', and Transformers' own class."""
    from transformers import GlmForCausalLM

    import chatglm2_directory as two

    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(1))
    for ratio in (1, 500, 10000):
        changes = {"layernorm_epsilon": 1.5625e-07, "rope_ratio": ratio, "num_layers": 3, "seq_length": 131072}
        values = two.config(eos_token_id=[93, 94], **changes)
        tensors = two.weights(values)
        first = _load(two.write(work / f"first-{ratio}", values, tensors)).model
        path = two.write(work / f"glm-{ratio}", two.glm_config(values), two.as_glm(tensors, values))
        second = _load(path).model
        want = GlmForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids[None]).logits[0]
        got = [model.head(_causal(model, ids)) for model in (first, second)]
        figures = [float((logits - want).abs().max()) for logits in got]
        between = float((got[0] - got[1]).abs().max())
        yield ratio, *(f"{x:.1e}" for x in (*figures, between)), f"{float(want.abs().max()):.1f}"


@torch.no_grad()
def internlm(work: Path) -> Iterator[tuple[object, ...]]:
    """InternLM 1 and 3 against Transformers' Llama, which is what Transformers runs InternLM3 with."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    three = {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5}
    dynamic = {"rope_type": "dynamic", "factor": 6.0}
    cases: tuple[tuple[str, dict[str, Any], dict[str, Any], int], ...] = (
        ("InternLM 7B: biases", {"model_type": "internlm", "bias": True, "rms_norm_eps": 1e-6}, {}, 50),
        ("InternLM 20B: none", {"model_type": "internlm", "bias": False, "rms_norm_eps": 1e-6}, {}, 50),
        ("InternLM3", {"model_type": "internlm3", **three, "rope_theta": 5e7}, {}, 50),
        ("InternLM3, past its length", {"model_type": "internlm3", **three, "rope_theta": 5e7}, dynamic, 90),
    )
    for number, (name, own, scaling, length) in enumerate(cases):
        bias = own.get("bias", False)
        plain = {k: v for k, v in own.items() if k not in ("model_type", "bias", "rope_theta")}
        rope = {"rope_type": "default", **scaling, "rope_theta": own.get("rope_theta", 1e4)}
        theirs = LlamaForCausalLM(
            LlamaConfig(**sizes, **plain, attention_bias=bias, rope_parameters=rope, tie_word_embeddings=False)
        ).eval()
        generator = torch.Generator().manual_seed(number)
        for key, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in key else noise / 8)
        path = work / f"internlm-{number}"
        path.mkdir()
        save_file(theirs.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**sizes, **own, "rope_scaling": scaling or None}))
        ids = torch.randint(0, 101, (length,), generator=generator)
        want = theirs(ids[None], use_cache=False).logits[0]
        model = _load(path).model
        got = model.head(_causal(model, ids))
        yield name, length, f"{float((got - want).abs().max()):.1e}", f"{float(want.abs().max()):.1f}"


def true_shape(path: Path) -> Path:
    """ChatGLM-6B as chatglm-6b-int4 stores it: 28 layers of random 4-bit numbers, in eight `.bin` shards."""
    import shutil

    import chatglm_directory as one

    if (path / "pytorch_model.bin.index.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    width, inner, rows, layers = 4096, 16384, 130528, 28
    generator = torch.Generator().manual_seed(0)

    def matrix(name: str, out: int, columns: int) -> dict[str, Tensor]:
        numbers = torch.randint(-128, 128, (out, columns // 2), dtype=torch.int8, generator=generator)
        return {f"{name}.weight": numbers, f"{name}.weight_scale": torch.full((out,), 0.02 / 7).half()}

    def block(layer: int) -> dict[str, Tensor]:
        at = f"transformer.layers.{layer}"
        found: dict[str, Tensor] = {}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found |= {f"{at}.{norm}.weight": torch.ones(width).half(), f"{at}.{norm}.bias": torch.zeros(width).half()}
        for name, out, columns in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", inner, width),
            ("mlp.dense_4h_to_h", width, inner),
        ):
            found |= matrix(f"{at}.{name}", out, columns)
            found[f"{at}.{name}.bias"] = torch.zeros(out).half()
        return found

    def table(name: str) -> dict[str, Tensor]:
        return {name: torch.empty(rows, width, dtype=torch.float16).normal_(0, 0.02, generator=generator)}

    ends = {"transformer.final_layernorm.weight": torch.ones(width).half()}
    ends["transformer.final_layernorm.bias"] = torch.zeros(width).half()
    where: dict[str, str] = {}
    for shard in range(8):
        file = f"pytorch_model-{shard + 1:05}-of-00008.bin"
        tensors: dict[str, Tensor] = {}
        for layer in range(shard * layers // 8, (shard + 1) * layers // 8):
            tensors |= block(layer)
        tensors |= table("transformer.word_embeddings.weight") if shard == 0 else {}
        tensors |= {**table("lm_head.weight"), **ends} if shard == 7 else {}
        torch.save(tensors, path / file)
        where |= dict.fromkeys(tensors, file)
    ids = {"mask_token_id": 130000, "gmask_token_id": 130001, "bos_token_id": 130004, "eos_token_id": 130005}
    shape = {"hidden_size": width, "inner_hidden_size": inner, "num_layers": layers, "num_attention_heads": 32}
    values = one.config(vocab_size=rows, quantization_bit=4, **ids, **shape)
    (path / "config.json").write_text(json.dumps(values))
    shutil.copyfile(SHARED / "assets" / "ice_text_v1_1.model", path / "ice_text.model")
    (path / "tokenizer_config.json").write_text(json.dumps(one.tokenizer_config()))
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


CHILD = """
import json, sys
import hanlin

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

path, rounds, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
with hanlin.load(path, packed_cache=False, session_len=2048) as llm:
    found, talk = [peak()], []
    for question in rounds:
        talk.append({"role": "user", "content": question})
        reply = llm.chat(talk, max_tokens=tokens, temperature=0)
        talk.append({"role": "assistant", "content": reply.text})
        found.append(peak())
print("FOUND", json.dumps(found))
"""


def memory(path: Path, tokens: int) -> tuple[object, ...]:
    """Peak memory of a whole process in GB: after loading, and after each of two rounds; and whether it is within."""
    command = [sys.executable, "-c", CHILD, str(path), json.dumps(ROUNDS), str(tokens)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(ran.stdout.rpartition("FOUND ")[2])
    return *(f"{peak / 1e9:.2f}" for peak in found), "yes" if max(found) <= MEMORY_LIMIT else "NO"


def main() -> None:
    """Measure, print and write the page."""
    import report
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the directory of ChatGLM-6B's shape is made and kept")
    parser.add_argument("--tokens", type=int, default=64, help="of each reply in that chat (default 64)")
    options = parser.parse_args()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        sections = [
            f"Largest absolute differences, float32, through the loading path. {versions}.",
            "## Recorded outputs of the official code\n\n"
            + report.table(("record", "difference", "allowed", "largest output"), recorded(work)),
            f"## GLM-4 on the same weights, allowed {LIMIT:.0e}\n\n"
            + report.table(
                ("rope_ratio", "first format to GlmForCausalLM", "glm format to it", "between them", "largest logit"),
                glm(work),
            ),
            f"## InternLM 1 and 3 to Transformers' Llama, allowed {LIMIT:.0e}\n\n"
            + report.table(("model", "tokens", "difference", "largest logit"), internlm(work)),
        ]
    if options.work:
        path = true_shape(options.work / "chatglm-6b-int4-random")
        sections.append(
            f"## Memory of ChatGLM-6B's shape, random int4 files in .bin shards, allowed {MEMORY_LIMIT / 1e9} GB\n\n"
            f"Peak of the whole process in GB, two rounds of {options.tokens} tokens.\n\n"
            + report.table(("after loading", "first round", "second round", "within"), [memory(path, options.tokens)])
        )
    report.write("families", "Families against their records and oracles", *sections)


if __name__ == "__main__":
    main()
