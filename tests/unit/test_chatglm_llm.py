"""ChatGLM-6B through `hanlin.load`: a released directory, both runners, prefixes, and other requests beside."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hanlin
from chatglm_directory import PIECES, config, quantised, tokenizer_config, tokenizer_model, weights, write
from hanlin.chat.chatglm import clean
from hanlin.checkpoints.base import TensorInfo
from hanlin.checkpoints.row_quantised import RowQuantisedSource
from hanlin.errors import CheckpointError, ConfigError, RequestError
from hanlin.kernels.native import available
from hanlin.models.chatglm import read_config

NAMES = [piece for piece, _ in PIECES]
IDS = {
    "mask_token_id": NAMES.index("[MASK]"),
    "gmask_token_id": NAMES.index("[gMASK]"),
    "bos_token_id": NAMES.index("<sop>"),
    "eos_token_id": NAMES.index("<eop>"),
}
RUNNERS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not available(), reason="no native library"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    values = config(vocab_size=len(NAMES) + 3, hidden_size=64, **IDS)
    path = write(tmp_path_factory.mktemp("chatglm") / "chatglm-6b", values, weights(values))
    (path / "ice_text.model").write_bytes(tokenizer_model())
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return path


def load(path: Path, runner: str, **options: Any) -> hanlin.LLM:
    return hanlin.load(path, runner=runner, dtype="float32", packed_cache=False, cache_max_entry_count=64, **options)


@pytest.mark.parametrize("runner", RUNNERS)
def test_chat_stream_generate_score(model: Path, runner: str) -> None:
    with load(model, runner) as llm:
        assert llm.chat_format.name == "chatglm" and llm.context_length == 2048
        assert (llm.default_sampling.temperature, llm.default_sampling.top_p) == (0.95, 0.7)
        alone = llm.chat("你好", max_tokens=12, seed=1)
        raw = llm.tokenizer.decode(alone.ids)
        assert alone.text == clean(raw)
        assert "".join(delta.text for delta in llm.stream("你好", max_tokens=12, seed=1)) == alone.text
        talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "好"}]
        several = llm.chat(["你好", [*talk, {"role": "user", "content": "问"}], "a b c"], max_tokens=12, seed=1)
        assert several[0].ids == alone.ids
        (plain,) = llm.generate("你好", max_tokens=12, seed=1)
        assert plain.ids == alone.ids and plain.text == raw
        with pytest.raises(RequestError, match="<sop>"):
            llm.generate([[7, 8, 9]])
        scored = llm.score("你好 the cat")[0]
        assert scored.ids[:2] == (IDS["gmask_token_id"], IDS["bos_token_id"])
        assert len(scored.logprobs) == len(scored.ids) and scored.perplexity > 1


def test_long_prompts_in_one_step(model: Path) -> None:
    """The prefix may be longer than any other step."""
    with load(model, "auto", max_prefill_token_num=16) as llm:
        got = llm.generate("cat " * 60, max_tokens=3, seed=2)[0]
    with load(model, "auto") as llm:
        assert llm.generate("cat " * 60, max_tokens=3, seed=2)[0].ids == got.ids


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
def test_ptuning(model: Path, tmp_path: Path, runner: str, projection: bool) -> None:
    """A checkpoint of the tuning scripts, and the same tensors within a tuned model's own files."""
    out = 2 * 2 * 64
    shapes = {"embedding.weight": (6, 64 if projection else out)}
    if projection:
        shapes |= {"trans.0.weight": (64, 64), "trans.0.bias": (64,)}
        shapes |= {"trans.2.weight": (out, 64), "trans.2.bias": (out,)}
    torch.manual_seed(0)
    soft = {f"transformer.prefix_encoder.{name}": torch.randn(shape) for name, shape in shapes.items()}
    checkpoint = tmp_path / "checkpoint-3000"
    checkpoint.mkdir()
    torch.save(soft, checkpoint / "pytorch_model.bin")
    with load(model, runner) as llm, load(model, runner, ptuning_checkpoint=checkpoint) as tuned:
        before, got = (x.chat("你好", max_tokens=12, temperature=0).ids for x in (llm, tuned))
        assert tuned.config.pre_seq_len == 6 and tuned.config.prefix_projection is projection
    assert before != got
    values = json.loads((model / "config.json").read_text())
    values |= {"pre_seq_len": 6, "prefix_projection": projection}
    whole = write(tmp_path / "whole", values, {**weights(values), **soft})
    for name in ("ice_text.model", "tokenizer_config.json"):
        (whole / name).write_bytes((model / name).read_bytes())
    with load(whole, runner) as llm:
        assert llm.chat("你好", max_tokens=12, temperature=0).ids == got


def test_prefixes_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    def checkpoint(**tensors: torch.Tensor) -> Path:
        torch.save({f"transformer.prefix_encoder.{k}": v for k, v in tensors.items()}, tmp_path / "pytorch_model.bin")
        return tmp_path

    with pytest.raises(CheckpointError, match=r"needs \(6, 256\)"):
        load(model, "torch", ptuning_checkpoint=checkpoint(**{"embedding.weight": torch.zeros(6, 200)}))
    with pytest.raises(CheckpointError, match=r"trans.0.bias'\n.*trans.2.weight"):
        wrong = {"embedding.weight": torch.zeros(6, 64), "trans.0.weight": torch.zeros(64, 64)}
        load(model, "torch", ptuning_checkpoint=checkpoint(**wrong))
    with pytest.raises(CheckpointError, match=r"missing tensor 'transformer.prefix_encoder.embedding.weight'"):
        load(model, "torch", ptuning_checkpoint=checkpoint(other=torch.zeros(1)))


