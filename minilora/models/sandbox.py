"""The sandbox that chat templates run in: what they cannot reach, and a limit on what a rendering costs.

A template is code from a model's author. jinja2's sandbox keeps it from Python's internals and from changing what it is
given; the limit keeps it from taking hours or all memory.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Sized
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

LIMIT, LIMIT_PER_CHARACTER = 20_000_000, 2000  # cost of a rendering: in all, and more for each character it is given
NODE = 40  # cost of a node of syntax, each time that the loop or macro around it runs
# as large as a number in a text says, many times their input, or not the same twice
REFUSED = ("**", "format", "format_map", "urlencode", "random")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, with a limit on what a rendering costs, which depends on no clock.

    A turn of a loop costs the size of its body. An operation costs the product of its two largest operands, before it
    runs, and then the size of its result.
    """

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self, filters: dict[str, Any], functions: dict[str, Any], **options: Any):
        super().__init__(**options)
        self._rendering = threading.local()  # empty while jinja2 compiles, which cannot compute constants then
        filters = self.filters | filters | {"_turn": lambda value, cost: value}
        self.filters = {name: self._metered(name, function) for name, function in filters.items()}
        self.globals |= functions
        del self.globals["lipsum"]

    def template(self, source: str) -> Template:
        """Compile a template; each turn of its loops and macros is charged, and `~` as the filter `join` is."""
        tree: Any = self.parse(source)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            cost = [nodes.Const(NODE * len([*node.find_all(nodes.Node)]))]
            turn = nodes.Filter(nodes.Const(None), "_turn", cost, [], None, None)
            node.body.insert(0, nodes.ExprStmt(turn).set_lineno(node.lineno))
            if isinstance(node, nodes.For) and node.test:
                node.test = nodes.Filter(node.test, "_turn", cost, [], None, None)
        for node in [*tree.find_all(nodes.Concat)]:
            node.nodes = [nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None)]
        return self.from_string(tree)

    def start(self, given: Any) -> None:
        """Begin a rendering in this thread."""
        self._rendering.left = LIMIT + LIMIT_PER_CHARACTER * len(str(given))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        operands = [] if owner is None else [owner, *args, *kwargs.values()]  # the body of a macro is charged by itself
        compute = functools.partial(super().call, context, function, *args, **kwargs)
        return self._compute(getattr(function, "__name__", ""), operands, compute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        name = "format" if operator == "%" and not isinstance(left, int | float) else operator
        operands = [] if operator == "+" and not isinstance(left, Sized) else [left, right]
        return self._compute(name, operands, functools.partial(super().call_binop, context, operator, left, right))

    def concat(self, pieces: Iterable[str]) -> str:  # what a macro or a block has written
        held = list(pieces)
        return str(self._compute("join", [held], lambda: "".join(held)))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # dict.update would change its argument
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)

    def _metered(self, name: str, function: Any) -> Any:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja2's own context comes first

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            operands = [*args[skipped:], *kwargs.values()]
            return self._compute(name, operands, functools.partial(function, *args, **kwargs))

        return metered

    def _compute(self, name: str, operands: list[Any], compute: Callable[[], Any]) -> Any:
        if name in REFUSED:
            raise SecurityError(f"{name} is not allowed in a template")
        self._charge(math.prod(sorted(map(_size, operands))[-2:]))
        result = compute()
        self._charge(_size(result))
        return result

    def _charge(self, cost: float) -> None:
        self._rendering.left -= cost
        if not self._rendering.left >= 0:
            raise SecurityError("it takes more work or memory than a rendering may")


def _size(value: Any) -> float:
    """Return a number's absolute value, or how many characters or elements a value has, with their text; 1 at least."""
    if isinstance(value, list | tuple | dict):
        held = value.values() if isinstance(value, dict) else value
        return 1 + len(value) + sum(len(each) for each in held if isinstance(each, str))
    if isinstance(value, int | float):
        return max(1, abs(value))
    return max(1, len(value)) if isinstance(value, Sized) else 1
