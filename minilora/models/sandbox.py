"""The sandbox that chat templates run in: jinja2's, with a limit on what a rendering computes.

A template is code from a model's author. jinja2's sandbox keeps it from Python's internals and from changing what it is
given; the limit keeps it from looping for hours, and from repeating text until no memory is left.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sized
from functools import wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Cost of a rendering: in all, and more for each character it is given. A character or element of a result costs 1.
LIMIT, LIMIT_PER_CHARACTER = 10_000_000, 1000
NODE = 20  # cost of a node of syntax, each time that the loop or macro around it runs


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, in which turns of loops and the sizes of results are charged to a limit."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self, filters: dict[str, Any], **options: Any):
        super().__init__(**options)
        self._rendering = threading.local()
        self.filters = {name: self._charged(function) for name, function in (self.filters | filters).items()}

    def template(self, source: str) -> Template:
        """Compile a template; each turn of its loops and macros is charged, and `~` as the filter `join` is."""
        tree: Any = self.parse(source)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            cost = nodes.Const(NODE * len([*node.find_all(nodes.Node)]))
            turn = nodes.Call(nodes.EnvironmentAttribute("charge"), [cost], [], None, None)
            node.body.insert(0, nodes.ExprStmt(turn).set_lineno(node.lineno))
            if isinstance(node, nodes.For) and node.test:
                node.test = nodes.And(turn, node.test)
        for node in [*tree.find_all(nodes.Concat)]:
            node.nodes = [nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None)]
        return self.from_string(tree)

    def start(self, given: Any) -> None:
        """Begin a rendering in this thread."""
        self._rendering.left = LIMIT + LIMIT_PER_CHARACTER * len(str(given))

    def charge(self, cost: int) -> bool:
        self._rendering.left -= cost
        if self._rendering.left < 0:
            raise SecurityError("it takes more work or memory than a rendering may")
        return True

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self._paid(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("** is not allowed in a template")
        if operator == "*":
            self.charge(_size(left) * _size(right))
            return super().call_binop(context, operator, left, right)
        return self._paid(super().call_binop(context, operator, left, right))

    def concat(self, pieces: Iterable[str]) -> str:  # what a macro or a block has written
        return str(self._paid("".join(pieces)))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # dict.update would change its argument
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)

    def _charged(self, function: Any) -> Any:
        return wraps(function)(lambda *args, **kwargs: self._paid(function(*args, **kwargs)))

    def _paid(self, result: Any) -> Any:
        self.charge(len(result) if isinstance(result, Sized) else 1)
        return result


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else abs(value) if isinstance(value, int) else 1
