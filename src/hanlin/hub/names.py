"""Names of models: hub ids, short names, what organisations and models are called on each hub, and near matches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = [
    "DEFAULT",
    "SHORT_NAMES",
    "HubId",
    "at",
    "candidates",
    "equivalents",
    "is_default",
    "near",
    "of_a_family",
    "parse",
    "short",
]

DEFAULT = "smollm2"
_DEFAULT_NAMES = frozenset({DEFAULT, "smollm2-135m", "smollm2-135m-instruct"})

# The released checkpoints of both families, as their cards on the Hugging Face Hub name them.
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
        "internlm-chat-7b-v1_1 internlm-chat-7b-8k internlm-20b internlm-chat-20b internlm-chat-20b-4bit "
        "internlm2_5-1_8b-chat-gguf internlm2_5-7b-chat-gguf internlm2_5-20b-chat-gguf internlm3-8b-instruct-gguf "
        "internlm3-8b-instruct-awq internlm3-8b-instruct-gptq-int4",
    ),
    (
        "zai-org",
        "chatglm-6b chatglm-6b-int4 chatglm-6b-int8 chatglm-6b-int4-qe chatglm2-6b chatglm2-6b-int4 chatglm2-6b-32k "
        "chatglm2-6b-32k-int4 chatglm3-6b-128k codegeex2-6b-int4 glm-4-9b-hf glm-4-9b-chat-1m-hf "
        "chatglm3-6b chatglm3-6b-base chatglm3-6b-32k codegeex2-6b glm-4-9b glm-4-9b-chat glm-4-9b-chat-1m "
        "glm-4-9b-chat-hf visualglm-6b",
    ),
)

# One organisation, several names: on each hub today's first, then earlier ones.
_ORGANISATIONS: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {"hf": ("zai-org", "THUDM"), "ms": ("ZhipuAI",), "ox": ("THUDM",)},
    {"hf": ("internlm",), "ms": ("Shanghai_AI_Laboratory",), "ox": ("OpenLMLab",)},
)

# Models whose own name differs on a hub, as the tables of the InternLM and ChatGLM cards link them.
_SPELLED: Mapping[str, Mapping[str, str]] = {
    "ms": {"chatglm-6b": "ChatGLM-6B"},
    "ox": {
        "internlm2-1_8b": "internlm2-base-1.8b",
        "internlm2-chat-1_8b": "internlm2-chat-1.8b",
        "internlm2-chat-1_8b-sft": "internlm2-chat-1.8b-sft",
        "internlm2-math-7b": "InternLM2-Math-7B",
        "internlm-7b": "InternLM-7b",
        "internlm-chat-7b": "InternLM-chat-7b",
        "internlm-20b": "InternLM-20b",
        "internlm-chat-20b": "InternLM-chat-20b",
    },
}

_PREFIX = r"(?:(?P<hub>hf|ms|ox):)?"
_SUFFIX = r"(?:@(?P<revision>[A-Za-z0-9][\w.-]{0,127}(?:/[\w-][\w.-]{0,127}){0,3}))?(?::(?P<tag>[\w.-]{1,64}))?"
_WORD = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_ID = re.compile(rf"{_PREFIX}(?P<org>{_WORD})/(?P<name>{_WORD}){_SUFFIX}", re.ASCII)
_SHORT = re.compile(rf"{_PREFIX}(?P<name>{_WORD}){_SUFFIX}", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A repository of a hub, under its name there.

    Attributes:
        repo: `org/name`.
        tag: picks one GGUF file of it (`org/name:Q4_K_M`).
        hub: "hf", "ms" or "ox"; empty where none was named, and then `repo` is the Hugging Face Hub's.
        revision: a branch, tag or commit (`org/name@v1.0`); empty for the newest.
        typed: `org/name` as it was written.
    """

    repo: str
    tag: str = ""
    hub: str = ""
    revision: str = ""
    typed: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        prefix = f"{self.hub}:" if self.hub not in ("", "hf") else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{prefix}{self.repo}{revision}" + (f":{self.tag}" if self.tag else "")


def _key(name: str) -> str:
    """People write internlm2.5-7B-chat for internlm2_5-7b-chat."""
    return name.lower().replace(".", "_")


SHORT_NAMES: Mapping[str, str] = MappingProxyType(
    {_key(name): f"{org}/{name}" for org, names in _RELEASED for name in names.split()}
)


