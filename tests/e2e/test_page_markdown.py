"""What the chat page makes of Markdown and maths, in a real Chromium: right where meant well, harmless where not."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from page_browser import Browser, needs_chromium

from serving import serving

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    needs_chromium()
    with serving() as url:
        browser = Browser(url, tmp_path_factory.mktemp("profile"))
        yield browser
        assert browser.foreign() == [] and browser.complaints() == []
        browser.close()


# As HTML without our own attributes: what a reader of the tests can check by eye.
_PLAIN = """
const box = document.createElement('div');
box.append(m.markdown(a[0]));
const kept = ['href', 'start', 'class', 'mathvariant', 'linethickness', 'display'];
for (const e of box.querySelectorAll('*')) for (const name of e.getAttributeNames())
  if (!kept.includes(name) || /^(code|code-bar|code-language|copy-code|wide|display)$/.test(e.className))
    e.removeAttribute(name);
for (const e of box.querySelectorAll('annotation, button')) e.remove();
return box.innerHTML;
"""


def html(page: Browser, text: str) -> str:
    return page.module("markdown.js", _PLAIN, text)


def maths(page: Browser, source: str, display: bool = False) -> str:
    """The MathML of a formula, without what stands around every one."""
    code = """
    const found = m.maths(a[0], a[1], 'RAW');
    if (found.localName === 'code') return 'RAW';
    found.querySelector('annotation').remove();
    return found.querySelector('mrow').innerHTML.replaceAll(/ (stretchy|largeop|movablelimits|class)="[^"]*"/g, '');
    """
    return page.module("maths.js", code, source, display)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "a *b* **c** ***d*** ~~e~~ `f*`",
            "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> <code>f*</code></p>",
        ),
        ("snake_case_name and 2*3*4", "<p>snake_case_name and 2<em>3</em>4</p>"),
        ("**注意：**内容，**“引用”**后", "<p><strong>注意：</strong>内容，<strong>“引用”</strong>后</p>"),
        ("**open *never closed", "<p>**open *never closed</p>"),
        ("line\nnext  \nthird", "<p>line<br>next<br>third</p>"),
        ("# A #\n## B\nText\n---\n\n---", "<h3>A</h3><h4>B</h4><h4>Text</h4><hr>"),
        (
            "- a\n- b\n  - c\n\n1) x\n2) y",
            "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>x</li><li>y</li></ol>",
        ),
        ("3. a\n\n   b\n4. c", '<ol start="3"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>'),
        ("1. a\n  - two spaces\n  - only", "<ol><li>a<ul><li>two spaces</li><li>only</li></ul></li></ol>"),
        (
            "- [x] a\n- [ ] b",
            '<ul><li class="task"><span class="tick">☑</span>a</li>'
            '<li class="task"><span class="tick">☐</span>b</li></ul>',
        ),
        ("> a\nb\n> > c", "<blockquote><p>a<br>b</p><blockquote><p>c</p></blockquote></blockquote>"),
        (
            "| a | b \\| |\n|:-:|--|\n| `x|y` | 2 |\n| 3 |",
            '<div><table><thead><tr><th class="align-center">a</th><th>b |</th></tr></thead>'
            "<tbody>"
            '<tr><td class="align-center"><code>x|y</code></td><td>2</td></tr>'
            '<tr><td class="align-center">3</td><td></td></tr></tbody></table></div>',
        ),
        (
            "~~~\n<b> & *c*\n```\n~~~",
            "<div><div><span>Code</span></div><pre><code>&lt;b&gt; &amp; *c*\n```</code></pre></div>",
        ),
        (
            "- a\n  ```json\n  [1]\n  ```\n- b",
            '<ul><li>a<div><div><span>json</span></div><pre><code>[<span class="code-number">1</span>]'
            "</code></pre></div></li><li>b</li></ul>",
        ),
        (
            "see https://a.example/x_(y), or <mailto:a@b.example>。",
            '<p>see <a href="https://a.example/x_(y)">https://a.example/x_(y)</a>, or '
            '<a href="mailto:a@b.example">mailto:a@b.example</a>。</p>',
        ),
        ("见https://a.example/b，好", '<p>见<a href="https://a.example/b">https://a.example/b</a>，好</p>'),
        ('[a *b*](https://a.example/ "t") [c](d)', '<p><a href="https://a.example/">a <em>b</em></a> [c](d)</p>'),
        ("![cat](https://a.example/cat.png)", '<p><a href="https://a.example/cat.png" class="picture">cat</a></p>'),
        ("&lt;b&gt; &#65; &copy; &unknown; \\*no\\*", "<p>&lt;b&gt; A © &amp;unknown; *no*</p>"),
        ("It costs $5 and $6.", "<p>It costs $5 and $6.</p>"),
        ("a<br>b <i>c</i>", "<p>a<br>b &lt;i&gt;c&lt;/i&gt;</p>"),
        ("    code\n\n    more", "<div><div><span>Code</span></div><pre><code>code\n\nmore</code></pre></div>"),
    ],
)
def test_markdown_reads_as_it_is_written(page: Browser, text: str, wanted: str) -> None:
    assert html(page, text) == wanted


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("x^2_i", "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>"),
        ("x^12", "<msup><mi>x</mi><mn>1</mn></msup><mn>2</mn>"),
        (r"\frac12", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"),
        (r"\sqrt[3]{a}", "<mroot><mi>a</mi><mn>3</mn></mroot>"),
        (r"\alpha+\Gamma", '<mi>α</mi><mo>+</mo><mi mathvariant="normal">Γ</mi>'),
        (r"\sin x", '<mrow><mi mathvariant="normal">sin</mi><mspace width="0.167em"></mspace></mrow><mi>x</mi>'),
        (r"\mathbb{R}^n", "<msup><mi>ℝ</mi><mi>n</mi></msup>"),
        (r"\text{if } f'(x)", "<mtext>if&nbsp;</mtext><msup><mi>f</mi><mo>′</mo></msup><mo>(</mo><mi>x</mi><mo>)</mo>"),
        (r"\hat{y} \neq 0", '<mover accent="true"><mi>y</mi><mo>^</mo></mover><mo>≠</mo><mn>0</mn>'),
        (r"a < b", "<mi>a</mi><mo>&lt;</mo><mi>b</mi>"),
        (r"\binom{n}{k}", '<mrow><mo>(</mo><mfrac linethickness="0"><mi>n</mi><mi>k</mi></mfrac><mo>)</mo></mrow>'),
    ],
)
def test_maths_reads_as_it_is_written(page: Browser, source: str, wanted: str) -> None:
    assert maths(page, source) == wanted


def test_larger_formulas_are_built_of_the_right_parts(page: Browser) -> None:
    code = """
    const count = (source, display, ...names) => {
      const node = m.maths(source, display, 'RAW');
      return names.map((name) => node.querySelectorAll(name).length);
    };
    return [
      count(String.raw`\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\\\ \\end{pmatrix}`, true, 'mtr', 'mtd', 'mo[fence=true]'),
      count(String.raw`f(x)=\\begin{cases} x & x>0 \\\\[2pt] 0 & \\text{else} \\end{cases}`, true, 'mtr', 'mtd'),
      count(String.raw`\\begin{align*} a &= b \\\\ &= c \\end{align*}`, true, 'mtr', 'mtd'),
      count(String.raw`\\sum_{i=1}^n i`, true, 'munderover', 'msubsup'),
      count(String.raw`\\sum_{i=1}^n i`, false, 'munderover', 'msubsup'),
      count(String.raw`\\int_0^1 \\lim_{x \\to 0}`, true, 'munderover', 'msubsup', 'munder'),
      count(String.raw`\\left( \\frac{a}{b} \\middle| c \\right]`, true, 'mo[fence=true]', 'mfrac'),
      count('a \\\\\\\\ b', true, 'mtr'),
    ];
    """
    assert page.module("maths.js", code) == [[2, 4, 2], [2, 4], [2, 4], [1, 0], [0, 1], [0, 1, 1], [3, 1], [2]]


@pytest.mark.parametrize(
    "source",
    [
        r"\unknown{x}",
        "a}",
        "{a",
        r"\frac{1}",
        "a_b_c",
        r"\left( x",
        r"\begin{what}\end{what}",
        "x" * 5000,
        "{" * 900 + "}" * 900,
        r"\sqrt[" * 400,
        r"\href{javascript:alert(1)}{x}",
        "^{",
        "x_",
    ],
)
def test_maths_that_cannot_be_read_is_shown_as_it_is(page: Browser, source: str) -> None:
    assert maths(page, source) == "RAW"


HOSTILE = [
    "<script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 1'>",
    "<svg/onload=window.harmed=1>",
    "<iframe srcdoc='<script>parent.harmed=1</script>'></iframe>",
    "[x](javascript:window.harmed=1)",
    "[x](JaVaScRiPt:window.harmed=1)",
    "[x](\x01javascript:window.harmed=1)",
    "[x](java\tscript:window.harmed=1) [y](&#106;avascript:harmed) <javascript:harmed=1>",
    "[x](data:text/html,<script>1</script>) [y](vbscript:x) [z](file:///etc/passwd) [w](//evil.example) [v](blob:x)",
    '[x](https://a.example/"onmouseover="harmed=1)',
    "![x](https://evil.example/track.png) ![y](data:image/svg+xml,<svg/>)",
    "<style>*{display:none}</style><link rel=stylesheet href=https://evil.example/x.css><base href=https://evil.example/>",
    '```"><script>window.harmed=1</script>\n</code></pre><script>window.harmed=1</script>\n```',
    "```__proto__\nx\n```\n```constructor\ny\n```",
    "$\\text{<script>window.harmed=1</script>}$ $<img src=x onerror=harmed=1>$ $\\constructor \\__proto__ \\toString$",
    "| <script>window.harmed=1</script> |\n|-|\n| <img src=x onerror=harmed=1> |",
    "<form action=https://evil.example><input name=key><button>Sign in</button></form>",
    "\ud800 lone \udc00 halves \x00 \ufffe \u202e",
]


_BANNED = set("script img svg iframe style link base form input object embed video audio".split())


def test_hostile_text_is_only_text(page: Browser) -> None:
    """Only our own elements, only addresses that may be followed, nothing run and nothing fetched."""
    text = "\n\n".join(HOSTILE)
    found = page.module(
        "markdown.js",
        """
        const box = document.body.appendChild(document.createElement('div'));
        box.append(m.markdown(JSON.parse(a[0])));
        await new Promise((resolve) => setTimeout(resolve, 100));
        const all = [...box.querySelectorAll('*')];
        const out = {
          names: [...new Set(all.map((e) => e.localName))],
          attributes: [...new Set(all.flatMap((e) => e.getAttributeNames()))],
          links: all.filter((e) => e.localName === 'a').map((e) => [e.protocol, e.rel, e.target]),
          harmed: window.harmed ?? null, text: box.textContent, fine: box.textContent.isWellFormed(),
        };
        box.remove();
        return out;
        """,
        json.dumps(text),
    )
    assert found["harmed"] is None and found["fine"]
    assert not set(found["names"]) & _BANNED
    assert not [name for name in found["attributes"] if name.startswith("on") or name in ("src", "srcdoc", "style")]
    assert all(link == ["https:", "noopener noreferrer nofollow", "_blank"] for link in found["links"])
    assert len(found["links"]) == 5
    assert "<script>window.harmed = 1</script>" in found["text"]


def test_hostile_conversations_and_names_are_only_text(page: Browser) -> None:
    """Through the page itself: an imported file with hostile fields, and a hostile reply of the real server."""
    evil = "<img src=x onerror='window.harmed = 1'>"
    nodes = {
        "__proto__": {"id": "__proto__", "role": "user", "content": "x"},
        "u": {"id": "u", "parent": None, "role": "user", "content": evil, "at": 1},
        "a": {
            "id": "a",
            "parent": "u",
            "role": "assistant",
            "content": "\n\n".join(HOSTILE[:-1]),
            "at": 2,
            "model": evil,
            "state": evil,
            "usage": {"prompt_tokens": evil},
            "timing": {"first": evil},
            "error": {"kind": evil, "message": evil},
            "tool_calls": [None, {"id": 7, "function": {"name": evil, "arguments": '{"a": "' + "<b>" + '"}'}}],
        },
        "loop1": {"id": "loop1", "parent": "loop2", "role": "user", "content": "x"},
        "loop2": {"id": "loop2", "parent": "loop1", "role": "user", "content": "x"},
        "odd": {"id": "odd", "role": "system", "content": "x"},
    }
    conversations: list[Any] = [
        {
            "id": "evil",
            "title": evil,
            "updated": 2,
            "system": 5,
            "settings": {"temperature": "hot", "stop": [1]},
            "nodes": nodes,
            "leaf": "a",
        },
        {"id": "loop", "title": "loop", "updated": 1, "nodes": nodes, "leaf": "loop1"},
        {"id": "../../x", "nodes": [1, None, "x"], "leaf": {}},
    ]
    file = {"format": "hanlin-conversations", "version": 1, "conversations": conversations}
    (page.profile / "evil.json").write_text(json.dumps(file))
    page.find("#import-file").send_keys(str(page.profile / "evil.json"))
    page.wait(lambda: evil in page.titles, "the import")
    page.open("#/evil")
    assert page.messages[0] == ("user", evil)
    assert page.texts(".call summary code") == ["…", evil]
    page.open("#/loop")
    assert page.js("return window.harmed ?? null") is None
    page.open()
    text = "**bold** <script>window.harmed = 1</script> [x](javascript:harmed) " + evil
    page.js("window.extra = {structured_outputs: {choice: [arguments[0]]}}", text)
    page.say("Go on")
    assert page.messages[1][1] == text.replace("**", "")
    assert page.js("return window.harmed ?? null") is None


@pytest.mark.parametrize(
    "unit",
    [
        "> ",
        "- ",
        "1. ",
        "*a ",
        "**a",
        "_a_",
        "[",
        "[](",
        "![[",
        "`",
        "`a``",
        "$a",
        "$$",
        "\\(",
        "\\[",
        "<",
        "&#",
        "|a",
        "|-",
        "#",
        "# ",
        "a\n",
        "\t",
        " ",
        "https://a.",
        "~~",
        "{",
        "\\frac{",
        "x\n\n",
        "- a\n  ",
        "```\n",
        "\u2028",
        '[a](b "',
        "((",
        "===",
    ],
)
def test_a_hundred_thousand_signs_take_no_long_time(page: Browser, unit: str) -> None:
    for text in (unit * (100_000 // len(unit)), "| a |\n|-|\n" + unit * (100_000 // len(unit)) + "x"):
        seconds, depth = page.module(
            "markdown.js",
            """
            const before = performance.now();
            const made = m.markdown(a[0]);
            const seconds = (performance.now() - before) / 1000;
            let depth = 0;
            for (let level = [...made.children]; level.length; depth++) level = level.flatMap((e) => [...e.children]);
            return [seconds, depth];
            """,
            text,
        )
        assert seconds < 2 and depth < 200, (unit, seconds, depth)


def test_a_line_of_a_megabyte(page: Browser) -> None:
    for text in ("word " * 200_000, "x" * 1_000_000, "```python\n" + "f(1) " * 200_000, "| " * 500_000):
        before = time.monotonic()
        found = page.module("markdown.js", "return m.markdown(a[0]).textContent.length", text)
        assert found > 400_000 and time.monotonic() - before < 8


_STREAM = """
const whole = (text) => { const e = document.createElement('div'); e.append(m.markdown(text)); return e.innerHTML; };
for (const [text, cuts] of a[0]) {
  const root = document.createElement('div');
  const view = new m.MarkdownView(root);
  for (const cut of [...cuts, text.length]) {
    view.update(text.slice(0, cut));
    if (root.innerHTML !== whole(text.slice(0, cut))) return [text, cut, root.innerHTML, whole(text.slice(0, cut))];
  }
}
return null;
"""


def test_a_text_that_streams_in_looks_as_if_it_had_come_at_once(page: Browser) -> None:
    """At every step, for random texts made of everything that begins, ends or continues a block."""
    pieces = [
        "# h\n",
        "a",
        "word ",
        "\n",
        "\n\n",
        "- x\n",
        "  - y\n",
        "1. z\n",
        "> q\n",
        "```py\n",
        "```\n",
        "~~~\n",
        "| a | b |\n",
        "|---|:-:|\n",
        "|--",
        "***\n",
        "---\n",
        "===\n",
        "$$",
        "$x$",
        "\\[",
        "\\]\n",
        "    ",
        "\t",
        "**",
        "*",
        "`",
        "[l](https://a.example)",
        "\\begin{align}\n",
        "\\end{align}\n",
        "注意",
        "😀",
        "\r\n",
        "-",
        "#",
    ]
    generator = random.Random(1)
    cases = []
    for _ in range(400):
        text = "".join(generator.choice(pieces) for _ in range(generator.randint(1, 30)))
        size = len(text.encode("utf-16-le")) // 2
        cases.append([text, sorted(generator.randint(0, size) for _ in range(12))])
    assert page.module("markdown.js", _STREAM, cases) is None


def test_the_last_words_of_a_long_reply_cost_no_more_than_the_first(page: Browser) -> None:
    """10,000 steps of about one token, with code, tables and maths; only the last blocks are built anew."""
    block = (
        "Some **bold** words about $x^2$ and `code`.\n\n- one\n- two\n\n"
        "```python\nfor i in range(10):\n    print(i)\n```\n\n| a | b |\n|-|-|\n| 1 | 2 |\n\n"
    )
    steps, early, late, kept = page.module(
        "markdown.js",
        """
        const root = document.body.appendChild(document.createElement('div'));
        const view = new m.MarkdownView(root);
        const text = a[0];
        const times = [];
        let first = null, kept = true;
        for (let end = 4; end <= text.length; end += 4) {
          const before = performance.now();
          view.update(text.slice(0, end));
          times.push(performance.now() - before);
          if (end === 400) first = root.firstChild;
          if (end > 400 && root.firstChild !== first) kept = false;
        }
        root.remove();
        const part = Math.floor(times.length / 10);
        const sum = (list) => list.reduce((x, y) => x + y, 0);
        return [times.length, sum(times.slice(0, part)), sum(times.slice(-part)), kept];
        """,
        (block * (40_000 // len(block) + 1))[:40_000],
    )
    assert steps == 10_000 and kept
    assert late / 1000 < 2, f"{late} ms for the last thousand steps, {early} ms for the first"


def test_code_is_coloured_and_copied_as_it_is(page: Browser) -> None:
    code = 'def f(x):  # a "comment"\n    return """a\n# b""" + "c\\"" if x > 1.5e3 else None\n'
    kinds, text = page.module(
        "syntax.js",
        "const e = document.createElement('code'); e.append(...m.coloured(a[0], 'Python'));"
        "return [[...e.children].map((s) => [s.className.slice(5), s.textContent]), e.textContent]",
        code,
    )
    assert text == code
    assert kinds == [
        ["keyword", "def"],
        ["call", "f"],
        ["comment", '# a "comment"'],
        ["keyword", "return"],
        ["string", '"""a\n# b"""'],
        ["string", '"c\\""'],
        ["keyword", "if"],
        ["number", "1.5e3"],
        ["keyword", "else"],
        ["keyword", "None"],
    ]
    names = page.module(
        "syntax.js",
        "return a[0].map((name) => m.languageName(name))",
        ["py", "JS", "c++", "__proto__", "<b>", "brainf"],
    )
    assert names == ["python", "javascript", "c++", "__proto__", "", "brainf"]


