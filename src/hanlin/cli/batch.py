"""`hanlin batch`: a file of requests, answered into another."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hanlin.cli.loading import show_loading
from hanlin.errors import ConfigError

if TYPE_CHECKING:
    from hanlin.serve.batch import Plan
    from hanlin.serve.settings import ServeConfig

__all__ = ["batch"]


def batch(
    source: Annotated[
        Path | None, typer.Argument(metavar="INPUT.jsonl", help="A request a line, as OpenAI's batches have them.")
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="OUTPUT.jsonl", help="An answer a line. What it holds is not asked again.")
    ] = None,
    input_file: Annotated[Path | None, typer.Option("--input-file", "-i", help="The same as INPUT.")] = None,
    output_file: Annotated[Path | None, typer.Option("--output-file", "-o", help="The same as OUTPUT.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The default model if none is given.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Names that requests use for it; by default any name will do.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, int8, int4.")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="auto, bfloat16, int8, int4.")] = None,
    session_len: Annotated[
        int | None, typer.Option("--session-len", "--max-model-len", help="Tokens of one conversation.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option("--max-batch-size", "--max-num-seqs", help="Requests at once.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
) -> None:
    """Answer a file of requests (chat, completions, embeddings, responses).

    Ctrl-C stops; the same command then goes on where it stopped. Every line is answered exactly once.
    """
    source, target = source or input_file, target or output_file
    if source is None or target is None:
        raise ConfigError("give the file of requests and the file for the answers: hanlin batch in.jsonl out.jsonl")
    from hanlin.serve.batch import plan
    from hanlin.serve.settings import Limits, ModelSpec, ServeConfig

    job = plan(source, target)
    options = {
        "weights": weights,
        "kv_cache": kv_cache,
        "session_len": session_len,
        "max_batch_size": max_batch_size,
        "threads": threads,
    }
    own, *aliases = served_model_name or [""]
    spec = ModelSpec(
        source=model,
        name=own,
        aliases=tuple(aliases),
        options={name: value for name, value in options.items() if value is not None},
    )
    limits = Limits(queued_requests=10**6, queued_tokens=10**12, request_seconds=0)
    config = ServeConfig(models=(spec,), page=False, any_model_name=not served_model_name, limits=limits)
    failed = asyncio.run(_answer(config, job, max_batch_size)) if job.offsets else 0
    print(f"{job.answered + len(job.offsets)} answers in {target}", file=sys.stderr)
    if failed:
        print(f"{failed} of them are errors: see their 'error'", file=sys.stderr)
        raise typer.Exit(1)


async def _answer(config: ServeConfig, job: Plan, at_once: int) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hanlin.serve.app import create_app
    from hanlin.serve.batch import run

    app = create_app(config)
    with show_loading() as progress:
        await app.state.service.models.preload(progress)
    await app.state.service.start()
    columns = (TextColumn("Answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=job.answered + len(job.offsets), completed=job.answered)
            return await run(app, job, at_once=at_once * 2, told=lambda good: bar.advance(task))
    finally:
        await app.state.service.close()
