"""A model's own Jinja template, run as the untrusted program that it is.

Jinja's immutable sandbox keeps a template from Python's internals, but not from taking all the time and memory there is
(CVE-2024-34359, CVE-2025-61620 and CVE-2026-5760: templates that came with a model or a request). So beside it:

* Only the statements, filters, tests, functions and methods that chat templates need exist at all: no include, import,
  inheritance, recursive loop, `attr`, `format`.
* Whatever makes a text, list or mapping pays for its size out of one budget, before it is made where it can be larger
  than what it is made of. Nothing is computed while compiling. So no value can be larger than the budget, and no single
  operation can take long.
* Each turn of a loop, call, filter, comparison and operator looks at the clock. The limit is this thread's CPU time:
  a busy machine does not make a good template fail.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace

from hanlin.chat import metering
from hanlin.chat.metering import Budget, LimitError, size, width
from hanlin.errors import ChatFormatError, problems

__all__ = ["Sandbox"]

MAX_TEMPLATE = 1 << 16  # characters; the longest published chat templates have some 30,000
MAX_CPU_SECONDS = 2.0
BUDGET = 1 << 22  # characters and list items made while rendering ...
BUDGET_PER_CHARACTER = 32  # ... and so many more for each character of the conversation
MAX_RANGE = 100_000
MAX_INT_BITS = 256
MAX_EXPONENT = 64
MAX_DIGITS = 30
MAX_INDENT = 16

ALLOWED_NODES = (
    nodes.Assign, nodes.AssignBlock, nodes.BinExpr, nodes.Break, nodes.Call, nodes.CallBlock, nodes.Compare,
    nodes.Concat, nodes.CondExpr, nodes.Continue, nodes.ExprStmt, nodes.Filter, nodes.FilterBlock, nodes.For,
    nodes.Getattr, nodes.Getitem, nodes.If, nodes.Keyword, nodes.Literal, nodes.Macro, nodes.Name, nodes.NSRef,
    nodes.Operand, nodes.Output, nodes.Pair, nodes.Scope, nodes.Slice, nodes.Template, nodes.Test, nodes.UnaryExpr,
    nodes.With,
)  # fmt: skip
STRING_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip title upper".split()
)
SPLITTING_METHODS = frozenset({"partition", "rpartition", "rsplit", "split", "splitlines"})
MAPPING_METHODS = frozenset({"get", "items", "keys", "values"})
LOOKING_FILTERS = ("abs", "count", "d", "default", "first", "float", "last", "length")
MAKING_FILTERS = ("int", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
TEXT_FILTERS = ("capitalize", "lower", "title", "trim", "upper")
SORTING_FILTERS = ("dictsort", "sort", "unique")
LOOKING_TESTS = (
    "boolean", "defined", "divisibleby", "even", "false", "float", "integer", "iterable", "mapping", "none", "number",
    "odd", "sameas", "sequence", "string", "true", "undefined",
)  # fmt: skip
COMPARING_TESTS = (
    ("eq", "=="), ("eq", "eq"), ("eq", "equalto"), ("ne", "!="), ("ne", "ne"), ("gt", ">"), ("gt", "gt"),
    ("gt", "greaterthan"), ("gteq", ">="), ("gteq", "ge"), ("lt", "<"), ("lt", "lt"), ("lt", "lessthan"),
    ("lteq", "<="), ("lteq", "le"), ("in", "in"),
)  # fmt: skip
SIMPLE_FORMAT = re.compile(r"(?:[^%]|%[%sdr])*")
SIMPLE_DATE = re.compile(r"(?:[^%]|%-?[a-zA-Z%]){0,100}")


class Sandbox:
    """A compiled chat template.

    Raises:
        ChatFormatError: a template that is too long, is not Jinja, or uses what no chat template needs, all named.
    """

    def __init__(self, template: str, *, cpu_seconds: float = MAX_CPU_SECONDS, budget: int = BUDGET) -> None:
        if len(template) > MAX_TEMPLATE:
            raise ChatFormatError(f"chat template: {len(template)} characters, more than the {MAX_TEMPLATE} allowed")
        self._cpu_seconds, self._budget = cpu_seconds, budget
        self._environment = _Environment()
        try:
            tree = self._environment.parse(template)
            _check(tree)
            tree = cast(nodes.Template, metering.Meter().visit(tree))
            tree.set_environment(self._environment)
            code = self._environment.compile(tree)
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.globals)
        except ChatFormatError:
            raise
        except Exception as error:  # whatever Jinja and Python's compiler make of a stranger's text
            raise ChatFormatError(f"chat template: not usable: {_reason(error)}") from error

    def render(self, variables: Mapping[str, Any], characters: int) -> str:
        """The template's text for these variables, plain JSON values that hold so many `characters`.

        Raises:
            ChatFormatError: the template refuses the conversation, fails, or needs more than it may have.
        """
        active = self._environment.active
        active.budget = Budget(self._budget + BUDGET_PER_CHARACTER * characters, self._cpu_seconds)
        try:
            return "".join(self._template.generate(**variables))
        except _RefusedError as error:
            raise ChatFormatError(f"the model's chat template refuses this conversation: {_reason(error)}") from error
        except Exception as error:  # a template can raise anything
            raise ChatFormatError(f"chat template: {_reason(error)}") from error
        finally:
            del active.budget


class _RefusedError(Exception):
    """The template called `raise_exception`."""


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = getattr(error, "lineno", None)
    return (text if len(text) <= 300 else f"{text[:300]}...") + (f" (line {line})" if line else "")


def _check(tree: nodes.Template) -> None:
    found: dict[str, None] = {}
    for node in tree.find_all(nodes.Node):
        if not isinstance(node, ALLOWED_NODES):
            found[f"{type(node).__name__} in line {node.lineno}"] = None
        elif isinstance(node, nodes.For) and node.recursive:
            found[f"recursive loop in line {node.lineno}"] = None
    if found:
        raise ChatFormatError(problems("chat template uses what no chat template needs", found))


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with meters. A render puts its budget into `active`, which each thread sees for itself."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self._text,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.active = threading.local()
        self.globals = {
            "dict": self._dict,
            "namespace": Namespace,
            "raise_exception": _refuse,
            "range": self._range,
            "strftime_now": _now,
        }
        self._functions: tuple[object, ...] = tuple(self.globals.values())
        self.tests = {name: self._looking(cast(Any, TESTS[name])) for name in LOOKING_TESTS}
        for kind, name in COMPARING_TESTS:
            self.tests[name] = cast(Any, functools.partial(self._test, kind))
        self.filters = {
            metering.TICK: self._looking(_same),
            metering.MADE: self._making(_same),
            metering.SLICE: self._making(_slice),
            metering.CONCAT: self._join,
            metering.COMPARE: self._compare,
            **{name: self._looking(FILTERS[name]) for name in LOOKING_FILTERS},
            **{name: self._making(FILTERS[name]) for name in MAKING_FILTERS},
            **{name: self._texting(FILTERS[name]) for name in TEXT_FILTERS},
            **{name: self._sorting(FILTERS[name]) for name in SORTING_FILTERS},
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "round": self._round,
            "safe": self._looking(_same),
            "string": self._text,
            "tojson": self._tojson,
        }

    # What the compiled template asks the sandbox.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in STRING_METHODS
        if isinstance(obj, dict):
            return attr in MAPPING_METHODS
        if isinstance(obj, LoopContext):  # `changed` would compare without paying
            return attr != "changed" and super().is_safe_attribute(obj, attr, value)
        return isinstance(obj, Namespace) and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self._pay(0)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if (isinstance(owner, str) and name in STRING_METHODS) or (isinstance(owner, dict) and name in MAPPING_METHODS):
            # Jinja adds the variables of its loops to the keywords of every call.
            return __self._method(owner, name, args, {k: v for k, v in kwargs.items() if not k.startswith("_")})
        allowed = isinstance(__obj, (Macro, jinja2.Undefined)) or any(__obj is known for known in __self._functions)
        if not allowed and not (isinstance(owner, LoopContext) and name == "cycle"):
            raise LimitError(f"it calls {name or type(__obj).__name__!r}, which is not allowed")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._pay(0)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    self._pay(max(0, times) * size(value, self._pay))
        elif operator == "+" and isinstance(left, (str, list, tuple)):
            self._pay(size(left, self._pay) + size(right, self._pay))
        elif operator == "%" and isinstance(left, str):
            if not SIMPLE_FORMAT.fullmatch(left):
                raise LimitError(f"the format {left[:40]!r} is not allowed, only %s, %d and %r are")
            self._pay(len(left) + left.count("%") * width(right, self._pay))
        elif operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= MAX_EXPONENT):
            raise LimitError(f"it raises to a power beyond {MAX_EXPONENT}")
        return _small(super().call_binop(context, operator, left, right))

    # Paying.

    def _pay(self, size: int) -> None:
        budget = getattr(self.active, "budget", None)
        if budget is None:
            raise nodes.Impossible  # the compiler tries to evaluate constants; that must wait for a budget
        budget.pay(size)

    def _looking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """For what only looks at values."""

        @functools.wraps(function)
        def looking(*args: Any, **kwargs: Any) -> Any:
            self._pay(0)
            return function(*args, **kwargs)

        return looking

    def _making(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """For what makes a value no larger than the one it is given, or a generator of items."""

        @functools.wraps(function)
        def making(*args: Any, **kwargs: Any) -> Any:
            self._pay(0)
            value = function(*args, **kwargs)
            if isinstance(value, Iterator):
                value = list(self._ticks(value))
            self._pay(size(value, self._pay))
            return _small(value)

        return making

    def _texting(self, function: Callable[..., str]) -> Callable[..., str]:
        """For what makes a text of about the size of the one it is given."""

        def texting(value: Any, *args: Any) -> str:
            text = function(self._text(value), *args)
            self._pay(len(text))
            return text

        return texting

    def _sorting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """For what compares the items of a container with each other, or copies them to do so."""
        making = self._making(function)

        @functools.wraps(function)
        def sorting(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if isinstance(value, (str, list, tuple, dict)):
                    self._pay(width(value, self._pay) * len(value).bit_length())
            return making(*args, **kwargs)

        return sorting

    def _ticks(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._pay(1)
            yield item

    # What can be larger than its operands, and pays first.

    def _text(self, value: Any) -> str:
        self._pay(width(value, self._pay))
        return value if isinstance(value, str) else str(value)

    def _compare(self, left: Any, kind: str, right: Any) -> bool:
        return metering.compare(left, kind, right, self._pay)

    def _test(self, kind: str, left: Any, right: Any) -> bool:
        return metering.compare(left, kind, right, self._pay)

    def _method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "replace":
            return self._replace(owner, *args, **kwargs)
        if name == "join":
            return self._join(args[0] if args else (), owner)
        if name in SPLITTING_METHODS:
            self._pay(len(owner))
        value = getattr(owner, name)(*args, **kwargs)
        if name == "get":
            return value
        if isinstance(owner, dict):
            value = list(value)
        self._pay(size(value, self._pay))
        return value

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = -1) -> str:
        text, old, new = self._text(value), self._text(old), self._text(new)
        self._pay(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, value: Any, between: Any = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = [self.getitem(item, attribute) for item in self._ticks(value)]
        parts, between = [self._text(item) for item in self._ticks(value)], self._text(between)
        self._pay(sum(map(len, parts)) + len(parts) * len(between))
        return str(between).join(parts)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self._text(value)
        lines = 1 + len(text.splitlines())
        self._pay(len(text) + lines * (len(width) if isinstance(width, str) else abs(int(width))))
        return str(FILTERS["indent"](text, width, first, blank))

    def _round(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        if not isinstance(precision, int) or abs(precision) > MAX_DIGITS:
            raise LimitError(f"it rounds to more than {MAX_DIGITS} digits")
        return FILTERS["round"](value, precision, method)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Transformers' `tojson`: unlike Jinja's own, it escapes nothing for HTML and keeps the order of keys."""
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= MAX_INDENT):
            raise LimitError(f"it indents JSON by {indent!r}, not 0..{MAX_INDENT}")
        between = max(map(len, separators), default=0) if separators else 2
        self._pay(width(value, self._pay, indent or 0, between=between) * (6 if ensure_ascii else 1))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _range(self, *bounds: int) -> list[int]:
        numbers = range(*bounds)
        if numbers[MAX_RANGE:]:
            raise LimitError(f"it counts over more than {MAX_RANGE} numbers")
        self._pay(len(numbers))
        return list(numbers)

    def _dict(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        self._pay(sum(size(value, self._pay) for value in args))
        value = dict(*args, **kwargs)
        self._pay(size(value, self._pay))
        return value


def _same(value: Any) -> Any:
    return value


def _slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    return value[start:stop:step]


def _small(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise LimitError(f"it computes with numbers of more than {MAX_INT_BITS} bits")
    return value


def _refuse(message: object = "") -> NoReturn:
    raise _RefusedError(message if isinstance(message, str) else type(message).__name__)


def _now(pattern: str) -> str:
    """Today as Transformers' `strftime_now`; the one thing that makes a rendering depend on more than its input."""
    if not isinstance(pattern, str) or not SIMPLE_DATE.fullmatch(pattern):
        raise LimitError("strftime_now takes up to 100 characters and plain directives")
    return datetime.now().strftime(pattern)
