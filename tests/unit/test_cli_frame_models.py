"""The verbs list, show, pull, rm and doctor, run as a person would: through `hanlin.cli.main.main`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_fakes import FakeHub, Repository

from hanlin import hub
from hanlin.cli import doctor
from hanlin.cli.main import main
from hanlin.hub import default

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


def safetensors(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A file of zeros."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"F32": 4, "BF16": 2}[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(offset)


FILES = {
    "config.json": b'{"model_type": "internlm2", "max_position_embeddings": 32768, "hidden_size": 8}',
    "model.safetensors": safetensors({"a.weight": ("BF16", [8, 16]), "b.weight": ("F32", [3])}),
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
    "README.md": b"---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\nlicense: mit\n",
}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub.Places:
    from huggingface_hub import constants

    monkeypatch.setenv("HANLIN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    return hub.Places.default()


@pytest.fixture
def run(places: hub.Places, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        said = capsys.readouterr()
        return int(leaving.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def cached(places: hub.Places) -> hub.Places:
    """The default model's place holds a file of its size, and the hub's cache holds one repository."""
    path = default.location(hub.DEFAULT, places)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(hub.DEFAULT.size)
    with FakeHub({"someone/model": Repository(dict(FILES))}) as server:
        there = hub.Places(home=places.home, hub_cache=places.hub_cache, endpoint=server.url)
        hub.pull("someone/model", places=there, report=hub.Report(None))
    return places


def test_list_before_anything_is_fetched(run: Run) -> None:
    status, out, _ = run("list")
    assert status == 0
    assert "smollm2 (default)" in out and "not fetched yet" in out
    assert run("list", "--json") == (0, "[]\n", "")


def test_list(run: Run, cached: hub.Places) -> None:
    status, out, _ = run("list")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["MODEL", "KIND", "SIZE", "LAST", "USED"]
    assert lines[1][:5] == ["smollm2", "(default)", "gguf", "98", "MB"]
    assert lines[2][:2] == ["someone/model", "safetensors"]
    status, out, _ = run("list", "--json")
    default_one, other = json.loads(out)
    assert default_one["default"] and default_one["size"] == 98_362_432
    assert other["id"] == "someone/model" and other["complete"] and not other["default"]
    assert Path(other["path"]).is_dir()


def test_show_a_directory(run: Run, cached: hub.Places) -> None:
    status, out, _ = run("show", "someone/model", "--json", "--tensors")
    assert status == 0
    facts = json.loads(out)
    assert facts["family"] == "internlm2" and facts["context"] == 32768 and facts["licence"] == "apache-2.0"
    assert facts["runs"].startswith("no: internlm2 configuration")
    assert facts["parameters"] == 8 * 16 + 3 and facts["weights"] == "BF16, F32" and facts["size"] == 268
    assert facts["tensors"][0] == {"name": "a.weight", "shape": [8, 16], "dtype": "BF16", "bytes": 256}
    status, out, _ = run("show", "someone/model", "--tensors")
    assert status == 0
    assert "internlm2" in out and "a.weight" in out and "32768" in out


def test_show_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name, data in FILES.items():
        if name != "README.md":
            (tmp_path / "x" / name).write_bytes(data)
    status, out, _ = run("show", "./x")
    assert status == 0 and "licence" in out and "unknown" in out


@pytest.mark.parametrize(
    "data", [b"", b"GGUF", b"GGUF" + b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_show_a_broken_file_is_one_error(run: Run, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    status, out, err = run("show", "x.gguf")
    assert status == 1 and out == "" and err.startswith("error: ") and "x.gguf" in err


def test_show_a_broken_configuration_is_one_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name, data in {**FILES, "config.json": b"{"}.items():
        (tmp_path / "x" / name).write_bytes(data)
    status, out, err = run("show", "./x")
    assert status == 1 and out == "" and "config.json" in err


def test_show_never_fetches(run: Run) -> None:
    status, _, err = run("show")
    assert status == 1 and "hanlin pull" in err


def test_rm_asks_nobody_where_nobody_can_answer(run: Run, cached: hub.Places) -> None:
    status, _, err = run("rm", "someone/model")
    assert status == 1 and "--yes" in err
    assert len(hub.cached()) == 2


def test_rm(run: Run, cached: hub.Places) -> None:
    status, out, err = run("rm", "--yes", "someone/model")
    assert (status, out) == (0, "") and "Deleted someone/model" in err
    assert run("rm", "-y", "smollm2")[0] == 0
    assert hub.cached() == []
    status, _, err = run("rm", "-y", "smollm2")
    assert status == 1 and "holds: nothing" in err


def test_rm_refuses_a_path(run: Run, cached: hub.Places, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    status, _, err = run("rm", "--yes", "./mine")
    assert status == 1 and "delete it yourself" in err
    assert (tmp_path / "mine").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_rm_asks_on_a_terminal(cached: hub.Places, tmp_path: Path, answer: str, gone: bool) -> None:
    import pty

    master, slave = pty.openpty()
    environment = {
        **os.environ,
        "HANLIN_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "PYTHONPATH": str(ROOT / "src"),
    }
    command = [sys.executable, "-m", "hanlin", "rm", "someone/model"]
    with subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave, close_fds=True) as process:
        os.write(master, answer.encode())
        status = process.wait(timeout=30)
    said = os.read(master, 10_000).decode()
    os.close(master)
    os.close(slave)
    assert "Delete someone/model" in said
    assert (status == 0) == gone
    assert (len(hub.cached()) == 1) == gone


def environment(tmp_path: Path, endpoint: str, **settings: str) -> dict[str, str]:
    places = {"HANLIN_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**inherited, **places, "PYTHONPATH": str(ROOT / "src"), "NO_PROXY": "127.0.0.1", **settings}


def test_pull_and_offline_through_the_environment(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hanlin"]
    options = {"capture_output": True, "text": True, "timeout": 60, "check": False}
    with FakeHub({"someone/model": Repository(dict(FILES))}) as server:
        reachable = environment(tmp_path, server.url)
        done = subprocess.run([*command, "pull", "someone/model"], env=reachable, **options)
        assert done.returncode == 0, done.stderr
        assert "licence apache-2.0" in done.stderr and "Traceback" not in done.stderr
    snapshot = Path(done.stdout.strip())
    assert snapshot.is_relative_to(tmp_path / "hf" / "hub")
    assert (snapshot / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    unreachable = environment(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    done = subprocess.run([*command, "show", "someone/model"], env=unreachable, **options)
    assert done.returncode == 0 and "internlm2" in done.stdout, done.stderr
    done = subprocess.run([*command, "pull", "someone/other"], env=unreachable, **options)
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="limits file sizes with ulimit")
def test_a_full_disk_while_pulling_is_told_with_its_remedy(tmp_path: Path) -> None:
    files = {**FILES, "model.safetensors": bytes(400_000)}
    limited = [
        "bash",
        "-c",
        'ulimit -f 200; exec "$@"',
        "bash",
        sys.executable,
        "-m",
        "hanlin",
        "pull",
        "someone/model",
    ]
    with FakeHub({"someone/model": Repository(files)}) as server:
        settings = environment(tmp_path, server.url, PYTHONDONTWRITEBYTECODE="1")
        done = subprocess.run(limited, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "disk is full" in done.stderr and "HF_HOME" in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.is_file() and path.stat().st_size > 100_000]


def test_doctor_lists_what_pyproject_requires() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml, which Python 3.10 cannot")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {line.split(">")[0].split("<")[0].split("=")[0].strip() for line in project["dependencies"]}
    assert set(doctor.REQUIRED) == required


def test_doctor(run: Run) -> None:
    status, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert status == 0, out
    assert {"python", "packages", "cpu", "memory", "torch", "gpu", "kernels", "cache", "default model"} <= checks.keys()
    assert all(check["remedy"] for check in checks.values() if check["status"] == "fail")
    status, out, _ = run("doctor")
    assert status == 0 and "python" in out and "torch" in out


def test_doctor_finds_a_cache_that_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("HANLIN_HOME", str(tmp_path / "file" / "home"))
    status, out, _ = run("doctor")
    assert status == 1
    assert "fail  cache" in out and "Set HANLIN_HOME" in out


def test_doctor_finds_a_damaged_default_model(run: Run, cached: hub.Places) -> None:
    status, out, _ = run("doctor")
    assert status == 1
    assert "is not the published file any more" in out and "hanlin pull" in out


def test_doctor_asks_the_hub_only_when_told(places: hub.Places) -> None:
    def findings(endpoint: str, network: bool) -> dict[str, doctor.Check]:
        there = hub.Places(home=places.home, hub_cache=places.hub_cache, endpoint=endpoint)
        return {check.name: check for check in doctor.examine(there, network=network)}

    with FakeHub({}) as server:
        assert "hub" not in findings(server.url, network=False)
        assert server.requested == []
        assert findings(server.url, network=True)["hub"].status == "ok"
        assert findings(f"{server.url}/elsewhere", network=True)["hub"].status == "warn"
    dead = findings("http://127.0.0.1:9", network=True)["hub"]
    assert dead.status == "warn" and "HF_ENDPOINT" in dead.remedy


def test_a_check_that_breaks_is_a_finding(places: hub.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def faint() -> tuple[str, frozenset[str]]:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "_processor", faint)
    (check,) = [check for check in doctor.examine(places) if check.name == "cpu"]
    assert check.status == "fail" and "ZeroDivisionError" in check.detail
