"""The fields of a request that say how to draw tokens: OpenAI's, and those that vLLM and LMDeploy add."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from hanlin.errors import problems
from hanlin.serve.errors import ApiError

__all__ = ["Body", "SamplingBody", "StreamOptions"]

# Each entry costs something at every token that is drawn.
_MOST_IDS = 1024


class Body(BaseModel):
    """Part of a request. Null means absent; what is not known is left alone, as servers of this API do."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Body):
    """What /v1/chat/completions and /v1/completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], Field(max_length=_MOST_IDS)] | None = None
    stop: str | list[str] | None = None
    user: Any = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=_MOST_IDS)] | None = None
    bad_words: Annotated[list[str], Field(max_length=64)] | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_decoding: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    logits_processors: Any = None
    prompt_embeds: Any = None
    allowed_token_ids: Any = None
    use_beam_search: bool | None = None
    truncate_prompt_tokens: Any = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None

    # Fields that would change the answer and cannot be honoured, with the reason; empty values are no request.
    refused: ClassVar[dict[str, str]] = {
        "logits_processors": "requests cannot bring code",
        "prompt_embeds": "requests cannot bring tensors",
        "allowed_token_ids": "use structured_outputs, or logit_bias",
        "use_beam_search": "replies are drawn, not searched for; use n, or best_of",
        "truncate_prompt_tokens": "prompts are never cut; shorten the prompt",
        "prompt_logprobs": "use /v1/completions with echo and logprobs, or /score",
        "include_stop_str_in_output": "stop texts are never part of the reply",
    }

    def check(self) -> None:
        """Raises:
        ApiError: fields that cannot be honoured, or that contradict each other.
        """
        found = [name for name in self.refused if getattr(self, name) not in (None, False, "", [], {})]
        if found:
            message = problems("not supported", [f"{name}: {self.refused[name]}" for name in found])
            raise ApiError(400, message, code="unsupported_parameter", param=found[0])

    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the request gives."""
        same = (
            *("n", "seed", "max_tokens", "temperature", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stop"),
            *("stop_token_ids", "bad_words", "skip_special_tokens"),
            *("response_format", "structured_outputs", "guided_decoding"),
            *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        )
        return {name: value for name in same if (value := getattr(self, name)) is not None}
