"""InternLM2 as a Transformers model: what `generate`, trainers and Accelerate need of it, and its outputs."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

from hanlin.errors import RequestError  # noqa: E402 - after the check above
from hanlin.hf import (  # noqa: E402
    InternLM2Config,
    InternLM2ForCausalLM,
    InternLM2ForSequenceClassification,
    InternLM2Model,
)
from hanlin.hf.caches import NAMES  # noqa: E402
from hanlin.layers.attend import PackedAttend  # noqa: E402
from hanlin.layers.rope import Positions  # noqa: E402
from hanlin.models.internlm2 import InternLM2ForCausalLM as Module  # noqa: E402

DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}


def config(**changes: Any) -> InternLM2Config:
    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bias": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": 1,
    }
    return InternLM2Config(**{**values, **changes})


def make(kind: type = InternLM2ForCausalLM, **changes: Any) -> Any:
    model = kind(config(**changes)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * 0.3)
    return model


def prompt(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.stack([F.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def scored(model: Any, ids: Tensor, length: int) -> Tensor:
    """Logits (T, V) of one sequence by Hanlin's own module; dynamic angles go by `length` tokens."""
    module = Module(model.config.to_hanlin()).eval()
    module.load_state_dict(model.state_dict())
    angle = module.model.rope.config.dynamic_length(length)
    lengths = torch.full((len(ids),), angle) if angle else None
    with torch.no_grad():
        hidden = module(ids, Positions(torch.arange(len(ids))[None], lengths), PackedAttend([len(ids)]))
        return module.head(hidden)


@pytest.fixture(scope="module")
def model() -> Any:
    return make()


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"tie_word_embeddings": True}, DYNAMIC])
@torch.no_grad()
def test_logits_are_the_modules(changes: dict[str, Any]) -> None:
    model = make(**changes)
    ids = prompt(1, 21)
    got = model(ids).logits
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0], scored(model, ids[0], 21), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", [{}, DYNAMIC], ids=["", "dynamic"])
@pytest.mark.parametrize("length", [5, 20])
def test_greedy_generation(changes: dict[str, Any], length: int, implementation: str) -> None:
    """With and without a cache; the angles of dynamic RoPE stay those of the prompt."""
    model = make(attn_implementation=implementation, **changes)
    ids = prompt(1, length)
    got = model.generate(ids, **GREEDY)[0]
    sequence = ids[0]
    for _ in range(12):
        sequence = torch.cat((sequence, scored(model, sequence, length)[-1].argmax()[None]))
    assert got.tolist() == sequence.tolist()
    if not changes:
        assert model.generate(ids, **GREEDY, use_cache=False)[0].tolist() == got.tolist()


@pytest.mark.parametrize("changes", [{}, DYNAMIC], ids=["", "dynamic"])
def test_a_padded_batch_is_its_rows_alone(changes: dict[str, Any]) -> None:
    model = make(**changes)
    prompts = [prompt(1, n, n)[0] for n in (4, 9, 20)]
    batch = model.generate(**padded(prompts), **GREEDY)
    for row, ids in zip(batch, prompts, strict=True):
        assert row[-12:].tolist() == model.generate(ids[None], **GREEDY)[0, -12:].tolist()


@torch.no_grad()
def test_positions_count_from_the_first_token_that_counts(model: Any) -> None:
    ids = prompt(1, 8)
    alone = model(ids).logits
    for left, right in ((3, 0), (0, 3), (2, 2)):
        mask = F.pad(torch.ones_like(ids), (left, right))
        logits = model(F.pad(ids, (left, right), value=9), attention_mask=mask).logits
        torch.testing.assert_close(logits[:, left : left + 8], alone, rtol=1e-5, atol=1e-5)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        given = model(F.pad(ids, (left, right), value=9), attention_mask=mask, position_ids=places).logits
        torch.testing.assert_close(given[:, left : left + 8], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "top_k": 20},
        {"do_sample": True, "num_beams": 2, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
        {"do_sample": True, "num_return_sequences": 3, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("changes", [{}, DYNAMIC], ids=["", "dynamic"])
def test_ways_to_generate(changes: dict[str, Any], options: dict[str, Any]) -> None:
    """Beams and samples are the same with a cache and without one (whose base of dynamic RoPE moves, so not there)."""
    model = make(**changes)
    inputs = padded([prompt(1, 6)[0], prompt(1, 19)[0]])
    torch.manual_seed(0)
    got = model.generate(**inputs, max_new_tokens=8, **options)
    assert got.shape == (2 * options.get("num_return_sequences", 1), 27)
    if not changes:
        torch.manual_seed(0)
        assert torch.equal(got, model.generate(**inputs, max_new_tokens=8, use_cache=False, **options))


@pytest.mark.parametrize("cache", ["static", "offloaded", "dynamic"])
def test_kinds_of_cache(model: Any, cache: str) -> None:
    inputs = padded([prompt(1, 5)[0], prompt(1, 9)[0]])
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("Transformers offloads to the CPU from a GPU, and there is none")
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation=cache), expected)


