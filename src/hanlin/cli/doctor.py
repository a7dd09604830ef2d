"""The verb `doctor`: what this machine and installation can do, and what to do about what they can't."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from hanlin import __version__, hub
from hanlin.errors import HanlinError
from hanlin.hub import default, index
from hanlin.hub.report import megabytes

__all__ = ["REQUIRED", "Check", "doctor", "examine"]

Status = Literal["ok", "warn", "fail"]

REQUIRED = (
    "torch numpy safetensors sentencepiece tokenizers jinja2 huggingface-hub httpx filelock gguf llguidance typer rich "
    "prompt-toolkit platformdirs fastapi uvicorn pydantic prometheus-client"
).split()
_OPTIONAL = ("transformers", "peft", "accelerate")

_CPU_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "avx_vnni": "avx-vnni",
    "avx512f": "avx512",
    "avx512_vnni": "avx512-vnni",
    "avx512_bf16": "avx512-bf16",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}


@dataclass(frozen=True)
class Check:
    """One finding: `remedy` says what to do unless all is well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask whether the hub can be reached.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Check this machine and installation. Each finding is ok, warn or fail; a remedy stands below it."""
    checks = examine(hub.Places.default(), network=network)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        colours = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}
        width = max(len(check.name) for check in checks)
        for check in checks:
            status = typer.style(f"{check.status:<4}", fg=colours[check.status])
            typer.echo(f"{status}  {check.name:<{width}}  {check.detail}")
            if check.remedy:
                typer.echo(f"{'':<{width + 8}}{check.remedy}")
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def examine(places: hub.Places, *, network: bool = False) -> list[Check]:
    """Make every check; one that breaks is itself a finding."""
    checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("cpu", _cpu),
        ("memory", _memory),
        ("torch", _torch),
        ("kernels", _kernels),
        ("cache", lambda: _cache(places)),
        ("default model", lambda: _default_model(places)),
    ]
    if network:
        checks.append(("hub", lambda: _hub(places)))
    found: list[Check] = []
    for name, check in checks:
        try:
            found.extend(check())
        except Exception as error:  # a doctor who faints is of no use to anybody
            found.append(
                Check(name, "fail", f"the check itself broke: {type(error).__name__}: {error}", "Report this.")
            )
    return found


def _python() -> Iterator[Check]:
    bits = "64-bit" if sys.maxsize > 2**32 else "32-bit"
    detail = f"{platform.python_version()} {bits}, {platform.system()} {platform.machine()}, hanlin {__version__}"
    if bits == "32-bit":
        yield Check("python", "fail", detail, "Models need more memory than 32 bits reach: install a 64-bit Python.")
    else:
        yield Check("python", "ok", detail)


def _packages() -> Iterator[Check]:
    versions = {name: _installed_version(name) for name in (*REQUIRED, *_OPTIONAL)}
    missing = [name for name in REQUIRED if versions[name] is None]
    detail = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        yield Check("packages", "fail", f"missing: {', '.join(missing)}", f"Run: pip install {' '.join(missing)}")
    else:
        yield Check("packages", "ok", detail)
    absent = [name for name in _OPTIONAL if versions[name] is None]
    if absent:
        yield Check("extras", "ok", f"not installed: {', '.join(absent)} (pip install 'hanlin[hf,tune]' brings them)")


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> Iterator[Check]:
    name, flags = _processor()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    features = [shown for flag, shown in _CPU_FLAGS.items() if flag in flags]
    detail = f"{name}, {usable} of {os.cpu_count()} cores, {' '.join(features) or 'features unknown'}"
    if platform.machine().lower() in ("x86_64", "amd64") and flags and "avx2" not in flags:
        yield Check("cpu", "warn", detail, "Without AVX2 everything runs, but slowly.")
    else:
        yield Check("cpu", "ok", detail)


def _processor() -> tuple[str, frozenset[str]]:
    """The processor's name and Linux' names for its features; none are known on other systems."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key.lower() in ("flags", "features"):
            flags = frozenset(value.split())
    return name, flags


