"""GGUF files that we write, in llama.cpp: the same greedy tokens in float32 (benchmarks/gguf_interop.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "benchmarks" / "gguf_interop.py"
_SPEC = spec_from_file_location("gguf_interop", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
benchmark = module_from_spec(_SPEC)
sys.modules["gguf_interop"] = benchmark  # dataclasses look their module up
_SPEC.loader.exec_module(benchmark)


@pytest.fixture(scope="module")
def python() -> str:
    """A Python that has llama-cpp-python: this one, or the one that HANLIN_LLAMA_CPP_PYTHON names."""
    path = os.environ.get("HANLIN_LLAMA_CPP_PYTHON", sys.executable)
    done = subprocess.run([path, "-c", "import llama_cpp"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs llama-cpp-python here, or in a Python that HANLIN_LLAMA_CPP_PYTHON names")
    return path


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: case.name)
def test_the_same_tokens(tmp_path: Path, python: str, case: object, request: pytest.FixtureRequest) -> None:
    folder = None
    if case.tokenizer not in ("", benchmark._INTERNLM2.name):  # type: ignore[attr-defined]
        folder = request.getfixturevalue("shared") / "assets"
    found = benchmark.measure(case, tmp_path, python, folder)
    assert found.tokens == found.of_tokens, found.differing
