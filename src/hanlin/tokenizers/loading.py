"""A model directory's tokenizer: which file it is, and what the JSON files beside it add. All is read as data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hanlin.errors import ModelNotFoundError, TokenizerError, problems
from hanlin.tokenizers.base import AddedToken, BaseTokenizer, Specials, is_markup
from hanlin.tokenizers.chatglm import ChatGLMTokenizer
from hanlin.tokenizers.glm import ROLES, chatglm2_tokenizer, glm4_tokenizer, is_ranks
from hanlin.tokenizers.hf import MAX_ID, HFTokenizer
from hanlin.tokenizers.spm import SentencePieceTokenizer, known_added
from hanlin.tokenizers.spm_model import NORMAL, SpmModel

__all__ = ["Directory", "Kind", "image_tokens", "load_glm", "load_tokenizer"]

MiB = 1 << 20
_LFS = b"version https://git-lfs"
# ChatGLM-6B's first layout: image tokens, rows of its embedding, and pieces of its file.
_IMAGES, _WITH_IMAGES, _FIRST_PIECES = 20000, 150528, 130000
_ROLES = ("bos", "eos", "unk", "pad")


class Directory:
    """A model directory as bounded data files. `auto_map` and whatever code lies there are never looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def read(self, name: str, *, limit: int) -> bytes:
        """A whole file of at most `limit` bytes.

        Raises:
            TokenizerError: it cannot be read, is longer, empty, no regular file, or a Git LFS pointer.
        """
        path = self.path / name
        try:
            if not path.is_file():  # a pipe or a device could keep us for ever
                raise TokenizerError(f"{path} is not a regular file. Fetch it again.")
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from error
        if data.startswith(_LFS):
            raise TokenizerError(f"{path} is a Git LFS pointer, not the file itself. Run 'git lfs pull'.")
        if len(data) > limit:
            raise TokenizerError(f"{path} is larger than {limit // MiB} MiB: no tokenizer file. Fetch it again.")
        if not data:
            raise TokenizerError(f"{path} is empty. Fetch it again.")
        return data

    def json(self, name: str, *, limit: int = 16 * MiB) -> dict[str, Any]:
        """A JSON object; empty when there is no such file.

        Raises:
            TokenizerError: broken JSON, or no object.
        """
        if not self.has(name):
            return {}
        data = self.read(name, limit=limit)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{self.path / name} is not valid JSON: {error}. Fetch it again.") from None
        if not isinstance(value, dict):
            raise TokenizerError(f"{self.path / name} must hold a JSON object, not {type(value).__name__}")
        return value

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json("tokenizer_config.json")

    @cached_property
    def rows(self) -> int:
        """Rows of the model's embedding as config.json gives them, or 0."""
        values = self.json("config.json")
        rows = values.get("padded_vocab_size", values.get("vocab_size"))
        return rows if isinstance(rows, int) and 0 < rows <= MAX_ID else 0

    @property
    def tokenizer_class(self) -> str | None:
        """The class that the model's makers named, without Transformers' "Fast"."""
        name = self.config.get("tokenizer_class")
        if name is None and self.json("config.json").get("model_type") == "chatglm":
            name = "ChatGLMTokenizer"
        return name.removesuffix("Fast") if isinstance(name, str) else None

    @cached_property
    def roles(self) -> dict[str, str]:
        """The texts of bos_token, eos_token, unk_token and pad_token, where given."""
        found = {}
        for role in _ROLES:
            contents = [_content(source.get(f"{role}_token")) for source in self._naming]
            given = next(filter(None, contents), None)
            if given:
                found[role] = given
        return found

    @cached_property
    def special_names(self) -> frozenset[str]:
        """The texts of all tokens that the directory calls special."""
        names = set(self.roles.values())
        keys = ("additional_special_tokens", "extra_special_tokens")  # Transformers 5 writes the second
        for further in (source.get(key) for source in self._naming for key in keys):
            names |= {name for name in map(_content, further) if name} if isinstance(further, list) else set()
        return frozenset(names)

    @cached_property
    def _naming(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.config, self.json("special_tokens_map.json")

    @cached_property
    def says_roles(self) -> bool:
        """Whether this is ChatGLM3's tokenizer rather than ChatGLM2's, whose files may be the same to the byte.

        Later revisions name ChatGLM3's role tokens; of the first ones only names tell: the model's own, or its
        directory's.
        """
        if isinstance(self.config.get("roles"), bool):  # as `hanlin.hf` saves it
            return bool(self.config["roles"])
        texts = {token.content for token in self.added()} | self.special_names
        template = self.config.get("chat_template")
        if ROLES[1] in texts or (isinstance(template, str) and ROLES[1] in template):
            return True
        named = (self.config.get("name_or_path"), self.json("config.json").get("_name_or_path"))
        places = [place.name for place in (self.path.resolve(), *self.path.resolve().parents[:2])]
        found = (re.search(r"chatglm([23])", name.lower()) for name in (*named, *places) if isinstance(name, str))
        return next((match[1] == "3" for match in found if match), False)

    def specials(self, find: Callable[[str], int | None], defaults: Specials) -> Specials:
        """The defaults, with the directory's own roles, `add_bos_token` and `add_eos_token` put over them."""
        ids = {role: getattr(defaults, role) for role in _ROLES}
        for role, content in self.roles.items():
            id_ = find(content)
            if id_ is not None:
                ids[role] = id_
        around = {"bos": defaults.prefix, "eos": defaults.suffix}
        for role in around:
            wanted = self.config.get(f"add_{role}_token")
            if isinstance(wanted, bool):
                around[role] = (ids[role],) if wanted and ids[role] is not None else ()
        return Specials(**ids, eot=defaults.eot, prefix=around["bos"], suffix=around["eos"])

    def added(self) -> list[AddedToken]:
        """Tokens of `added_tokens_decoder`, and of `added_tokens.json` as older Transformers wrote it.

        Raises:
            TokenizerError: naming every entry that makes no sense.
        """
        tokens: dict[int, AddedToken] = {}
        found: list[str] = []
        for key, content, special in self._added_entries():
            digits = str(key)
            id_ = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else MAX_ID
            if id_ >= MAX_ID or not content:
                found.append(f"an added token has an id below {MAX_ID} and a text, not {key!r:.20}: {content!r:.40}")
            else:
                tokens[id_] = AddedToken(id=id_, content=content, special=special or content in self.special_names)
        if found:
            raise TokenizerError(problems(f"the added tokens of {self.path}", found, "Fetch the JSON files again."))
        return list(tokens.values())

    def _added_entries(self) -> Iterator[tuple[object, str | None, bool]]:
        for content, key in self.json("added_tokens.json").items():
            yield key, content, False
        decoder = self.config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, Mapping):
            yield None, None, False
            return
        for key, entry in decoder.items():
            yield key, _content(entry), isinstance(entry, Mapping) and entry.get("special") is True


