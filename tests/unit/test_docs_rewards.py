"""The snippets of docs/rewards.md run as they stand, on tiny models of the named kinds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_directory import make_directory

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
REWARD: dict[str, Any] = {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 92527}


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_snippets_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")
    judge = make_directory(tmp_path / "judge", **REWARD)
    writer = make_directory(tmp_path / "writer")
    found = snippets()
    assert len(found) == 5
    text = "\n".join(found).replace("internlm/internlm2-1_8b-reward", str(judge))
    script = tmp_path / "snippets.py"
    script.write_text(text.replace("internlm/internlm2-chat-1_8b", str(writer)), encoding="utf-8")
    assert "internlm/" not in script.read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 20
