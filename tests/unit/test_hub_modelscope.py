"""Fetching from ModelScope: our client against its interface on loopback, over real sockets, faults included."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_fakes import sha256
from hub_servers import Faults, ModelScope, Storage

from hanlin import hub
from hanlin.errors import ConfigError, DownloadError, HanlinError, ModelNotFoundError
from hanlin.hub import Places, Report, modelscope, names, snapshot
from hanlin.hub.web import Limits

WEIGHTS = os.urandom(3 << 20)
BAIT = b"open('bitten', 'w')"
FILES = {
    "config.json": b'{"model_type": "chatglm"}',
    "configuration.json": b'{"framework": "pytorch"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.model": b"\x0a\x0b",
    "MODEL_LICENSE": b"Terms",
    "README.md": b"# Model",
    "modeling_chatglm.py": BAIT,
    "nested/model.safetensors": b"other",
}
FETCHED = {"config.json", "model.safetensors", "tokenizer.model", "MODEL_LICENSE", "README.md"}
REPO = "someone/model"
QUICK = Limits(pause=0.01, longest_pause=0.1, read=5.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures that pass are tried again at once."""
    monkeypatch.setattr("hanlin.hub.web.Limits", lambda: QUICK)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(home=tmp_path / "home", hub_cache=tmp_path / "hub", modelscope_cache=tmp_path / "ms")


@contextmanager
def serving(
    places: Places, faults: Faults | None = None, files: dict[str, bytes] | None = None, repo: str = REPO
) -> Iterator[tuple[ModelScope, Places]]:
    models = {repo: {"master": FILES if files is None else files}}
    with Storage(faults) as storage, ModelScope(models, faults, storage) as server:
        yield server, at(places, server.url)


def at(places: Places, url: str, **more: object) -> Places:
    kept = {name: getattr(places, name) for name in ("home", "hub_cache", "modelscope_cache", "modelscope_token")}
    return Places(endpoint="http://127.0.0.1:9", modelscope=url, **{**kept, **more})


def pull(places: Places, model: str = f"ms:{REPO}", **options: object) -> hub.Location:
    return hub.pull(model, places=places, report=Report(None), **options)


def kept(places: Places) -> Path:
    return places.of_modelscope() / "models" / "someone--model" / "snapshots" / "master"


def inside(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_data_files_are_fetched_where_its_own_client_looks_and_found_again_offline(places: Places) -> None:
    with serving(places) as (server, here):
        found = pull(here)
        assert not any(".py" in path for path, _ in server.asked)
    assert found == hub.Location(path=kept(places), kind="directory", id=f"ms:{REPO}")
    assert inside(found.path) == FETCHED
    assert all((found.path / name).read_bytes() == FILES[name] for name in FETCHED)
    for name in (f"ms:{REPO}", REPO):
        again = hub.resolve(name, places=at(places, "http://127.0.0.1:9", offline=True), report=Report(None))
        assert again == found


def test_a_second_pull_fetches_nothing_that_is_there_and_mends_what_is_broken(places: Places) -> None:
    with serving(places) as (server, here):
        pull(here)
        assert server.storage is not None
        server.storage.asked.clear()
        pull(here)
        assert not server.storage.asked
        with (kept(places) / "model.safetensors").open("r+b") as file:
            file.write(b"broken")
        pull(here)
        assert len(server.storage.asked) == 1
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("cuts", [[1 << 20], [0], [10, 20, 30], [1 << 20, 1 << 20, 100]])
def test_a_connection_that_breaks_is_continued(places: Places, cuts: list[int]) -> None:
    asked = len(cuts) + 1
    with serving(places, Faults(cut={"model.safetensors": cuts})) as (server, here):
        pull(here)
        assert server.storage is not None
        ranges = [headers.get("range") for _, headers in server.storage.asked if _.startswith("/model.safe")]
        assert len(ranges) == asked
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS


def test_what_an_earlier_run_left_is_continued(places: Places) -> None:
    faults = Faults(cut={"model.safetensors": [1 << 20] + [0] * 10})
    with serving(places, faults) as (server, here):
        with pytest.raises(DownloadError, match=r"ended|broke"):
            pull(here)
        (left,) = kept(places).glob("model.safetensors.*.incomplete")
        assert left.read_bytes() == WEIGHTS[: 1 << 20]
        assert modelscope.find(names.HubId(REPO, hub="ms"), here) is None
        faults.cut.clear()
        assert server.storage is not None
        server.storage.asked.clear()
        pull(here)
        assert server.storage.asked[-1][1]["range"] == f"bytes={1 << 20}-"
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS
    assert inside(kept(places)) == FETCHED


@pytest.mark.parametrize("ranges", [False, 7])
def test_a_server_that_does_not_continue_is_asked_for_all_of_it(places: Places, ranges: bool | int) -> None:
    faults = Faults(cut={"model.safetensors": [1 << 20]}, ranges=ranges)
    with serving(places, faults) as (_, here):
        pull(here)
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_broken_beginning_is_noticed_and_fetched_again(places: Places) -> None:
    kept(places).mkdir(parents=True)
    left = kept(places) / f"model.safetensors.{sha256(WEIGHTS)[:12]}.incomplete"
    left.write_bytes(bytes(1000))
    with serving(places) as (_, here):
        pull(here)
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("size", [0, len(WEIGHTS), len(WEIGHTS) + 5])
def test_a_beginning_of_any_length_is_dealt_with(places: Places, size: int) -> None:
    kept(places).mkdir(parents=True)
    left = kept(places) / f"model.safetensors.{sha256(WEIGHTS)[:12]}.incomplete"
    left.write_bytes((WEIGHTS + b"extra")[:size])
    with serving(places) as (_, here):
        pull(here)
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["api", "file"])
def test_a_status_that_passes_is_waited_for(places: Places, status: int, where: str) -> None:
    faults = Faults(**{where: [status, status]}, retry_after="0.05")
    with serving(places, faults) as (_, here):
        assert inside(pull(here).path) == FETCHED


