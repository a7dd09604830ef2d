"""LMDeploy's Python interface: `pipeline`, `GenerationConfig`, `Response`, and its names for the engine's options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from hanlin.errors import ConfigError, problems
from hanlin.llm import LLM, load
from hanlin.options import EngineConfig
from hanlin.types import Completion, Constraint, SamplingParams

__all__ = [
    "ChatTemplateConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "TurbomindEngineConfig",
    "pipeline",
]

TurbomindEngineConfig = EngineConfig
PytorchEngineConfig = EngineConfig


@dataclass(kw_only=True)
class GenerationConfig:
    """How to choose tokens, under LMDeploy's names and with its defaults; `do_sample=False` is greedy.

    Raises:
        ConfigError: for what is asked for and not done here (processors, raw logits).
    """

    n: int = 1
    max_new_tokens: int = 512
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: list[str] | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    logits_processors: list[Any] | None = None
    output_logits: str | None = None
    output_last_hidden_state: str | None = None
    return_ppl: bool = False

    def __post_init__(self) -> None:
        missing = ("logits_processors", "output_logits", "output_last_hidden_state", "return_ppl")
        found = [f"{name} = {getattr(self, name)!r} is not supported" for name in missing if getattr(self, name)]
        if found:
            raise ConfigError(problems("GenerationConfig", found))

    def sampling(self) -> SamplingParams:
        """The same as `SamplingParams`.

        Raises:
            RequestError: naming every impossible value.
        """
        return SamplingParams(
            n=self.n,
            max_tokens=self.max_new_tokens,
            min_tokens=self.min_new_tokens or 0,
            temperature=self.temperature if self.do_sample else 0.0,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            ignore_eos=self.ignore_eos,
            seed=self.random_seed,
            stop=tuple(self.stop_words or ()),
            bad_words=tuple(self.bad_words or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=dict.fromkeys(self.bad_token_ids or (), -1e6),
            logprobs=self.logprobs,
            skip_special_tokens=self.skip_special_tokens,
            constraint=Constraint.parse(self.response_format),
        )


@dataclass(frozen=True, kw_only=True)
class ChatTemplateConfig:
    """Which chat format to use, and its system prompt; `meta_instruction` is LMDeploy's word for the latter."""

    model_name: str | None = None
    system: str | None = None
    meta_instruction: str | None = None


@dataclass(frozen=True, kw_only=True)
class Response:
    """A reply, or in a stream a piece of one. `logprobs` has for each token {id: log-probability}."""

    text: str
    generate_token_len: int
    input_token_len: int
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    index: int = 0

    @property
    def session_id(self) -> int:
        """An older name of `index`."""
        return self.index


class Pipeline:
    """Call it with a string, a list of strings, OpenAI messages, or a list of those."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def __call__(
        self,
        prompts: Any,
        gen_config: GenerationConfig | list[GenerationConfig] | None = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Any:
        """One Response for one prompt, a list for a list. Without `do_preprocess`, strings are prompts as they are.

        Raises:
            RequestError: prompts or values that cannot be.
        """
        many, items = _items(prompts)
        configs = self._configs(gen_config, len(items))
        if len({id(c) for c in configs}) == 1:
            completions = self._run(items, configs[0].sampling(), do_preprocess, adapter_name)
        else:
            completions = [
                out
                for item, c in zip(items, configs, strict=True)
                for out in self._run([item], c.sampling(), do_preprocess, adapter_name)
            ]
        responses = [_response(completion, index) for index, completion in enumerate(completions)]
        return responses if many or len(responses) > 1 else responses[0]

    def stream_infer(
        self,
        prompts: Any,
        gen_config: GenerationConfig | None = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Iterator[Response]:
        """Pieces of the replies as they come; `index` tells which prompt a piece belongs to."""
        _, items = _items(prompts)
        sampling = self._configs(gen_config, len(items))[0].sampling()
        for index, item in enumerate(items):
            count = 0
            source = {"messages": item} if do_preprocess else {"prompt": item}
            for delta in self.llm.stream(sampling=sampling, adapter=adapter_name, **source):
                count += len(delta.ids)
                done = delta.done
                yield Response(
                    text=delta.text,
                    generate_token_len=count,
                    input_token_len=done.usage.prompt_tokens if done else 0,
                    finish_reason=done.finish_reason if done else None,
                    token_ids=list(delta.ids),
                    index=index,
                )

    def get_ppl(self, input_ids: Any) -> list[float]:
        """Mean negative log-probability of each prompt's tokens (LMDeploy's meaning of the name)."""
        scores = self.llm.score(input_ids)
        return [-s.total / max(1, len(s.ids) - 1) for s in scores]

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self.llm.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, items: list[Any], sampling: SamplingParams, do_preprocess: bool, adapter: str | None
    ) -> list[Completion]:
        if not do_preprocess:
            return self.llm.generate(items, sampling, adapter=adapter)
        conversations = [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in items]
        out: list[Completion] = self.llm.chat(conversations, sampling, adapter=adapter)
        return out

    @staticmethod
    def _configs(given: Any, count: int) -> list[GenerationConfig]:
        if not isinstance(given, list):
            return [given or GenerationConfig()] * count
        if len(given) != count:
            raise ConfigError(f"{count} prompts need as many generation configs, not {len(given)}")
        return given


def pipeline(
    model_path: str | os.PathLike[str] | None = None,
    backend_config: EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | str | None = None,
    log_level: str = "WARNING",
    **options: Any,
) -> Pipeline:
    """LMDeploy's entry point: load a model and return something to call.

    `log_level` is accepted and not needed: Hanlin's library code logs nothing.
    """
    template = (
        ChatTemplateConfig(model_name=chat_template_config)
        if isinstance(chat_template_config, str)
        else chat_template_config or ChatTemplateConfig()
    )
    system = template.system if template.system is not None else template.meta_instruction
    if template.model_name is not None:
        options.setdefault("chat_template", template.model_name)
    if system is not None:
        options.setdefault("system_prompt", system)
    return Pipeline(load(model_path, config=backend_config, **options))


def _items(prompts: Any) -> tuple[bool, list[Any]]:
    """(whether a list was given, the prompts)."""
    if isinstance(prompts, str) or (isinstance(prompts, list) and prompts and isinstance(prompts[0], dict)):
        return False, [prompts]
    return True, list(prompts)


def _response(completion: Completion, index: int) -> Response:
    logprobs = None
    if completion.logprobs is not None:
        logprobs = [{token.id: token.logprob for token in (*t.top, t)} for t in completion.logprobs]
    return Response(
        text=completion.text,
        generate_token_len=completion.usage.generated_tokens,
        input_token_len=completion.usage.prompt_tokens,
        finish_reason=completion.finish_reason,
        token_ids=list(completion.ids),
        logprobs=logprobs,
        index=index,
    )
