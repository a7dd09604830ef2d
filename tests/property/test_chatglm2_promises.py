"""Promise 2 for ChatGLM2's mathematics, in both formats of its files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from test_engine_promises import RUNNER_PARAMS, RUNNERS, check, schedules


@pytest.mark.parametrize("kind", ["chatglm2-32k", "glm"])
@pytest.mark.parametrize("runner", RUNNER_PARAMS)
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(plan=schedules())
def test_one_request_one_answer(tiny: Any, kind: str, runner: str, plan: dict[str, Any]) -> None:
    dtype, make = RUNNERS[runner]
    check(tiny(kind, dtype), make, plan)