def test_both_languages_have_the_same_words(page: Browser) -> None:
    words = page.module("i18n.js", "return m.WORDS")
    assert list(words) == ["en", "zh"] and set(words["en"]) == set(words["zh"])
    for key, text in words["en"].items():
        other = words["zh"][key]
        found = [sorted(re.findall(r"\{\w+\}", json.dumps(said))) for said in (text, other)]
        assert found[0] == found[1], key


def test_server_sent_events_are_read_however_they_are_cut(page: Browser) -> None:
    body = 'data: {"a": "你好😀"}\r\n\r\n: ping\n\ndata: one\ndata: two\n\nevent: x\ndata:three\n\ndata: [DONE]\n\n'
    found = page.module(
        "api.js",
        """
        const bytes = new TextEncoder().encode(a[0]);
        const out = [];
        for (let size = 1; size < 12; size++) {
          const parts = [];
          for (let at = 0; at < bytes.length; at += size) parts.push(bytes.slice(at, at + size));
          const stream = new ReadableStream({ start(c) { parts.forEach((p) => c.enqueue(p)); c.close(); } });
          const seen = [];
          for await (const data of m.events(stream)) seen.push(data);
          out.push(JSON.stringify(seen));
        }
        return [...new Set(out)];
        """,
        body,
    )
    assert [json.loads(text) for text in found] == [['{"a": "你好😀"}', "one\ntwo", "three", "[DONE]"]]