def test_retry_after_is_honoured_but_bounded(places: Places) -> None:
    with serving(places, Faults(api=[429], retry_after="3600")) as (_, here):
        start = time.monotonic()
        pull(here)
        assert 0.1 <= time.monotonic() - start < 30


def test_a_failure_that_stays_is_told_with_what_to_check(places: Places) -> None:
    with serving(places, Faults(api=[500] * 99)) as (_, here), pytest.raises(DownloadError) as caught:
        pull(here)
    assert "500" in str(caught.value) and "MODELSCOPE_ENDPOINT" in str(caught.value)


def test_no_hub_at_all(places: Places) -> None:
    with pytest.raises(DownloadError, match="cannot be reached"):
        pull(at(places, "http://127.0.0.1:9"))
    assert not places.of_modelscope().exists()


@pytest.mark.parametrize("endpoint", ["", "nonsense", "ftp://x", "http://", "https://modelscope.cn:port"])
def test_an_impossible_address_is_one_of_our_errors(places: Places, endpoint: str) -> None:
    with pytest.raises(DownloadError, match="address"):
        pull(at(places, endpoint))


def test_an_unknown_model_says_what_it_may_be(places: Places) -> None:
    with serving(places) as (_, here), pytest.raises(ModelNotFoundError) as caught:
        pull(here, "ms:Shanghai_AI_Laboratory/internlm2_5-7b-chta")
    assert "ms:internlm2_5-7b-chat" in str(caught.value) and "MODELSCOPE_API_TOKEN" in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_private_model_says_how_to_get_access(places: Places, status: int) -> None:
    with serving(places, Faults(api=[status])) as (_, here), pytest.raises(ModelNotFoundError, match="API_TOKEN"):
        pull(here)


