"""What the READMEs say is what the code and CI do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hanlin.cli.main import VERBS

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README_zh.md")


def commands(name: str) -> list[str]:
    """The shell commands of a README, in order."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.strip() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("name", READMES)
def test_the_first_command_chats_and_the_second_is_what_ci_runs(name: str) -> None:
    first, second = commands(name)[:2]
    assert first == 'pip install . && hanlin chat "Why is the sky blue?"'
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert any(line.replace(" --quiet", "") == second for line in lines)


@pytest.mark.parametrize("name", READMES)
def test_every_verb_is_named(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    missing = [verb for verb in VERBS if not re.search(rf"`(hanlin )?{verb}\b", text)]
    assert missing == []


def test_the_tables_are_renewed() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "tables.py", "--check"], check=True)


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if not t.startswith("http")]
    missing = [target for target in targets if not ((ROOT / name).parent / target).exists()]
    assert missing == []
