"""Who may import whom, held by walking the imports of every file (docs/architecture.md has the reasons)."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import hanlin

PACKAGE = Path(hanlin.__file__).parent
ROOMS = {
    "types": {"errors", "constraint", "images"},
    "images": {"errors"},
    "constraint": {"errors"},
    "guide": {"types", "errors"},
    "infill": {"types", "errors"},
    "errors": set(),
    "options": {"errors"},
    "tokenizers": {"types", "errors"},
    "chat": {"types", "errors"},
    "kernels": {"errors", "types"},
    "layers": {"types", "errors", "kernels"},
    "models": {"layers", "types", "errors"},
    "checkpoints": {"models", "layers", "types", "errors"},
    "hub": {"types", "errors"},
    "engine": {"models", "layers", "kernels", "types", "errors"},
    "compress": {"models", "checkpoints", "layers", "types", "errors"},
    "hf": {"models", "checkpoints", "tokenizers", "chat", "layers", "types", "errors", "images", "hub"},
    "bench": {"llm", "options", "types", "errors", "hub"},
    "serve": {"llm", "aio", "requests", "engine", "chat", "hub", "types", "errors", "images"},
}
# The facade's own files may import every room below them, and each other.
FACADE = {
    "__init__",
    "adapters",
    "llm",
    "aio",
    "judging",
    "assembly",
    "calls",
    "replies",
    "requests",
    "lmdeploy",
    "packing",
    "vision",
}
NO_TORCH = (
    "types",
    "images",
    "errors",
    "options",
    "constraint",
    "guide",
    "infill",
    "tokenizers",
    "chat",
    "hub",
    "kernels",
)
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}


def modules() -> list[tuple[str, Path]]:
    return [(str(p.relative_to(PACKAGE).with_suffix("")), p) for p in sorted(PACKAGE.rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth of its code."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            out.add(node.module or "")
            if node.module == "hanlin":
                out.update(f"hanlin.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
    return out


def room(name: str) -> str:
    return name.split("/")[0]


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_stay_in_their_rooms(name: str, path: Path) -> None:
    own = room(name)
    ours = {i.split(".")[1] for i in imports(path) if i.startswith("hanlin.")} - {own}
    others = {i.split(".")[0] for i in imports(path)}
    if own in ROOMS:
        assert ours <= ROOMS[own], f"{name} may not import {ours - ROOMS[own]}"
    elif own in FACADE:
        assert "cli" not in ours
    if own in NO_TORCH:
        assert "torch" not in others, f"{name} must work without torch"
    if own != "hf" and name != "bench/peers/transformers":  # which measures it, in a process of its own
        assert "transformers" not in others, f"{name} must not depend on somebody else's release"


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_no_foreign_code_can_run(name: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imports(path) & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in BANNED_CALLS, f"{name}:{node.lineno} calls {called}"
            assert called not in ("torch.load", "os.system", "os.popen"), f"{name}:{node.lineno} calls {called}"
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code"):
                    assert ast.unparse(keyword.value) == "False", f"{name}:{node.lineno} sets {keyword.arg}"


def test_sizes_are_within_their_budgets() -> None:
    sizes = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "sizes.py"))
    assert sizes["too_large"]() == []


def test_what_is_exported_exists() -> None:
    for info in pkgutil.walk_packages(hanlin.__path__, "hanlin."):
        if info.name.startswith(("hanlin.hf", "hanlin.kernels.libhanlin")):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{info.name}.__all__ names {name}"
    assert set(hanlin.__all__) == set(hanlin._HOME)


def test_importing_the_package_needs_no_torch() -> None:
    code = "import hanlin, sys; dir(hanlin); assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