def _memory() -> Iterator[Check]:
    total, free = _memory_sizes()
    if total is None or free is None:
        yield Check("memory", "ok", "this system does not say how much there is")
    elif free < 10**9:
        remedy = "Close other programs: the default model needs about 1 GB, a 7B model in 4 bits about 6 GB."
        yield Check("memory", "warn", f"{megabytes(free)} of {megabytes(total)} available", remedy)
    else:
        yield Check("memory", "ok", f"{megabytes(free)} of {megabytes(total)} available")


def _memory_sizes() -> tuple[int | None, int | None]:
    """Total and available bytes, within the limit of a container."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {key: int(value.split()[0]) << 10 for key, _, value in (line.partition(":") for line in lines)}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None, None
        return total, total
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        total, free = min(total, limit), min(free, max(limit - used, 0))
    except (OSError, ValueError):  # no limit, or no such group
        pass
    return total, free


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken library fails in its own ways
        yield Check("torch", "fail", f"cannot be imported: {error}", "Run: pip install --force-reinstall torch")
        return
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads, {capability}"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() > usable:
        yield Check("torch", "warn", detail, f"More threads than cores slow it down: set OMP_NUM_THREADS={usable}.")
    else:
        yield Check("torch", "ok", detail)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
        yield Check("gpu", "ok", ", ".join(names))
    elif torch.backends.mps.is_available():
        yield Check("gpu", "ok", "Apple Metal")
    else:
        yield Check("gpu", "ok", "none that torch can use; models run on the CPU")


def _kernels() -> Iterator[Check]:
    from hanlin.kernels import native

    found = native.describe()
    if not found["available"]:
        detail = f"no native kernels: {found['reason']}"
        yield Check(
            "kernels", "warn", detail, "Models run on plain torch, slower. Reinstall with a C++ compiler at hand."
        )
        return
    pages = "huge pages" if found["huge_pages"] else "no huge pages"
    yield Check(
        "kernels", "ok", f"{found['isa']} of {' '.join(found['supported'])}; {found['threads']} threads, {pages}"
    )


def _cache(places: hub.Places) -> Iterator[Check]:
    home = places.home
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            free = shutil.disk_usage(home).free
    except OSError as error:
        remedy = "Set HANLIN_HOME to a directory that can be written."
        yield Check("cache", "fail", f"{home} cannot be written: {error.strerror or error}", remedy)
        return
    detail = f"{home}, {megabytes(free)} free; hub cache {places.hub_cache}"
    if free < 10**9:
        yield Check("cache", "warn", detail, "Free some space, or set HANLIN_HOME and HF_HOME to another disk.")
    else:
        yield Check("cache", "ok", detail)


def _default_model(places: hub.Places) -> Iterator[Check]:
    path = default.location(hub.DEFAULT, places)
    if not path.exists():
        try:
            yield Check("default model", "ok", f"not fetched yet; {index.client().name} would fetch it")
        except HanlinError as error:
            first, _, rest = str(error).partition("\n")
            yield Check("default model", "warn", f"not fetched yet: {first}", rest)
    elif default.matches(path, hub.DEFAULT.sha256):
        yield Check("default model", "ok", f"{hub.DEFAULT.title}, its SHA-256 is right")
    else:
        yield Check("default model", "fail", f"{path} is not the published file any more", "Run: hanlin pull")


def _hub(places: hub.Places) -> Iterator[Check]:
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    address, variable, path = places.endpoint or constants.ENDPOINT, "HF_ENDPOINT", "/api/models?limit=1"
    if places.hub == "ms":
        address, variable, path = places.modelscope, "MODELSCOPE_ENDPOINT", "/"
    request = urllib.request.Request(f"{address}{path}", headers={"User-Agent": f"hanlin/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            yield Check("hub", "ok", f"{address} answers with HTTP {answer.status}")
    except urllib.error.HTTPError as error:
        yield Check("hub", "warn", f"{address} answers with HTTP {error.code}", f"Try later, or another {variable}.")
    except (OSError, ValueError) as error:
        remedy = f"Check the network and the proxy, or set {variable} to a mirror."
        yield Check("hub", "warn", f"{address} cannot be reached: {error}", remedy)
