"""The default model's own tokenizer, out of its GGUF file, where it has been fetched."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path
from typing import Any

import gguf
import pytest

from hanlin.hub.default import SMOLLM2, location, present
from hanlin.hub.places import Places
from hanlin.tokenizers import from_gguf
from hanlin.tokenizers.base import BaseTokenizer


@functools.cache
def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm2() -> BaseTokenizer:
    path = location(SMOLLM2, Places.default())
    if not present(path, SMOLLM2):
        pytest.skip("needs the default model in the cache (hanlin pull)")
    return from_gguf(metadata(path))


def test_facts(smollm2: BaseTokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.special_ids == set(range(17))
    assert (smollm2.token_id("<|im_start|>"), smollm2.token_id("<|im_end|>")) == (1, 2)
    assert (smollm2.bos_id, smollm2.eos_id) == (1, 2)
    assert smollm2.encode("Hello", add_special=True) == smollm2.encode("Hello")
    text = "<|im_start|>user\nhi<|im_end|>\n"
    assert smollm2.encode(text, parse_special=True) == [1, 4093, 198, 6004, 2, 198]
    assert not smollm2.special_ids & set(smollm2.encode(text))


def test_digits_stand_alone(smollm2: BaseTokenizer) -> None:
    assert [smollm2.token_text(i) for i in smollm2.encode("x 2024")] == ["x", " ", "2", "0", "2", "4"]


def test_text_round_trips(smollm2: BaseTokenizer, shared: Path) -> None:
    for name in ("zh_text/wiki_gsdsimp_dev.txt.gz", "mbpp/mbpp.jsonl.gz", "oasst_sample/en_100_message.jsonl.gz"):
        text = gzip.decompress((shared / "data" / name).read_bytes()).decode()[:60_000]
        ids = smollm2.encode(text)
        assert smollm2.decode(ids) == text
        detokenizer = smollm2.detokenizer()
        assert "".join([*(detokenizer.push([i]) for i in ids), detokenizer.finish()]) == text
