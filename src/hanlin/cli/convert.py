"""`hanlin convert`: a model directory in another layout, written whole or not at all."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hanlin import hub
from hanlin.errors import ConfigError

__all__ = ["convert"]


class Format(str, Enum):
    hf = "hf"
    llama = "llama"
    internlm2 = "internlm2"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model directory, or a name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A directory that is not there yet.")],
    to: Annotated[Format, typer.Option("--to", help="The layout; hf keeps the family and writes safetensors.")],
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", min=1, help="Keep so many rows of embedding and head.")
    ] = None,
) -> None:
    """Write a model in another layout: InternLM2 as Llama, Llama as InternLM2, exactly. Read again and compared."""
    location = hub.resolve(source)
    from hanlin.checkpoints.convert import convert as write
    from hanlin.cli.loading import show_loading
    from hanlin.tokenizers import load_tokenizer

    if location.path.is_dir() and vocab_size is not None:
        known = load_tokenizer(location.path).vocab_size
        if vocab_size < known:
            raise ConfigError(f"--vocab-size {vocab_size}: the tokenizer of {location.id} has {known} tokens")
    with show_loading() as progress:
        write(location.path, target, to=to.value, vocab_size=vocab_size, progress=progress)
    print(f"Wrote {target}; every tensor and the logits of a probe prompt are as in {location.id}.", file=sys.stderr)
    print(target)
