"""`hanlin serve`: the HTTP server, with the flags that people type for LMDeploy's and vLLM's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hanlin.cli.loading import show_loading
from hanlin.cli.serve_flags import (
    ListFlags,
    adapters_of,
    certificates_of,
    model_of,
    note_ignored,
    seconds_of,
    size_of,
    template_of,
    type_of,
)
from hanlin.errors import ConfigError, problems

if TYPE_CHECKING:
    from hanlin.serve.settings import ServeConfig

__all__ = ["serve"]

_WHERE, _WHO, _LIMITS = "Where to listen", "Who may come", "Limits"
_HOLD, _NONE = "How models are held (see also hanlin chat --help)", "Accepted for other servers' command lines"

Text = str | None
Whole = int | None


def serve(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[NAME=]MODEL]...",
            help="Directories, .gguf files, hub ids or names; the default model if none is given. The first is loaded "
            "at start, the others when they are asked for.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="A model; the same as the argument.")] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name", "--model-name", help="Names under which the one model, or the first, is asked for."
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "--lora-modules",
            metavar="NAME=PATH",
            help="LoRA adapters of the first model.",
        ),
    ] = None,
    adapter_directory: Annotated[Path | None, typer.Option(help="Whose folders requests may load as adapters.")] = None,
    host: Annotated[
        str,
        typer.Option("--host", "--server-name", help="Beyond loopback it needs a key.", rich_help_panel=_WHERE),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "--server-port", "-p", help="0 takes a free one.", rich_help_panel=_WHERE)
    ] = 8000,
    certificate: Annotated[Path | None, typer.Option("--ssl-certfile", help="For TLS.", rich_help_panel=_WHERE)] = None,
    private_key: Annotated[Path | None, typer.Option("--ssl-keyfile", help="For TLS.", rich_help_panel=_WHERE)] = None,
    tls: Annotated[
        bool, typer.Option("--ssl", help="TLS with SSL_CERTFILE and SSL_KEYFILE.", rich_help_panel=_WHERE)
    ] = False,
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            "--api-keys",
            help="KEY or NAME:KEY. Others on this machine can see a command line: better a file, or HANLIN_API_KEY.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="A line a key: [NAME:]KEY [requests/minute [tokens/minute]].", rich_help_panel=_WHO),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option(help="Names by which this server may be called.", rich_help_panel=_WHO)
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origins",
            "--allowed-origins",
            "--allow-origins",
            help="Pages that may call, like https://example.org.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    dtype: Annotated[Text, typer.Option(rich_help_panel=_HOLD)] = None,
    device: Annotated[Text, typer.Option(rich_help_panel=_HOLD)] = None,
    weights: Annotated[Text, typer.Option(help="auto, float32, bfloat16, int8, int4.", rich_help_panel=_HOLD)] = None,
    kv_cache: Annotated[
        Text, typer.Option("--kv-cache", "--kv-cache-dtype", help="auto, bfloat16, int8, int4.", rich_help_panel=_HOLD)
    ] = None,
    quant_policy: Annotated[Whole, typer.Option(help="LMDeploy's --kv-cache: 0, 8, 4.", rich_help_panel=_HOLD)] = None,
    session_len: Annotated[
        Whole,
        typer.Option("--session-len", "--max-model-len", help="Tokens of a conversation.", rich_help_panel=_HOLD),
    ] = None,
    max_batch_size: Annotated[
        Whole, typer.Option("--max-batch-size", "--max-num-seqs", help="Replies at once.", rich_help_panel=_HOLD)
    ] = None,
    max_prefill_token_num: Annotated[
        Whole,
        typer.Option("--max-prefill-token-num", "--max-num-batched-tokens", help="A step.", rich_help_panel=_HOLD),
    ] = None,
    cache_max_entry_count: Annotated[
        float | None, typer.Option(help="KV cache: a share of the free memory, or blocks.", rich_help_panel=_HOLD)
    ] = None,
    cache_size: Annotated[Text, typer.Option(help="KV cache: its size, like 2G.", rich_help_panel=_HOLD)] = None,
    cache_block_seq_len: Annotated[
        Whole, typer.Option("--cache-block-seq-len", "--block-size", help="Tokens of a block.", rich_help_panel=_HOLD)
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", rich_help_panel=_HOLD)
    ] = True,
    rope_scaling_factor: Annotated[float | None, typer.Option(rich_help_panel=_HOLD)] = None,
    chat_template: Annotated[
        Text, typer.Option(help="A format's name, or LMDeploy's file.json.", rich_help_panel=_HOLD)
    ] = None,
    system_prompt: Annotated[Text, typer.Option(help="For conversations without one.", rich_help_panel=_HOLD)] = None,
    model_format: Annotated[Text, typer.Option(rich_help_panel=_HOLD)] = None,
    draft_model: Annotated[Text, typer.Option(help="A small model to guess with.", rich_help_panel=_HOLD)] = None,
    threads: Annotated[Whole, typer.Option(help="Of the CPU.", rich_help_panel=_HOLD)] = None,
    tp: Annotated[Whole, typer.Option("--tp", "--tensor-parallel-size", rich_help_panel=_HOLD)] = None,
    memory_budget: Annotated[
        Text, typer.Option(help="What all loaded models may take, like 12G.", rich_help_panel=_HOLD)
    ] = None,
    keep_alive: Annotated[
        Text, typer.Option(help="How long an idle model stays loaded, like 5m; -1 is for ever.", rich_help_panel=_HOLD)
    ] = None,
    queued_requests: Annotated[
        Whole,
        typer.Option("--max-queued-requests", "--max-num-queued-reqs", help="Else 429.", rich_help_panel=_LIMITS),
    ] = None,
    queued_tokens: Annotated[
        Whole,
        typer.Option("--max-queued-tokens", "--max-num-queued-tokens", help="Else 429.", rich_help_panel=_LIMITS),
    ] = None,
    running: Annotated[
        Whole, typer.Option("--max-concurrent-requests", help="Replies of a model at once.", rich_help_panel=_LIMITS)
    ] = None,
    body_bytes: Annotated[Text, typer.Option("--max-body", help="Like 8M.", rich_help_panel=_LIMITS)] = None,
    max_prompt_tokens: Annotated[Whole, typer.Option(help="Of one prompt.", rich_help_panel=_LIMITS)] = None,
    max_reply_tokens: Annotated[Whole, typer.Option(help="Of one reply.", rich_help_panel=_LIMITS)] = None,
    completions: Annotated[
        Whole, typer.Option("--max-completions", help="Of one request: prompts times n.", rich_help_panel=_LIMITS)
    ] = None,
    top_logprobs: Annotated[
        Whole, typer.Option("--max-logprobs", help="Alternatives beside each token.", rich_help_panel=_LIMITS)
    ] = None,
    request_timeout: Annotated[Text, typer.Option(help="Of one request, like 10m.", rich_help_panel=_LIMITS)] = None,
    drain_timeout: Annotated[Text, typer.Option(help="Of running requests at exit.", rich_help_panel=_LIMITS)] = None,
    legacy_chatglm: Annotated[
        bool, typer.Option("--legacy-chatglm", help="ChatGLM-6B's and VisualGLM's own routes: POST /, /chat, ...")
    ] = False,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The chat page at /.")] = True,
    log_level: Annotated[Text, typer.Option(help="debug, info, warning, error.")] = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and replies to the log.")] = False,
    trace_endpoint: Annotated[
        Text, typer.Option("--otlp-traces-endpoint", help="Where OpenTelemetry spans go.")
    ] = None,
    quantization: Annotated[
        Text, typer.Option("--quantization", "-q", help="int8 or int4; the files tell the rest.", rich_help_panel=_NONE)
    ] = None,
    ignored: Annotated[
        list[str] | None,
        typer.Option(
            "--tool-call-parser",
            "--reasoning-parser",
            "--generation-config",
            "--load-format",
            "--tokenizer",
            "--tokenizer-mode",
            "--backend",
            "--gpu-memory-utilization",
            "--swap-space",
            "--cpu-offload-gb",
            "--seed",
            "--max-log-len",
            "--num-tokens-per-iter",
            "--max-prefill-iters",
            "--max-lora-rank",
            "--max-loras",
            "--uvicorn-log-level",
            "--distributed-executor-backend",
            "--guided-decoding-backend",
            "--structured-outputs-config",
            "--logprobs-mode",
            "--communicator",
            "--proxy-url",
            "--vision-max-batch-size",
            "--response-role",
            "--runner",
            "--task",
            "--convert",
            help="Of no effect: the model's files say it, or there is nothing to choose.",
            rich_help_panel=_NONE,
        ),
    ] = None,
    ignored_switches: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            "--enable-auto-tool-choice",
            "--enable-lora",
            "--enable-chunked-prefill",
            "--enforce-eager",
            "--eager-mode",
            "--disable-log-requests",
            "--disable-log-stats",
            "--enable-request-id-headers",
            "--enable-metrics",
            "--enable-prompt-tokens-details",
            "--enable-server-load-tracking",
            "--enable-abort-handling",
            "--allow-terminate-by-client",
            "--disable-fastapi-docs",
            "--disable-uvicorn-access-log",
            "--disable-frontend-multiprocessing",
            help="Of no effect: always so here, or never. No model's code is ever run.",
            rich_help_panel=_NONE,
        ),
    ] = False,
) -> None:
    """Serve models over HTTP: OpenAI's, Anthropic's and Ollama's APIs, and a chat page at /.

    Every option can stand in the environment: HANLIN_SERVE_PORT=9000 is --port 9000. HANLIN_API_KEY holds keys.
    """
    note_ignored(context)
    sources = [*(models or []), *(model or [])]
    if sources[:1] == ["api_server"]:  # as in `lmdeploy serve api_server MODEL`
        del sources[0]
    found: list[str] = []

    def read(parse: Callable[[str], Any], value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except ConfigError as error:
            found.append(str(error))
            return None

    if quantization in ("int8", "int4"):
        weights = weights or quantization
    template, system = read(template_of, chat_template) or (None, None)
    options = {
        "dtype": type_of(dtype),
        "device": device,
        "weights": weights,
        "kv_cache": kv_cache,
        "quant_policy": quant_policy,
        "session_len": session_len,
        "max_batch_size": max_batch_size,
        "max_prefill_token_num": max_prefill_token_num,
        "cache_max_entry_count": cache_max_entry_count,
        "cache_bytes": read(size_of, cache_size),
        "cache_block_seq_len": cache_block_seq_len,
        "enable_prefix_caching": prefix_caching,
        "rope_scaling_factor": rope_scaling_factor,
        "chat_template": template,
        "system_prompt": system_prompt if system_prompt is not None else system,
        "model_format": model_format,
        "draft_model": draft_model,
        "threads": threads,
        "tp": tp,
    }
    limits = {
        "queued_requests": queued_requests,
        "queued_tokens": queued_tokens,
        "running": running,
        "body_bytes": read(size_of, body_bytes),
        "prompt_tokens": max_prompt_tokens,
        "max_tokens": max_reply_tokens,
        "completions": completions,
        "top_logprobs": top_logprobs,
        "request_seconds": read(seconds_of, request_timeout),
        "drain_seconds": read(seconds_of, drain_timeout),
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    adapter_paths = read(adapters_of, "\n".join(adapters or [])) or {}
    budget, alive = read(size_of, memory_budget), read(seconds_of, keep_alive)
    if tls:
        try:
            certificate, private_key = certificates_of(certificate, private_key, os.environ)
        except ConfigError as error:
            found.append(str(error))
    if found:
        raise ConfigError(problems("options", found))
    from hanlin.options import EngineConfig
    from hanlin.serve.keys import KeyRing
    from hanlin.serve.settings import Limits, ServeConfig

    EngineConfig().override(**chosen)  # what is wrong is better said before anything is fetched
    specs = [model_of(source, chosen) for source in sources or [""]]
    specs[0] = model_of(sources[0] if sources else "", chosen, names or [], adapter_paths)
    config = ServeConfig(
        models=tuple(specs),
        host=host,
        port=port,
        keys=KeyRing.read(given=api_keys or (), file=api_key_file, environment=os.environ),
        allowed_hosts=tuple(allowed_hosts or ()),
        cors_origins=tuple(cors_origins or ()),
        certificate=certificate,
        private_key=private_key,
        memory_budget=budget,
        keep_alive=None if alive is None or alive < 0 else alive,
        adapter_directory=adapter_directory,
        legacy_chatglm=legacy_chatglm,
        page=page,
        log_format=log_format,
        log_prompts=log_prompts,
        trace_endpoint=trace_endpoint,
        limits=Limits(**{key: value for key, value in limits.items() if value is not None}),
    )
    raise typer.Exit(_run(config, (log_level or "info").upper()))


# Flags after which several words may follow, as argparse has them in LMDeploy and vLLM.
serve.command_class = ListFlags  # type: ignore[attr-defined]


def _run(config: ServeConfig, level: str) -> int:
    from hanlin.serve.logs import set_up
    from hanlin.serve.run import serve as run

    set_up(config, level)

    def ready(url: str) -> None:
        models = ", ".join(
            dict.fromkeys(name for spec in config.models for name in (spec.name, *spec.adapters) if name)
        )
        what = f"  {models}" if models else ""
        print(f"Hanlin serves at {url}{what}\n  OpenAI API: {url}/v1    chat: {url}/    Ctrl-C ends.", file=sys.stderr)

    with show_loading() as progress:
        return run(config, ready=ready, progress=progress)