def test_a_page_in_place_of_data_is_told(places: Places) -> None:
    with serving(places, Faults(page=True)) as (_, here), pytest.raises(DownloadError, match="web page"):
        pull(here)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense",
        b"[]",
        b"3",
        b"{}",
        b'{"Data": 3}',
        b'{"Data": {"Files": 3}}',
        b'{"Data": {"Files": [3]}}',
        b'{"Data": {"Files": [{}]}}',
        b'{"Data": {"Files": [{"Path": "config.json", "Size": true, "Sha256": ""}]}}',
        b'{"Data": {"Files": [{"Path": "config.json", "Size": "9", "Sha256": ""}]}}',
        b'{"Data": {"Files": [{"Path": "config.json", "Size": -1, "Sha256": ""}]}}',
        b'{"Data": {"Files": [{"Path": "config.json", "Size": 1, "Sha256": "../x"}]}}',
        b'{"Data": {"Files": [{"Path": "config.json", "Size": 1, "Sha256": 5}]}}',
        b"[" * 100_000,
        b'{"Code": 500, "Message": "busy", "Success": false, "Data": null}',
    ],
)
def test_an_answer_of_another_shape_is_one_of_our_errors(places: Places, answer: bytes) -> None:
    class Odd(ModelScope):
        def tell(self, request: object, told: object, *, body: bool) -> None:
            self.send(request, 200, answer, body=body)  # type: ignore[arg-type]

    with Odd({REPO: {"master": FILES}}) as server, pytest.raises(DownloadError):
        pull(at(places, server.url))
    assert not inside(places.of_modelscope())


def test_an_enormous_answer_is_not_read_to_its_end(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanlin.hub.web.Limits", lambda: Limits(answer=10_000))
    extra = [{"Path": f"{n}.txt", "Size": 1, "Sha256": ""} for n in range(1000)]
    with serving(places) as (server, here):
        server.extra += extra
        with pytest.raises(DownloadError, match="more than 10000 bytes"):
            pull(here)


def test_a_listing_of_too_many_files_is_refused(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanlin.hub.files._MOST_FILES", 50)
    with serving(places) as (server, here):
        server.extra += [{"Path": f"{n}.txt", "Size": 1, "Sha256": ""} for n in range(60)]
        with pytest.raises(DownloadError, match="more than 50 files"):
            pull(here)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/evil.model",
        "a/../../evil.gguf",
        "..\\evil.model",
        "C:evil.model",
        "a//b.gguf",
        "a\x00.model",
        "Config.json",
        "config.json",
        ".hanlin-fetching",
        "x" * 600,
        "LICENSE.",
    ],
)
def test_names_that_lead_outside_or_are_there_twice_are_refused_before_anything_is_fetched(
    places: Places, name: str
) -> None:
    with serving(places) as (server, here):
        server.extra.append({"Path": name, "Type": "blob", "Size": 4, "Sha256": sha256(b"evil")})
        with pytest.raises(DownloadError, match=r"outside the repository|listed twice"):
            pull(here)
        assert not any("FilePath" in path for path, _ in server.asked)
    assert not inside(places.of_modelscope())


@pytest.mark.parametrize("kind", ["file", "directory", "beginning", "root"])
def test_nothing_is_written_through_a_link(places: Places, tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "model.safetensors").write_bytes(b"mine")
    folder = kept(places)
    if kind == "directory":
        folder.parent.mkdir(parents=True)
        folder.symlink_to(precious)
    elif kind == "root":
        places.of_modelscope().mkdir()
        (places.of_modelscope() / "models").symlink_to(precious)
    else:
        folder.mkdir(parents=True)
        beginning = f".{sha256(WEIGHTS)[:12]}.incomplete" if kind == "beginning" else ""
        (folder / f"model.safetensors{beginning}").symlink_to(precious / "model.safetensors")
    with serving(places) as (_, here):
        if kind in ("directory", "root"):
            with pytest.raises(DownloadError, match="is a link"):
                pull(here)
        else:
            pull(here)
            assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (precious / "model.safetensors").read_bytes() == b"mine"
    assert len(list(precious.iterdir())) == 1


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (Faults(wrong={"model.safetensors": b"\xee" * len(WEIGHTS)}), "has the hash"),
        (Faults(wrong={"model.safetensors": WEIGHTS + b"!"}), "answers with"),
        (Faults(wrong={"model.safetensors": WEIGHTS[:-1]}), "answers with"),
        (Faults(announced={"model.safetensors": 12}), "answers with 12 bytes"),
        (Faults(wrong={"config.json": b"<html>" + b" " * 19}), "config.json has the hash"),
    ],
)
def test_other_content_than_listed_is_never_in_place_and_the_next_try_mends_it(
    places: Places, faults: Faults, told: str
) -> None:
    with serving(places, faults) as (_, here):
        with pytest.raises(DownloadError, match=told):
            pull(here)
        assert modelscope.find(names.HubId(REPO, hub="ms"), here) is None
        faults.wrong.clear()
        faults.announced.clear()
        assert inside(pull(here).path) == FETCHED
    assert all((kept(places) / name).read_bytes() == FILES[name] for name in FETCHED)


