"""The CPU library under the compiler's sanitizers: memory and undefined behaviour, and data races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hanlin.kernels.build import build, build_directory

ROOT = Path(__file__).parents[2]
CHECKS = ("hanlin_check", "hanlin_check_program")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None or shutil.which("cmake") is None,
        reason="needs Linux with g++ and cmake",
    ),
]

# Runs the other tests of the kernels with another library in place.
RUN_TESTS = """
import sys
from pathlib import Path
from hanlin.kernels import native
library = Path(sys.argv[1])
native.library_path = lambda: library
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def runtime(name: str) -> str:
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return found


def run(command: list[str], **environment: str) -> None:
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]


def test_memory_and_undefined_behaviour(tmp_path: Path) -> None:
    preload = (
        f"{runtime('libasan.so')} {runtime('libstdc++.so')}"  # the latter first seen by Python's extensions otherwise
    )
    library = build(tmp_path / "libhanlin_cpu.so", sanitize="address,undefined", root=ROOT)
    for check in CHECKS:
        run([str(build_directory("address,undefined", root=ROOT) / check)])
    if not os.environ.get("HANLIN_SANITIZE_PYTHON"):  # it ended once without a word on a busy machine; see docs/log.md
        return
    others = sorted(str(path) for path in Path(__file__).parent.glob("test_kernels_*.py") if path != Path(__file__))
    run(
        [
            sys.executable,
            "-c",
            RUN_TESTS,
            str(library),
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            *others,
        ],
        LD_PRELOAD=preload,
        ASAN_OPTIONS="detect_leaks=0",  # Python leaves much behind; hanlin_check looks for leaks
        PYTHONPATH=str(ROOT / "src"),
    )


def test_data_races(tmp_path: Path) -> None:
    runtime("libtsan.so")
    build(tmp_path / "libhanlin_cpu.so", sanitize="thread", root=ROOT)
    for check in CHECKS:
        run([str(build_directory("thread", root=ROOT) / check)], TSAN_OPTIONS="halt_on_error=1")
