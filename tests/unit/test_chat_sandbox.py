"""Templates as attackers write them: every one ends soon, in an error of ours, and has touched nothing."""

from __future__ import annotations

import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from hanlin.chat.sandbox import MAX_TEMPLATE, Sandbox
from hanlin.errors import ChatFormatError

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": " hi <b> "},
    {
        "role": "assistant",
        "content": "yo",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1, "b": "é"}}}],
    },
]


def render(template: str, **options: float) -> str:
    variables = {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>", "tools": None}
    return Sandbox(template, **options).render(variables, 20)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        (
            "{% for m in messages %}{{ '<' ~ m['role'] ~ '>' }}{{ m.content | trim }}{% endfor %}",
            "<system>S<user>hi <b><assistant>yo",
        ),
        (
            "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.role[0] %}{% endfor %}{{ n.x }}",
            "sua",
        ),
        (
            "{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ 'abc'[:-1] }}{{ messages[0]['role'] }}",
            "2assistantabsystem",
        ),
        ("{{ messages[2].tool_calls[0].function.arguments | tojson }}", '{"a": 1, "b": "é"}'),
        ("{{ {'b': [1], 'a': '<'} | tojson(indent=2) }}", '{\n  "b": [\n    1\n  ],\n  "a": "<"\n}'),
        ("{{ ['é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}", '["\\u00e9"]'),
        ("{% macro f(x, y=2) %}[{{ x }},{{ y }}]{% endmacro %}{{ f(1) }}{{ f(1, y='q') }}", "[1,2][1,q]"),
        ("{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}in{% endcall %}", "<in>"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | rejectattr('tool_calls', 'defined') | map(attribute='role') | join(', ') }}", "system, user"),
        ("{{ ['b', 'a'] | sort | map('upper') | join }}{{ [1, 1] | unique | list }}", "AB[1]"),
        (
            "{{ 1 < 2 < 3 }}{{ 1 < 2 > 3 }}{{ 'a' in 'abc' }}{{ 'x' not in ['y'] }}{{ messages == messages[:] }}",
            "TrueFalseTrueTrueTrue",
        ),
        (
            "{{ 'a b'.split(' ')[1] }}{{ 'x'.upper() }}{{ messages[0].get('z', 'D') }}{{ ','.join(['p', 'q']) }}",
            "bXDp,q",
        ),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=system;content=S;"),
        ("{% for i in range(3) if i != 1 %}{{ loop.index }}{{ loop.last }}{% else %}none{% endfor %}", "1False2True"),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "S"),
        ("{% set x %}a{{ 1 }}b{% endset %}{{ x }}{% filter upper %}c{% endfilter %}", "a1bC"),
        (
            "{{ x is defined }}{{ messages is iterable }}{{ none is none }}{{ 3 is odd }}{{ 'a' is in ['a'] }}",
            "FalseTrueTrueTrueTrue",
        ),
        ("{{ '-' * 5 }}{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 3 }}{{ 'x%sy' % 'k' }}{{ -1 }}{{ 1 / 4 }}", "-----318xky-10.25"),
        (
            "{{ 'a,b' | replace(',', ';') | title }}{{ 3.7 | int }}{{ 3.14159 | round(2) }}{{ 'x\ny' | indent(2) }}",
            "A;b33.14x\n  y",
        ),
        (
            "{{ nothing | default('d') }}{{ '' | default('e', true) }}{{ messages | first | items | list }}",
            "de[('role', 'system'), ('content', 'S')]",
        ),
        ("{%- for m in messages -%}\n  {{- m.role[0] }}\n{%- endfor %}\n", "sua"),
        ("{% if tools %}\n  t\n{% else %}\n  n\n{% endif %}\nend", "  n\nend"),
        ("{{ strftime_now('%Y') | length }}{{ {'b': 1, 'a': 2} | dictsort }}", "4[('a', 2), ('b', 1)]"),
        ("{{ dict(a=1)['a'] }}{{ [1, 2] + [3] }}{{ (1, 2) }}{{ [0] * 2 }}", "1[1, 2, 3](1, 2)[0, 0]"),
    ],
)
def test_what_chat_templates_need_works(template: str, printed: str) -> None:
    assert render(template) == printed


def sixty_times(step: str, start: str = "'aaaa'", after: str = "") -> str:
    """`ns.s` begins as `start`, and becomes `step` of itself sixty times."""
    return "{% set ns = namespace(s=" + start + ") %}{% for i in range(60) %}" + step + "{% endfor %}" + after


def becomes(value: str) -> str:
    return "{% set ns.s = " + value + " %}"


LONG = "{% set s = 'a' * 999999 %}{% set t = 'a' * 999999 %}"

