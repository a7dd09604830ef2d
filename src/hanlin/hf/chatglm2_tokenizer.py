"""ChatGLM2's, ChatGLM3's and GLM-4's tokenizers as Transformers classes, with the methods of the released files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import BatchEncoding, PreTrainedTokenizer

from hanlin.chat.chatglm2 import ChatGLM2Format
from hanlin.chat.chatglm3 import ChatGLM3Format
from hanlin.chat.glm4 import GLM4Format
from hanlin.chat.reply import json_text
from hanlin.chat.roles import Part
from hanlin.errors import ChatFormatError, RequestError, TokenizerError, problems
from hanlin.tokenizers import loading
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.tokenizers.glm import ROLES, GLM4Tokenizer
from hanlin.types import Message, Tool

__all__ = ["ChatGLM4Tokenizer", "ChatGLMTokenizer", "chat_format", "parts_of"]

Conversation = Sequence[Mapping[str, Any]]

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "observation": "tool", "tool": "tool"}


def chat_format(plain: BaseTokenizer) -> ChatGLM2Format | ChatGLM3Format | GLM4Format:
    """How the model of this tokenizer was trained to converse."""
    if plain.token_id(ROLES[1]) is None:
        return ChatGLM2Format(plain)
    return GLM4Format(plain) if isinstance(plain, GLM4Tokenizer) else ChatGLM3Format(plain)


def parts_of(form: ChatGLM3Format | GLM4Format, conversation: Conversation, tools: Any = None) -> list[Part]:
    """A conversation as the released code takes it: {"role", "content"[, "metadata", "tools"]}.

    Raises:
        ChatFormatError: naming every entry that is none.
    """
    found = [
        f"message {i} must have a role of {', '.join(_ROLES)}, and content that is text, not {str(turn)[:80]}"
        for i, turn in enumerate(conversation)
        if not isinstance(turn, Mapping)
        or turn.get("role") not in _ROLES
        or not isinstance(turn.get("content") or "", str)
        or not str(turn.get("metadata") or "").isprintable()
    ]
    if found:
        raise ChatFormatError(problems("the conversation", found))
    parts = form.parts([], [Tool.parse(tool) for tool in tools]) if tools else []
    for turn in conversation:
        content, given = str(turn.get("content") or ""), turn.get("tools")
        if given is not None and isinstance(form, GLM4Format):
            parts += form.parts([], [_tool(tool) for tool in given])
        elif given is not None:
            content = f"{content}\n{json_text(given, indent=4)}"
        if content or isinstance(form, ChatGLM3Format):
            parts.append(Part(_ROLES[turn["role"]], content, str(turn.get("metadata") or "")))
    return parts


def _tool(value: Any) -> Tool:
    python = isinstance(value, Mapping) and value.get("type") == "python"
    return Tool(name="python", kind="interpreter") if python else Tool.parse(value)


class ChatGLMTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """The released tokenizer of ChatGLM2 and ChatGLM3: `[gMASK] sop` before a text, padding on the left.

    Role tokens and masks in a text are read only with `encode_special_tokens=True`. The released `position_ids` are
    left out: the model counts them itself.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - as Transformers has it
    model_input_names = ("input_ids", "attention_mask")
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        encode_special_tokens: bool = False,
        roles: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            raise TokenizerError(f"{type(self).__name__} needs tokenizer.model, which the directory does not have")
        self.vocab_file, self.encode_special_tokens = vocab_file, encode_special_tokens
        self._plain = loading.load_glm(loading.Directory(Path(vocab_file).parent), roles=roles)
        roles = self._plain.token_id(ROLES[1]) is not None
        pieces = self._plain.table.pieces
        self._pieces = pieces[: 1 + max(i for i, piece in enumerate(pieces) if piece)]
        self._ids = {piece: i for i, piece in reversed(list(enumerate(self._pieces)))}
        # What later revisions register would be looked for in every text.
        for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
            kwargs.pop(name, None)
        named = {f"{role}_token": getattr(self._plain.specials, role) for role in ("eos", "unk", "pad")}
        super().__init__(
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            encode_special_tokens=encode_special_tokens,
            roles=roles,
            **{**kwargs, **{name: None if i is None else self._pieces[i] for name, i in named.items()}},
        )

    def make_hanlin(self) -> BaseTokenizer:
        """The same tokenizer for the chat formats."""
        return self._plain

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def get_command(self, token: str) -> int:
        """The id of a special token.

        Raises:
            RequestError: there is none of this name.
        """
        names = {"<eos>": self._plain.eos_id, "<bos>": self._plain.bos_id, "<pad>": self._plain.specials.pad}
        found = names.get(token, self._plain.token_id(token))
        if found is None or found not in self._plain.special_ids:
            raise RequestError(f"{token!r} is no special token of this tokenizer")
        return found

    def get_prefix_tokens(self) -> list[int]:
        """What stands before every prompt."""
        return list(self._plain.specials.prefix)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._pieces[i] for i in self._plain.encode(text, parse_special=self.encode_special_tokens)]

    def _convert_token_to_id(self, token: str) -> int | None:
        found = self._plain.token_id(token)
        return self._ids.get(token, self._plain.specials.unk) if found is None else found

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index] if 0 <= index < len(self._pieces) else ""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        ids = [self._convert_token_to_id(token) for token in tokens]
        return self._plain.decode([i for i in ids if i is not None], skip_special=False)

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        hidden = {i for i in vars(self._plain.specials).values() if isinstance(i, int)}  # these never print
        return self._plain.decode(
            [i for i in ids if i < len(self._pieces) and i not in hidden], skip_special=skip_special_tokens
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop A`, or `[gMASK] sop A B </s>` of a pair."""
        pair = [] if token_ids_1 is None else [*token_ids_1, cast(int, self._plain.eos_id)]
        return [*self._plain.specials.prefix, *token_ids_0, *pair]

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """A turn behind its role's token: its first line and its content, encoded apart."""
        encode = self._plain.encode
        return [self.get_command(f"<|{role}|>"), *encode(f"{metadata}\n"), *encode(message)]

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] | None = None) -> str:
        """ChatGLM2's rounds as text."""
        rounds = [*(history or ()), (query, "")]
        text = "".join(f"[Round {i}]\n\n问：{asked}\n\n答：{answer}\n\n" for i, (asked, answer) in enumerate(rounds, 1))
        return text.removesuffix("\n\n")

    def build_chat_input(self, query: str, history: Conversation | None = None, role: str = "user") -> BatchEncoding:
        """A conversation that the assistant is to go on with, as ids and mask (1, S)."""
        turns = [*(history or ()), {"role": role, "content": query}]
        made = self.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return cast(BatchEncoding, made)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: Any = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """The released template, without running it: as text, ids, or a batch of ids and masks. A template given
        here is run in Transformers' own way."""
        if chat_template is not None or documents:
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
                return_dict=return_dict,
                **kwargs,
            )
        many = bool(conversation) and not isinstance(conversation[0], Mapping)
        talks = conversation if many else [conversation]
        rendered = [self._render(talk, tools, add_generation_prompt) for talk in talks]
        if not tokenize:
            texts = [self._plain.decode(ids, skip_special=False) for ids in rendered]
            return texts if many else texts[0]
        rows = [ids[-max_length:] if truncation and max_length else ids for ids in rendered]
        if not return_dict and return_tensors is None:
            return rows if many else rows[0]
        rows = rows if many or return_tensors is not None else rows[0]  # type: ignore[assignment]
        made = self.pad({"input_ids": rows}, padding=padding, max_length=max_length, return_tensors=return_tensors)
        return made if return_dict else made["input_ids"]

    def _render(self, conversation: Conversation, tools: Any, prompted: bool) -> list[int]:
        form = chat_format(self._plain)
        if isinstance(form, ChatGLM2Format):
            turns = [Message.parse(turn) for turn in conversation]
            known = [Tool.parse(tool) for tool in tools or ()]
            return list(form.render(turns, known, generation_prompt=prompted).ids)
        parts = parts_of(form, conversation, tools)
        answered = bool(parts) and parts[-1].role == "assistant"
        ids = form.write(parts, generation_prompt=prompted or answered).rendered().ids
        return [*ids, self.get_command(ROLES[2])] if prompted and answered else list(ids)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model")
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class ChatGLM4Tokenizer(ChatGLMTokenizer):
    """The released tokenizer of GLM-4."""
