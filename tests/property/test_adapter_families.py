"""Live adapters on every family, fused layouts and all: the answers of a model whose weights hold the additions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_promises import RUNNERS, answer, engine_of, needs_native, request, run

from adapter_directory import halves, linears_of, write_adapter
from hanlin.checkpoints.peft import Base, read_peft
from hanlin.types import SamplingParams

KINDS = ["internlm2-bias", "llama", "qwen2", "internlm3", "glm", "chatglm", "chatglm2"]
SAMPLING = SamplingParams(temperature=0, max_tokens=12, logprobs=0)


@pytest.mark.parametrize("runner", ["torch-float32", pytest.param("float32", marks=needs_native)])
@pytest.mark.parametrize("kind", KINDS)
def test_live_equals_dense(tiny: Any, tmp_path: Path, kind: str, runner: str) -> None:
    _, make = RUNNERS[runner]
    model = tiny(kind).requires_grad_(False)
    base = Base.of(model)
    linears = {n: shape for n, shape in linears_of(model).items() if f"{n}.weight" not in base.tables}
    path = write_adapter(tmp_path / "adapter", halves(linears, 5), 5)
    additions = read_peft(path, base).additions
    dense = copy.deepcopy(model)
    for name, low in additions.items():
        dense.get_submodule(name).weight.data += low.weight()
    prompt = torch.randint(3, 80, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    got = []
    for which, adapted in ((model, True), (dense, False), (model, False)):
        engine = engine_of(which, make=make, max_step_tokens=31)
        adapter = engine.runner.adapt(additions) if adapted else None
        sequence = request(prompt, SAMPLING, which, adapter=adapter)
        engine.add(sequence)
        run(engine)
        got.append(answer(sequence)[0])
    live, merged, plain = got
    assert [token.id for token in live] == [token.id for token in merged]
    for one, other in zip(live, merged, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert [token.logprob for token in live] != [token.logprob for token in plain]
