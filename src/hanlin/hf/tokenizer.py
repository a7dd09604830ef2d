"""SentencePiece tokenizers as Transformers classes, slow and fast, with the text rules of `hanlin.tokenizers`.

Both read special tokens in a text, as Transformers does unless `split_special_tokens=True`. Reserved pieces such as
"[UNUSED_TOKEN_145]" stay plain text always, since SentencePiece would give them the ids of renamed special tokens; when
`skip_special_tokens=True`, they are left out of text as well.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers
from transformers import AddedToken, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hanlin.errors import TokenizerError, problems
from hanlin.tokenizers import HFTokenizer, SentencePieceTokenizer
from hanlin.tokenizers.base import AddedToken as HanlinToken
from hanlin.tokenizers.base import BaseTokenizer, Specials, is_markup
from hanlin.tokenizers.loading import Directory
from hanlin.tokenizers.spm import SPACE, known_added
from hanlin.tokenizers.spm_model import BPE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SpmModel

__all__ = ["FastSentencePiece", "SlowSentencePiece", "to_hanlin"]

_FILES = {"vocab_file": "tokenizer.model"}
_FAST_FILES = {**_FILES, "tokenizer_file": "tokenizer.json"}
_LIMIT = 32 << 20
_RESERVED = re.compile(r"\[UNUSED_TOKEN_\d+\]")


def to_hanlin(tokenizer: PreTrainedTokenizerBase) -> BaseTokenizer:
    """Hanlin's view of a Transformers tokenizer, made once and again when tokens were added.

    Raises:
        TokenizerError: a slow tokenizer of another kind.
    """
    size, known = getattr(tokenizer, "_hanlin", (0, None))
    if size == len(tokenizer) and known is not None:
        return known  # type: ignore[no-any-return]
    made: BaseTokenizer
    if hasattr(tokenizer, "make_hanlin"):
        made = tokenizer.make_hanlin()
    elif isinstance(tokenizer, PreTrainedTokenizerFast):
        data = json.loads(tokenizer.backend_tokenizer.to_str())
        hidden = _reserved(tokenizer.get_vocab().items())
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        data["added_tokens"] += [{"id": i, "content": p, "special": True, **plain} for i, p in hidden.items()]
        made = HFTokenizer(data, name=str(tokenizer.name_or_path))
        made.specials = Specials(bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    else:
        raise TokenizerError(f"{type(tokenizer).__name__} cannot be used for chat; load it with AutoTokenizer instead")
    tokenizer._hanlin = (len(tokenizer), made)
    return made


class SlowSentencePiece(PreTrainedTokenizer):  # type: ignore[misc]
    """Ids and text by `hanlin.tokenizers.SentencePieceTokenizer`; what is added later stands beside it."""

    vocab_files_names = _FILES
    model_input_names = ("input_ids", "attention_mask")
    padding_side = "right"

    def __init__(
        self,
        vocab_file: str | None = None,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str = "</s>",
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        tokenizer_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        # All of this before Transformers' own constructor, which asks for the vocabulary.
        self.vocab_file = vocab_file
        self._spm = _read(vocab_file, type(self).__name__)
        added = _added(self._spm, added_tokens_decoder)
        self._pieces = _names(self._spm, added)
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self._hidden = _reserved(self._ids.items())
        self._plain = SentencePieceTokenizer(self._spm, added=_for_hanlin(added), name=str(vocab_file))
        # Transformers keeps both from a slow tokenizer whose directory has a tokenizer.json as well.
        said = Directory(Path(str(vocab_file)).parent).config
        add_bos_token = said.get("add_bos_token", True) if add_bos_token is None else add_bos_token
        add_eos_token = said.get("add_eos_token", False) if add_eos_token is None else add_eos_token
        self.add_bos_token, self.add_eos_token = bool(add_bos_token), bool(add_eos_token)
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=self.add_bos_token,
            add_eos_token=self.add_eos_token,
            added_tokens_decoder=added,
            **_with_extras(kwargs, added),
        )

    def make_hanlin(self) -> SentencePieceTokenizer:
        """The same tokenizer with all that was added since."""
        added = [HanlinToken(id=i, content=piece) for i, piece in self._hidden.items()]
        added += _for_hanlin(self.added_tokens_decoder)
        made = SentencePieceTokenizer(self._spm, added=added, name=str(self.vocab_file))
        made.specials = Specials(bos=self.bos_token_id, eos=self.eos_token_id)
        return made

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._pieces[i] for i in self._plain.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, self.unk_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index] if 0 <= index < len(self._pieces) else ""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of pieces; special and added tokens verbatim, with no space put around them."""
        parts: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token in self._ids and token not in self.added_tokens_encoder:
                run.append(self._ids[token])
                continue
            parts += (self._plain.decode(run, skip_special=False), token)
            run = []
        return "".join((*parts, self._plain.decode(run, skip_special=False)))

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = _kept(token_ids, self._hidden) if skip_special_tokens else token_ids
        return str(super()._decode(ids, skip_special_tokens=skip_special_tokens, **kwargs))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Begin and end tokens around the whole, as `add_bos_token` and `add_eos_token` say."""
        before = [self.bos_token_id] if self.add_bos_token else []
        after = [self.eos_token_id] if self.add_eos_token else []
        return [*before, *token_ids_0, *(token_ids_1 or ()), *after]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        middle = [0] * (len(token_ids_0) + len(token_ids_1 or ()))
        return [1] * int(self.add_bos_token) + middle + [1] * int(self.add_eos_token)

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        return _copy(self.vocab_file, save_directory, filename_prefix)

    def _save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        files: tuple[str, ...] = super()._save_pretrained(save_directory, *args, **kwargs)
        _amend_config(self, save_directory, kwargs.get("filename_prefix"))
        return files


class FastSentencePiece(PreTrainedTokenizerFast):  # type: ignore[misc]
    """The same over the Rust library: from `tokenizer.json` if there is one, else converted from `tokenizer.model`."""

    vocab_files_names = _FAST_FILES
    model_input_names = ("input_ids", "attention_mask")
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str = "</s>",
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        tokenizer_object: tokenizers.Tokenizer | None = None,
        **kwargs: Any,
    ) -> None:
        source: dict[str, Any] = {"tokenizer_object": tokenizer_object}
        if tokenizer_object is None and tokenizer_file is not None:
            source = {"tokenizer_file": tokenizer_file}
        elif tokenizer_object is None:
            spm = _read(vocab_file, type(self).__name__)
            added_tokens_decoder = _added(spm, added_tokens_decoder)
            source = {"tokenizer_object": _convert(spm, added_tokens_decoder, str(vocab_file))}
            kwargs = {"add_bos_token": True, "add_eos_token": False, **kwargs}
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            added_tokens_decoder=dict(added_tokens_decoder or {}),
            **source,
            **_with_extras(kwargs, added_tokens_decoder or {}),
        )
        self.vocab_file = vocab_file
        self._hidden = _reserved(self.get_vocab().items())
        around = self.backend_tokenizer.encode("", add_special_tokens=True).ids
        self._add_bos_token, self._add_eos_token = self.bos_token_id in around[:1], self.eos_token_id in around[-1:]

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to the constructor; Transformers would guess at them here."""
        return kwargs

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = _kept(token_ids, self._hidden) if skip_special_tokens else token_ids
        return str(super()._decode(ids, skip_special_tokens=skip_special_tokens, **kwargs))

    @property
    def can_save_slow_tokenizer(self) -> bool:
        return self.vocab_file is not None and Path(self.vocab_file).is_file()

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        return _copy(self.vocab_file, save_directory, filename_prefix)

    def _save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """`tokenizer.json`, and for the slow class and Hanlin's other rooms `tokenizer.model`."""
        files = super()._save_pretrained(save_directory, *args, **kwargs)
        prefix = kwargs.get("filename_prefix")
        _amend_config(self, save_directory, prefix)
        return (*files, *(self.save_vocabulary(save_directory, prefix) if self.can_save_slow_tokenizer else ()))