def test_a_trickle_is_given_up(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Limits(pause=0.01, attempts=2, slow_time=0.3, slow_rate=1000.0)
    monkeypatch.setattr("hanlin.hub.web.Limits", lambda: slow)
    start = time.monotonic()
    with (
        serving(places, Faults(trickle={"model.safetensors": 0.05})) as (_, here),
        pytest.raises(DownloadError, match=r"sent \d+ bytes"),
    ):
        pull(here)
    assert time.monotonic() - start < 10


def test_silence_is_given_up(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanlin.hub.web.Limits", lambda: Limits(pause=0.01, attempts=2, read=0.3))
    with (
        serving(places, Faults(trickle={"model.safetensors": 1.0})) as (_, here),
        pytest.raises(DownloadError, match="ReadTimeout"),
    ):
        pull(here)


def test_the_token_goes_to_the_hub_alone(places: Places) -> None:
    with serving(at(places, "", modelscope_token="secret-token")) as (server, here):
        pull(here)
        assert server.storage is not None and server.storage.asked
        for _, headers in server.asked:
            assert headers["authorization"] == "Bearer secret-token"
            assert headers["cookie"] == "m_session_id=secret-token"
        for path, headers in server.storage.asked:
            assert "secret-token" not in path + str(headers)
    assert "secret-token" not in repr(here)


def test_a_way_back_does_not_bring_the_token_again(places: Places) -> None:
    class Back(Storage):
        def answer(self, request: object, *, body: bool) -> None:
            self.redirect(request, f"{self.home}/api/v1/models/{REPO}/repo?FilePath=config.json", body=body)  # type: ignore[arg-type]

    back = Back()
    with back, ModelScope({REPO: {"master": FILES}}, storage=back) as server:
        back.home = server.url  # type: ignore[attr-defined]
        with pytest.raises(DownloadError):
            pull(at(places, server.url, modelscope_token="secret-token"))
        last = [headers for path, headers in server.asked if path.endswith("FilePath=config.json")]
        assert any("authorization" not in headers for headers in last)


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://user:word@127.0.0.1/x",
        "http://[",
        "//",
        "gopher:x",
        "javascript:1",
    ],
)
def test_redirects_to_odd_places_are_refused(places: Places, location: str) -> None:
    with serving(places, Faults(location=location)) as (_, here), pytest.raises(DownloadError):
        pull(here)


def test_redirects_in_a_circle_end(places: Places) -> None:
    faults = Faults()
    with serving(places, faults) as (server, here):
        faults.location = f"{server.url}/api/v1/models/{REPO}/repo?FilePath=config.json"
        with pytest.raises(DownloadError, match="redirects more than 5 times"):
            pull(here)
        assert len(server.asked) < 60


def test_offline_says_so_and_asks_nobody(places: Places) -> None:
    with serving(places) as (server, here):
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
            pull(at(here, server.url, offline=True))
        assert not server.asked


def test_revisions_stand_side_by_side(places: Places) -> None:
    models = {REPO: {"master": FILES, "v1.0": {**FILES, "config.json": b'{"old": true}'}}}
    with ModelScope(models) as server:
        here = at(places, server.url)
        pull(here)
        old = pull(here, revision="v1.0")
        assert old.path.name == "v1.0" and old.id == f"ms:{REPO}@v1.0"
        assert hub.resolve(f"ms:{REPO}@v1.0", places=here, report=Report(None)) == old
        assert hub.resolve(f"ms:{REPO}", places=here, report=Report(None)).path == kept(places)
        with pytest.raises(DownloadError, match="no revision 'v2'"):
            pull(here, f"ms:{REPO}@v2")
        with pytest.raises(ConfigError, match="--revision says"):
            pull(here, f"ms:{REPO}@v1.0", revision="v2")
        for odd in ("refs/pr/1", "../x", "a b", ""):
            if odd:
                with pytest.raises(HanlinError):
                    pull(here, revision=odd)


