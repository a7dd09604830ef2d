"""What quantising cost, as Markdown for people and JSON for programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Report", "Row"]


@dataclass(frozen=True)
class Row:
    """A linear layer: squared error as a share of the squares, and the same had it only been rounded."""

    name: str
    error: float
    nearest: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """
    Attributes:
        settings: method, bits, group_size and so on, as they were used.
        tokens: of the text that was calibrated on, and of that which was measured.
        perplexity: before and after, if there was text to measure on.
        seconds, peak_memory: in all; 0 where the system does not tell.
    """

    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    tokens: tuple[int, int] = (0, 0)
    perplexity: tuple[float, float] | None = None
    original_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    def markdown(self) -> str:
        """Everything, the most important first."""
        lines = ["# Quantisation", "", ", ".join(f"{key} {value}" for key, value in self.settings.items()) + ".", ""]
        if self.perplexity is not None:
            before, after = self.perplexity
            change = 100 * (after / before - 1) if before and math.isfinite(after) else math.nan
            lines += [
                f"Perplexity of {self.tokens[1]:,} tokens: {before:.4f} before, {after:.4f} after ({change:+.2f}%).",
                "",
            ]
        lines += [
            f"{self.original_bytes:,} bytes before, {self.written_bytes:,} after. {self.seconds:.0f} s, "
            f"{self.peak_memory / 2**20:,.0f} MiB of memory at most. Calibrated on {self.tokens[0]:,} tokens.",
            "",
            f"Squared error of each layer's {'outputs' if self.tokens[0] else 'weights'}, as a share of their squares:",
            "",
            "| layer | error | rounded to nearest |",
            "|---|---|---|",
            *(f"| {row.name} | {row.error:.3e} | {row.nearest:.3e} |" for row in self.rows),
            "",
        ]
        return "\n".join(lines)

    def write(self, directory: Path) -> None:
        """`quantisation.md` and `quantisation.json`."""
        (directory / "quantisation.md").write_text(self.markdown(), encoding="utf-8")
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (directory / "quantisation.json").write_text(text + "\n", encoding="utf-8")