def test_prompt_lookup_crops_the_cache(model: Any) -> None:
    ids = torch.cat((prompt(1, 6), prompt(1, 6)), 1)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), expected)


def test_assisted_generation(model: Any) -> None:
    ids = prompt(1, 6)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=make()), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("changes", [{}, DYNAMIC], ids=["", "dynamic"])
def test_a_conversation_goes_on_with_its_cache(changes: dict[str, Any]) -> None:
    model = make(**changes)
    ids = prompt(1, 9)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, prompt(1, 4, 7)), 1)
    cache = copy.deepcopy(first.past_key_values)
    got = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    again = model.generate(longer, past_key_values=cache, **GREEDY)
    assert torch.equal(got, again)
    if not changes:
        assert torch.equal(got, model.generate(longer, **GREEDY))


@pytest.mark.parametrize("changes", [{}, DYNAMIC], ids=["", "dynamic"])
def test_chunked_prefill(changes: dict[str, Any]) -> None:
    model = make(**changes)
    ids = prompt(1, 14)
    assert torch.equal(model.generate(ids, **GREEDY, prefill_chunk_size=4), model.generate(ids, **GREEDY))


def test_embeddings_instead_of_ids(model: Any) -> None:
    ids = prompt(2, 7)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), model.generate(ids, **GREEDY)[:, 7:])


@pytest.mark.parametrize("place", ["argument", "configuration", "the model's configuration"])
def test_top_p_above_one_is_one(place: str) -> None:
    model = make()
    ids = prompt(1, 5)
    options: dict[str, Any] = {"do_sample": True, "max_length": 20, "temperature": 1.0, "repetition_penalty": 1.0}
    torch.manual_seed(1)
    expected = model.generate(ids, **options, top_p=1.0)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="top_p=10 is above 1"):
        if place == "argument":
            got = model.generate(ids, top_p=10, **options)
        elif place == "configuration":
            got = model.generate(ids, generation_config=transformers.GenerationConfig(top_p=10, **options))
        else:
            model.generation_config.top_p = 10
            got = model.generate(ids, **options)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_hidden_states_and_attentions(model: Any) -> None:
    ids = prompt(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    plain = model(ids, attention_mask=mask)
    assert plain.hidden_states is None
    assert plain.attentions is None
    full = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(full.logits[mask.bool()], plain.logits[mask.bool()], rtol=1e-5, atol=1e-5)
    assert [tuple(x.shape) for x in full.hidden_states] == [(2, 6, 32)] * 4
    assert torch.equal(full.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.output(full.hidden_states[-1]), full.logits)
    assert [tuple(x.shape) for x in full.attentions] == [(2, 4, 6, 6)] * 3
    assert not full.attentions[0][1, :, 2:, :2].any()
    eager = make(attn_implementation="eager", output_attentions=True)(ids, attention_mask=mask)
    torch.testing.assert_close(eager.attentions, full.attentions)


@torch.no_grad()
def test_forms_of_the_output(model: Any) -> None:
    ids = prompt(1, 6)
    whole = model(ids)
    assert isinstance(whole.past_key_values, transformers.DynamicCache)
    assert model(ids, use_cache=False).past_key_values is None
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], whole.logits)
    assert isinstance(model.model(ids, return_dict=False), tuple)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole.logits[:, [0, 3]])


@torch.no_grad()
def test_a_cache_by_either_name(model: Any) -> None:
    """Transformers 5.24 calls it `cache`, what is older, PEFT and the released code `past_key_values`."""
    ids = prompt(1, 6)
    whole = model(ids).logits[:, 3:]
    for name in NAMES:
        held = transformers.DynamicCache(config=model.config)
        model(ids[:, :3], **{name: held})
        assert held.get_seq_length() == 3
        torch.testing.assert_close(model(ids[:, 3:], **{name: held}).logits, whole)
        assert held.get_seq_length() == 6
        longer = torch.cat((ids, prompt(1, 2, 7)), 1)
        assert torch.equal(model.generate(longer, **{name: held}, **GREEDY), model.generate(longer, **GREEDY))
    with pytest.raises(RequestError, match="not both"):
        model(ids, cache=transformers.DynamicCache(), past_key_values=transformers.DynamicCache())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_cards_cuda_without_a_gpu(model: Any) -> None:
    with pytest.warns(UserWarning, match="no GPU here; the model stays on the CPU"):
        assert model.cuda() is model and model.device.type == "cpu"


def test_what_cannot_be_served(model: Any) -> None:
    ids = prompt(1, 3)
    with pytest.raises(RequestError, match="exactly one"):
        model()
    with pytest.raises(RequestError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(RequestError, match="DynamicCache"):
        model(ids, past_key_values=((torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8)),) * 3)
    with pytest.raises(ValueError, match=r"[Ff]lash"):
        make(attn_implementation="flash_attention_2")


