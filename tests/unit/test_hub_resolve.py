from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanlin import hub
from hanlin.errors import HanlinError, ModelNotFoundError
from hanlin.hub import Places, Report, default


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(home=tmp_path / "home", hub_cache=tmp_path / "hub", endpoint="http://127.0.0.1:9")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def resolve(model: str | Path | None, places: Places) -> hub.Location:
    return hub.resolve(model, fetch=False, places=places, report=Report(None))


def model_directory(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}", encoding="utf-8")
    return path


def fetched_default(places: Places) -> Path:
    path = default.location(hub.DEFAULT, places)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(hub.DEFAULT.size)
    return path


def test_no_model_is_the_default(places: Places) -> None:
    with pytest.raises(ModelNotFoundError, match="hanlin pull"):
        resolve(None, places)
    path = fetched_default(places)
    for name in (None, "smollm2", "SmolLM2-135M-Instruct"):
        assert resolve(name, places) == hub.Location(path=path, kind="gguf", id="smollm2")


def test_a_default_of_another_size_is_not_taken_for_whole(places: Places) -> None:
    with fetched_default(places).open("wb") as file:
        file.truncate(5)
    with pytest.raises(ModelNotFoundError, match="hanlin pull"):
        resolve(None, places)


@pytest.mark.parametrize("spelling", ["model", "./model", "model/", "{here}/model"])
def test_a_directory(places: Places, here: Path, spelling: str) -> None:
    model_directory(here / "model")
    found = resolve(spelling.format(here=here), places)
    assert (found.kind, found.id) == ("directory", "model")
    assert found.path.samefile(here / "model")
    assert resolve(here / "model", places).kind == "directory"


def test_a_home_directory_is_expanded(places: Places, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    model_directory(here / "model")
    assert resolve("~/model", places).path == here / "model"


def test_a_gguf_file_with_or_without_its_suffix(places: Places, here: Path) -> None:
    for name in ("m.gguf", "0123abcd"):
        (here / name).write_bytes(b"GGUF")
        assert resolve(name, places) == hub.Location(path=Path(name), kind="gguf", id=Path(name).stem)


def test_a_directory_with_one_gguf_is_that_file(places: Places, here: Path) -> None:
    (here / "d").mkdir()
    for part in (1, 2):
        (here / "d" / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    assert resolve("./d", places).path == Path("d/m-00001-of-00002.gguf")
    (here / "d" / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"several models.*m-00001-of-00002\.gguf, other\.gguf"):
        resolve("./d", places)


def test_one_file_of_a_directory_names_the_directory(places: Places, here: Path) -> None:
    folder = model_directory(here / "model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="Name its directory: model"):
        resolve("model/model.safetensors", places)


def test_a_directory_without_a_model(places: Places, here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        resolve("./empty", places)
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        resolve(here / "empty", places)


def test_a_path_that_exists_wins_over_a_name_but_only_if_it_is_a_model(places: Places, here: Path) -> None:
    model_directory(here / "internlm" / "internlm2-7b")
    assert resolve("internlm/internlm2-7b", places).path == Path("internlm/internlm2-7b")
    (here / "smollm2").mkdir()  # somebody's source tree
    path = fetched_default(places)
    assert resolve("smollm2", places).path == path


def test_hf_prefix_never_means_a_path(places: Places, here: Path) -> None:
    model_directory(here / "internlm" / "internlm2-7b")
    with pytest.raises(ModelNotFoundError, match="hanlin pull internlm/internlm2-7b"):
        resolve("hf:internlm/internlm2-7b", places)


def test_a_misspelt_path_names_its_neighbours(places: Places, here: Path) -> None:
    model_directory(here / "internlm2-finetuned")
    with pytest.raises(ModelNotFoundError, match="internlm2-finetuned"):
        resolve("./internlm2-fintuned", places)


def test_a_misspelt_name_names_its_neighbours(places: Places) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("intenlm2_5-7b-chat", places)
    assert "internlm2_5-7b-chat" in str(caught.value) and "hanlin list" in str(caught.value)


def test_a_name_not_fetched_yet_says_the_command(places: Places) -> None:
    with pytest.raises(ModelNotFoundError, match="hanlin pull internlm/internlm2-chat-7b"):
        resolve("internlm2-chat-7b", places)


ODD = ["\0", "a" * 300, "/" * 300, "~nobody/x", "~0", "con", ":", "hf:", "a:b"]


@given(text=st.text(max_size=60) | st.sampled_from(ODD))
def test_any_text_is_found_or_refused_with_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    base = tmp_path_factory.getbasetemp() / "nothing"
    try:
        resolve(text, Places(home=base, hub_cache=base, endpoint="http://127.0.0.1:9"))
    except HanlinError as error:
        assert str(error)
    try:
        hub.remove(text, places=Places(home=base, hub_cache=base))
    except HanlinError as error:
        assert str(error)


def test_places_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HANLIN_HOME", str(tmp_path))
    assert Places.default().home == tmp_path
    monkeypatch.setenv("HANLIN_HOME", " ")
    assert Places.default().home.name == "hanlin"