def test_configurations_that_make_no_sense(model: Path, tmp_path: Path) -> None:
    values = config(vocab_size=50, position_encoding_2d=False, num_attention_heads=16, surprise=1)
    with pytest.raises(ConfigError, match=r"(?s)position_encoding_2d.*vocabulary ends at 49.*halves.*surprise"):
        load(write(tmp_path, values, weights(config())), "torch")


def test_both_layouts_by_the_size_of_the_vocabulary() -> None:
    for rows, offset in ((130528, 0), (150528, 20000)):
        got = read_config({"vocab_size": rows})
        assert (got.mask_id, got.gmask_id, got.bos_id, *got.stop_ids) == tuple(
            i + offset for i in (130000, 130001, 130004, 130005)
        )
        assert (got.hidden_size, got.intermediate_size, got.num_layers, got.max_positions) == (4096, 16384, 28, 2048)


@pytest.mark.skipif(not available(), reason="no native library")
@pytest.mark.parametrize(("bits", "stored"), [(4, torch.int8), (8, torch.int8)])
def test_quantised_checkpoints(model: Path, tmp_path: Path, bits: int, stored: torch.dtype) -> None:
    """chatglm-6b-int4 and -int8: the numbers and scales are packed as they are, and torch sees their products."""
    values = {**json.loads((model / "config.json").read_text()), "quantization_bit": bits}
    tensors = quantised(weights(values), bits)
    path = write(tmp_path / f"chatglm-6b-int{bits}", values, tensors)
    for name in ("ice_text.model", "tokenizer_config.json"):
        (path / name).write_bytes((model / name).read_bytes())
    name = "transformer.layers.1.mlp.dense_4h_to_h.weight"
    assert tensors[name].dtype == stored and tensors[name].shape == (64, 128 * bits // 8)
    with load(path, "torch") as llm:
        dense = llm.engine.runner._model.get_parameter(name)  # type: ignore[attr-defined]
        scale = tensors[f"{name}_scale"].float()[:, None]
        original = weights(values)[name]
        assert torch.equal(dense, (original / scale).round() * scale)
        want = llm.score("你好 the cat sat")[0].logprobs[1:]
        answer = llm.chat("the cat", temperature=0, max_tokens=5).ids
    with hanlin.load(path, packed_cache=False, cache_max_entry_count=64) as llm:
        lowering = llm.engine.runner._lowering  # type: ignore[attr-defined]
        down = lowering.blocks[1].down
        assert down.by_row and down.kind.name == f"INT{bits}" and lowering.head.kind.name == "INT8"
        held = llm.engine.runner._context.unpack(down.weight)  # type: ignore[attr-defined]
        assert (held == dense.numpy()).all()
        assert lowering.table is None and lowering.embedding.kind.name == "INT8"
        got = llm.score("你好 the cat sat")[0].logprobs[1:]
        assert len(llm.chat("the cat", temperature=0, max_tokens=5).ids) == len(answer)
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 0.3


def test_broken_quantised_checkpoints(model: Path, tmp_path: Path) -> None:
    values = {**json.loads((model / "config.json").read_text()), "quantization_bit": 4}
    tensors = quantised(weights(values), 4)
    at = "transformer.layers.0.mlp.dense_h_to_4h.weight"
    tensors[f"{at}_scale"] = tensors[f"{at}_scale"][:5]
    tensors["lm_head.weight_scale"] = torch.zeros(3).half()
    with pytest.raises(CheckpointError, match=r"(?s)dense_h_to_4h.weight'.*lm_head.weight'"):
        load(write(tmp_path / "broken", values, tensors), "torch")
    values["quantization_bit"] = 0
    with pytest.raises(CheckpointError, match=r"\(192, 32\), the configuration needs \(192, 64\)"):
        load(write(tmp_path / "wrong", values, quantised(weights(values), 4)), "torch")


NUMBERS = st.one_of(st.integers(-3, 200000), st.floats())
ODD = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=3), st.lists(st.integers()))


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(config())), ODD, max_size=4))
def test_any_configuration_is_read_or_refused(changes: dict[str, Any]) -> None:
    with suppress(ConfigError):
        read_config({**config(), **changes})


class Files:
    """Files that hold these tensors."""

    path, metadata = Path("files"), {}

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        names = {torch.int8: "I8", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
        self.tensors = tensors
        self.infos = {
            name: TensorInfo(name, tuple(t.shape), names[t.dtype], t.nbytes, self.path) for name, t in tensors.items()
        }

    def load(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def raw(self, name: str) -> Any:
        return self.tensors[name].numpy().view("uint8").reshape(-1)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    scale=st.lists(st.integers(0, 5), max_size=2),
    kinds=st.tuples(*[st.sampled_from([torch.int8, torch.float16, torch.float32, torch.int64])] * 2),
    bits=st.sampled_from([4, 8]),
)
def test_any_scales_are_read_or_refused(shape: list[int], scale: list[int], kinds: Any, bits: int) -> None:
    files: Any = Files(
        {"a.weight": torch.ones(shape, dtype=kinds[0]), "a.weight_scale": torch.ones(scale).to(kinds[1])}
    )
    try:
        source = RowQuantisedSource(files, bits)
    except CheckpointError as error:
        assert "'a.weight'" in str(error)
        return
    info = source.infos["a.weight"]
    assert source.load("a.weight").shape == info.shape and list(source.infos) == ["a.weight"]
    assert source.raw("a.weight").nbytes == info.nbytes
