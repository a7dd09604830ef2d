"""Count code lines (neither blank, nor comment, nor docstring) against the budgets, and print the table.

Budgets are there to be noticed, not golfed: a file that passes one needs a written reason in `REASONS`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "hanlin"
# The spine was meant to be 2,600; images in the place of embeddings, packed directories, tables kept between steps and
# telling listeners once a step took what is above.
FILE, MODEL, SPINE = 400, 200, 2720
REASONS: dict[str, str] = {
    "kernels/cpu/simd.h": "four instruction sets' versions of one small vector type, to be read side by side",
}
SPINE_FILES = ("types.py", "llm.py", "models/internlm2.py", "layers/*.py", "engine/*.py")


def code_lines(path: Path) -> int:
    """Lines that hold code: of Python without docstrings and comments, of C++ without comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return _cpp_lines(text)
    quiet: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                quiet.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in quiet for n, line in lines)


def _cpp_lines(text: str) -> int:
    count, inside = 0, False
    for raw in text.splitlines():
        line = raw.strip()
        if inside or line.startswith("/*"):
            inside = "*/" not in line
        elif line and not line.startswith("//"):
            count += 1
    return count


def measured() -> dict[str, int]:
    """Code lines of every source file, by its path below the package."""
    files = sorted(p for p in ROOT.rglob("*") if p.suffix in (".py", ".cpp", ".h"))
    return {str(p.relative_to(ROOT)): code_lines(p) for p in files}


def spine() -> int:
    """Code lines of the spine: types, InternLM2, the layers, the engine and the facade."""
    return sum(code_lines(p) for pattern in SPINE_FILES for p in ROOT.glob(pattern))


def too_large() -> list[str]:
    """Files past their budget that nobody has given a reason for."""
    out = []
    for name, lines in measured().items():
        model = name.startswith("models/") and name not in ("models/config.py", "models/registry.py")
        budget = MODEL if model else FILE
        if lines > budget and name not in REASONS:
            out.append(f"{name}: {lines} code lines, the budget is {budget}")
    if spine() > SPINE:
        out.append(f"the spine: {spine()} code lines, the budget is {SPINE}")
    return out


def main() -> int:
    rooms: dict[str, int] = {}
    for name, lines in measured().items():
        room = name.split("/")[0] if "/" in name else "(top)"
        rooms[room] = rooms.get(room, 0) + lines
    for room, lines in sorted(rooms.items()):
        print(f"{room:14}{lines:7}")
    print(f"{'all':14}{sum(rooms.values()):7}\n{'spine':14}{spine():7} of {SPINE}")
    for line in too_large():
        print("too large:", line)
    return bool(too_large())


if __name__ == "__main__":
    sys.exit(main())
