"""Names of models: hub ids, short names, organisations that were renamed, and near matches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["DEFAULT", "SHORT_NAMES", "HubId", "equivalents", "is_default", "near", "parse", "short"]

DEFAULT = "smollm2"
_DEFAULT_NAMES = frozenset({DEFAULT, "smollm2-135m", "smollm2-135m-instruct"})

# The released checkpoints of both families, as their cards name them.
_RELEASED: tuple[tuple[str, str], ...] = (
    (
        "internlm",
        "internlm2_5-1_8b internlm2_5-1_8b-chat internlm2_5-7b internlm2_5-7b-chat internlm2_5-7b-chat-1m "
        "internlm2_5-20b internlm2_5-20b-chat internlm2_5-20b-chat-4bit-awq internlm2_5-20b-chat-4bit-gptq "
        "internlm2-1_8b internlm2-chat-1_8b internlm2-chat-1_8b-sft internlm2-7b internlm2-base-7b internlm2-chat-7b "
        "internlm2-chat-7b-sft internlm2-20b internlm2-base-20b internlm2-chat-20b internlm2-chat-20b-sft "
        "internlm2-chat-20b-4bits internlm2-math-7b internlm2-math-base-7b internlm2-math-20b internlm2-math-base-20b "
        "internlm2-math-plus-1_8b internlm2-math-plus-7b internlm2-math-plus-20b internlm2-1_8b-reward "
        "internlm2-7b-reward internlm2-20b-reward internlm3-8b-instruct internlm-7b internlm-chat-7b "
        "internlm-chat-7b-v1_1 internlm-chat-7b-8k internlm-20b internlm-chat-20b internlm-chat-20b-4bit",
    ),
    (
        "zai-org",
        "chatglm-6b chatglm-6b-int4 chatglm-6b-int8 chatglm-6b-int4-qe chatglm2-6b chatglm2-6b-int4 chatglm2-6b-32k "
        "chatglm2-6b-32k-int4 chatglm3-6b-128k codegeex2-6b-int4 glm-4-9b-hf glm-4-9b-chat-1m-hf "
        "chatglm3-6b chatglm3-6b-base chatglm3-6b-32k codegeex2-6b glm-4-9b glm-4-9b-chat glm-4-9b-chat-1m "
        "glm-4-9b-chat-hf visualglm-6b",
    ),
)

# One organisation, several names: today's on the Hub first, then earlier ones, ModelScope's and OpenXLab's.
_ORGANISATIONS: tuple[tuple[str, ...], ...] = (
    ("zai-org", "THUDM", "ZhipuAI"),
    ("internlm", "Shanghai_AI_Laboratory", "OpenLMLab"),
)

_HUB_ID = re.compile(
    r"(?P<org>[A-Za-z0-9][\w.-]{0,95})/(?P<name>[A-Za-z0-9][\w.-]{0,95})(?::(?P<tag>[\w.-]{1,64}))?", re.ASCII
)


@dataclass(frozen=True)
class HubId:
    """`org/name`, and the tag that picks one GGUF file of it (`org/name:Q4_K_M`)."""

    repo: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.tag}" if self.tag else self.repo


def _key(name: str) -> str:
    """People write internlm2.5-7B-chat for internlm2_5-7b-chat."""
    return name.lower().replace(".", "_")


SHORT_NAMES: Mapping[str, str] = MappingProxyType(
    {_key(name): f"{org}/{name}" for org, names in _RELEASED for name in names.split()}
)


def parse(text: str) -> HubId | None:
    """Read `org/name`, `hf:org/name`, `org/name:TAG`, an organisation's old name as today's. None: not a hub id."""
    found = _HUB_ID.fullmatch(text.removeprefix("hf:"))
    if found is None or any(bad in text for bad in ("..", "--")):
        return None
    org, name = found["org"], found["name"]
    for names in _ORGANISATIONS:
        if org.lower() in (other.lower() for other in names):
            org = names[0]
    return HubId(f"{org}/{name}", found["tag"] or "")


def short(text: str) -> HubId | None:
    """Read a short name such as `internlm2_5-7b-chat`, with or without `:TAG`."""
    name, _, tag = text.partition(":")
    repo = SHORT_NAMES.get(_key(name))
    return parse(f"{repo}:{tag}" if tag else repo) if repo else None


def is_default(text: str) -> bool:
    return text.lower() in _DEFAULT_NAMES


def equivalents(repo: str) -> tuple[str, ...]:
    """The ids that a repository may be cached under, today's first."""
    org, _, name = repo.partition("/")
    for names in _ORGANISATIONS:
        if org == names[0]:
            return tuple(f"{other}/{name}" for other in names)
    return (repo,)


def near(text: str, *, more: Iterable[str] = ()) -> list[str]:
    """The names that `text` was probably meant to be, best first: among short names, the default, and `more`."""
    known = {_key(name): name for name in (*SHORT_NAMES.values(), *more, DEFAULT)}
    known |= {_key(name): name for name in (repo.partition("/")[2] for repo in SHORT_NAMES.values())}
    wanted = _key(text.removeprefix("hf:").partition(":")[0])
    return [known[key] for key in difflib.get_close_matches(wanted, known, n=4)]
