"""InternLM2 is a Llama in other clothes: the same logits as Transformers' own Llama, float32, within 1e-5."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

_PATH = Path(__file__).parents[2] / "benchmarks" / "internlm2_vs_llama.py"
_SPEC = spec_from_file_location("internlm2_vs_llama", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
benchmark = module_from_spec(_SPEC)
sys.modules["internlm2_vs_llama"] = benchmark  # dataclasses look their module up
_SPEC.loader.exec_module(benchmark)


@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: case.name)
def test_logits_equal_llamas(case: object) -> None:
    found = benchmark.measure(case)
    assert found.worst <= benchmark.LIMIT, found
    assert found.largest > 1, "the comparison says nothing about logits that are all tiny"


def test_the_comparison_can_fail() -> None:
    """Cutting the fused projection as if the heads were not grouped is seen."""
    case = benchmark.Case(name="wrong", heads=4, group=2)

    def wrong(weights: dict, case: object) -> dict:
        out = right(weights, case)
        for name, tensor in out.items():
            if "k_proj" in name:
                out[name] = tensor.flip(0)
        return out

    right = benchmark.split
    benchmark.split = wrong
    try:
        assert benchmark.measure(case).worst > 0.01
    finally:
        benchmark.split = right
