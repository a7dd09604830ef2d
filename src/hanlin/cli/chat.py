"""`hanlin chat`: one question from the command line or a pipe, or a conversation at the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hanlin import images
from hanlin.cli.conversation import Conversation
from hanlin.cli.inputs import document, is_terminal, joined, meant, sound
from hanlin.cli.judged import Judged
from hanlin.cli.loading import load
from hanlin.cli.render import PlainView, SilentView, View, visible
from hanlin.cli.session import Model, Session
from hanlin.cli.stats import Stats
from hanlin.errors import RequestError
from hanlin.types import BestOf, SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["chat"]

_SAMPLING = "How replies are sampled (by default as the model recommends)"
_LOADING = "How the model is held"


def chat(
    first: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A directory, a .gguf file, a hub id, or a name.", show_default=False),
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="A question. A chat begins without one.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="MODEL, where it could be mistaken for a prompt.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system prompt.")] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="An image to ask about, with a model that sees.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the most probable token.", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep this share of the probability.", rich_help_panel=_SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep so many tokens; 0 keeps all.", rich_help_panel=_SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop what is less probable than this share of the best.", rich_help_panel=_SAMPLING),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, what was said is less likely said again.", rich_help_panel=_SAMPLING)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The longest reply, in tokens.", rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same reply.", rich_help_panel=_SAMPLING)] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the reply before this text. May be repeated.", rich_help_panel=_SAMPLING),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_LOADING)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel=_LOADING)] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16, int8 or int4; on a CPU.", rich_help_panel=_LOADING),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16, int8 or int4; on a CPU.", rich_help_panel=_LOADING),
    ] = None,
    session_len: Annotated[
        int | None, typer.Option(help="The longest conversation, in tokens.", rich_help_panel=_LOADING)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A LoRA adapter to merge into the weights.", rich_help_panel=_LOADING),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_LOADING)] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A chat format by name, instead of the model's.", rich_help_panel=_LOADING)
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many replies and show the one that --reward prefers.", show_default=False),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The reward model for --best-of, 10 if unsaid.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and memory after each reply.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reply to PROMPT as JSON.")] = False,
    no_markdown: Annotated[bool, typer.Option("--no-markdown", help="Print replies as they are.")] = False,
) -> None:
    """Chat with a model, or ask it one thing.

    hanlin chat "Why is the sky blue?"
    hanlin chat internlm2_5-1_8b-chat
    cat notes.txt | hanlin chat "Summarise this:"
    hanlin chat visualglm-6b --image photo.jpg "What is this?"
    """
    name, prompt = meant(model, first, second)
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
        "stop": stop or None,
    }
    sampling = _checked({key: value for key, value in given.items() if value is not None})
    if best_of is not None and reward is None:
        raise typer.BadParameter("--best-of needs --reward, the model that judges")
    asked = joined(prompt, document(beside=prompt))
    if asked is None and prompt is not None:
        raise typer.BadParameter("PROMPT is empty")
    if asked is None and (as_json or not is_terminal(sys.stdin) or not is_terminal(sys.stdout)):
        raise typer.BadParameter("there is no PROMPT, and a chat without one needs a terminal, and no --json")
    for text in (asked, system):
        sound(text)
    shown = images.read(image) if image is not None else None
    held = {
        "dtype": dtype,
        "device": device,
        "weights": weights,
        "kv_cache": kv_cache,
        "session_len": session_len,
        "adapter": adapter,
        "threads": threads,
        "chat_template": chat_template,
    }
    options = {key: value for key, value in held.items() if value is not None}
    with contextlib.ExitStack() as models:
        writer = models.enter_context(load(name, options, guessed=model is None and name is not None))
        llm: Model = writer
        if reward is not None:
            of_writer = ("adapter", "chat_template", "session_len")
            judge = load(reward, {k: v for k, v in options.items() if k not in of_writer}, guessed=False)
            llm = Judged(writer, models.enter_context(judge), best_of or 10)
        talk = Conversation(system=system, sampling=llm.default_sampling.override(**sampling))
        if asked is None:
            _converse(llm, talk, shown, markdown=not no_markdown, stats=stats)
        elif as_json:
            _print_json(llm, talk, asked, shown)
        else:
            _print_reply(llm, talk, asked, shown, markdown=not no_markdown, stats=stats)


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """Complain before a model is loaded."""
    try:
        SamplingParams(**given)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
    return given


def _converse(llm: Model, talk: Conversation, shown: bytes | None, *, markdown: bool, stats: bool) -> None:
    from hanlin import __version__
    from hanlin.cli.commands import Shell
    from hanlin.cli.repl import Repl, history_path

    console = _console()

    def say(text: str) -> None:
        console.print(visible(text), style="notice", markup=False, highlight=False)

    def done() -> None:
        if stats and session.last is not None:
            say(Stats.of(session.last, llm.stats()).line())

    session = _session(shown, model=llm, conversation=talk, view=lambda: _view(console, markdown), notice=say)
    say(f"Hanlin {__version__} · {llm.name} ({llm.chat_format.name}, {llm.context_length} tokens)")
    say("/help lists the commands, Ctrl+D leaves.")
    if stats:
        say(f"loaded in {llm.stats()['load_seconds']:.2f} s")
    Repl(Shell(session=session, default=talk.sampling, say=say), console, done, history_path()).run()


def _session(shown: bytes | None, **of: Any) -> Session:
    session = Session(**of)
    if shown is not None:
        session.show(shown)
    return session


def _print_reply(
    llm: Model, talk: Conversation, prompt: str, shown: bytes | None, *, markdown: bool, stats: bool
) -> None:
    console = _console()
    session = _session(shown, model=llm, conversation=talk, view=lambda: _view(console, markdown), notice=_aside)
    reply = session.ask(prompt)
    if stats:
        _aside(Stats.of(reply, llm.stats()).text())
    if reply.stopped:
        raise KeyboardInterrupt


def _print_json(llm: Model, talk: Conversation, prompt: str, shown: bytes | None) -> None:
    reply = _session(shown, model=llm, conversation=talk, view=SilentView, notice=_aside).ask(prompt)
    done = reply.completion
    answer: dict[str, Any] = {
        "model": llm.name,
        "text": reply.text,
        "finish_reason": done.finish_reason if done else "abort",
        "stop": done.stop if done else None,
        "seed": done.seed if done else talk.sampling.seed,
        "tool_calls": [asdict(call) for call in done.tool_calls] if done else [],
        "stats": asdict(Stats.of(reply, llm.stats())),
    }
    if isinstance(done, BestOf):
        answer |= {"score": done.score, "scores": done.scores, "candidates": [c.text for c in done.candidates]}
    print(json.dumps(answer, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8", indent=2))
    if done is None:
        raise KeyboardInterrupt


def _aside(text: str) -> None:
    print(visible(text), file=sys.stderr)


def _console() -> Console:
    from rich.console import Console

    from hanlin.cli.markdown import THEME

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # question marks where the terminal knows no Unicode
    return Console(theme=THEME, highlight=False)


def _view(console: Console, markdown: bool) -> View:
    terminal = is_terminal(sys.stdout)  # Rich believes environment variables; a pipe stays a pipe
    if markdown and terminal and not console.is_dumb_terminal and not console.legacy_windows:
        from hanlin.cli.live import MarkdownView

        return MarkdownView(console)
    return PlainView(sys.stdout, clean=terminal)
