"""Whether everybody can use the chat page: keyboard, screen readers, small screens, contrast, moving things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from page_browser import Browser, Keys, needs_chromium

from serving import serving

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    needs_chromium()
    with serving() as url:
        browser = Browser(url, tmp_path_factory.mktemp("profile"))
        yield browser
        browser.close()


# Text and the grounds it stands on in theme.css.
_ON = {
    "ground side raised sunk bubble": "text quiet",
    "ground raised sunk bubble": "link",
    "ground": "accent wrong",
    "accent": "accent-text",
    "wrong-soft": "wrong",
    "sunk": "code-comment code-string code-number code-keyword code-call added wrong",
    "text": "ground",
}
_CONTRAST = """
const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const probe = document.body.appendChild(document.createElement('i'));
const light = (name) => {
  probe.style.color = `var(--${name})`;
  pen.fillStyle = getComputedStyle(probe).color;
  pen.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((v) => v / 255).map(
    (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const out = {};
for (const [grounds, texts] of Object.entries(arguments[0]))
  for (const ground of grounds.split(' ')) for (const text of texts.split(' ')) {
    const [a, b] = [light(ground), light(text)].sort();
    out[`${text} on ${ground}`] = (b + 0.05) / (a + 0.05);
  }
probe.remove();
return out;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("system", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Browser, theme: str, system: str) -> None:
    """4.5:1, level AA of WCAG 2.2."""
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
    page.js(
        "const e = document.querySelector('#theme'); e.value = arguments[0]; e.dispatchEvent(new Event('change'))",
        theme,
    )
    ground = page.js("return getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")
    found = page.js(_CONTRAST, _ON)
    assert {pair: round(ratio, 2) for pair, ratio in found.items() if ratio < 4.5} == {}
    page.open()  # the choice is remembered, and there before the first frame
    assert page.js("return document.documentElement.dataset.theme") == theme
    page.js("const e = document.querySelector('#theme'); e.value = ''; e.dispatchEvent(new Event('change'))")
    ground = page.js("return getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (system == "light")


def test_everything_that_can_be_used_has_a_name(page: Browser) -> None:
    page.press("#settings-open")
    for control in page.all("button, input:not([type=file]), select, textarea, a, summary, [tabindex]"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")[:200]
    page.press("#settings-close")
    assert page.focused == "settings-open"


def test_the_first_tab_stop_leads_to_the_message_box(page: Browser) -> None:
    page.open()
    page.js("document.body.tabIndex = -1; document.body.focus()")
    page.keys(Keys.TAB)
    assert page.focused == "skip"
    assert page.find("#skip").rect["y"] >= 0  # to be seen once it has the focus
    page.keys(Keys.ENTER)
    assert page.focused == "message"
    page.find("#message").send_keys(Keys.CONTROL, Keys.SHIFT, "o")
    assert page.focused == "message"


def test_words_that_stream_in_are_not_read_one_by_one(page: Browser) -> None:
    live = "[aria-live], [role=status], [role=alert], [role=log]"
    found = page.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.id)", live)
    assert found == ["notices", "toast", "announce", "key-wrong"]
    assert page.find("#announce").get_attribute("aria-live") == "polite"


_SHOWN = """
const messages = document.querySelector('#messages');
messages.hidden = false;
const message = messages.appendChild(document.createElement('li'));
message.className = 'message';
const prose = message.appendChild(document.createElement('div'));
prose.className = 'prose';
prose.append(m.markdown(a[0]));
"""


def test_a_narrow_screen(page: Browser) -> None:
    page.command("Emulation.setDeviceMetricsOverride", width=360, height=720, deviceScaleFactor=2, mobile=True)
    try:
        page.open()
        assert not page.find("#side").is_displayed()
        page.press("#side-open")
        assert page.focused == "side-close" and page.js("return document.querySelector('#main').inert")
        page.keys(Keys.ESCAPE)
        assert page.focused == "side-open" and not page.js("return document.querySelector('#main').inert")
        page.press("#settings-open")
        assert page.find("#settings").rect["width"] <= 360
        page.js("document.querySelector('#shade').click()")
        assert not page.find("#settings").is_displayed()
        table = f"|a|b|\n|-|-|\n|{'c' * 200}|d|"
        text = f"{'wide ' * 3}{'w' * 300}\n\n{table}\n\n```\n{'x' * 400}\n```\n\n$${'a+' * 200}b$$"
        page.module("markdown.js", _SHOWN, text)
        assert page.js("return document.documentElement.scrollWidth") == 360
        assert page.js("return document.querySelector('#scroll').scrollWidth") <= 360
        small = page.js(
            "return [...document.querySelectorAll('.bar button, .composer button')].filter((e) => e.offsetWidth"
            " && (e.offsetWidth < 24 || e.offsetHeight < 24)).map((e) => e.id)"
        )
        assert small == []
    finally:
        page.command("Emulation.clearDeviceMetricsOverride")
        page.open()


def test_nothing_moves_for_those_who_asked_for_that(page: Browser) -> None:
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    code = (
        "const e = document.body.appendChild(document.createElement('span')); e.className = 'waiting';"
        "const i = e.appendChild(document.createElement('i')); const s = getComputedStyle(i);"
        "const found = [s.animationDuration, s.animationIterationCount]; e.remove(); return found"
    )
    assert page.js(code) == ["1e-05s", "1"]
    page.command("Emulation.setEmulatedMedia", features=[])
    assert page.js(code) == ["1.2s", "infinite"]


def test_the_files_need_no_build_and_name_no_other_place() -> None:
    import hanlin

    folder = Path(hanlin.__file__).parent / "serve" / "page"
    files = {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.is_file()}
    assert {"index.html", "app.js", "markdown.js"} <= set(files)
    for name, text in files.items():
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "cdn"):
            assert word not in text, f"{name}: {word}"
        assert len(text.splitlines()) <= 400, name
        found = [line for line in text.splitlines() if "://" in line and "w3.org" not in line and "https?:" not in line]
        assert found == [], name
