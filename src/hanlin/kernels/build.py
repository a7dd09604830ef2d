"""`python -m hanlin.kernels.build`: compile the CPU library beside this file, for work in a checkout.

An installation does this by itself. Needs cmake and a C++17 compiler.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hanlin.kernels.native import library_path

__all__ = ["build", "build_directory", "main"]

_ROOT = Path(__file__).resolve().parents[3]


def build_directory(sanitize: str = "", *, root: Path = _ROOT) -> Path:
    """Where `build` compiles: one directory in the checkout for each choice of sanitizers."""
    return root / "build" / "-".join(["native", *filter(None, sanitize.split(","))])


def build(output: Path | None = None, *, sanitize: str = "", root: Path = _ROOT) -> Path:
    """Compile and return the library's path.

    Args:
        output: where to put the library; None is beside this file, where `hanlin.kernels.native` looks.
        sanitize: for tests: "address,undefined" or "thread".
        root: the checkout, where this module is an installed one.

    Raises:
        FileNotFoundError: no sources here (an installed package), or no cmake.
        subprocess.CalledProcessError: the compiler failed; its output has been shown.
    """
    if not (root / "CMakeLists.txt").exists():
        raise FileNotFoundError(
            "the sources of the CPU library are not installed; run this in a checkout of the repository"
        )
    cmake = shutil.which("cmake")
    if cmake is None:
        raise FileNotFoundError("cmake is not installed. Run: pip install cmake ninja")
    output = output or library_path()
    directory = build_directory(sanitize, root=root)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [cmake, "-S", str(root), "-B", str(directory), *generator, f"-DHANLIN_SANITIZE={sanitize}"]
    for command in (configure, [cmake, "--build", str(directory), "--config", "Release", "--parallel"]):
        subprocess.run(command, check=True)
    made = next(path for path in sorted(directory.rglob(library_path().name)))
    # Into place by renaming: a running process keeps the copy that it has mapped.
    staged = output.with_name(output.name + ".new")
    shutil.copy2(made, staged)
    staged.replace(output)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hanlin.kernels.build", description="Compile the CPU library.")
    parser.add_argument("--output", type=Path, help="where to put the library (default: beside this module)")
    parser.add_argument("--sanitize", default="", help="address,undefined or thread (for tests)")
    options = parser.parse_args(arguments)
    try:
        print(build(options.output, sanitize=options.sanitize))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"hanlin.kernels.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
