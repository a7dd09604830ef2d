"""Fetching from the Hugging Face Hub: huggingface_hub itself against a hub on loopback, faults included."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hub_fakes import FakeHub, HubFaults, Repository
from hub_servers import Storage

from hanlin import hub
from hanlin.errors import DownloadError, ModelNotFoundError
from hanlin.hub import Places, Report, files, huggingface
from hanlin.hub.names import HubId

WEIGHTS = bytes(range(256)) * 300
SHARDS = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 5000 for n in (1, 2)}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
BAIT = b"open('bitten', 'w')"

MODEL = {
    "config.json": b'{"model_type": "internlm2"}',
    "model.safetensors.index.json": INDEX.encode(),
    **SHARDS,
    "tokenizer.model": b"\x0a\x0b",
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"Apache",
    "README.md": b"---\nlicense: apache-2.0\n---\n# Model",
    "modeling_internlm2.py": BAIT,
    "tokenization_internlm2.py": BAIT,
    "pytorch_model.bin": WEIGHTS,
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "assets/picture.png": b"png",
    "onnx/model.safetensors": b"other",
}
REPO = "someone/model"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@contextmanager
def serving(
    files: dict[str, bytes], cache: Path, faults: HubFaults | None = None, repo: str = REPO
) -> Iterator[tuple[FakeHub, Places]]:
    with FakeHub({repo: Repository(files)}, faults) as server:
        yield server, Places(home=cache.parent / "home", hub_cache=cache, endpoint=server.url)


def pull(model: str, places: Places) -> hub.Location:
    return hub.pull(model, places=places, report=Report(None))


def offline(places: Places) -> Places:
    """The same caches, and a hub that is not there."""
    return Places(home=places.home, hub_cache=places.hub_cache, endpoint="http://127.0.0.1:9")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_data_files_are_fetched_and_found_again_offline(cache: Path) -> None:
    with serving(MODEL, cache) as (server, places):
        found = pull(REPO, places)
    assert found.kind == "directory" and found.id == REPO
    skipped = {"pytorch_model.bin", "training_args.bin", "optimizer.pt", "assets/picture.png", "onnx/model.safetensors"}
    assert names(found.path) == {name for name in MODEL if not name.endswith(".py")} - skipped
    assert all((found.path / name).read_bytes() == MODEL[name] for name in names(found.path))
    assert not any(path.endswith(".py") for path in server.requested)
    assert BAIT not in {path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    again = hub.resolve(REPO, places=offline(places), report=Report(None))
    assert again == found


def test_bin_files_only_where_there_is_no_safetensors() -> None:
    assert files.choose(["config.json", "pytorch_model.bin", "model.safetensors"]) == [
        "config.json",
        "model.safetensors",
    ]
    assert "pytorch_model.bin" in files.choose(["config.json", "pytorch_model.bin", "training_args.bin"])
    assert "training_args.bin" not in files.choose(["config.json", "pytorch_model.bin", "training_args.bin"])
    chatglm = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    listed = ["config.json", "ice_text.model", "pytorch_model.bin.index.json", "quantization.py", *chatglm]
    assert files.choose(listed) == sorted(name for name in listed if not name.endswith(".py"))


def test_a_repository_without_weights_is_refused(cache: Path) -> None:
    with (
        serving({"config.json": b"{}", "README.md": b""}, cache) as (_, places),
        pytest.raises(DownloadError) as caught,
    ):
        pull(REPO, places)
    assert "no weights that Hanlin reads" in str(caught.value)
    assert not names(cache)


GGUF = {
    "model-Q8_0.gguf": b"GGUF8" * 99,
    "model-Q4_K_M.gguf": b"GGUF4" * 99,
    "IQ2/model-IQ2_XS-00001-of-00002.gguf": b"GGUF2a",
    "IQ2/model-IQ2_XS-00002-of-00002.gguf": b"GGUF2b",
    "mmproj-model-f16.gguf": b"GGUFv",
    "README.md": b"",
}


@pytest.mark.parametrize(
    ("model", "file", "fetched"),
    [
        (REPO, "model-Q4_K_M.gguf", {"model-Q4_K_M.gguf"}),
        (f"{REPO}:q8_0", "model-Q8_0.gguf", {"model-Q8_0.gguf"}),
        (f"hf:{REPO}:Q8_0", "model-Q8_0.gguf", {"model-Q8_0.gguf"}),
        (f"{REPO}:IQ2_XS", "IQ2/model-IQ2_XS-00001-of-00002.gguf", {n for n in GGUF if n.startswith("IQ2")}),
    ],
)
def test_one_gguf_of_many(cache: Path, model: str, file: str, fetched: set[str]) -> None:
    with serving(GGUF, cache) as (_, places):
        found = pull(model, places)
    assert found.kind == "gguf" and found.id == model.removeprefix("hf:")
    snapshot = cache / "models--someone--model" / "snapshots" / ("a" * 40)
    assert found.path == snapshot / file
    assert names(snapshot) == {"README.md", *fetched}
    assert hub.resolve(model, places=offline(places), report=Report(None)) == found


def test_an_unknown_tag_lists_the_known(cache: Path) -> None:
    with serving(GGUF, cache) as (_, places), pytest.raises(DownloadError, match=r"'Q5_0'.*model-Q8_0\.gguf"):
        pull(f"{REPO}:Q5_0", places)


def test_a_tag_does_not_match_half_a_name() -> None:
    assert files.choose(["m-IQ4_K_M.gguf", "m-Q4_K.gguf"], "Q4_K_M") == []
    assert files.choose(["m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf"], "Q4_K_XL")[0] in (
        "m-Q4_K_XL.gguf",
        "m-UD-Q4_K_XL.gguf",
    )


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
    ],
)
def test_names_that_lead_outside_are_refused_before_anything_is_fetched(cache: Path, name: str) -> None:
    with serving({**MODEL, name: b"evil"}, cache) as (server, places):
        with pytest.raises(DownloadError, match="outside the repository"):
            pull(REPO, places)
        assert not any("/resolve/" in path for path in server.requested)
    assert not names(cache.parent)


def test_an_unknown_repository_has_near_matches(cache: Path) -> None:
    with serving(MODEL, cache) as (_, places), pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("internlm/internlm2_5-7b-chta", places=places, report=Report(None))
    message = str(caught.value)
    assert "internlm/internlm2_5-7b-chat" in message and "HF_TOKEN" in message and "no directory" in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_how_to_get_access(cache: Path, status: int) -> None:
    faults = HubFaults(failures=99, status=status)
    with serving(MODEL, cache, faults) as (_, places), pytest.raises(ModelNotFoundError, match="HF_TOKEN"):
        pull(REPO, places)


def test_no_hub_at_all_says_what_to_check(cache: Path) -> None:
    places = Places(home=cache.parent / "home", hub_cache=cache, endpoint="http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="HF_ENDPOINT"):
        pull(REPO, places)
    assert not names(cache)


def test_a_failure_that_passes_is_tried_again(cache: Path) -> None:
    with serving(MODEL, cache, HubFaults(failures=1)) as (_, places):
        assert (pull(REPO, places).path / "config.json").is_file()


def test_a_failure_that_stays_is_told(cache: Path) -> None:
    with serving(MODEL, cache, HubFaults(failures=10**6)) as (_, places), pytest.raises(DownloadError, match="500"):
        pull(REPO, places)


def test_other_content_than_the_hub_lists_is_deleted_and_the_next_try_mends_it(cache: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    faults = HubFaults(wrong={shard: b"\xff" * 5000, "config.json": b'{"model_type": "internlmX"}'})
    with serving(MODEL, cache, faults) as (_, places):
        with pytest.raises(DownloadError) as caught:
            pull(REPO, places)
        assert shard in str(caught.value) and "config.json" in str(caught.value)
        assert huggingface.find(HubId(REPO), places) is None
        faults.wrong.clear()
        assert (pull(REPO, places).path / shard).read_bytes() == MODEL[shard]


def test_a_wrong_etag_does_not_hide_wrong_content(cache: Path) -> None:
    """Whoever serves other content also says that its hash is right: only the listing counts."""
    evil = b"\xee" * len(WEIGHTS)
    faults = HubFaults(wrong={"model.safetensors": evil}, etag={"model.safetensors": "e" * 64})
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    refused = pytest.raises(DownloadError, match=r"model\.safetensors has another length or hash")
    with serving(files, cache, faults) as (_, places), refused:
        pull(REPO, places)
    assert evil not in {path.read_bytes() for path in cache.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_body_cut_short_is_not_kept(cache: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    faults = HubFaults(cut={"model.safetensors"})
    with serving(files, cache, faults) as (_, places):
        with pytest.raises(DownloadError):
            pull(REPO, places)
        assert huggingface.find(HubId(REPO), places) is None
        faults.cut.clear()
        assert (pull(REPO, places).path / "model.safetensors").read_bytes() == WEIGHTS


def test_an_interrupted_fetch_is_not_taken_for_a_model(cache: Path) -> None:
    with serving(MODEL, cache) as (_, places):
        found = pull(REPO, places)
        (found.path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelNotFoundError, match="hanlin pull someone/model"):
            hub.resolve(REPO, places=places, report=Report(None), fetch=False)
        assert hub.resolve(REPO, places=places, report=Report(None)) == found
        assert (found.path / "model-00002-of-00002.safetensors").is_file()


def test_models_cached_under_an_earlier_name_are_found(cache: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    with serving(files, cache, repo="zai-org/chatglm-6b") as (_, places):
        pull("THUDM/chatglm-6b", places)
    (cache / "models--zai-org--chatglm-6b").rename(cache / "models--THUDM--chatglm-6b")
    for name in ("THUDM/chatglm-6b", "zai-org/chatglm-6b", "chatglm-6b", "hf:chatglm-6b"):
        assert "THUDM" in str(hub.resolve(name, places=offline(places), report=Report(None)).path)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": 3}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"weight_map": {"a": ["x"]}}',
    ],
)
def test_a_broken_index_is_an_incomplete_model_not_a_crash(tmp_path: Path, index: bytes) -> None:
    for name, data in {**MODEL, "model.safetensors.index.json": index}.items():
        if "/" not in name:
            (tmp_path / name).write_bytes(data)
    assert not files.complete(tmp_path)


def test_what_is_fetched_is_said(cache: Path) -> None:
    stream = io.StringIO()
    with serving(MODEL, cache) as (_, places):
        hub.pull(REPO, places=places, report=Report(stream))
    assert "someone/model: 10 files, 10 kB, licence apache-2.0." in stream.getvalue()


def test_a_revision_patterns_and_offline(cache: Path) -> None:
    with serving(MODEL, cache) as (server, places):
        found = hub.pull(REPO, revision="a" * 40, include=["*.json"], places=places, report=Report(None))
        assert names(found.path) == {name for name in MODEL if name.endswith(".json")}
        assert any(f"revision/{'a' * 40}" in path for path in server.requested)
        with pytest.raises(DownloadError, match=r"modeling_internlm2\.py"):
            hub.pull(REPO, include=["*.py"], places=places, report=Report(None))
        whole = pull(f"{REPO}@{'a' * 40}", places)
        assert hub.resolve(f"hf:{REPO}@{'a' * 40}", places=offline(places), report=Report(None)).path == whole.path
        with pytest.raises(ModelNotFoundError):
            hub.resolve(f"{REPO}@v2", fetch=False, places=places, report=Report(None))
        silent = Places(home=places.home, hub_cache=cache / "new", endpoint=server.url, offline=True)
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
            pull(REPO, silent)


def test_the_token_is_not_carried_to_another_host(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Storage() as storage:

        class Redirecting(FakeHub):
            def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
                tokens.append(request.headers.get("Authorization"))
                super().answer(request, body=body)

            def send(
                self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers=None, *, body: bool
            ) -> None:  # type: ignore[no-untyped-def,override]
                if "model.safetensors" in request.path and status == 200 and headers:
                    linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
                    away = {**headers, **linked, "Location": f"{storage.url}/model.safetensors"}
                    super().send(request, 302, b"", away, body=body)
                    return
                super().send(request, status, data, headers, body=body)

        tokens: list[str | None] = []
        storage.files["model.safetensors"] = WEIGHTS
        files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
        with Redirecting({REPO: Repository(files)}) as server:
            places = Places(home=cache.parent / "home", hub_cache=cache, endpoint=server.url)
            assert (pull(REPO, places).path / "model.safetensors").read_bytes() == WEIGHTS
        assert "Bearer hf_secret" in tokens
        assert storage.asked and not any("hf_secret" in str(asked) for asked in storage.asked)