def _read(vocab_file: str | None, name: str) -> SpmModel:
    if vocab_file is None:
        raise TokenizerError(f"{name} needs tokenizer.model, which the directory does not have. Fetch it again.")
    path = Path(vocab_file)
    return SpmModel.parse(Directory(path.parent).read(path.name, limit=_LIMIT), str(path))


def _added(spm: SpmModel, given: Mapping[int, AddedToken] | None) -> dict[int, AddedToken]:
    """The tokens that the directory names, and those that the family is known to have."""
    known = {token.id: AddedToken(token.content, special=True, normalized=False) for token in known_added(spm)}
    return known | {int(i): token for i, token in (given or {}).items()}


def _with_extras(given: dict[str, Any], added: Mapping[int, AddedToken]) -> dict[str, Any]:
    """The arguments, with every special token among the `added` ones named, so that it is left out of text."""
    kwargs = dict(given)
    extras = list(kwargs.pop("extra_special_tokens", None) or kwargs.pop("additional_special_tokens", None) or ())
    known = {str(token) for token in extras} | {"<unk>", "<s>", "</s>"}
    extras += [token for token in added.values() if token.special and token.content not in known]
    return {"clean_up_tokenization_spaces": False, **kwargs, "extra_special_tokens": extras}


def _for_hanlin(added: Mapping[int, AddedToken]) -> list[HanlinToken]:
    return [HanlinToken(id=i, content=token.content, special=token.special) for i, token in added.items()]


