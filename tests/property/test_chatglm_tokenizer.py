"""ChatGLM-6B's text rules on any text, with a tiny model of the released make and with the released ones."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_directory import PIECES, tokenizer_config, tokenizer_model
from hanlin.errors import TokenizerError
from hanlin.tokenizers import load_tokenizer
from hanlin.tokenizers.chatglm import ChatGLMTokenizer
from hanlin.tokenizers.spm_model import SpmModel

NAMES = [piece for piece, _ in PIECES]
# What SentencePiece leaves as it is: no blanks at the ends, none alone beside others.
WORDS = st.text("abcdefg你好问答!?.", min_size=1, max_size=6)
GAPS = st.one_of(st.sampled_from([" ", "\n", "\t", "\n\n\t", "  \n"]), st.integers(2, 170).map(" ".__mul__))


@pytest.fixture(scope="module")
def tiny_tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer(SpmModel.parse(tokenizer_model(), "tiny"))


@st.composite
def texts(draw: Any) -> str:
    words = draw(st.lists(WORDS, min_size=1, max_size=6))
    return "".join(word + draw(GAPS) for word in words[:-1]) + words[-1]


@settings(max_examples=150, deadline=None)
@given(text=texts())
def test_text_comes_back(tiny_tokenizer: ChatGLMTokenizer, text: str) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_streams_and_never_forges(tiny_tokenizer: ChatGLMTokenizer, text: str, cuts: list[int]) -> None:
    tokenizer = tiny_tokenizer
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(ids)
    stream, at, out = tokenizer.detokenizer(), 0, ""
    for cut in [*sorted(cuts), len(ids)]:
        out += stream.push(ids[at:cut])
        at = max(at, cut)
    assert out + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["[gMASK]", "<sop>", "<eop>", "[MASK]", "</s>", "<pad>"])
def test_specials_are_parsed_only_when_asked(tiny_tokenizer: ChatGLMTokenizer, name: str) -> None:
    known = NAMES.index(name)
    assert known not in tiny_tokenizer.encode(f"a{name}b")
    assert known in tiny_tokenizer.encode(f"a{name}b", parse_special=True)


def test_what_stands_around_a_prompt(tiny_tokenizer: ChatGLMTokenizer) -> None:
    gmask, sop = NAMES.index("[gMASK]"), NAMES.index("<sop>")
    plain = tiny_tokenizer.encode("the cat")
    assert tiny_tokenizer.encode("the cat", add_special=True) == [*plain, gmask, sop]
    own = tiny_tokenizer.encode("the cat[MASK]<sop>", add_special=True, parse_special=True)
    assert own == [*plain, NAMES.index("[MASK]"), sop]
    assert (tiny_tokenizer.bos_id, tiny_tokenizer.eos_id) == (sop, NAMES.index("<eop>"))


def write(path: Path, model: bytes, config: dict[str, Any], rows: int) -> Path:
    (path / "ice_text.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": "chatglm", "vocab_size": rows}))
    return path


def test_directories(tmp_path: Path) -> None:
    path = write(tmp_path, tokenizer_model(), tokenizer_config(), 600)
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 600
    assert tokenizer.decode([599, NAMES.index("你好")]) == "你好"
    path = write(tmp_path, tokenizer_model(), tokenizer_config(num_image_tokens=10), 600)
    assert load_tokenizer(path).encode("你好") == [i + 10 for i in tokenizer.encode("你好")]
    assert load_tokenizer(path).decode([3, 9], skip_special=False) == "<image_3><image_9>"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (SpmModel(pieces=["<unk>"], scores=[0], kinds=[2], byte_fallback=False).serialize(), "no piece '<n>'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (tokenizer_model()[:-9], "ice_text"),
    ],
    ids=["another", "pointer", "cut"],
)
def test_broken_files(tmp_path: Path, model: bytes, said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(write(tmp_path, model, tokenizer_config(), 600))


def test_added_tokens_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, tokenizer_model(), tokenizer_config(), 600)
    (path / "added_tokens.json").write_text(json.dumps({"<new>": 599}))
    with pytest.raises(TokenizerError, match="<new>"):
        load_tokenizer(path)


@pytest.fixture(scope="module", params=["1_1", "1_0"])
def released(request: Any, shared: Path) -> tuple[ChatGLMTokenizer, int, bytes]:
    """Both released files as directories would have them: (tokenizer, image tokens, model file)."""
    images = 20000 if request.param == "1_0" else 0
    data = (shared / "assets" / f"ice_text_v{request.param}.model").read_bytes()
    return ChatGLMTokenizer(SpmModel.parse(data, "ice"), images=images, rows=130528 + images), images, data


def test_golden_ids(released: tuple[ChatGLMTokenizer, int, bytes], shared: Path) -> None:
    tokenizer, images, _ = released
    golden = json.loads((shared / "assets" / "golden_token_ids.json").read_text(encoding="utf-8"))["chatglm-6b"]
    assert golden
    for text, ids in golden:
        assert tokenizer.encode(text, add_special=True) == [i + images for i in ids]
        assert tokenizer.decode([i + images for i in ids]) == unicodedata.normalize("NFKC", text)


def test_ids_and_text_are_sentencepieces_own(released: tuple[ChatGLMTokenizer, int, bytes], shared: Path) -> None:
    """On real texts, line by line, in both directions."""
    tokenizer, images, data = released
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    lines: list[str] = []
    for path in sorted((shared / "data").rglob("*.jsonl"))[:12]:
        with path.open(encoding="utf-8") as file:
            lines += [file.readline()[:400].strip() for _ in range(25)]
    assert len(lines) > 20
    for line in filter(None, lines):
        line = " ".join(line.split())
        want = reference.encode(line)
        if 0 in want:  # the first file has no pieces for bytes
            continue
        ids = tokenizer.encode(line)
        assert ids == [i + images for i in want]
        assert tokenizer.decode(ids) == reference.decode(want)
