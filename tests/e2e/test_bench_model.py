"""`hanlin bench` from the command line, with a real engine and a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hanlin
from hf_directory import make_directory

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def bench(model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(hanlin.__file__).parents[1])}
    small = ["--prompt", "20", "--tokens", "4", "--sequences", "1,3", "--repeats", "2"]
    command = [sys.executable, "-m", "hanlin", "bench", str(model), *small, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_a_model_alone_and_against_one_that_is_missing(tmp_path: Path) -> None:
    model = make_directory(tmp_path / "model", tokenizer="small")
    done = bench(model, "--json", str(tmp_path / "out.json"), "--weights", "float32", "--threads", "1")
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    (entry,) = data["entries"]
    assert entry["options"]["weights"] == "float32"
    assert {title: {k: len(v) for k, v in figures.items()} for title, figures in entry["values"].items()} == {
        "1 sequence, prompt of 20": {"prompt": 2, "first": 2},
        "1 sequence, 32 + 4 tokens": {"generation": 2},
        "3 sequences, 32 + 4 tokens": {"generation": 2, "together": 2},
    }
    assert all(value > 0 for figures in entry["values"].values() for values in figures.values() for value in values)
    assert entry["peak_memory"] > 10**7 and entry["load_seconds"] > 0
    assert "peak memory, MiB" in done.stdout and done.stderr == ""

    python = tmp_path / "nowhere" / "python"
    done = bench(model, "--against", "transformers", "--peer-python", f"transformers={python}")
    assert done.returncode == 1
    assert f"transformers was left out: {python} cannot be run" in done.stdout