def parse(text: str) -> HubId | None:
    """Read `org/name`, `hf:org/name`, `org/name@REVISION`, `org/name:TAG`, under any hub's name. None: no hub id."""
    found = _HUB_ID.fullmatch(text)
    if found is None or ".." in text or "--" in f"{found['org']}/{found['name']}":
        return None
    typed = f"{found['org']}/{found['name']}"
    hub = found["hub"] or ""
    repo = _on(_canonical(typed), hub or "hf")
    return HubId(repo, found["tag"] or "", hub, found["revision"] or "", typed)


def short(text: str) -> HubId | None:
    """Read a short name such as `internlm2_5-7b-chat`, with or without a hub's prefix, `@REVISION` and `:TAG`."""
    found = _SHORT.fullmatch(text)
    repo = SHORT_NAMES.get(_key(found["name"])) if found else None
    if found is None or repo is None:
        return None
    hub = found["hub"] or ""
    return HubId(_on(repo, hub or "hf"), found["tag"] or "", hub, found["revision"] or "", repo)


def _family(org: str) -> Mapping[str, tuple[str, ...]] | None:
    for names in _ORGANISATIONS:
        if org.lower() in (name.lower() for hub in names.values() for name in hub):
            return names
    return None


def _canonical(repo: str) -> str:
    """Today's id on the Hugging Face Hub of a repository under any of its names."""
    org, _, name = repo.partition("/")
    family = _family(org)
    if family is None:
        return repo
    home = family["hf"][0]
    for hub, spelled in _SPELLED.items():
        if org.lower() in (other.lower() for other in family[hub]):
            name = {_key(there): here for here, there in spelled.items()}.get(_key(name), name)
    known = SHORT_NAMES.get(_key(name), "")
    return known if known.startswith(f"{home}/") else f"{home}/{name}"


def _on(canonical: str, hub: str) -> str:
    org, _, name = canonical.partition("/")
    family = _family(org)
    if family is None or hub == "hf":
        return canonical
    return f"{family[hub][0]}/{_SPELLED[hub].get(name, name)}"


def at(wanted: HubId, hub: str) -> HubId:
    """The same model on another hub, under its name there."""
    repo = _on(_canonical(wanted.repo), hub)
    return HubId(repo, wanted.tag, hub, wanted.revision, wanted.typed)


def candidates(wanted: HubId) -> tuple[str, ...]:
    """The ids to ask its hub for, the likeliest first: a card may spell a name otherwise than the hub does."""
    canonical = _canonical(wanted.repo)
    family = _family(canonical.partition("/")[0])
    plain = f"{family[wanted.hub or 'hf'][0]}/{canonical.partition('/')[2]}" if family else wanted.repo
    return tuple(dict.fromkeys(repo for repo in (wanted.repo, plain, wanted.typed) if repo))


def of_a_family(repo: str) -> bool:
    """Whether its organisation, under whatever name, is one that released InternLM or ChatGLM."""
    return _family(repo.partition("/")[0]) is not None


def is_default(text: str) -> bool:
    return text.lower() in _DEFAULT_NAMES


def equivalents(repo: str) -> tuple[str, ...]:
    """The ids that a repository may be cached under, today's on the Hugging Face Hub first."""
    canonical = _canonical(repo)
    org, _, name = canonical.partition("/")
    family = _family(org)
    if family is None:
        return (repo,)
    found = [f"{other}/{name}" for others in family.values() for other in others]
    found += [_on(canonical, hub) for hub in _SPELLED]
    return tuple(dict.fromkeys(found))


def near(text: str, *, more: Iterable[str] = ()) -> list[str]:
    """The names that `text` was probably meant to be, best first: among short names, the default, and `more`."""
    known = {_key(name): name for name in (*SHORT_NAMES.values(), *more, DEFAULT)}
    known |= {_key(name): name for name in (repo.partition("/")[2] for repo in SHORT_NAMES.values())}
    prefix = re.match("(hf|ms|ox):", text)
    wanted = _key(re.split("[@:]", text[prefix.end() :] if prefix else text)[0])
    hub = prefix[0] if prefix else ""
    found = [known[key] for key in difflib.get_close_matches(wanted, known, n=4)]
    return [f"{hub}{name}" if hub and name != DEFAULT and ":" not in name else name for name in found]
