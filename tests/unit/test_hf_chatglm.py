"""ChatGLM-6B through Transformers: what the model card types, against Hanlin's own modules and engine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

import hanlin
import hanlin.hf
from chatglm_directory import PIECES, config, quantised, tokenizer_config, tokenizer_model, weights, write
from hanlin.errors import ConfigError, RequestError
from hanlin.hf import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.registry import build, layout_of, read_config

NAMES = [piece for piece, _ in PIECES]
GMASK, MASK, SOP, EOP = (NAMES.index(name) for name in ("[gMASK]", "[MASK]", "<sop>", "<eop>"))
IDS = {"mask_token_id": MASK, "gmask_token_id": GMASK, "bos_token_id": SOP, "eos_token_id": EOP}


def directory(path: Path, tensors: Any = None, **changes: Any) -> Path:
    values = config(vocab_size=len(NAMES) + 3, **IDS, **changes)
    write(path, values, weights(values) if tensors is None else tensors(weights(values)))
    (path / "ice_text.model").write_bytes(tokenizer_model())
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    (path / "modeling_chatglm.py").write_text("raise SystemExit('foreign code was run')")
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    return directory(tmp_path_factory.mktemp("chatglm") / "chatglm-6b")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()


def plain(path: Path, ids: list[int], soft: Any = None) -> torch.Tensor:
    """Logits (T, V) of Hanlin's own module with the same weights."""
    values = json.loads((path / "config.json").read_text())
    module = build(read_config(values), dtype=torch.float32).to_empty(device="cpu")
    module.load_state_dict({k: v for k, v in weights(values).items() if "inv_freq" not in k}, strict=soft is None)
    rule = layout_of(module.config)
    assert rule is not None
    context, positions = rule(ids)
    attend = PackedAttend([len(ids)], [context], soft)
    return module.head(module(torch.tensor(ids), Positions(torch.from_numpy(positions(0, len(ids)))), attend))


def test_classes(path: Path, model: Any, tokenizer: Any) -> None:
    assert type(model) is ChatGLMForConditionalGeneration
    assert type(AutoModelForSeq2SeqLM.from_pretrained(path)) is ChatGLMForConditionalGeneration
    assert type(tokenizer) is ChatGLMTokenizer
    assert not hasattr(AutoConfig.from_pretrained(path), "auto_map")


def test_logits_and_padding(path: Path, model: Any, tokenizer: Any) -> None:
    texts = ["the cat sat", "你好", "print ( a ) # b c d e f"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["input_ids"][1, -2:].tolist() == [GMASK, SOP] and not batch["attention_mask"][1, 0]
    with torch.no_grad():
        logits = model(**batch).logits
        # the masks and positions that the released tokenizer makes give the same
        layout = hanlin.hf.chatglm.Layout.of(model.config, batch["input_ids"], batch["attention_mask"])
        length = batch["input_ids"].shape[1]
        released = {"attention_mask": ~layout.seen(length), "position_ids": layout.positions(0, length)}
        again = model(input_ids=batch["input_ids"], **released).logits
    for row, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        want = plain(path, ids)
        for got in (logits, again):
            assert (got[row, -len(ids) :] - want).abs().max() < 1e-4


def test_steps_with_a_cache(path: Path, model: Any, tokenizer: Any) -> None:
    """A loop of one's own: the cache remembers where the context ended."""
    ids = tokenizer("你好 the cat")["input_ids"]
    cache, got = None, []
    follow = [7, 8, 9, 10]
    with torch.no_grad():
        for step in (torch.tensor([ids]), *(torch.tensor([[i]]) for i in follow)):
            out = model(step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            got.append(out.logits[0, -1])
    want = plain(path, [*ids, *follow])[-len(follow) - 1 :]
    assert (torch.stack(got) - want).abs().max() < 1e-4


def test_generate_chat_stream_equal_the_engine(path: Path, model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["the cat", "你好 a b c"], return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    with hanlin.load(path, runner="torch", dtype="float32", cache_max_entry_count=64) as llm:
        told = llm.generate(["the cat", "你好 a b c"], temperature=0, max_tokens=8)
        for row, reply in zip(out.tolist(), told, strict=True):
            assert row[: len(reply.ids)] == list(reply.ids)
        messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "好"), ("user", "the cat"))]
        want = llm.chat(messages, temperature=0, max_tokens=8).text
    response, history = model.chat(tokenizer, "the cat", history=[("a", "好")], do_sample=False, max_new_tokens=8)
    assert response == want and history == [("a", "好"), ("the cat", want)]
    *_, last = model.stream_chat(tokenizer, "the cat", history=[("a", "好")], do_sample=False, max_new_tokens=8)
    assert last == (want, history)
    torch.manual_seed(0)
    assert model.chat(tokenizer, "你好", max_length=20)[1][0][0] == "你好"


