"""LoRA adapters that PEFT has made: live on both runners and merged, against PEFT's own forward pass."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")
peft = pytest.importorskip("peft", reason="needs the extra 'tune' (peft), which is not installed")

from hanlin.checkpoints.load import load_model  # noqa: E402 - after the checks above
from hanlin.checkpoints.peft import Base, read_peft  # noqa: E402
from hanlin.engine.engine import Engine, EngineLimits  # noqa: E402
from hanlin.engine.lowering import Lowering  # noqa: E402
from hanlin.engine.native import NativeRunner  # noqa: E402
from hanlin.engine.runner import TorchRunner  # noqa: E402
from hanlin.engine.sequence import Adapter, Sequence  # noqa: E402
from hanlin.errors import CheckpointError  # noqa: E402
from hanlin.hf import InternLM2Config, InternLM2ForCausalLM  # noqa: E402
from hanlin.kernels.native import Context, available, unavailable_reason  # noqa: E402
from hanlin.types import SamplingParams  # noqa: E402

pytestmark = [
    # PEFT asks Transformers by a name that 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # What PEFT says of tied weights and of copies of the head is no news here.
    pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings|tied).*:UserWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "internlm2": (
        lambda **c: InternLM2ForCausalLM(InternLM2Config(bias=False, pad_token_id=0, **c)),
        SIZES,
        ["wqkv", "wo", "w1", "w2", "w3", "output"],
    ),
    "internlm2-odd": (  # gates and ups that the fused activation cannot have
        lambda **c: InternLM2ForCausalLM(InternLM2Config(bias=True, pad_token_id=0, **c)),
        {**SIZES, "intermediate_size": 56, "num_key_value_heads": 1},
        ["wqkv", "w1", "w2"],
    ),
    "llama-tied": (
        lambda **c: transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **c)),
        SIZES,
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    ),
    "llama-q-v": (  # PEFT's own choice; heads of 8, so that parts share tiles of outputs
        lambda **c: transformers.LlamaForCausalLM(transformers.LlamaConfig(**c)),
        {**SIZES, "num_key_value_heads": 1},
        ["q_proj", "v_proj"],
    ),
}
IDS = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(4))


class Made:
    """A model directory, an adapter directory, and what PEFT computes."""

    def __init__(self, path: Path, kind: str, **config: Any) -> None:
        make, sizes, targets = MODELS[kind]
        self.model, self.adapter = path / "model", path / "adapter"
        torch.manual_seed(0)
        base = make(**sizes).eval()
        for parameter in base.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        base.save_pretrained(self.model)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, **config}
        self.peft = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        for name, parameter in self.peft.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        self.peft.save_pretrained(self.adapter)
        with torch.no_grad():
            self.adapted = self.peft(IDS[None]).logits[0]
            with self.peft.disable_adapter():
                self.plain = self.peft(IDS[None]).logits[0]


@pytest.fixture(params=MODELS)
def made(request: Any, tmp_path: Path) -> Made:
    return Made(tmp_path, request.param)


def engine_of(runner: str, path: Path, adapter: Path | None = None) -> tuple[Engine, Base]:
    """An engine of either kind in float32, with an adapter merged or not."""
    lowering: list[Lowering] = []

    def taker(model: Any) -> Lowering:
        lowering.append(Lowering(model, weights="float32", context=Context(2)))
        return lowering[0]

    device = torch.device("cpu")
    native = taker if runner == "native" else None
    loaded = load_model(path, dtype=torch.float32, device=device, taker=native, adapter=adapter)
    if lowering:
        made: Any = NativeRunner(
            lowering[0],
            loaded.config,
            context=lowering[0]._context,
            rope=loaded.config.rope,
            blocks=32,
            block_size=16,
            kv_cache="float32",
            max_tokens=64,
        )
    else:
        made = TorchRunner(loaded.model, blocks=32, block_size=16, invariant=True)
    return Engine(made, EngineLimits(blocks=32, block_size=16, max_context=256, max_step_tokens=13)), Base.of(
        loaded.model
    )


class Quiet:
    def token(self, sampled: Any) -> None:
        return None

    def finish(self, sequence: Sequence) -> None:
        pass

    def error(self, error: BaseException) -> None:
        raise error


def run(engine: Engine, adapter: Adapter | None, *, score: bool) -> Sequence:
    sampling = SamplingParams(temperature=0, max_tokens=1 if score else 12)
    sequence = Sequence(
        prompt=tuple(IDS.tolist()), sampling=sampling, sink=Quiet(), score_prompt=score, adapter=adapter
    )
    engine.add(sequence)
    while not engine.idle:
        engine.step()
    return sequence


def log_probabilities(logits: torch.Tensor) -> Any:
    return logits.double().log_softmax(-1)[range(len(IDS) - 1), IDS[1:]].numpy()


RUNNERS = {
    "torch": 1e-5,
    "native": 1e-4,
}
runners = pytest.mark.parametrize(
    "runner",
    [
        "torch",
        pytest.param("native", marks=pytest.mark.skipif(not available(), reason=f"native: {unavailable_reason()}")),
    ],
)


@runners
def test_live_equals_peft(made: Made, runner: str) -> None:
    engine, base = engine_of(runner, made.model)
    adapter = engine.runner.adapt(read_peft(made.adapter, base).additions)
    for which, logits in ((adapter, made.adapted), (None, made.plain)):
        got = np.asarray(run(engine, which, score=True).prompt_logprobs)
        assert np.abs(got - log_probabilities(logits)).max() <= RUNNERS[runner]


@runners
def test_merged_equals_live(made: Made, runner: str) -> None:
    engine, base = engine_of(runner, made.model)
    adapter = engine.runner.adapt(read_peft(made.adapter, base).additions)
    live = run(engine, adapter, score=False).generated
    assert live != run(engine, None, score=False).generated
    if base.tied and "lm_head" in read_peft(made.adapter, base).additions:
        with pytest.raises(CheckpointError, match=r"'lm_head\.weight' shares its weights with the embedding"):
            engine_of(runner, made.model, made.adapter)
        return
    merged, _ = engine_of(runner, made.model, made.adapter)
    assert run(merged, None, score=False).generated == live
    got = np.asarray(run(merged, None, score=True).prompt_logprobs)
    assert np.abs(got - log_probabilities(made.adapted)).max() <= RUNNERS[runner]


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"wo": 2, "layers.1.*.w1": 3}, "alpha_pattern": {r"layers\.0\..*w2": 5, "^model.*w3": 7}},
        {"use_rslora": True, "rank_pattern": {"model.layers.1.attention.wqkv": 9}},
        {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["wqkv", "w2"]},
    ],
    ids=["patterns", "rslora", "some-layers"],
)
def test_ranks_and_scales_are_pefts(tmp_path: Path, config: dict[str, Any]) -> None:
    made = Made(tmp_path, "internlm2", **config)
    engine, base = engine_of("torch", made.model)
    found = read_peft(made.adapter, base)
    for name, low in found.additions.items():
        layer = made.peft.get_submodule(f"base_model.model.{name}")
        assert (low.rank, low.scale) == (layer.r["default"], layer.scaling["default"])
    got = np.asarray(run(engine, engine.runner.adapt(found.additions), score=True).prompt_logprobs)
    assert np.abs(got - log_probabilities(made.adapted)).max() <= 1e-5


def test_pickled_and_bfloat16_adapters(tmp_path: Path) -> None:
    """`.bin` through the restricted reader; halves are read as they are stored."""
    made = Made(tmp_path, "internlm2")
    _, base = engine_of("torch", made.model)
    want = read_peft(made.adapter, base)
    other = tmp_path / "bin"
    made.peft.save_pretrained(other, safe_serialization=False)
    assert not (other / "adapter_model.safetensors").exists()
    got = read_peft(other, base)
    assert all(torch.equal(want.additions[n].down, low.down) for n, low in got.additions.items())
    made.peft.bfloat16().save_pretrained(tmp_path / "short")
    assert {low.up.dtype for low in read_peft(tmp_path / "short", base).additions.values()} == {torch.bfloat16}


def test_a_trained_head_and_embedding_are_merged_but_not_live(tmp_path: Path) -> None:
    made = Made(tmp_path, "internlm2", target_modules=["wqkv"], modules_to_save=["output", "tok_embeddings"])
    for name, parameter in made.peft.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    shutil.rmtree(made.adapter)
    made.peft.save_pretrained(made.adapter)
    with torch.no_grad():
        want = log_probabilities(made.peft(IDS[None]).logits[0])
    merged, base = engine_of("torch", made.model, made.adapter)
    assert np.abs(np.asarray(run(merged, None, score=True).prompt_logprobs) - want).max() <= 1e-5
    assert set(read_peft(made.adapter, base).tables) == {"output.weight", "model.tok_embeddings.weight"}
