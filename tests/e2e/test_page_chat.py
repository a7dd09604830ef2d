"""The chat page in a real Chromium, against the real server with the default model: what a person does with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_browser import Browser, Keys, needs_chromium

from hanlin.serve.keys import KeyRing
from hanlin.serve.settings import ModelSpec, ServeConfig
from serving import serving

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    needs_chromium()
    with serving() as url:
        yield url


@pytest.fixture(scope="module")
def window(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(server, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(window: Browser) -> Iterator[Browser]:
    """The page as at a first visit. At the end nothing may have come from elsewhere, and the console must be empty."""
    window.open()  # so that nothing of the test before is still to be saved
    window.js("localStorage.clear(); sessionStorage.clear()")
    window.module(
        "store.js",
        "const s = await m.Store.open(); for (const c of await s.all()) await s.remove(c.id); s.database.close()",
    )
    window.open()
    window.complaints()
    yield window
    assert window.foreign() == []
    assert window.complaints() == []


def settings(page: Browser, **values: Any) -> None:
    """Set fields of the settings panel."""
    if not page.find("#settings").is_displayed():
        page.press("#settings-open")
    for name, value in values.items():
        page.fill("#" + name, str(value))


def greedy(page: Browser, tokens: int) -> None:
    settings(page, temperature=0, max_tokens=tokens)


def conversation(name: str, *nodes: dict[str, Any]) -> dict[str, Any]:
    """A conversation as the page exports it; each message below the one before."""
    ids = [f"{name}-{n}" for n in range(len(nodes))]
    made = {
        i: {"id": i, "parent": ids[n - 1] if n else None, "at": n, **node}
        for n, (i, node) in enumerate(zip(ids, nodes, strict=True))
    }
    return {"id": name, "title": "", "created": 1, "updated": 1, "nodes": made, "leaf": ids[-1]}


def bring(page: Browser, *conversations: dict[str, Any]) -> None:
    """Import a file through the page's own button."""
    path = page.profile / "import.json"
    path.write_text(json.dumps({"format": "hanlin-conversations", "version": 1, "conversations": conversations}))
    page.find("#import-file").send_keys(str(path))
    page.wait(lambda: any(c["id"] in page.find("#list").get_attribute("innerHTML") for c in conversations), "import")


def test_a_reply_streams_in_and_is_the_servers_own(page: Browser, server: str) -> None:
    greedy(page, 48)
    page.js(
        """window.seen = []; new MutationObserver(() => { const e = document.querySelector('.assistant .prose');
        if (e) window.seen.push(e.innerText.length); }).observe(document.body, {childList: true, subtree: true,
        characterData: true})"""
    )
    page.say("List three colours.")
    lengths = sorted(set(page.js("return window.seen")))
    assert len(lengths) > 3, "the reply did not come piece by piece"
    body = {"messages": [{"role": "user", "content": "List three colours."}], "temperature": 0, "max_tokens": 48}
    assert page.js("return window.sent[0].messages") == body["messages"]
    model = page.js("return document.querySelector('#model').value")
    answer = httpx.post(f"{server}/v1/chat/completions", json={"model": model, **body}, timeout=60).json()
    assert page.js("return window.sent[0].model") == model
    reply = answer["choices"][0]["message"]["content"]
    stored = page.module("store.js", "return Object.values((await (await m.Store.open()).all())[0].nodes).at(-1)")
    assert stored["content"] == reply
    assert stored["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"] <= 48
    numbers = page.find(".assistant .numbers").text
    assert f"{answer['usage']['completion_tokens']} tokens" in numbers
    assert re.search(r"\d tokens/s .* first after \d+\.\d\d s", numbers)
    spoken = page.wait(lambda: page.js("return document.querySelector('#announce').textContent"), "announcement")
    assert spoken.startswith("Reply finished. ")
    assert page.find("#context").text.endswith("of 8,192 tokens")
    shown = page.messages
    page.open(page.js("return location.hash"))  # as after closing the tab
    assert page.messages == shown
    assert page.titles == ["List three colours."]