def _content(value: object) -> str | None:
    """The text of a token that is given as a string or as {"content": string}."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) and value else None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to store a tokenizer: its file, the `tokenizer_class` names that mean it (none: any), how to read it."""

    file: str
    classes: frozenset[str] = frozenset()
    load: Callable[[Directory], BaseTokenizer]

    def fits(self, directory: Directory) -> bool:
        name = directory.tokenizer_class
        return directory.has(self.file) and (name is None or not self.classes or name in self.classes)


def _sentencepiece(directory: Directory) -> BaseTokenizer:
    name = str(directory.path / "tokenizer.model")
    model = SpmModel.parse(directory.read("tokenizer.model", limit=32 * MiB), name)
    named = [
        AddedToken(id=i, content=piece)
        for i, (piece, kind) in enumerate(zip(model.pieces, model.kinds, strict=True))
        if piece in directory.special_names and (kind != NORMAL or is_markup(piece))
    ]
    # The later of these wins.
    added = {token.id: token for token in (*known_added(model), *named, *directory.added())}
    tokenizer = SentencePieceTokenizer(model, added=added.values(), rows=directory.rows, name=name)
    tokenizer.specials = directory.specials(tokenizer.token_id, tokenizer.specials)
    return tokenizer


def image_tokens(model: SpmModel) -> int:
    """How many image tokens stand before the pieces of an `ice_text.model`, by its make."""
    return _IMAGES if len(model.pieces) == _FIRST_PIECES else 0


