"""`hanlin quantize`, and LMDeploy's `lite auto_awq`, `auto_gptq` and `smooth_quant` in its words."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hanlin import hub

if TYPE_CHECKING:
    from hanlin.compress.quantise import Progress, Settings
    from hanlin.compress.report import Report

__all__ = ["lite", "quantize"]

_TEXT = "The text"
_STORED = "The result"


class Method(str, Enum):
    rtn = "rtn"
    awq = "awq"
    gptq = "gptq"
    smoothquant = "smoothquant"


class Format(str, Enum):
    awq = "awq"
    gptq = "gptq"
    compressed = "compressed-tensors"
    chatglm = "chatglm"


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a .gguf file, a hub id, or a name.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A directory that is not there yet.")],
    method: Annotated[Method, typer.Option(help="rtn needs no text; the others cost less quality.")] = Method.awq,
    bits: Annotated[
        int | None,
        typer.Option("--bits", "--w-bits", help="4 or 8.", show_default="4; smoothquant: 8", rich_help_panel=_STORED),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "--w-group-size",
            help="Columns with one scale.",
            show_default="128; smoothquant and ChatGLM's own format: a row",
            rich_help_panel=_STORED,
        ),
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option("--format", help="How it is stored.", show_default="the method's", rich_help_panel=_STORED),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--sym/--no-sym", help="No zero points.", show_default="as usual", rich_help_panel=_STORED),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help=".txt, or .jsonl with text or messages.", rich_help_panel=_TEXT)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of it that are used.", rich_help_panel=_TEXT)] = 128,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.", rich_help_panel=_TEXT)] = 512,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval", metavar="FILE", help="Other text to measure on; else what follows.", rich_help_panel=_TEXT
        ),
    ] = None,
) -> None:
    """Quantise a model into files in the formats of AWQ, GPTQ and compressed-tensors.

    hanlin quantize internlm2_5-1_8b-chat out --calibration text.txt
    hanlin quantize model.gguf out --method gptq --bits 8 --calibration chats.jsonl
    hanlin quantize smollm2 out --method rtn --group-size 32
    hanlin quantize chatglm-6b out --method rtn --bits 4

    One layer is in memory at a time. Interrupted, the same command goes on where it stopped.
    """
    from hanlin.compress.quantise import Settings

    settings = Settings(
        method=method.value,
        bits=bits or (8 if method is Method.smoothquant else 4),
        group_size=group_size,
        symmetric=symmetric,
        format=None if form is None else form.value,
    )
    _quantise(model, target, settings, calibration, evaluation, samples, length)


lite = typer.Typer(no_args_is_help=True, help="LMDeploy's names for quantising.")
_Model = Annotated[str, typer.Argument(metavar="MODEL")]
_WorkDir = Annotated[Path, typer.Option("--work-dir", help="A directory that is not there yet.")]
_Dataset = Annotated[Path | None, typer.Option("--calib-dataset", "--calibration", metavar="FILE", help="Your text.")]
_Samples = Annotated[int, typer.Option("--calib-samples", min=1)]
_Length = Annotated[int, typer.Option("--calib-seqlen", min=8)]
_Bits = Annotated[int, typer.Option("--w-bits")]
_Group = Annotated[int, typer.Option("--w-group-size")]
_Ignored = Annotated[str | None, typer.Option(help="Accepted, without effect: a layer at a time, on the CPU.")]
_Search = Annotated[bool, typer.Option("--search-scale", help="Accepted: scales are always searched.")]


@lite.command("auto_awq")
def auto_awq(
    model: _Model,
    work_dir: _WorkDir = Path("work_dir"),
    calib_dataset: _Dataset = None,
    calib_samples: _Samples = 128,
    calib_seqlen: _Length = 2048,
    w_bits: _Bits = 4,
    w_group_size: _Group = 128,
    w_sym: Annotated[bool, typer.Option("--w-sym")] = False,
    search_scale: _Search = True,
    batch_size: _Ignored = None,
    device: _Ignored = None,
    dtype: _Ignored = None,
) -> None:
    """Quantise with AWQ."""
    from hanlin.compress.quantise import Settings

    settings = Settings(method="awq", bits=w_bits, group_size=w_group_size, symmetric=w_sym)
    _quantise(model, work_dir, settings, calib_dataset, None, calib_samples, calib_seqlen)


@lite.command("auto_gptq")
def auto_gptq(
    model: _Model,
    work_dir: _WorkDir = Path("work_dir"),
    calib_dataset: _Dataset = None,
    calib_samples: _Samples = 128,
    calib_seqlen: _Length = 2048,
    w_bits: _Bits = 4,
    w_group_size: _Group = 128,
    batch_size: _Ignored = None,
    device: _Ignored = None,
    dtype: _Ignored = None,
) -> None:
    """Quantise with GPTQ."""
    from hanlin.compress.quantise import Settings

    settings = Settings(method="gptq", bits=w_bits, group_size=w_group_size)
    _quantise(model, work_dir, settings, calib_dataset, None, calib_samples, calib_seqlen)


@lite.command("smooth_quant")
def smooth_quant(
    model: _Model,
    work_dir: _WorkDir = Path("work_dir"),
    calib_dataset: _Dataset = None,
    calib_samples: _Samples = 128,
    calib_seqlen: _Length = 2048,
    quant_dtype: Annotated[str, typer.Option("--quant-dtype", help="int8.")] = "int8",
    search_scale: _Search = True,
    batch_size: _Ignored = None,
    device: _Ignored = None,
    dtype: _Ignored = None,
) -> None:
    """Quantise weights and activations to 8 bits with SmoothQuant, stored as compressed-tensors."""
    from hanlin.compress.quantise import Settings
    from hanlin.errors import ConfigError

    if quant_dtype != "int8":
        raise ConfigError(
            f"--quant-dtype {quant_dtype}: only int8 is written here; 8-bit floats need a GPU that has them"
        )
    settings = Settings(method="smoothquant", bits=8)
    _quantise(model, work_dir, settings, calib_dataset, None, calib_samples, calib_seqlen)


@lite.command("calibrate", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def calibrate() -> None:
    """Not needed: every method calibrates by itself."""
    from hanlin.errors import ConfigError

    raise ConfigError(
        "There is nothing to calibrate beforehand: `hanlin lite auto_awq`, `auto_gptq` and `smooth_quant` take "
        "--calib-dataset FILE and calibrate layer by layer as they quantise."
    )


def _quantise(
    model: str,
    target: Path,
    settings: Settings,
    calibration: Path | None,
    evaluation: Path | None,
    samples: int,
    length: int,
) -> None:
    from hanlin.errors import ConfigError

    if calibration is not None and not calibration.is_file():
        what = "a name of a data set, which is not fetched here" if "/" not in str(calibration) else "not a file"
        raise ConfigError(f"--calibration {calibration}: {what}. Give a .txt or .jsonl file of your own.")
    location = hub.resolve(model)
    from hanlin.assembly import peak_memory
    from hanlin.checkpoints.source import open_source
    from hanlin.compress.calibration import read_windows
    from hanlin.compress.quantise import quantise
    from hanlin.tokenizers import from_gguf, load_tokenizer
    from hanlin.tokenizers.gguf_files import gguf_to_files

    path, files = location.path, {}
    if path.is_dir():
        tokenizer: Any = load_tokenizer(path) if calibration or evaluation else None
    else:
        with open_source(path) as source:
            tokenizer = from_gguf(source.metadata, name=str(path))
            files = gguf_to_files(source.metadata, name=str(path))
    windows = None
    if calibration is not None:
        windows = read_windows(calibration, tokenizer, samples=samples, length=length, evaluation=evaluation)
    elif evaluation is not None:
        raise ConfigError("--eval needs --calibration FILE too")
    with _screen() as progress:
        report = quantise(
            path, target, settings, windows=windows, files=files, progress=progress, peak_memory=peak_memory
        )
    print(_closing(report), file=sys.stderr)
    print(target)


def _closing(report: Report) -> str:
    lines = [f"{report.original_bytes:,} bytes before, {report.written_bytes:,} after; {report.seconds:.0f} s."]
    if report.perplexity is not None:
        before, after = report.perplexity
        lines.append(f"Perplexity {before:.3f} before, {after:.3f} after ({100 * (after / before - 1):+.2f}%).")
    lines.append(
        "Each layer's error: quantisation.md in the directory. Try it: hanlin chat, with the directory's name."
    )
    return "\n".join(lines)


@contextmanager
def _screen() -> Iterator[Progress]:
    """A bar on a terminal's standard error, a line a layer elsewhere."""
    if not sys.stderr.isatty():
        yield lambda doing, done, steps: print(f"{done}/{steps} {doing}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Quantising {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda doing, done, steps: bar.update(task, description=doing, completed=done, total=steps)