def test_enter_sends_but_not_while_a_word_is_composed(page: Browser) -> None:
    settings(page, max_tokens=4)
    box = page.find("#message")
    box.click()
    page.command("Input.imeSetComposition", text="ni", selectionStart=2, selectionEnd=2)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    page.js("addEventListener('keydown', (e) => (window.composing = [e.key, e.isComposing]), true)")
    page.command("Input.dispatchKeyEvent", type="keyDown", **enter)
    page.command("Input.dispatchKeyEvent", type="keyUp", **enter)
    assert page.js("return window.composing") == ["Enter", True]
    assert page.messages == []
    page.command("Input.insertText", text="你好")
    box.send_keys(Keys.SHIFT, Keys.ENTER)
    box.send_keys("世界")
    assert page.messages == [] and box.get_attribute("value") == "你好\n世界"
    box.send_keys(Keys.ENTER)
    page.finish()
    assert page.messages[0] == ("user", "你好\n世界")
    assert page.js("return window.sent[0].messages") == [{"role": "user", "content": "你好\n世界"}]
    assert box.get_attribute("value") == ""
    box.send_keys("  ", Keys.ENTER)
    assert len(page.messages) == 2


def test_escape_stops_the_reply_and_the_model(page: Browser, server: str) -> None:
    page.js("window.extra = {ignore_eos: true}")
    greedy(page, 4000)
    page.say("Tell a long story.", finish=False)
    page.wait(lambda: len(page.messages) == 2 and len(page.messages[1][1]) > 40, "the first words")
    page.find("#message").send_keys("kept", Keys.ENTER)  # no second message while a reply is written
    assert len(page.messages) == 2
    page.keys(Keys.ESCAPE)
    page.wait(lambda: not page.busy, "the stop", 5)
    said = page.messages[1][1]
    assert "Stopped before its end." in page.texts(".state")
    assert page.focused == "message" and page.find("#message").get_attribute("value") == "kept"
    spoken = page.wait(lambda: page.js("return document.querySelector('#announce').textContent"), "announcement")
    assert spoken == "Stopped."

    def running() -> float:
        text = httpx.get(f"{server}/metrics").text
        found = re.findall(r"^hanlin:num_requests_running\{[^}]*\} ([\d.e+]+)$", text, re.M)
        assert found, text[:2000]
        return sum(map(float, found))

    page.wait(lambda: running() == 0, "the model's stop", 5)
    assert page.messages[1][1] == said


def test_retry_and_edit_make_branches(page: Browser) -> None:
    greedy(page, 6)
    page.say("One")
    page.say("Two")
    assert [role for role, _ in page.messages] == ["user", "assistant"] * 2
    page.js("document.querySelectorAll('.assistant')[1].querySelector('.retry').click()")
    page.finish()
    assert page.texts(".versions span[aria-hidden]") == ["2/2"]
    assert page.js("return window.sent[2]") == page.js("return window.sent[1]")  # the same question again
    page.js("document.querySelectorAll('.user')[0].querySelector('.edit').click()")
    assert page.focused == "Edit the message"
    page.keys(Keys.ESCAPE)
    assert page.focused == "Edit" and len(page.messages) == 4
    page.keys(Keys.ENTER)
    page.js("document.activeElement.value = ''")
    page.keys("Uno", Keys.ENTER)
    page.finish()
    assert [words for role, words in page.messages if role == "user"] == ["Uno"]
    assert [m["content"] for m in page.js("return window.sent[3].messages")] == ["Uno"]
    assert page.texts(".versions span[aria-hidden]") == ["2/2"]
    page.press(".versions .earlier")
    assert [words for role, words in page.messages if role == "user"] == ["One", "Two"]
    assert page.focused == "Later version"
    page.find("#message").send_keys(Keys.ARROW_UP)  # in an empty box: the last message
    assert page.focused == "Edit the message" and page.find(".editing textarea").get_attribute("value") == "Two"


