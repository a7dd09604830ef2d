"""VisualGLM-6B through `hanlin.load`: prompts with an image, the same reply whatever else runs, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="needs Pillow: pip install 'hanlin[vision]'")

import numpy as np
import torch
from PIL import Image

import hanlin
from chatglm_directory import tokenizer_config
from hanlin.errors import ChatFormatError, CheckpointError, ConfigError, RequestError
from hanlin.kernels.native import available
from hanlin.models.registry import read_config
from hanlin.models.visualglm import VisualGLMConfig
from visualglm_directory import config, picture, weights, write

RUNNERS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not available(), reason="no native library"))]
FIRST, SECOND = picture(1), picture(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return write(tmp_path_factory.mktemp("visualglm") / "visualglm-6b")


def load(path: Path, runner: str = "auto", **options: Any) -> hanlin.LLM:
    options = {"dtype": "float32", "packed_cache": False, "cache_max_entry_count": 64, **options}
    return hanlin.load(path, runner=runner, **options)


def asked(text: str, image: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def by_url(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("runner", RUNNERS)
def test_images_in_all_forms_give_one_answer(model: Path, runner: str, tmp_path: Path) -> None:
    file = tmp_path / "a picture.png"
    file.write_bytes(FIRST)
    with load(model, runner) as llm:
        assert llm.chat_format.name == "visualglm" and llm.sees
        defaults = llm.default_sampling
        assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.95, 0.7, 30)
        assert (defaults.repetition_penalty, defaults.max_tokens) == (1.2, 1024)
        want = llm.chat(asked("你好", FIRST), max_tokens=12, seed=1)
        parts = [{"type": "text", "text": "你好"}, {"type": "image_url", "image_url": {"url": uri(FIRST)}}]
        forms = [asked("你好", file), asked("你好", str(file)), asked("你好", Image.open(file))]
        forms.append([{"role": "user", "content": parts}])
        assert [llm.chat(form, max_tokens=12, seed=1).ids for form in forms] == [want.ids] * 4
        assert "".join(d.text for d in llm.stream(asked("你好", FIRST), max_tokens=12, seed=1)) == want.text
        other = llm.chat(asked("你好", SECOND), max_tokens=12, seed=1)
        blind = llm.chat("你好", max_tokens=12, seed=1)
        assert len({want.ids, other.ids, blind.ids}) == 3
        assert want.usage.prompt_tokens == other.usage.prompt_tokens
        assert llm.requests.vision is not None and llm.requests.vision.kept == 3  # Pillow writes other bytes


@pytest.mark.parametrize("runner", RUNNERS)
def test_one_request_one_answer(model: Path, runner: str) -> None:
    talks = [asked("你好", FIRST), asked("你好", SECOND), asked("the cat", FIRST)]
    talks.append([{"role": "user", "content": "你好"}])
    talks.append([*asked("你好", FIRST), {"role": "assistant", "content": "好"}, {"role": "user", "content": "问"}])
    with load(model, runner, enable_prefix_caching=False, max_batch_size=1) as llm:
        alone = [llm.chat(talk, max_tokens=20, seed=3).ids for talk in talks]
    assert len(set(alone)) == len(alone)
    options = [{"max_prefill_token_num": 16}, {"cache_max_entry_count": 9}, {"max_batch_size": 2}]
    for option in options:
        with load(model, runner, cache_block_seq_len=16, **option) as llm:
            together = [done.ids for done in llm.chat([*talks, *talks], max_tokens=20, seed=3)]
            warm = [llm.chat(talk, max_tokens=20, seed=3) for talk in talks]
        assert together == alone * 2
        assert [done.ids for done in warm] == alone
        if "cache_max_entry_count" not in option:
            assert warm[0].usage.cached_tokens and warm[-1].usage.cached_tokens  # of the blind one no block is full


@pytest.mark.skipif(not available(), reason="no native library")
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_no_number_of_threads_changes_a_bit(model: Path, weights: str) -> None:
    before = torch.get_num_threads()
    rows, ids = [], []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with load(model, "native", weights=weights, threads=threads, dtype="auto") as llm:
                assert llm.requests.vision is not None
                rows.append(llm.requests.vision.given(0, FIRST).rows)
                ids.append(llm.chat(asked("你好", FIRST), max_tokens=12, seed=1).ids)
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(rows[0], each) for each in rows) and len(set(ids)) == 1


def test_the_native_encoder_is_torchs(model: Path) -> None:
    if not available():
        pytest.skip("no native library")
    with load(model, "torch") as plain, load(model, "native", weights="float32") as packed:
        assert plain.requests.vision is not None and packed.requests.vision is not None
        want, got = (llm.requests.vision.given(3, FIRST) for llm in (plain, packed))  # type: ignore[union-attr]
        assert np.abs(want.rows - got.rows).max() < 1e-4 and want.rows.shape == (5, 64) and got.start == 3


def test_prompts(model: Path) -> None:
    with load(model, "torch") as llm:
        render, decode = llm.chat_format.render, llm.tokenizer.decode
        conversations = llm.requests.chat_jobs
        (job,) = conversations(asked("你好", FIRST), None, None, {})[1]
        (given,) = job.given
        text = decode(job.ids[: given.start]), decode(job.ids[given.start + 5 :])
        assert text == ("<img>", "</img>问：你好\n答：")
        pad = llm.tokenizer.token_id("<pad>")
        assert job.ids[given.start : given.start + 5] == (pad,) * 5 and pad not in job.ids[given.start + 5 :]
        assert job.ids[: given.start] == tuple(llm.tokenizer.encode("<img>"))
        english = conversations("the cat", None, None, {})[1][0]
        assert decode(english.ids) == "Q:the cat\nA:" and not english.given
        talk = [*asked("a", FIRST), {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
        (job,) = conversations(talk, None, None, {})[1]
        assert decode(job.ids[job.given[0].start + 5 :]) == "</img>Q:a\nA:b\nQ:c\nA:"
        # a text that spells the marks and the padding shows nothing and takes no image's place
        (job,) = conversations("<img><pad><pad></img> a", None, None, {})[1]
        assert pad not in job.ids and not job.given
        rendered = render([hanlin.types.Message(role="user", content="你", images=(FIRST,))], generation_prompt=False)
        assert rendered.images[0][1] == FIRST and llm.tokenizer.token_id("<sop>") not in rendered.ids


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    with load(model, "torch") as llm:
        two = [*asked("a", FIRST), {"role": "assistant", "content": "b"}, *asked("c", SECOND)]
        for messages, words in (
            (two, "shows 2 images, the model sees one"),
            (asked("a", tmp_path / "none.png"), "none.png"),
            (asked("a", str(tmp_path)), "irectory"),
            (asked("a", b""), "empty"),
            (asked("a", b"no image at all"), "this is not an image"),
            (asked("a", 7), "must be bytes, a path or a Pillow image, not int"),
            (asked("a", FIRST[:200]), "broken"),
            ([{"role": "assistant", "content": [{"type": "image", "image": FIRST}]}], "only the user shows images"),
            (by_url("https://a/b.png"), "nothing is fetched"),
            (by_url("file:///etc/passwd"), "data URI"),
        ):
            with pytest.raises(RequestError, match=words):
                llm.chat(messages, max_tokens=2)
        # what a request from elsewhere names is never opened
        with pytest.raises(RequestError, match="data URI"):
            llm.requests.chat_jobs(asked("a", str(tmp_path / "none.png")), None, None, {})


def test_a_blind_model_says_so(tmp_path: Path) -> None:
    import chatglm_directory as plain

    values = config()
    language = {k: v for k, v in values.items() if k not in ("eva_config", "qformer_config", "image_length")}
    path = plain.write(tmp_path / "chatglm-6b", language, plain.weights(language))
    (path / "ice_text.model").write_bytes(plain.tokenizer_model())
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    with load(path, "torch") as llm:
        assert not llm.sees
        with pytest.raises(ChatFormatError, match="message 0: this model cannot see images"):
            llm.chat(asked("你好", FIRST))
    with load(path, "torch", chat_template="visualglm") as llm, pytest.raises(RequestError, match="cannot see images"):
        llm.chat(asked("你好", FIRST))


def test_configurations(tmp_path: Path) -> None:
    read = read_config(config())
    assert isinstance(read, VisualGLMConfig) and read.model_type == "visualglm"
    assert (read.image_length, read.vision.places, read.queries.crossed) == (5, 10, (True, False, True, False))
    eva, queries = config()["eva_config"], config()["qformer_config"]
    wrong = config(
        image_length=7,
        eva_config={**eva, "layernorm_order": "post", "patch_size": 13, "gate": 1},
        qformer_config={**queries, "is_decoder": [True], "num_attention_heads": 3},
        position_encoding_2d=False,
    )
    with pytest.raises(ConfigError) as error:
        read_config(wrong)
    told = str(error.value)
    for words in (
        "'image_length' is 7, the Q-Former has 5 queries",
        "'layernorm_order' = 'post'",
        "images of 42 pixels do not divide into patches of 13",
        "unknown key 'gate'",
        "'is_decoder' must say true or false of each of 4 layers",
        "does not divide into 3 heads",
        "position_encoding_2d",
    ):
        assert words in told
    import chatglm_directory as plain

    values = config()
    tensors = weights(values)
    tensors["image_encoder.vit.extra"] = tensors.pop("image_encoder.glm_proj.weight")
    del tensors["image_encoder.qformer.transformer.layers.2.cross_attention.key_value.bias"]
    path = plain.write(tmp_path / "broken", values, tensors)
    with pytest.raises(CheckpointError) as broken:
        load(path, "torch")
    for words in (
        "missing tensor 'image_encoder.glm_proj.weight'",
        "missing tensor 'image_encoder.qformer.transformer.layers.2.cross_attention.key_value.bias'",
        "unexpected tensor 'image_encoder.vit.extra'",
    ):
        assert words in str(broken.value)