def test_a_new_revision_of_a_branch_is_never_mixed_with_the_old(places: Places) -> None:
    with serving(places) as (_, here):
        pull(here)
    new = {**FILES, "config.json": b'{"model_type": "new"}', "model.safetensors": WEIGHTS[::-1]}
    faults = Faults(cut={"model.safetensors": [1000] + [0] * 20})
    with serving(places, faults, new) as (_, here):
        with pytest.raises(DownloadError):
            pull(here)
        with pytest.raises(ModelNotFoundError, match="hanlin pull ms:someone/model"):
            hub.resolve(f"ms:{REPO}", fetch=False, places=here, report=Report(None))
        faults.cut.clear()
        assert hub.resolve(f"ms:{REPO}", places=here, report=Report(None)).path == kept(places)
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert inside(kept(places)) == FETCHED


def test_include_and_exclude(places: Places) -> None:
    with serving(places) as (_, here):
        assert inside(pull(here, include=["*.json", "nested/"]).path) == {
            "config.json",
            "configuration.json",
            "nested/model.safetensors",
        }
    with serving(at(places, "", modelscope_cache=places.home / "second")) as (_, here):
        assert inside(pull(here, exclude=["*.safetensors", "README*"]).path) == {
            "config.json",
            "tokenizer.model",
            "MODEL_LICENSE",
        }
        with pytest.raises(DownloadError, match=r"only data files.*modeling_chatglm\.py"):
            pull(here, include=["*.py"])
        with pytest.raises(DownloadError, match="left by --include"):
            pull(here, include=["nothing*"])


def test_what_is_fetched_is_said_with_its_licence_and_terms_once(places: Places) -> None:
    stream = io.StringIO()
    files = {**FILES}
    with serving(places, files=files) as (server, here):
        server.unhashed.add("README.md")
        hub.pull(f"ms:{REPO}", places=here, report=Report(stream))
    said = stream.getvalue()
    assert said.count("licence Apache License 2.0") == 1 and "no checksum for README.md" in said
    assert "ms:someone/model: 5 files, 3.1 MB" in said


def test_no_room_is_told_before_anything_is_fetched(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda path: Usage)
    with serving(places) as (server, here):
        with pytest.raises(DownloadError, match=r"needs 3\.1 MB more.*\n.*MODELSCOPE_CACHE"):
            pull(here)
        assert not any("FilePath" in path for path, _ in server.asked)


CHILD = """
import sys, resource, signal
from pathlib import Path
from hanlin import hub
from hanlin.errors import HanlinError
from hanlin.hub import Places, Report
home, url, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
places = Places(home=home / "home", hub_cache=home / "hub", modelscope_cache=home / "ms", modelscope=url)
try:
    print(hub.pull("ms:someone/model", places=places, report=Report(sys.stderr)).path)
except HanlinError as error:
    print(error)
    raise SystemExit(1)
except KeyboardInterrupt:
    raise SystemExit(130)
"""