def test_a_loss_and_wrong_ids(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("the cat", "你好")["input_ids"]
    assert ids[-1] == EOP and ids.count(SOP) == 1
    labels = [-100 if place < ids.index(SOP) else i for place, i in enumerate(ids)]
    loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = ids.index(SOP)
    want = -sum(logits[place, ids[place + 1]] for place in range(start - 1, len(ids) - 1)) / (len(ids) - start)
    assert abs(loss - want) < 1e-5
    with pytest.raises(RequestError, match="rows \\[1\\]"):
        model(torch.tensor([[5, GMASK, SOP], [5, 6, 7]]))


def test_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    text = "the cat\n\n  a\tb"
    ids = tokenizer(text)["input_ids"]
    assert ids[-2:] == [GMASK, SOP] and tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.gmask_token_id, tokenizer.mask_token_id, tokenizer.end_token_id) == (GMASK, MASK, 2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (SOP, EOP, 3)
    tokenizer.save_pretrained(tmp_path)
    assert ChatGLMTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize(path: Path, model: Any, tokenizer: Any, tmp_path: Path, bits: int) -> None:
    """At run time, from a checkpoint, and saved: the same numbers each time."""
    made = copy.deepcopy(model).quantize(bits)
    at = "transformer.layers.1.mlp.dense_4h_to_h.weight"
    stored = directory(tmp_path / "stored", lambda tensors: quantised(tensors, bits), quantization_bit=bits)
    read = AutoModel.from_pretrained(stored, dtype=torch.float32)
    made.save_pretrained(tmp_path / "saved")
    saved = AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for other in (read, saved):
        assert other.get_parameter(at).dtype == torch.int8 == made.get_parameter(at).dtype
        assert torch.equal(other.get_parameter(at), made.get_parameter(at))
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    with torch.no_grad():
        near, far = made(ids).logits, model(ids).logits
        assert torch.allclose(saved(ids).logits, near, atol=1e-4)
        assert 0 < (near - far).abs().max() < (3 if bits == 4 else 0.3)
    assert made.quantize(bits) is made
    with pytest.raises(ConfigError, match="bits already"):
        made.quantize(12 - bits)
    with pytest.raises(ConfigError, match="4 or 8"):
        model.quantize(3)
    assert made.half().get_parameter(at).dtype == torch.int8


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_embeddings(path: Path, model: Any, tokenizer: Any, tmp_path: Path, bits: int) -> None:
    """chatglm-6b-int4-qe: the table of embeddings and the head in few bits too, from files and at run time."""
    changes = {"quantization_bit": bits, "quantization_embeddings": True}
    stored = directory(tmp_path / "qe", lambda tensors: quantised(tensors, bits, ends=True), **changes)
    read = AutoModel.from_pretrained(stored, dtype=torch.float32).eval()
    made = copy.deepcopy(model).quantize(bits, quantize_embeddings=True)
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    with torch.no_grad():
        want = read(ids).logits
        assert torch.allclose(made(ids).logits, want, atol=2e-2)  # norms and biases are stored in float16
        assert (model(ids).logits - want).abs().max() > 0
    made.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    replies = []
    for where in (stored, tmp_path / "saved"):
        with hanlin.load(where, runner="torch", dtype="float32", cache_max_entry_count=64) as llm:
            replies.append(llm.chat("the cat", temperature=0, max_tokens=8).text)
    response, _ = read.chat(tokenizer, "the cat", do_sample=False, max_new_tokens=8)
    assert replies == [response, response]
    with pytest.raises(ConfigError, match="quantised already"):
        copy.deepcopy(model).quantize(bits).quantize(bits, quantize_embeddings=True)


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_tuning(path: Path, tokenizer: Any, projection: bool) -> None:
    """Only the prefix learns, and logits are those of Hanlin's module with it."""
    settings = AutoConfig.from_pretrained(path, pre_seq_len=3, prefix_projection=projection)
    model = AutoModel.from_pretrained(path, config=settings, dtype=torch.float32)
    learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learns and all(name.startswith("transformer.prefix_encoder.") for name in learns)
    torch.manual_seed(0)
    for name in learns:
        torch.nn.init.normal_(model.get_parameter(name).data, std=0.5)
    ids = tokenizer("the cat", "你好")["input_ids"]
    out = model(torch.tensor([ids]), labels=torch.tensor([ids]))
    soft = [(k.detach(), v.detach()) for k, v in model.transformer.soft_prefix()]
    assert (out.logits[0] - plain(path, ids, soft)).abs().max() < 1e-4
    out.loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in learns)
    replies = model.generate(torch.tensor([ids[: ids.index(SOP) + 1]]), max_new_tokens=4, do_sample=False)
    assert replies.shape[1] == ids.index(SOP) + 5


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora(path: Path, tokenizer: Any, bits: int) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModel.from_pretrained(path, dtype=torch.float32)
    model = model.quantize(bits) if bits else model
    settings = peft.LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, settings)
    row = tokenizer("the cat", "你好")["input_ids"]
    ids = torch.tensor([row])
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    prompt = ids[:, : row.index(SOP) + 1]
    assert tuned.generate(input_ids=prompt, max_new_tokens=2, do_sample=False).shape[1] == prompt.shape[1] + 2
