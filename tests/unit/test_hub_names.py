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
        ("internlm/internlm2_5-7b-chat-gguf:Q4_K_M", "internlm/internlm2_5-7b-chat-gguf", "Q4_K_M"),
        ("THUDM/chatglm-6b", "zai-org/chatglm-6b", ""),
        ("thudm/chatglm3-6b", "zai-org/chatglm3-6b", ""),
        ("ZhipuAI/chatglm2-6b", "zai-org/chatglm2-6b", ""),
        ("Shanghai_AI_Laboratory/internlm2-chat-7b", "internlm/internlm2-chat-7b", ""),
        ("OpenLMLab/internlm2-1_8b-reward", "internlm/internlm2-1_8b-reward", ""),
        ("someone/A.Model_v1.5", "someone/A.Model_v1.5", ""),
        ("ZhipuAI/ChatGLM-6B", "zai-org/chatglm-6b", ""),
        ("OpenLMLab/internlm2-base-1.8b", "internlm/internlm2-1_8b", ""),
        ("OpenLMLab/InternLM-chat-7b", "internlm/internlm-chat-7b", ""),
        ("internlm/internlm2-base-1_8b", "internlm/internlm2-base-1_8b", ""),
    ],
)
def test_hub_ids_are_read_and_old_organisations_become_todays(text: str, repo: str, tag: str) -> None:
    assert names.parse(text) == HubId(repo, tag)


@pytest.mark.parametrize(
    ("text", "hub", "repo", "revision", "tag"),
    [
        ("hf:internlm/internlm2-7b", "hf", "internlm/internlm2-7b", "", ""),
        ("hf:ZhipuAI/chatglm3-6b", "hf", "zai-org/chatglm3-6b", "", ""),
        ("ms:ZhipuAI/chatglm3-6b@v1.0.2", "ms", "ZhipuAI/chatglm3-6b", "v1.0.2", ""),
        ("ms:THUDM/chatglm-6b", "ms", "ZhipuAI/ChatGLM-6B", "", ""),
        ("ms:internlm/internlm2-1_8b", "ms", "Shanghai_AI_Laboratory/internlm2-1_8b", "", ""),
        ("ms:someone/model-gguf:Q4_0", "ms", "someone/model-gguf", "", "Q4_0"),
        ("ox:internlm/internlm2-1_8b", "ox", "OpenLMLab/internlm2-base-1.8b", "", ""),
        ("ox:zai-org/chatglm3-6b", "ox", "THUDM/chatglm3-6b", "", ""),
        ("someone/model@refs/pr/1:Q4_0", "", "someone/model", "refs/pr/1", "Q4_0"),
    ],
)
def test_prefixes_choose_the_hub_and_its_name_for_the_model(
    text: str, hub: str, repo: str, revision: str, tag: str
) -> None:
    found = names.parse(text)
    assert found == HubId(repo, tag, hub, revision)
    assert names.parse(str(found)) == (found if hub != "hf" else HubId(repo, tag, "", revision))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gs:a/b",
        "ms:hf:a/b",
        "MS:a/b",
        "a/b@",
        "a/b@-x",
        "a/b@../x",
        "a/b@x/../y",
        "a/b@x//y",
        "a/b@x/.git",
        "a/b@x:y@z",
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