HUNGRY = {
    "loop": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}x" + "{% endfor %}" * 3,
    "empty loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "filtered loops": "{% set r = range(9999) %}{% for a in r %}{% for i in r if false %}{% endfor %}{% endfor %}",
    "many characters": "{{ 'a' * 10**10 }}",
    "times many characters": "{{ 10**10 * 'a' }}",
    "many items": "{{ ['a'] * 10**9 }}",
    "huge factor": "{{ 'a' * (2**64) }}",
    "power": "{{ 10**10**10 }}",
    "power of a power": "{{ (2**64)**64 }}",
    "squares": sixty_times(becomes("ns.s * ns.s"), "9"),
    "doubling by ~": sixty_times(becomes("ns.s ~ ns.s")),
    "doubling by +": sixty_times(becomes("ns.s + ns.s")),
    "doubling by set": sixty_times("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    "doubling by macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}a{% endmacro %}{{ f(50) }}",
    "doubling by join": sixty_times(becomes("[ns.s, ns.s] | join")),
    "doubling by format": sixty_times(becomes("'%s%s' % (ns.s, ns.s)")),
    "lists of lists": sixty_times(becomes("[ns.s, ns.s]"), "[1]", "{{ ns.s }}"),
    "tuples of tuples": sixty_times(becomes("(ns.s, ns.s)"), "(1,)", "{{ ns.s }}"),
    "looking up a tuple": sixty_times(becomes("(ns.s, ns.s)"), "(1,)", "{{ {}[ns.s] }}"),
    "a tuple as a key": sixty_times(becomes("(ns.s, ns.s)"), "(1,)", "{{ {ns.s: 1} }}"),
    "searching a mapping": sixty_times(becomes("(ns.s, ns.s)"), "(1,)", "{{ ns.s in {} }}"),
    "mappings of mappings": sixty_times(becomes("{'a': ns.s, 'b': ns.s}"), "1", "{{ ns.s }}"),
    "namespaces of namespaces": "{% set a = namespace() %}{% set b = namespace(x=a, y=a) %}{{ [b] }}",
    "deep list": sixty_times("{% for j in range(999) %}" + becomes("[ns.s]") + "{% endfor %}", "[]", "{{ ns.s }}"),
    "printing one text often": LONG + "{{ ([s] * 99999) | string | length }}",
    "upper of a list": LONG + "{{ ([s] * 99999) | upper }}",
    "JSON of one text often": LONG + "{{ ([s] * 99999) | tojson }}",
    "sorting equal texts": LONG + "{{ ([s, t] * 9999) | sort }}",
    "unique texts": LONG + "{{ ([s] * 9999) | unique | list }}",
    "comparing lists": LONG + "{{ [s] * 99999 == [t] * 99999 }}",
    "searching a list": LONG + "{{ s ~ 'x' in [t ~ 'y'] * 299999 }}",
    "testing equality": "{% set l = [['a' * 999] * 999] %}{% for i in range(9999) %}{{ l is eq(l) }}{% endfor %}",
    "join between": "{{ (['a'] * 9999) | join('b' * 9999) }}",
    "join method": "{{ ('b' * 9999).join(['a'] * 9999) }}",
    "replace": "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
    "replace method": "{{ ('a' * 9999).replace('', 'b' * 9999) }}",
    "indent": "{{ ('\n' * 99999) | indent(10**9) }}",
    "indent of JSON": "{{ [1] | tojson(indent=10**9) }}",
    "separators of JSON": "{{ ([1] * 99999) | tojson(separators=('a' * 99999, ':')) }}",
    "rounding": "{{ 1.5 | round(10**9, 'floor') }}",
    "literals": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "splitting": "{% set s = 'aa ' * 999999 %}" + "{{ s.split() | length }}" * 3,
    "many filters": "{% for i in range(999) %}{{ range(9999) | map('string') | map('upper') | list }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format star": "{{ '%*d' % (10**9, 1) }}",
    "date width": "{{ strftime_now('%1000000000Y') }}",
    "long date": "{{ strftime_now('%Y' * 99999) }}",
}


LIMITS = (
    "makes more text|CPU time|prints a Namespace|recursion depth|counts over|power beyond|more than 256 bits|"
    "rounds to|indents JSON by|the format .* is not allowed|strftime_now takes"
)


