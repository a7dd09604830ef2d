"""Images on the chat page in a real Chromium: attached, pasted and dropped, shown, sent and kept."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("PIL", reason="needs Pillow: pip install 'hanlin[vision]'")

from page_browser import Browser, needs_chromium

from hanlin.serve.settings import ModelSpec, ServeConfig
from serving import serving
from visualglm_directory import picture, write

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
OPTIONS = {"dtype": "float32", "packed_cache": False, "cache_max_entry_count": 64}
# A file in the hands of the page, as pasting and dropping bring one.
_BRING = """
const bytes = Uint8Array.from(atob(arguments[1]), (c) => c.charCodeAt(0));
const held = new DataTransfer();
held.items.add(new File([bytes], "a", { type: arguments[2] }));
const target = document.querySelector(arguments[0] === "paste" ? "#message" : "#main");
const how = { bubbles: true, cancelable: true };
const event = arguments[0] === "paste" ? new ClipboardEvent("paste", { clipboardData: held, ...how })
  : new DragEvent("drop", { dataTransfer: held, ...how });
target.dispatchEvent(event);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    needs_chromium()
    path = write(tmp_path_factory.mktemp("visualglm") / "visualglm-6b")
    with serving(ServeConfig(models=(ModelSpec(source=str(path), name="sees", options=OPTIONS),))) as url:
        browser = Browser(url, tmp_path_factory.mktemp("profile"))
        yield browser
        browser.close()


def bring(page: Browser, how: str, data: bytes, kind: str = "image/png") -> None:
    page.js(_BRING, how, base64.b64encode(data).decode(), kind)


def attached(page: Browser) -> str:
    return page.wait(lambda: page.js("return document.querySelector('#attached img')?.src"), "the image", 60)


def test_an_image_is_attached_sent_and_kept(page: Browser, tmp_path: Path) -> None:
    assert page.find("#attach").is_displayed() and page.find("#attach").get_attribute("aria-label") == "Attach an image"
    data, file = picture(1), tmp_path / "picture.png"
    file.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    page.find("#attach-file").send_keys(str(file))
    assert attached(page) == uri  # small ones go as they are
    page.press("#attached button")
    assert page.all("#attached img") == [] and page.focused == "message"
    bring(page, "paste", data)
    assert attached(page) == uri
    if not page.find("#settings").is_displayed():
        page.press("#settings-open")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "6")
    page.say("你好")
    assert page.all("#attached img") == []
    shown = {"type": "image_url", "image_url": {"url": uri}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": "你好"}]}]
    assert page.js("return window.sent.at(-1).messages") == messages
    body = {"model": "sees", "messages": messages, "temperature": 0, "max_tokens": 6}
    answer = httpx.post(f"{page.url}/v1/chat/completions", json=body, timeout=120).json()
    assert page.all(".failure") == []
    stored = page.module("store.js", "return Object.values((await (await m.Store.open()).all())[0].nodes).at(-1)")
    assert stored["content"] == answer["choices"][0]["message"]["content"]
    assert page.js("return [...document.querySelectorAll('.user img')].map((e) => [e.src, e.alt])") == [[uri, "Image"]]
    page.open(page.js("return location.hash"))  # as after closing the tab
    assert page.js("return document.querySelector('.user img').src") == uri
    page.say("问")  # the image stays part of the conversation
    assert page.js("return window.sent.at(-1).messages")[0] == messages[0]
    node = {"id": "a", "role": "user", "content": "c", "images": [uri, "https://a/b.png", "data:text/html;base64,AA=="]}
    kept = page.module("tree.js", "return m.imported(m.exported([a[0]]))", {"id": "x", "nodes": {"a": node}})
    assert kept[0]["nodes"]["a"]["images"] == [uri]
    assert page.foreign() == []


def test_large_ones_become_small_and_wrong_ones_are_told(page: Browser) -> None:
    page.press("#new")
    page.complaints()
    bring(page, "drop", picture(2, "PNG", (1500, 1400)))
    assert attached(page).startswith("data:image/jpeg;base64,")
    size = page.js("const i = document.querySelector('#attached img'); return [i.naturalWidth, i.naturalHeight]")
    assert size == [1024, 956]
    page.press("#attached button")
    bring(page, "paste", b"no image")
    page.wait(lambda: page.texts("#attached .wrong") == ["This image cannot be read."], "the complaint", 60)
    bring(page, "paste", b"plain", "text/plain")
    assert page.all("#attached img") == []
    bring(page, "paste", picture(1))
    attached(page)
    page.find("#message").send_keys("\n")  # an image alone is a message
    page.finish()
    sent = page.js("return window.sent.at(-1).messages")
    assert [part["type"] for part in sent[0]["content"]] == ["image_url", "text"]
    bring(page, "paste", picture(2))
    attached(page)
    page.say("问")
    assert "shows 2 images" in page.find(".failure").text
    assert page.foreign() == []


def test_models_that_cannot_see_get_no_button(page: Browser) -> None:
    code = "const p = new m.Pictures(() => {}); p.allow(false); const hidden = p.button.hidden; p.allow(true);"
    assert page.module("pictures.js", f"{code} return [hidden, p.button.hidden]") == [True, False]
