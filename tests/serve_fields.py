"""Every field of OpenAI's requests: an example, and what it does here. `docs/serve_fields.md` is made of this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from hanlin.serve.schemas.chat import ChatBody
from hanlin.serve.schemas.completions import CompletionBody
from hanlin.serve.schemas.embeddings import EmbeddingBody
from hanlin.serve.schemas.responses import ResponseBody

__all__ = ["ROUTES", "Field", "table"]

MESSAGES = [{"role": "user", "content": "Hello"}]
FUNCTION = {"name": "look", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


@dataclass(frozen=True)
class Field:
    """
    Attributes:
        kind: "works"; "idle": taken, the reply is the same as without; "refused": 400 for the example.
        needs: other fields that the example goes with.
    """

    example: Any
    kind: Literal["works", "idle", "refused"] = "works"
    note: str = ""
    needs: tuple[tuple[str, Any], ...] = ()


def idle(example: Any, note: str = "") -> Field:
    return Field(example, "idle", note)


def refused(example: Any, note: str) -> Field:
    return Field(example, "refused", note)


SAMPLING = {
    "model": Field("tiny", note="a name that `/v1/models` lists; none or empty is the first"),
    "stream": Field(True),
    "stream_options": Field(
        {"include_usage": True}, note="`include_usage`, `continuous_usage_stats`", needs=(("stream", True),)
    ),
    "n": Field(1),
    "seed": Field(3, note="one is drawn, and reported in the choice, when none is given"),
    "max_tokens": Field(2, note="none: until the context is full; 16 for `/v1/completions`"),
    "temperature": Field(0.5, note="none of the sampling fields given: the model's own recommendation"),
    "top_p": Field(0.5),
    "presence_penalty": Field(0.5),
    "frequency_penalty": Field(0.5),
    "logit_bias": Field({"1000": 100}, note="at most 1024 ids"),
    "stop": Field(["a", "b"], note="a text or a list; the text that ended the reply is in `stop_reason`"),
    "user": idle("me"),
    "top_k": Field(5),
    "min_p": Field(0.1),
    "repetition_penalty": Field(1.2),
    "min_tokens": Field(1),
    "ignore_eos": Field(True),
    "stop_token_ids": Field([1000]),
    "bad_words": Field(["no"]),
    "skip_special_tokens": Field(False),
    "cache_salt": idle("salt", "keeps cached prefixes apart from those of other salts, beyond those of other keys"),
    "return_token_ids": Field(True),
    "response_format": Field({"type": "json_object"}, note="`json_object`, `json_schema`, `regex_schema`"),
    "structured_outputs": Field({"choice": ["a"]}, note="`json`, `json_object`, `regex`, `choice`, `grammar`"),
    "guided_decoding": Field({"choice": ["a"]}),
    "guided_json": Field({"type": "integer"}),
    "guided_regex": Field("[0-9]{2}"),
    "guided_choice": Field(["a"]),
    "guided_grammar": Field('start: "a"'),
    "logits_processors": refused(["x"], "requests bring no code"),
    "prompt_embeds": refused("gAR9lC4=", "requests bring no tensors"),
    "allowed_token_ids": refused([1], "use `structured_outputs` or `logit_bias`"),
    "use_beam_search": refused(True, "use `n` or `best_of`"),
    "truncate_prompt_tokens": refused(5, "prompts are never cut"),
    "prompt_logprobs": refused(1, "use `/v1/completions` with `echo` and `logprobs`, or `/score`"),
    "include_stop_str_in_output": refused(True, "stop texts are never shown"),
}
CHAT = {
    **SAMPLING,
    "n": Field(2),
    "messages": Field(
        MESSAGES, note="text parts; roles system, developer, user, assistant, tool, function; calls and results"
    ),
    "max_completion_tokens": Field(2, note="goes before `max_tokens`"),
    "logprobs": Field(True),
    "top_logprobs": Field(2, needs=(("logprobs", True),)),
    "tools": Field(
        [TOOL], note='functions, and `{"type": "code_interpreter"}`, whose calls come as a function of `code`'
    ),
    "tool_choice": Field("none", note="auto, none, required, by name, `allowed_tools`", needs=(("tools", [TOOL]),)),
    "parallel_tool_calls": Field(False, needs=(("tools", [TOOL]),)),
    "functions": Field([FUNCTION], note="the older word for tools"),
    "function_call": Field("auto", needs=(("functions", [FUNCTION]),)),
    "add_generation_prompt": Field(False),
    "continue_final_message": Field(
        True,
        note="a last message of the assistant is continued unless this is false",
        needs=(("messages", [*MESSAGES, {"role": "assistant", "content": "Well"}]),),
    ),
    "metadata": idle({"a": "b"}),
    "store": idle(True),
    "service_tier": idle("auto"),
    "safety_identifier": idle("me"),
    "prompt_cache_key": idle("x"),
    "prompt_cache_retention": idle("24h"),
    "verbosity": idle("low"),
    "reasoning_effort": idle("low"),
    "chat_template_kwargs": idle({"enable_thinking": False}),
    "modalities": idle(["text"], "anything but text is refused"),
    "audio": refused({"voice": "alloy", "format": "wav"}, "text only"),
    "prediction": refused({"type": "content", "content": "x"}, "guessing ahead needs no help"),
    "web_search_options": refused({"search_context_size": "low"}, "give a function for it"),
    "chat_template": refused("{{ 1 }}", "requests bring no templates"),
    "documents": refused([{"text": "x"}], "put them into a message"),
    "echo": refused(True, "the reply never repeats the messages"),
}
COMPLETIONS = {
    **SAMPLING,
    "prompt": Field("Hello", note="a text, ids, or a list of either"),
    "echo": Field(True, note="with `logprobs`, the prompt's tokens are scored; `max_tokens` may be 0"),
    "logprobs": Field(2),
    "best_of": Field(2, note="by the mean log-probability; not streamed"),
    "suffix": refused("x", "works with models that can fill a gap: code models' `fim` tokens, ChatGLM-6B's `[MASK]`"),
}
EMBEDDINGS = {
    "model": Field("tiny"),
    "input": Field("Hello", note="a text, ids, or a list of either"),
    "encoding_format": Field("base64"),
    "dimensions": refused(5, "vectors cannot be shortened; the model's own size is taken"),
    "pooling": Field("last", note="`mean` or `last`; this server's own field"),
    "normalize": Field(False, note="to length 1; this server's own field"),
    "user": idle("me"),
}
RESPONSES = {
    **SAMPLING,
    "input": Field("Hello", note="a text, or messages, calls and results of calls"),
    "instructions": Field("Be brief"),
    "max_output_tokens": Field(2),
    "previous_response_id": refused("resp_x", "works with one that is kept: in memory, 512 for each key"),
    "store": Field(False),
    "background": Field(True, note="not streamed"),
    "tools": Field([{"type": "function", **FUNCTION}], note="as in chat; this server runs none itself"),
    "tool_choice": Field("none"),
    "parallel_tool_calls": Field(False),
    "text": Field({"format": {"type": "json_object"}}),
    "top_logprobs": Field(2),
    "include": Field(["message.output_text.logprobs"]),
    "truncation": refused("auto", "input is never cut"),
    "conversation": refused("conv_x", "use `previous_response_id`"),
    "prompt": refused({"id": "x"}, "there are no stored prompts"),
    "metadata": Field({"a": "b"}, note="given back"),
    "reasoning": idle({"effort": "low"}),
    "service_tier": idle("auto"),
    "safety_identifier": idle("me"),
    "prompt_cache_key": idle("x"),
    "max_tool_calls": idle(3),
}

# Route, its schema, its fields, and the least body.
ROUTES: tuple[tuple[str, type[BaseModel], dict[str, Field], dict[str, Any]], ...] = (
    ("/v1/chat/completions", ChatBody, CHAT, {"messages": MESSAGES, "max_tokens": 3, "seed": 1}),
    ("/v1/completions", CompletionBody, COMPLETIONS, {"prompt": "Hello", "max_tokens": 3, "seed": 1}),
    ("/v1/embeddings", EmbeddingBody, EMBEDDINGS, {"input": "Hello"}),
    ("/v1/responses", ResponseBody, RESPONSES, {"input": "Hello", "max_output_tokens": 3, "seed": 1}),
)

_WORDS = {"works": "works", "idle": "taken, without effect on the reply", "refused": "refused (400)"}


def table() -> str:
    """`docs/serve_fields.md`."""
    lines = [
        "# Fields of OpenAI's requests",
        "",
        "Made by `python scripts/serve_fields.py` from what the tests ask for, field by field. Fields that are not",
        "listed are ignored.",
    ]
    for route, _, fields, _ in ROUTES:
        lines += ["", f"## `{route}`", "", "| field | here | note |", "|---|---|---|"]
        lines += [f"| `{name}` | {_WORDS[field.kind]} | {field.note} |" for name, field in fields.items()]
    return "\n".join(lines) + "\n"
