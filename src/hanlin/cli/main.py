"""The command line: a table from verb to function, of which only the called one is imported.

`hanlin --help` shows the table and imports no verb at all, so it answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from hanlin.errors import HanlinError

__all__ = ["VERBS", "Verb", "main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells count
PIPE_CLOSED = 141  # 128 + SIGPIPE


@dataclass(frozen=True)
class Verb:
    """A verb: `target` is "module:name" of a function, or of a `typer.Typer` with verbs of its own."""

    target: str
    help: str
    panel: str = "Models"

    def load(self) -> Any:
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


VERBS: Mapping[str, Verb] = MappingProxyType(
    {
        "chat": Verb("hanlin.cli.chat:chat", "Chat with a model, or ask it one thing.", "Use a model"),
        "run": Verb("hanlin.cli.chat:chat", "The same as chat.", "Use a model"),
        "serve": Verb("hanlin.cli.serve:serve", "Serve models over HTTP.", "Use a model"),
        "ps": Verb("hanlin.cli.remote:ps", "List the models that a server has in memory.", "Use a model"),
        "stop": Verb("hanlin.cli.remote:stop", "Have a server unload a model.", "Use a model"),
        "batch": Verb("hanlin.cli.batch:batch", "Answer a file of requests.", "Use a model"),
        "list": Verb("hanlin.cli.models:list_models", "List the models on this disk."),
        "show": Verb("hanlin.cli.models:show", "Show what a model is: family, size, context, licence."),
        "pull": Verb("hanlin.cli.models:pull", "Fetch a model, or the default one."),
        "rm": Verb("hanlin.cli.models:rm", "Delete a fetched model."),
        "convert": Verb("hanlin.cli.convert:convert", "Write a model in another layout."),
        "quantize": Verb("hanlin.cli.quantize:quantize", "Write a model with 4 or 8 bits: AWQ, GPTQ, rounding."),
        "lite": Verb("hanlin.cli.quantize:lite", "The same in LMDeploy's words: auto_awq, auto_gptq."),
        "bench": Verb("hanlin.cli.bench:bench", "Measure how fast a model runs, and other engines.", "This machine"),
        "doctor": Verb("hanlin.cli.doctor:doctor", "Check this machine and installation.", "This machine"),
    }
)


class _Frame(TyperGroup):
    """Every way out of a verb that is not its plain end, in one place."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HanlinError as error:
            if _debugging():
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            raise typer.Exit(PIPE_CLOSED) from error


def _debugging() -> bool:
    return os.environ.get("HANLIN_DEBUG", "") not in ("", "0")


def _version(asked: bool) -> None:
    if asked:
        from hanlin import __version__

        print(f"hanlin {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Run, inspect and fetch InternLM, ChatGLM and related chat models."""


def _not_loaded() -> None:
    """Stands for a verb that was not called."""


def _app(called: str | None) -> typer.Typer:
    app = typer.Typer(
        cls=_Frame,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="hanlin VERB --help explains a verb. HANLIN_HOME says where models are kept.",
    )
    app.callback()(_root)
    for name, verb in VERBS.items():
        target = verb.load() if name == called else _not_loaded
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=verb.help, rich_help_panel=verb.panel)
        else:
            help_text = verb.help if target is _not_loaded else None
            kind = getattr(target, "command_class", TyperCommand)
            settings = {"auto_envvar_prefix": f"HANLIN_{name.upper()}"} if kind is not TyperCommand else None
            app.command(name, cls=kind, context_settings=settings, help=help_text, rich_help_panel=verb.panel)(target)
    return app


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 used wrongly, 130 interrupted by Ctrl-C.

    With HANLIN_DEBUG=1, an error shows its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    called = next((word for word in given if not word.startswith("-")), None)
    status: int | str | None = 0
    try:
        _app(called)(args=given, prog_name="hanlin")
    except SystemExit as leaving:
        status = leaving.code
    except KeyboardInterrupt:
        status = INTERRUPTED
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = PIPE_CLOSED
    if status == PIPE_CLOSED:
        # The interpreter flushes once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
