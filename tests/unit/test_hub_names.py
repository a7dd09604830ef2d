from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanlin.hub import names
from hanlin.hub.names import HubId


@pytest.mark.parametrize(
    ("text", "repo", "tag"),
    [
        ("internlm/internlm2_5-7b-chat", "internlm/internlm2_5-7b-chat", ""),
        ("hf:internlm/internlm2-7b", "internlm/internlm2-7b", ""),
        ("internlm/internlm2_5-7b-chat-gguf:Q4_K_M", "internlm/internlm2_5-7b-chat-gguf", "Q4_K_M"),
        ("THUDM/chatglm-6b", "zai-org/chatglm-6b", ""),
        ("thudm/chatglm3-6b", "zai-org/chatglm3-6b", ""),
        ("ZhipuAI/chatglm2-6b", "zai-org/chatglm2-6b", ""),
        ("Shanghai_AI_Laboratory/internlm2-chat-7b", "internlm/internlm2-chat-7b", ""),
        ("OpenLMLab/internlm2-1_8b-reward", "internlm/internlm2-1_8b-reward", ""),
        ("someone/A.Model_v1.5", "someone/A.Model_v1.5", ""),
    ],
)
def test_hub_ids_are_read_and_old_organisations_become_todays(text: str, repo: str, tag: str) -> None:
    assert names.parse(text) == HubId(repo, tag)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "../b",
        "a/..",
        "a--b/c",
        "a/b:",
        "/a/b",
        "a/b\n",
        "./a",
        "a/.b",
        "a /b",
        "https://a/b",
        "é/b",
    ],
)
def test_what_is_no_hub_id(text: str) -> None:
    assert names.parse(text) is None


@given(st.text(alphabet="ab./\\:-_~ \0é", max_size=20))
def test_a_hub_id_can_never_lead_out_of_a_directory(text: str) -> None:
    found = names.parse(text)
    if found is not None:
        assert found.repo.count("/") == 1
        assert not {"", ".", ".."} & set(found.repo.split("/"))
        assert "\\" not in str(found)


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("internlm2_5-7b-chat", "internlm/internlm2_5-7b-chat"),
        ("InternLM2.5-7B-Chat", "internlm/internlm2_5-7b-chat"),
        ("internlm2-1.8b-reward", "internlm/internlm2-1_8b-reward"),
        ("ChatGLM-6B", "zai-org/chatglm-6b"),
        ("internlm2_5-7b-chat:Q4_0", "internlm/internlm2_5-7b-chat:Q4_0"),
    ],
)
def test_short_names(text: str, repo: str) -> None:
    assert str(names.short(text)) == repo


def test_every_short_name_is_a_hub_id() -> None:
    for key, repo in names.SHORT_NAMES.items():
        found = names.parse(repo)
        assert found is not None and found.repo == repo, repo
        assert names.short(key) == found


def test_unknown_short_names_have_near_matches() -> None:
    assert names.short("internlm2_5-7b-chta") is None
    assert names.near("internlm2_5-7b-chta")[0] == "internlm2_5-7b-chat"
    assert "smollm2" in names.near("smolm2")
    assert "me/my-model" in names.near("me/my-modle", more=["me/my-model"])
    assert names.near("qqqqqqqqqqqqqqqqqqqqqqq") == []


def test_equivalents_hold_earlier_names() -> None:
    assert names.equivalents("zai-org/chatglm-6b") == ("zai-org/chatglm-6b", "THUDM/chatglm-6b", "ZhipuAI/chatglm-6b")
    assert names.equivalents("someone/model") == ("someone/model",)