def child(places: Places, url: str, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(places.home.parent), url, str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_full_disk_leaves_what_came_and_the_next_run_goes_on(places: Places) -> None:
    with serving(places) as (server, here):
        process = child(places, server.url, limit=1 << 20)
        out, _ = process.communicate(timeout=150)
        assert process.returncode == 1 and "disk is full" in out and "MODELSCOPE_CACHE" in out
        (left,) = kept(places).glob("model.safetensors.*.incomplete")
        assert 0 < left.stat().st_size <= 1 << 20
        assert server.storage is not None
        server.storage.asked.clear()
        pull(here)
        assert server.storage.asked[-1][1]["range"] == f"bytes={1 << 20}-"
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_is_gone_on_with(places: Places, how: int) -> None:
    faults = Faults(trickle={"model.safetensors": 0.001})
    with serving(places, faults) as (server, here):
        process = child(places, server.url)
        until = time.monotonic() + 100
        while time.monotonic() < until:
            left = list(kept(places).glob("model.safetensors.*.incomplete"))
            if left and left[0].stat().st_size > 0:
                break
            time.sleep(0.02)
        process.send_signal(how)
        process.communicate(timeout=20)
        assert process.returncode == (130 if how == signal.SIGINT else -how)
        assert modelscope.find(names.HubId(REPO, hub="ms"), here) is None
        faults.trickle.clear()
        pull(here)
    assert (kept(places) / "model.safetensors").read_bytes() == WEIGHTS
    assert inside(kept(places)) == FETCHED


def test_two_processes_fetch_one_model_once(places: Places) -> None:
    with serving(places, Faults(trickle={"tokenizer.model": 0.5})) as (server, _):
        processes = [child(places, server.url) for _ in range(2)]
        try:
            outs = [process.communicate(timeout=150) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [0, 0], outs
        assert server.storage is not None
        assert sum(path.startswith("/model.safetensors") for path, _ in server.storage.asked) == 1
    assert inside(kept(places)) == FETCHED


@pytest.mark.parametrize(
    "layout",
    [
        "models/ZhipuAI--chatglm3-6b/snapshots/master",
        "models/ZhipuAI--chatglm3-6b/snapshots/v1.0",
        "models/ZhipuAI/chatglm3-6b",
        "hub/models/ZhipuAI/chatglm3-6b",
        "hub/ZhipuAI/chatglm3-6b",
        "ZhipuAI/chatglm3-6b",
    ],
)
def test_what_its_own_client_has_fetched_is_found_listed_and_removed(places: Places, layout: str) -> None:
    folder = places.of_modelscope() / layout
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")
    (folder / ".msc").write_bytes(b"\x80\x04pickle")
    for name in ("ms:ZhipuAI/chatglm3-6b", "chatglm3-6b", "THUDM/chatglm3-6b", "ms:chatglm3-6b", "zai-org/chatglm3-6b"):
        found = hub.resolve(name, fetch=False, places=places, report=Report(None))
        assert (found.path, found.id) == (folder, "ms:ZhipuAI/chatglm3-6b")
    with pytest.raises(ModelNotFoundError):
        hub.resolve("hf:THUDM/chatglm3-6b", fetch=False, places=places, report=Report(None))
    (entry,) = hub.cached(places=places)
    assert (entry.id, entry.kind, entry.complete) == ("ms:ZhipuAI/chatglm3-6b", "safetensors", True)
    with pytest.raises(ConfigError, match="without @"):
        hub.remove("ms:ZhipuAI/chatglm3-6b@master", places=places)
    with pytest.raises(ModelNotFoundError):
        hub.remove("ox:chatglm3-6b", places=places)
    hub.remove("THUDM/chatglm3-6b", places=places)
    assert hub.cached(places=places) == []
    assert not folder.exists()


def test_dots_in_names_of_earlier_clients(places: Places) -> None:
    folder = places.of_modelscope() / "hub" / "models" / "someone" / "Model-1___5"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")
    (folder.parent / "Model-1.5").symlink_to(folder)
    assert hub.resolve("ms:someone/Model-1.5", fetch=False, places=places, report=Report(None)).path == folder
    assert [entry.id for entry in hub.cached(places=places)] == ["ms:someone/Model-1.5"]


def test_a_directory_of_an_earlier_client_is_completed_where_it_is(places: Places) -> None:
    folder = places.of_modelscope() / "hub" / "models" / "someone" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(FILES["config.json"])
    with serving(places) as (server, here):
        assert pull(here).path == folder
        assert not any("FilePath=config.json" in path for path, _ in server.asked)
    assert inside(folder) == FETCHED


def test_a_listing_cut_at_the_interfaces_limit_is_asked_for_again(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelscope, "_MOST_LISTED", len(FILES))
    with serving(places) as (server, here):
        pull(here)
        assert [path for path, _ in server.asked if "Recursive=False" in path]


def test_another_spelling_of_a_name_is_tried(places: Places) -> None:
    for there in ("ZhipuAI/ChatGLM-6B", "ZhipuAI/chatglm-6b"):
        with serving(at(places, "", modelscope_cache=places.home / there), repo=there) as (server, here):
            pull(here, "ms:THUDM/chatglm-6b")
            assert any(there.lower() in path.lower() for path, _ in server.asked)


def test_the_switch_of_the_environment_chooses_the_hub(places: Places) -> None:
    with serving(places, repo="Shanghai_AI_Laboratory/internlm2-chat-7b") as (_, here):
        found = hub.resolve("internlm2-chat-7b", places=at(here, here.modelscope, hub="ms"), report=Report(None))
    assert found.id == "ms:Shanghai_AI_Laboratory/internlm2-chat-7b"
    again = hub.resolve("internlm/internlm2-chat-7b", fetch=False, places=places, report=Report(None))
    assert again == found