def test_settings_are_sent_and_wrong_ones_are_named(page: Browser) -> None:
    settings(page, system="You are terse.", temperature=0.5, top_p=0.9, max_tokens=5, seed=7)
    page.fill("#stop-words", "zebra\\n\nEND")
    page.say("Hello")
    sent = page.js("return window.sent[0]")
    assert sent["messages"][0] == {"role": "system", "content": "You are terse."}
    wanted = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 5, "seed": 7, "stop": ["zebra\n", "END"], "stream": True}
    assert {name: sent[name] for name in wanted} == wanted
    assert "The reply reached its max tokens, or the end of the model’s context." in page.texts(".state")
    first = page.messages[1]
    page.press(".assistant .retry")
    page.finish()
    assert page.messages[1] == first  # the same seed, the same reply
    page.fill("#temperature", "3")
    assert page.find("#temperature-error").text == "A number from 0 to 2."
    assert page.find("#temperature").get_attribute("aria-invalid") == "true"
    page.fill("#tools", "{")
    assert page.find("#tools-error").text == "This is not a JSON list of tools."
    page.press("#reset")
    page.js("window.extra = {max_completion_tokens: 3}")
    page.say("Hello again")
    assert not {"temperature", "top_p", "max_tokens", "seed", "stop", "tools"} & set(page.js("return window.sent[2]"))
    page.fill("#system", "You are kind.")
    page.open(page.js("return location.hash"))  # at once: it is kept all the same
    assert page.find("#system").get_attribute("value") == "You are kind."
    page.press("#new")
    assert page.find("#system").get_attribute("value") == ""  # of that conversation only


def test_conversations_are_named_found_deleted_and_brought_back(page: Browser) -> None:
    settings(page, max_tokens=3)
    page.say("About apples")
    page.press("#new")
    assert page.messages == [] and page.focused == "message"
    page.say("About pears")
    assert page.titles == ["About pears", "About apples"]
    page.fill("#search", "APPLE")
    assert page.titles == ["About apples"]
    page.fill("#search", "quince")
    assert page.titles == [] and page.find("#list-empty").text == "Nothing found"
    page.find("#search").send_keys(Keys.CONTROL, "a")
    page.find("#search").send_keys(Keys.DELETE)
    page.press("#list [data-kind=rename]")
    page.keys(Keys.CONTROL, "a")
    page.keys("Fruit <b>", Keys.ENTER)
    assert page.titles == ["Fruit <b>", "About apples"] and page.find("#title").text == "Fruit <b>"
    page.press("#list li:nth-child(1) [data-kind=remove]")
    assert page.titles == ["About apples"] and page.messages == []
    assert "Deleted “Fruit <b>”." in page.find("#toast").text
    page.press("#toast button")
    page.wait(lambda: page.messages, "the conversation that was brought back")
    assert page.titles == ["Fruit <b>", "About apples"]
    page.press("#export")
    file = page.wait(lambda: [p for p in page.profile.glob("hanlin-*.json") if p.stat().st_size], "the export")[0]
    exported = json.loads(file.read_text("utf-8"))
    file.unlink()
    assert [c["title"] for c in exported["conversations"]] == ["Fruit <b>", ""]
    page.press("#list li:nth-child(2) [data-kind=remove]")
    bring(page, *exported["conversations"])
    page.wait(lambda: len(page.titles) == 2, "both")
    page.open()
    assert page.titles == ["Fruit <b>", "About apples"]
    for text, said in (("{", "This file is not JSON."), ("[]", "This file holds no conversations exported from here.")):
        (page.profile / "import.json").write_text(text)
        page.find("#import-file").send_keys(str(page.profile / "import.json"))
        page.wait(lambda said=said: page.find("#toast").text.startswith(said), said)