def test_the_loss_is_plain_cross_entropy(model: Any) -> None:
    ids = prompt(3, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    logits = out.logits[:, :-1].reshape(-1, 97)
    expected = F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    counted = model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    summed = F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(counted, summed / 7)


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing(options: dict[str, Any] | None) -> None:
    ids = prompt(2, 9)
    grads, calls = [], []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # Transformers 5.23 renames the method
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        count = [0]
        model.model.layers[1].register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        calls.append(count[0])
    assert calls == [1, 2]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_checkpointing_takes_no_cache(caplog: pytest.LogCaptureFixture) -> None:
    model = make().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    with caplog.at_level(logging.WARNING, logger="hanlin.hf.base"):
        assert model(prompt(1, 4), use_cache=True).past_key_values is None
    model.eval()
    assert model(prompt(1, 4), use_cache=True).past_key_values is not None


def test_training_lowers_the_loss() -> None:
    model = make().train()
    ids = prompt(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("changes", [{}, DYNAMIC], ids=["", "dynamic"])
def test_sequences_packed_into_a_row(changes: dict[str, Any]) -> None:
    """What TRL and DataCollatorWithFlattening send: no mask, and positions that start anew."""
    model = make(**changes)
    prompts = [prompt(1, n, n)[0] for n in (5, 20, 1, 3)]
    places = torch.cat([torch.arange(len(p)) for p in prompts])[None]
    with torch.no_grad():
        got = model(torch.cat(prompts)[None], position_ids=places, use_cache=False).logits[0].split([5, 20, 1, 3])
        for row, ids in zip(got, prompts, strict=True):
            torch.testing.assert_close(row, model(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_what_transformers_5_looks_for(model: Any) -> None:
    assert isinstance(model, transformers.GenerationMixin)
    assert model.can_generate()
    assert isinstance(model._tied_weights_keys, dict)
    assert model.all_tied_weights_keys == {}
    assert make(tie_word_embeddings=True).all_tied_weights_keys == {"output.weight": "model.tok_embeddings.weight"}
    assert set(model._no_split_modules) == {"Block"}
    assert model.get_input_embeddings() is model.model.tok_embeddings
    assert model.get_output_embeddings() is model.output
    assert model.base_model is model.model
    assert not list(model.buffers())


def test_new_tokens(model: Any) -> None:
    for tied in (False, True):
        grown = make(tie_word_embeddings=tied)
        before = grown(prompt(1, 4)).logits
        grown.resize_token_embeddings(101)
        assert grown.config.vocab_size == 101
        assert grown(prompt(1, 4)).logits.shape == (1, 4, 101)
        assert (grown.output.weight is grown.model.tok_embeddings.weight) == tied
        torch.testing.assert_close(grown(prompt(1, 4)).logits[..., :97], before)


def test_copies_are_independent(model: Any) -> None:
    twin = copy.deepcopy(model)
    twin.model.norm.weight.data.zero_()
    assert not torch.equal(twin(prompt(1, 3)).logits, model(prompt(1, 3)).logits)


def test_fresh_weights_follow_the_configuration() -> None:
    fresh = InternLM2ForCausalLM(config(initializer_range=0.05, bias=True, hidden_size=64))
    assert float(fresh.model.layers[0].attention.wqkv.weight.detach().std()) == pytest.approx(0.05, rel=0.1)
    assert not fresh.model.layers[0].attention.wqkv.bias.any()
    assert torch.equal(fresh.model.norm.weight, torch.ones(64))


@pytest.mark.parametrize("left", [True, False])
def test_sequence_classification(left: bool, tmp_path: Path) -> None:
    model = make(InternLM2ForSequenceClassification, num_labels=3)
    assert model.score.bias is None
    prompts = [prompt(1, n, n)[0] for n in (4, 9)]
    batch = padded(prompts)
    if not left:
        batch = {
            "input_ids": torch.stack([F.pad(p, (0, 9 - len(p))) for p in prompts]),
            "attention_mask": torch.stack([F.pad(torch.ones_like(p), (0, 9 - len(p))) for p in prompts]),
        }
    with torch.no_grad():
        logits = model(**batch).logits
        for row, ids in zip(logits, prompts, strict=True):
            torch.testing.assert_close(row, model(ids[None]).logits[0], rtol=1e-5, atol=1e-5)
    out = model(**batch, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([0, 2])))
    out.loss.backward()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"": "cpu"},
        {"model.tok_embeddings": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
        | {"model.norm": "disk", "output": "cpu"},
    ],
    ids=["cpu", "auto", "whole", "disk"],
)
def test_device_map(model: Any, tmp_path: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate, which is not installed")
    model.save_pretrained(tmp_path)
    placed = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    ids = prompt(1, 5)
    assert torch.equal(placed.generate(ids.to(placed.device), **GREEDY).cpu(), model.generate(ids, **GREEDY))


def test_the_body_alone(model: Any) -> None:
    body = make(InternLM2Model)
    assert isinstance(body, InternLM2Model)
    assert body(prompt(1, 4)).last_hidden_state.shape == (1, 4, 32)