def _names(spm: SpmModel, added: Mapping[int, AddedToken]) -> list[str]:
    """Each piece's name, that of the added token where one takes its place."""
    return [added[i].content if i in added else piece for i, piece in enumerate(spm.pieces)]


def _reserved(vocabulary: Iterable[tuple[str, int]]) -> dict[int, str]:
    """The pieces without a meaning, by id."""
    return {i: piece for piece, i in vocabulary if _RESERVED.fullmatch(piece)}


def _kept(ids: int | Sequence[int], hidden: Mapping[int, str]) -> list[int]:
    return [i for i in ([ids] if isinstance(ids, int) else ids) if i not in hidden]


def _copy(vocab_file: str | None, save_directory: str, filename_prefix: str | None) -> tuple[str]:
    target = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + _FILES["vocab_file"])
    if vocab_file is not None and Path(vocab_file).is_file() and Path(vocab_file).resolve() != target.resolve():
        shutil.copyfile(vocab_file, target)
    return (str(target),)


def _amend_config(
    tokenizer: SlowSentencePiece | FastSentencePiece, save_directory: Any, filename_prefix: str | None
) -> None:
    """Put back what Transformers 5 leaves out of a saved `tokenizer_config.json`, and released ones have."""
    path = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer_config.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    values["add_bos_token"], values["add_eos_token"] = tokenizer.add_bos_token, tokenizer.add_eos_token
    added = sorted(tokenizer.added_tokens_decoder.items())
    values["added_tokens_decoder"] = {str(i): token.__getstate__() for i, token in added}
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _convert(spm: SpmModel, added: Mapping[int, AddedToken], name: str) -> tokenizers.Tokenizer:
    """The Rust tokenizer that gives SentencePiece's ids.

    Raises:
        TokenizerError: a model of another kind than InternLM's: not BPE with byte fallback, or one that changes text.
    """
    names = _names(spm, added)
    # Beside byte fallback SentencePiece never gives a NUL piece, though InternLM2 has one: no text may spell its name.
    nul = [i for i, piece in enumerate(spm.pieces) if piece == "\0"]
    for i in nul:
        names[i] = "\0\0"
    vocabulary = {piece: i for i, piece in enumerate(names)}
    words = [
        p for i, p in enumerate(spm.pieces) if spm.kinds[i] == USER_DEFINED and i not in added and not is_markup(p)
    ]
    found = []
    if spm.algorithm != BPE or not spm.byte_fallback:
        found.append("it is not BPE with byte fallback")
    if spm.dummy_prefix or spm.remove_extra_spaces or spm.charsmap:
        found.append("it normalises text")
    if len(vocabulary) != len(names):
        found.append(f"{len(names) - len(vocabulary)} pieces stand twice")
    found += [f"its piece {p!r} cannot be made of single characters" for p in words if len(p) > 2]
    found += [f"its piece {p!r} is unused" for p, kind in zip(spm.pieces, spm.kinds, strict=True) if kind == UNUSED]
    if found:
        raise TokenizerError(problems(name, found, "Use the slow tokenizer: use_fast=False."))
    unknown = names[spm.kinds.index(UNKNOWN)]
    merges = [(word[0], word[1]) for word in words if len(word) == 2] + _merges(spm)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), *(decoders.Replace(names[i], "\0") for i in nul)]
    made.decoder = decoders.Sequence([*steps, decoders.ByteFallback(), decoders.Fuse()])
    return made


def _merges(spm: SpmModel) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best pieces first.

    SentencePiece merges whichever neighbours make the piece with the highest score; all ways to make it share its rank.
    """
    parts = {piece for piece, kind in zip(spm.pieces, spm.kinds, strict=True) if kind == NORMAL}
    ranked = sorted(
        (i for i, kind in enumerate(spm.kinds) if kind == NORMAL and len(spm.pieces[i]) > 1),
        key=lambda i: -spm.scores[i],
    )
    return [
        (piece[:cut], piece[cut:])
        for piece in (spm.pieces[i] for i in ranked)
        for cut in range(1, len(piece))
        if piece[:cut] in parts and piece[cut:] in parts
    ]
