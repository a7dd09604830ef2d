"""Renew the tables in the READMEs that are made from the code; with --check, only say whether they are true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from hanlin.models.registry import FAMILIES  # noqa: E402

HEADS = {
    "README.md": "| `model_type` | checkpoints | safetensors, `.bin` | GGUF | chat, tools | Transformers classes |",
    "README_zh.md": "| `model_type` | 模型 | safetensors、`.bin` | GGUF | 对话、工具 | Transformers 类 |",
}


def table(head: str) -> str:
    """One row a family, from the registry."""
    rows = [head, "|---|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        gguf = "yes" if family.gguf else "no"
        rows.append(f"| `{name}` | {family.released} | yes | {gguf} | {family.chat} | {family.transformers} |")
    return "\n".join(rows)


def renewed(name: str) -> str:
    """The README's text with its table as it should be."""
    text = (ROOT / name).read_text(encoding="utf-8")
    pattern = r"(<!-- models:.*?-->\n).*?(<!-- end of models -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{table(HEADS[name])}\n{m[2]}", text, flags=re.DOTALL)


def main() -> int:
    stale = [name for name in HEADS if renewed(name) != (ROOT / name).read_text(encoding="utf-8")]
    for name in stale:
        if "--check" in sys.argv:
            print(f"{name}: the table of models is stale; run python scripts/tables.py")
        else:
            (ROOT / name).write_text(renewed(name), encoding="utf-8")
    return bool(stale) and "--check" in sys.argv


if __name__ == "__main__":
    sys.exit(main())
