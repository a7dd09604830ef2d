"""The short form of benchmarks/soak.py; the long one is run by hand, with a dated result."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_crowd_that_misbehaves_leaves_nothing_behind(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("soak", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    tally, _ = module.soak(tmp_path / "log", seconds=15.0, clients=8, warm=8.0)
    assert not tally.wrong, "\n".join(tally.wrong[:20])
    assert tally.done["chat"] and tally.done["stream"] and tally.done["vanish"]