@given(st.text(alphabet="abhfms./\\:@-_~ \0é", max_size=20))
def test_a_hub_id_can_never_lead_out_of_a_directory(text: str) -> None:
    found = names.parse(text)
    if found is not None:
        assert found.repo.count("/") == 1
        assert not {"", ".", ".."} & set(found.repo.split("/"))
        assert "\\" not in str(found)
        assert ".." not in str(found) and not found.revision.startswith(("/", "-", "."))


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("internlm2_5-7b-chat", "internlm/internlm2_5-7b-chat"),
        ("InternLM2.5-7B-Chat", "internlm/internlm2_5-7b-chat"),
        ("internlm2-1.8b-reward", "internlm/internlm2-1_8b-reward"),
        ("ChatGLM-6B", "zai-org/chatglm-6b"),
        ("internlm2_5-7b-chat:Q4_0", "internlm/internlm2_5-7b-chat:Q4_0"),
        ("ms:chatglm-6b", "ms:ZhipuAI/ChatGLM-6B"),
        ("ms:InternLM2.5-7B-Chat@v1", "ms:Shanghai_AI_Laboratory/internlm2_5-7b-chat@v1"),
        ("ox:internlm2-chat-1.8b", "ox:OpenLMLab/internlm2-chat-1.8b"),
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
    assert names.equivalents("zai-org/chatglm-6b")[:3] == (
        "zai-org/chatglm-6b",
        "THUDM/chatglm-6b",
        "ZhipuAI/chatglm-6b",
    )
    assert "ZhipuAI/ChatGLM-6B" in names.equivalents("THUDM/chatglm-6b")
    assert "OpenLMLab/internlm2-base-1.8b" in names.equivalents("internlm/internlm2-1_8b")
    assert names.equivalents("someone/model") == ("someone/model",)


# As the cards and tables of the two families link them: on the Hugging Face Hub, on ModelScope, on OpenXLab.
FAMILY = {"internlm": ("internlm", "Shanghai_AI_Laboratory", "OpenLMLab"), "glm": ("zai-org", "ZhipuAI", "THUDM")}
RELEASED = """
internlm2-1_8b internlm2-7b internlm2-base-7b internlm2-chat-7b internlm2-chat-7b-sft internlm2-20b
internlm2-chat-20b internlm2-chat-20b-4bits internlm2-chat-1_8b internlm2-chat-1_8b-sft internlm2-base-20b
internlm2-chat-20b-sft internlm2_5-1_8b internlm2_5-1_8b-chat internlm2_5-7b internlm2_5-7b-chat
internlm2_5-7b-chat-1m internlm2_5-20b internlm2_5-20b-chat internlm2_5-20b-chat-4bit-awq
internlm2_5-20b-chat-4bit-gptq internlm2-1_8b-reward internlm2-7b-reward internlm2-20b-reward
internlm-7b internlm-chat-7b internlm-chat-7b-v1_1 internlm-chat-7b-8k internlm-20b internlm-chat-20b
internlm-chat-20b-4bit internlm3-8b-instruct internlm2-math-7b internlm2-math-base-7b internlm2-math-20b
chatglm-6b chatglm-6b-int4 chatglm-6b-int8 chatglm-6b-int4-qe chatglm2-6b chatglm2-6b-int4 chatglm2-6b-32k
chatglm2-6b-32k-int4 chatglm3-6b chatglm3-6b-base chatglm3-6b-32k chatglm3-6b-128k codegeex2-6b glm-4-9b glm-4-9b-chat
glm-4-9b-chat-1m glm-4-9b-hf glm-4-9b-chat-hf glm-4-9b-chat-1m-hf visualglm-6b
""".split()


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_name_resolves_on_each_hub_under_every_organisation(name: str) -> None:
    family = FAMILY["internlm" if name.startswith("internlm") else "glm"]
    today = f"{family[0]}/{name}"
    assert str(names.short(name)) == today
    assert str(names.short(name.upper().replace("_", "."))) == today
    for org in (*family, "THUDM") if family[0] == "zai-org" else family:
        assert str(names.parse(f"{org}/{name}")) == today
        assert str(names.parse(f"hf:{org}/{name}")) == today
    for hub, org in zip(("hf", "ms", "ox"), family, strict=True):
        there = names.short(f"{hub}:{name}")
        assert there is not None and there.repo.startswith(f"{org}/")
        assert there == names.parse(f"{hub}:{today}") == names.at(HubId(today), hub)
        assert f"{org}/{name}" in names.candidates(there)
        assert there.repo in names.equivalents(today)
        # Whatever a hub calls it leads back to the one model.
        assert str(names.parse(there.repo)) == today
