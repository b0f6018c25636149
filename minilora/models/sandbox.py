"""The sandbox of chat templates: jinja2's, with a limit on loops that take hours and texts that are doubled forever."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sized
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

LIMIT, LIMIT_PER_CHARACTER = 10_000_000, 1000  # cost of a rendering: in all, and more for each character it is given
NODE = 20  # cost of a node of syntax, each time that the block around it is entered; a result costs its length
PAYING = (nodes.Call, nodes.Filter, nodes.Concat, nodes.Add, nodes.Sub, nodes.Mod)


def size(value: Any) -> int:
    """Return what a value costs; a number its amount, since it may be a width or a number of digits."""
    return len(value) if isinstance(value, Sized) else abs(value) if isinstance(value, int) else 1


class Compiler(CodeGenerator):
    """jinja2's compiler, whose programs pay for each block of statements that they enter, and for results."""

    def blockvisit(self, body: Iterable[nodes.Node], frame: Any) -> None:
        inside = sum(len([*node.find_all(nodes.Node)]) for node in body)
        self.writeline(f"environment.charge({NODE * (1 + inside)})")
        super().blockvisit(body, frame)

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> None:
        pays = isinstance(node, PAYING) or (isinstance(node, nodes.Const) and size(node.value) > NODE)
        self.write("environment.paid(" if pays else "")
        super().visit(node, *args, **kwargs)
        self.write(")" if pays else "")

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):  # or it would be computed now, without a limit
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which keeps Python's internals out of reach and what it is given unchanged, with a limit."""

    intercepted_binops = frozenset(("*", "**"))
    code_generator_class = Compiler
    _rendering = threading.local()

    def __init__(self, **options: Any):
        super().__init__(optimized=False, **options)  # so that nothing is computed where it is compiled

    def start(self, given: Any) -> None:
        """Begin a rendering in this thread."""
        self._rendering.left = LIMIT + LIMIT_PER_CHARACTER * len(str(given))

    def charge(self, cost: int) -> None:
        self._rendering.left -= cost
        if self._rendering.left < 0:
            raise SecurityError("it takes more work or memory than a rendering may")

    def paid(self, result: Any) -> Any:
        self.charge(1 + size(result))
        return result

    def concat(self, pieces: Iterable[str]) -> Any:  # what a macro or a block has written
        return self.paid("".join(pieces))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # charged before it is computed
        if operator == "**":
            raise SecurityError("** is not allowed in a template")
        self.charge(size(left) * size(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # dict.update would change its argument
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)
