"""Making a Jinja template pay for what it computes: a budget, the cost of values, meters in the syntax tree."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.visitor import NodeTransformer

__all__ = ["COMPARE", "CONCAT", "MADE", "SLICE", "TICK", "Budget", "LimitError", "Meter", "compare", "size", "width"]

Pay = Callable[[int], None]

# Names of filters that stand where Jinja's own operations were. The spaces keep a template from using them itself.
TICK, MADE, CONCAT, SLICE, COMPARE = "do tick", "do make", "do concat", "do slice", "do compare"

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    {
        "eq": operator.eq,
        "ne": operator.ne,
        "gt": operator.gt,
        "gteq": operator.ge,
        "lt": operator.lt,
        "lteq": operator.le,
        "in": lambda left, right: left in right,
        "notin": lambda left, right: left not in right,
    }
)


class LimitError(Exception):
    """A template needs more than it may have, or something that it may not have."""


class Budget:
    """What one rendering may still use: sizes of values, and CPU seconds of this thread."""

    def __init__(self, size: int, seconds: float) -> None:
        self._left = size
        self._seconds = seconds
        self._cpu = time.thread_time()
        self._look = time.monotonic() + seconds

    def pay(self, size: int) -> None:
        """Pay for a value of that size before it is made, and look at the clock.

        Raises:
            LimitError: the size or the time is used up.
        """
        now = time.monotonic()  # a thread's CPU time runs no faster, and costs ten times as much to ask for
        if now > self._look:
            used = time.thread_time() - self._cpu
            if used > self._seconds:
                raise LimitError(f"it takes more than {self._seconds:g} s of CPU time")
            self._look = now + self._seconds - used
        self._left -= size
        if self._left < 0:
            raise LimitError("it makes more text and lists than the conversation can need")


def size(value: object, pay: Pay) -> int:
    """How much memory a value adds: a text's characters, or a container's items, counted through all levels.

    Items are counted as often as they can be reached: a list that holds one list twice is as long as it prints, which
    is what stops `[x, x]` of `[x, x]` of ... from growing exponentially.
    """
    if isinstance(value, str):
        return len(value)
    return _items(value, pay)


def _items(value: object, pay: Pay) -> int:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 1
    pay(1)
    return 1 + sum(_items(item, pay) for item in value)


def width(value: object, pay: Pay, indent: int = 0, depth: int = 0, between: int = 2) -> int:
    """About how many characters a value prints as, with so many between items, and as JSON indented so far a level.

    Raises:
        LimitError: a value that chat templates have no reason to print.
    """
    own = indent * depth + between
    if isinstance(value, str):
        return len(value) + own
    if isinstance(value, (list, tuple)):
        pay(1)
        return own + 2 + sum(width(item, pay, indent, depth + 1, between) for item in value)
    if isinstance(value, dict):
        pay(1)
        parts = (part for pair in value.items() for part in pair)
        return own + 2 + sum(width(part, pay, indent, depth + 1, between) for part in parts)
    if value is None or isinstance(value, (bool, int, float, Undefined)):
        return own + 8
    raise LimitError(f"it prints a {type(value).__name__}")


def compare(left: object, kind: str, right: object, pay: Pay) -> bool:
    """`left == right` and its kin; whole containers, and a search through one, cost what they hold."""
    if kind in ("in", "notin") and isinstance(right, (list, tuple)):
        pay(sum(_alike(left, item, pay) for item in right))
    else:
        pay(_alike(left, right, pay))
    return COMPARISONS[kind](left, right)


def _alike(left: object, right: object, pay: Pay) -> int:
    if isinstance(left, str) and isinstance(right, str):
        return 1 + min(len(left), len(right)) // 64  # compared so many at a time
    if isinstance(left, (list, tuple, dict)) and isinstance(right, (list, tuple, dict)):
        return min(width(left, pay), width(right, pay))
    return 1


class Meter(NodeTransformer):
    """Puts a filter before, or in the place of, each operation that Jinja would do without asking the environment."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return nodes.Const(node.data, lineno=node.lineno)  # unlike template data, a constant passes `finalize`

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filter(TICK, node.iter)
        if node.test is not None:
            node.test = _filter(TICK, node.test)
        turn = nodes.ExprStmt(_filter(TICK, nodes.Const(None, lineno=node.lineno)), lineno=node.lineno)
        node.body = [turn, *node.body]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            bounds = (node.arg.start, node.arg.stop, node.arg.step)
            return _filter(SLICE, node.node, *(bound or nodes.Const(None, lineno=node.lineno) for bound in bounds))
        node.node = _filter(TICK, node.node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        result: nodes.Expr | None = None
        left = node.expr
        for operand in node.ops:  # a < b < c is a < b and b < c
            pair = _filter(COMPARE, left, nodes.Const(operand.op, lineno=node.lineno), operand.expr)
            result = pair if result is None else nodes.And(result, pair, lineno=node.lineno)
            left = operand.expr
        return result or node.expr

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(MADE, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(MADE, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(MADE, node) if node.ctx == "load" else node


def _filter(name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)
