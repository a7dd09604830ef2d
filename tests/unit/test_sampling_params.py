"""Sampling parameters refuse what no engine could honour, with the name and the value."""

from __future__ import annotations

from typing import Any

import pytest

from hanlin.errors import RequestError
from hanlin.types import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 5),
        ("stop", [""]),
        ("stop_token_ids", "ab"),
        ("top_k", 10**400),
        ("max_tokens", 10**400),
        ("max_tokens", 0),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("temperature", True),
        ("ignore_eos", "yes"),
        ("logit_bias", {"7": 1.0}),
        ("logit_bias", [1]),
    ],
)
def test_impossible_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_all_problems_come_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=-1, top_p=0, stop=(3,))  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in ("temperature", "top_p", "stop"))


def test_a_single_text_or_id_is_a_list_of_one() -> None:
    sampling = SamplingParams(stop="###", bad_words="x", stop_token_ids=3)  # type: ignore[arg-type]
    assert (sampling.stop, sampling.bad_words, sampling.stop_token_ids) == (("###",), ("x",), (3,))