@pytest.mark.parametrize("template", HUNGRY.values(), ids=HUNGRY)
def test_hungry_templates_are_stopped(template: str) -> None:
    """CVE-2025-61620 and its kin: one small template, all the CPU or memory there is."""
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(ChatFormatError, match=LIMITS):
            render(template, cpu_seconds=0.3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    assert time.thread_time() - start < 5, "tracing memory makes everything some ten times slower"


@pytest.mark.parametrize(
    "template",
    [
        "(" * 50_000 + "{{ x }}{% if %}",
        "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
        "{{ " + "1+" * 20_000 + "1 }}",
        "{{ " + "not " * 15_000 + "1 }}",
        "{{ " + "[" * 3_000 + "]" * 3_000 + " }}",
        "{% for a in x %}" * 500 + "{% endfor %}" * 500,
        "{{ " + "9" * 60_000 + " }}",
        "x" * (MAX_TEMPLATE + 1),
        "{% for %}",
        "{{ 'a",
        "{% generation %}",
        "{{ 1 | center(10**9) }}",
        "{{ lipsum | attr('x') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% from 'os' import path %}",
        "{% extends 'x' %}",
        "{% block a %}{% endblock %}",
        "{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}",
        "{% autoescape true %}{% endautoescape %}",
    ],
)
def test_unusable_templates_are_refused_before_they_run(template: str) -> None:
    with pytest.raises(ChatFormatError, match="chat template"):
        Sandbox(template)


def test_all_that_is_forbidden_is_named_at_once() -> None:
    with pytest.raises(ChatFormatError) as error:
        Sandbox("{% include 'a' %}\n{% import 'b' as b %}")
    assert "Include in line 1" in str(error.value)
    assert "Import in line 2" in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ messages.__class__ }}",
        "{{ messages[0]['__class__'] }}",
        "{{ ['x'] | map(attribute='__class__') | list }}",
        "{{ [''] | map(attribute='__class__.__mro__') | list }}",
        "{{ messages | selectattr('__class__', 'defined') | list | length }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range.__self__ }}",
        "{{ range.__func__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace()._Namespace__attrs }}",
        "{% macro f() %}{% endmacro %}{{ f._func }}{{ f._environment }}",
        "{% for x in [1] %}{{ loop._iterator }}{{ loop._recurse }}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{0.__class__}'.format_map({}) }}",
        "{% set f = '{0.__class__}'.format %}{{ f('') }}",
        "{{ ['{0.__class__}'] | map('format', '') | list }}",
        "{{ ('%(a)s' % {'a': 1}).__class__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ (1).__class__ }}{{ (1.5).as_integer_ratio() }}",
    ],
)
def test_nothing_of_pythons_is_reachable(template: str) -> None:
    """CVE-2024-34359 and CVE-2026-5760: from a text to its class to everything."""
    try:
        printed = render(template)
    except ChatFormatError:
        return
    assert printed in ("", "[Undefined]", "0"), printed


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].pop('role') }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ messages.clear() }}",
    ],
)
def test_messages_are_not_changed(template: str) -> None:
    before = repr(MESSAGES)
    with pytest.raises(ChatFormatError, match="unsafe"):
        render(template)
    assert repr(MESSAGES) == before


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no way') }}", "refuses this conversation: no way"),
        ("{{ raise_exception([1]) }}", "refuses this conversation: list"),
        ("{{ foo() }}", "'foo' is undefined"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[9].content.x }}", "no element 9"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ namespace }}", "prints a type"),
        ("{{ [range] | tojson }}", "prints a method"),
        ("{% set f = messages[0].items %}{{ 'x'.ljust(3) }}", "ljust"),
    ],
)
def test_what_goes_wrong_inside_is_said(template: str, words: str) -> None:
    with pytest.raises(ChatFormatError, match="chat template") as error:
        render(template)
    assert words in str(error.value)


def test_the_budget_grows_with_the_conversation() -> None:
    sandbox = Sandbox("{% for m in messages %}{{ m.content | trim ~ '!' }}{% endfor %}", budget=100)
    long = [{"content": "a" * 1000}] * 50
    assert len(sandbox.render({"messages": long}, 50_000)) == 50_050
    with pytest.raises(ChatFormatError, match="makes more text"):
        sandbox.render({"messages": long}, 100)


def test_a_long_loop_that_does_nothing_is_stopped() -> None:
    with pytest.raises(ChatFormatError, match="CPU time"):
        Sandbox("{% for c in 'a' * 9999999 %}{% endfor %}", cpu_seconds=0.05).render({}, 10**7)


def test_threads_do_not_share_a_budget() -> None:
    sandbox = Sandbox("{{ 'a' * n }}", budget=1000)
    with ThreadPoolExecutor(4) as pool:
        printed = list(pool.map(lambda n: sandbox.render({"n": n}, 0), [400] * 40))
    assert printed == ["a" * 400] * 40


def test_one_sandbox_serves_again_after_a_failure() -> None:
    sandbox = Sandbox("{{ 'a' * n }}", budget=1000)
    with pytest.raises(ChatFormatError):
        sandbox.render({"n": 10**9}, 0)
    assert sandbox.render({"n": 3}, 0) == "aaa"