def _chatglm(directory: Directory) -> BaseTokenizer:
    name = str(directory.path / "ice_text.model")
    model = SpmModel.parse(directory.read("ice_text.model", limit=32 * MiB), name)
    images = directory.config.get("num_image_tokens")
    if type(images) is not int or not 0 <= images <= _IMAGES:  # the first releases do not say
        images = _IMAGES if directory.rows >= _WITH_IMAGES else image_tokens(model) if not directory.rows else 0
    tokenizer = ChatGLMTokenizer(model, images=images, rows=directory.rows, name=name)
    tokenizer.check_added(directory.added())
    return tokenizer


def load_glm(directory: Directory, roles: bool | None = None) -> BaseTokenizer:
    """Of ChatGLM2 and all later ones; whatever the class is called, the file says of which make it is.

    `roles`: whether ChatGLM3's rather than ChatGLM2's; None finds out.
    """
    name = str(directory.path / "tokenizer.model")
    data = directory.read("tokenizer.model", limit=32 * MiB)
    if is_ranks(data):
        return glm4_tokenizer(data, added=directory.added(), rows=directory.rows, name=name)
    model = SpmModel.parse(data, name)
    roles = directory.says_roles if roles is None else roles
    return chatglm2_tokenizer(model, roles=roles, added=directory.added(), rows=directory.rows, name=name)


def _tokenizer_json(directory: Directory) -> BaseTokenizer:
    name = str(directory.path / "tokenizer.json")
    data = directory.json("tokenizer.json", limit=128 * MiB)
    tokenizer = HFTokenizer(data, special=directory.special_names, rows=directory.rows, name=name)
    tokenizer.specials = directory.specials(tokenizer.token_id, tokenizer.specials)
    return tokenizer


# In order of preference: the makers' own file before its conversion.
KINDS: tuple[Kind, ...] = (
    Kind(
        file="tokenizer.model",
        classes=frozenset({"InternLM2Tokenizer", "InternLMTokenizer", "InternLM3Tokenizer", "LlamaTokenizer"}),
        load=_sentencepiece,
    ),
    Kind(file="tokenizer.model", classes=frozenset({"ChatGLMTokenizer", "ChatGLM4Tokenizer"}), load=load_glm),
    Kind(file="ice_text.model", classes=frozenset({"ChatGLMTokenizer"}), load=_chatglm),
    Kind(file="tokenizer.json", load=_tokenizer_json),
)


def load_tokenizer(path: Path) -> BaseTokenizer:
    """The tokenizer of a model directory.

    Raises:
        ModelNotFoundError: there is no such directory.
        TokenizerError: no known tokenizer file in it, or one that is broken; with the file's name and the remedy.
    """
    if not path.is_dir():
        raise ModelNotFoundError(f"{path} is not a directory. Give the directory that holds the model's files.")
    directory = Directory(path)
    for kind in KINDS:
        if kind.fits(directory):
            return kind.load(directory)
    known = "; ".join(f"{kind.file} ({', '.join(sorted(kind.classes)) or 'any class'})" for kind in KINDS)
    present = [kind.file for kind in KINDS if directory.has(kind.file)]
    raise TokenizerError(
        f"{path} has {' and '.join(present) or 'no tokenizer file'}"
        + (f" for tokenizer_class {directory.tokenizer_class!r}" if present else "")
        + f". What can be read: {known}."
    )
