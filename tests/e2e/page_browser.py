"""A real Chromium for the tests of the chat page: started, driven, and asked what it thought of the page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="needs selenium: pip install 'hanlin[dev]'")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

__all__ = ["Browser", "Keys", "needs_chromium"]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
# Records what the page sends, and lets a test add to it; the answers are the real server's.
_SPY = """
window.sent = []; window.extra = {};
const real = window.fetch;
window.fetch = (url, options = {}) => {
  if (options.body) {
    const body = {...JSON.parse(options.body), ...window.extra};
    window.sent.push(body);
    options = {...options, body: JSON.stringify(body)};
  }
  return real(url, options);
};
"""


def needs_chromium() -> tuple[str, str]:
    """Paths of the browser and its driver; skips the test where there is none."""
    browser = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    return browser, driver


class Browser:
    """One window of Chromium on the page at `url`, with a profile of its own."""

    def __init__(self, url: str, profile: Path, *, language: str = "en", key: str = "") -> None:
        browser, driver = needs_chromium()
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*_FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900", f"--lang={language}"):
            options.add_argument(flag)
        downloads = {"download.default_directory": str(profile), "intl.accept_languages": language}
        options.add_experimental_option("prefs", downloads)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.driver.set_script_timeout(60)
        self.url, self.profile = url, profile
        self.command("Page.addScriptToEvaluateOnNewDocument", source=_SPY)
        self.command("Network.enable")
        self.headers({"Authorization": f"Bearer {key}"} if key else {})
        self.open()

    def close(self) -> None:
        self.driver.quit()

    def open(self, fragment: str = "") -> None:
        """Load the page anew, and wait until it answers."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.url}/{fragment}")
        self.wait(lambda: self.js("return 'ready' in document.documentElement.dataset"), "the page's script")
        self.wait(lambda: self.js("return document.querySelector('#model').value"), "the list of models")

    def command(self, name: str, **arguments: Any) -> Any:
        """A command of the Chrome DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def headers(self, headers: dict[str, str]) -> None:
        """Send these with every request from now on."""
        self.command("Network.setExtraHTTPHeaders", headers=headers)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def module(self, name: str, code: str, *arguments: Any) -> Any:
        """The value of `code`, an asynchronous function's body that sees the module as `m` and `arguments` as `a`."""
        script = (
            "const done = arguments[arguments.length - 1], a = [...arguments].slice(1, -1);"
            f"import(arguments[0]).then(async (m) => {{ {code} }}).then((value) => done({{ value }}),"
            " (error) => done({ error: String(error.stack) }));"
        )
        found = self.driver.execute_async_script(script, f"{self.url}/page/{name}", *arguments)
        assert "error" not in found, found["error"]
        return found.get("value")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Texts of all elements found, as a person sees them."""
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector)

    def press(self, selector: str) -> None:
        self.find(selector).click()

    def keys(self, *keys: str) -> None:
        """Typed where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    @property
    def focused(self) -> str:
        """The id of what has the focus, or its label."""
        return self.js("const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.tagName")

    def fill(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def wait(self, true: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        until = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < until, f"{what}: not within {seconds} s"
            time.sleep(0.02)
        return found

    @property
    def busy(self) -> bool:
        return self.js("return !document.querySelector('#stop').hidden")

    def say(self, text: str, *, finish: bool = True) -> None:
        """Write a message and send it."""
        self.find("#message").send_keys(text, Keys.ENTER)
        if finish:
            self.finish()

    def finish(self) -> None:
        self.wait(lambda: not self.busy, "the end of the reply", 60)

    @property
    def messages(self) -> list[tuple[str, str]]:
        """(role, words) of what is shown."""
        code = (
            "return [...document.querySelectorAll('.message')].map((e) => "
            "[e.classList[1], (e.querySelector('.prose, .words') ?? e).innerText])"
        )
        return [(role, words.strip()) for role, words in self.js(code)]

    @property
    def titles(self) -> list[str]:
        return self.texts("#list a")

    def complaints(self) -> list[str]:
        """What the browser wrote to its console since this was asked last: violations of the policy, errors."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def foreign(self) -> list[str]:
        """Addresses that the page fetched and that are not this server's."""
        code = "return performance.getEntriesByType('resource').map((e) => e.name)"
        return [name for name in self.js(code) if not name.startswith(self.url + "/")]