def test_a_tool_is_called_shown_and_answered(page: Browser) -> None:
    page.press("#settings-open")
    tool = {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    page.js(
        "const e = document.querySelector('#tools'); e.value = arguments[0]; e.dispatchEvent(new Event('input'))",
        json.dumps([{"type": "function", "function": tool}]),
    )
    page.js(
        "window.extra = {tool_choice: 'required', parallel_tool_calls: false, temperature: 0}"
    )  # this small model would not think of it itself
    page.say("What is the weather in Paris?")
    assert page.texts(".call summary") == ["Call of get_weather"]
    assert page.find(".call pre").text == '{\n  "city": "Paris"\n}'
    page.js("window.extra = {tool_choice: 'none', max_tokens: 8}")
    page.fill(".results textarea", '{"sky": "blue"}')
    page.press(".results button")
    page.finish()
    assert [role for role, _ in page.messages] == ["user", "assistant", "tool", "assistant"]
    asked, answered = page.js("return window.sent[1].messages.slice(1)")
    (call,) = asked["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": call["function"]["arguments"]}
    assert answered == {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": call["id"]} and call["id"]


def test_an_unreachable_server_is_said_and_trying_again_helps(page: Browser) -> None:
    settings(page, max_tokens=3)
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.command("Network.enable")
    page.command("Network.emulateNetworkConditions", offline=True, **offline)
    page.say("Are you there?")
    assert "The server cannot be reached. Is it still running?" in page.find(".failure").text
    page.command("Network.emulateNetworkConditions", offline=False, **offline)
    page.press(".assistant .retry")
    page.finish()
    assert page.all(".failure") == [] and page.all(".versions") == [] and len(page.messages) == 2
    assert all("ERR_INTERNET_DISCONNECTED" in said for said in page.complaints())


def test_what_the_server_refuses_is_said(page: Browser) -> None:
    page.js("window.extra = {temperature: -1}")
    page.say("Hello")
    assert "The server refused the request." in page.find(".failure").text
    assert "temperature" in page.find(".failure").text
    assert all("400" in said for said in page.complaints())


def test_a_full_browser_is_said(server: str, tmp_path: Path) -> None:
    needs_chromium()
    page = Browser(server, tmp_path / "profile")  # a browser remembers for a while how much room there was
    try:
        settings(page, max_tokens=3)
        page.command("Storage.overrideQuotaForOrigin", origin=server, quotaSize=1000)
        page.say("Hello")
        page.wait(lambda: "The browser has no more room" in page.find("#notices").text, "the notice")
        page.say("Are you still there?")
        assert len(page.messages) == 4  # the conversation goes on
        page.open()
        assert page.titles == []
    finally:
        page.close()


def test_two_tabs_show_the_same(page: Browser) -> None:
    settings(page, max_tokens=3)
    page.say("From the first tab")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open()
    assert page.titles == ["From the first tab"]
    # This tab is closed before its database says that it is done: the others must know all the same.
    page.js("Object.defineProperty(IDBTransaction.prototype, 'oncomplete', { set() {} })")
    page.press("#list [data-kind=remove]")
    page.driver.close()
    page.driver.switch_to.window(first)
    page.wait(lambda: page.titles == [] and page.messages == [], "the other tab's deletion")


def test_the_page_asks_for_a_key(tmp_path: Path) -> None:
    needs_chromium()
    spec = ModelSpec(options={"cache_bytes": 200 << 20})
    with serving(ServeConfig(models=(spec,), keys=KeyRing.read(given=["sk-right"]))) as url:
        page = Browser(url, tmp_path / "profile", key="sk-right")
        try:
            page.headers({})
            settings(page, max_tokens=3)
            page.say("Hello", finish=False)
            page.wait(lambda: page.find("#key-dialog").is_displayed(), "the question")
            assert page.focused == "key"
            page.keys("sk-wrong", Keys.ENTER)
            page.wait(lambda: page.find("#key-wrong").text == "The server did not accept that key.", "its answer")
            page.keys("sk-right", Keys.ENTER)
            page.finish()
            assert page.messages[1][1] and page.all(".failure") == []
            kept = page.js("return [JSON.stringify(localStorage), JSON.stringify(sessionStorage), location.href]")
            assert ["sk-right" in place for place in kept] == [False, True, False]
            page.js("sessionStorage.clear()")
            page.press("#new")
            page.say("Again", finish=False)
            page.wait(lambda: page.find("#key-dialog").is_displayed(), "the question")
            page.keys(Keys.ESCAPE)
            page.finish()
            assert "The server wants an API key." in page.find(".failure").text
        finally:
            page.close()


def test_the_page_speaks_chinese(server: str, tmp_path: Path) -> None:
    needs_chromium()
    page = Browser(server, tmp_path / "profile", language="zh-CN")
    try:
        assert page.find("html").get_attribute("lang") == "zh-CN"
        assert page.find("#new").text == "新对话" and page.find("#message").get_attribute("placeholder") == "输入消息"
        settings(page, max_tokens=32)  # three may arrive at once, and have no speed
        page.say("你好")
        assert "token/秒" in page.find(".assistant .numbers").text
        page.js("const e = document.querySelector('#language'); e.value = 'en'; e.dispatchEvent(new Event('change'))")
        assert page.find("#new").text == "New conversation" and "tokens/s" in page.find(".assistant .numbers").text
        page.open()
        assert page.find("html").get_attribute("lang") == "en"
        assert page.complaints() == []
    finally:
        page.close()
