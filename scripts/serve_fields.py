"""Write docs/serve_fields.md from the declarations that the tests ask for."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    from serve_fields import table

    (ROOT / "docs" / "serve_fields.md").write_text(table(), encoding="utf-8")
