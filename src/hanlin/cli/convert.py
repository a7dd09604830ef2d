"""`hanlin convert`: a model in another layout or file format, written whole or not at all."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from hanlin import hub
from hanlin.errors import ConfigError

__all__ = ["convert"]


class Format(str, Enum):
    hf = "hf"
    llama = "llama"
    internlm2 = "internlm2"
    gguf = "gguf"
    internevo = "internevo"
    hanlin = "hanlin"


class Weights(str, Enum):
    auto = "auto"
    int8 = "int8"
    int4 = "int4"
    bfloat16 = "bfloat16"


class Outtype(str, Enum):
    auto = "auto"
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"
    q4_1 = "q4_1"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model directory, a .gguf file, or a name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A directory or file that is not there yet.")],
    to: Annotated[Format, typer.Option("--to", help="The layout; hf keeps the family and writes safetensors.")],
    outtype: Annotated[
        Outtype,
        typer.Option("--outtype", help="What matrices are stored in; auto: as they are, and float32 out of blocks."),
    ] = Outtype.auto,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", min=1, help="Keep so many rows of embedding and head.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.model, or a directory with one, where SRC has none.")
    ] = None,
    weights: Annotated[
        Weights, typer.Option("--weights", help="hanlin: what matrices are packed as; auto: as they are quantised.")
    ] = Weights.auto,
    tp: Annotated[int, typer.Option("--tp", min=1, help="internevo: ranks that share a layer.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="internevo: stages of the pipeline.")] = 1,
    adapt_hf: Annotated[
        bool, typer.Option("--adapt-hf/--no-adapt-hf", help="internevo: rotary pairs in halves, or side by side.")
    ] = True,
) -> None:
    """Write a model in another layout or as a GGUF file. Read again and compared before it counts.

    Interrupted, the same command goes on where it stopped.
    """
    location = hub.resolve(source)
    from hanlin.checkpoints.convert import convert as write
    from hanlin.cli.loading import show_loading

    path, directory = location.path, location.path.is_dir()
    if to is Format.hanlin:
        from hanlin.packing import pack_model

        with show_loading() as progress:
            pack_model(path, target, weights=weights.value, progress=progress)
        print(f"Wrote {target}; it starts at once: hanlin chat {target}", file=sys.stderr)
        print(target)
        return
    if weights is not Weights.auto:
        raise ConfigError(f"--weights is for --to hanlin, not for --to {to.value}")
    wanted: dict[str, Any] = {"to": to.value, "outtype": outtype.value, "vocab_size": vocab_size}
    wanted |= {"lent": tokenizer, "tp": tp, "pp": pp, "adapt_hf": adapt_hf}
    if directory and (vocab_size is not None or to is Format.gguf):
        wanted |= _of_directory(path, location.id, to, vocab_size)
    elif not directory:
        wanted |= _of_gguf(path, vocab_size)
    with show_loading() as progress:
        write(path, target, progress=progress, **wanted)
    print(f"Wrote {target}; {_said(to, outtype, directory)} {location.id}.", file=sys.stderr)
    print(target)


def _of_directory(path: Path, name: str, to: Format, vocab_size: int | None) -> dict[str, Any]:
    """The tokenizer as a GGUF file has it, once it is clear that no token loses its row."""
    from hanlin.chat.registry import chat_format_for
    from hanlin.chat.templates import template_for
    from hanlin.checkpoints.description import read_json
    from hanlin.models.registry import family_name
    from hanlin.tokenizers import load_tokenizer
    from hanlin.tokenizers.to_gguf import gguf_keys

    tokenizer = load_tokenizer(path)
    named = max((i for i, piece in enumerate(tokenizer.table.pieces) if piece), default=-1) + 1
    if vocab_size is not None and vocab_size < named:
        raise ConfigError(f"--vocab-size {vocab_size}: the tokenizer of {name} has {named} tokens")
    if to is not Format.gguf:
        return {}
    keys, family = gguf_keys(tokenizer, name=name), family_name(read_json(path / "config.json"))
    template = template_for(chat_format_for(tokenizer, model_type=str(family)))
    return {"tokenizer": keys | ({"tokenizer.chat_template": template} if template else {})}


def _of_gguf(path: Path, vocab_size: int | None) -> dict[str, Any]:
    """The tokenizer's files out of a GGUF file."""
    from hanlin.checkpoints.source import open_source
    from hanlin.tokenizers.gguf_files import gguf_to_files

    with open_source(path) as source:
        named = source.metadata.get("tokenizer.ggml.tokens") or ()
        tokens = max((i for i, token in enumerate(named) if token != f"[PAD{i}]"), default=-1) + 1
        if vocab_size is not None and vocab_size < tokens:
            raise ConfigError(f"--vocab-size {vocab_size}: the tokenizer of {path} has {tokens} tokens")
        return {"files": gguf_to_files(source.metadata, name=str(path))}


def _said(to: Format, outtype: Outtype, directory: bool) -> str:
    if to is Format.gguf and outtype is not Outtype.auto:
        return f"every tensor, in {outtype.value} where it is a matrix, and the logits of a probe prompt follow"
    if not directory:
        return "every tensor, out of its blocks if it was in any, and the logits of a probe prompt are as in"
    return "every tensor and the logits of a probe prompt are as in"
