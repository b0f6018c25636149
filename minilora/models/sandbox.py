"""The sandbox of chat templates: jinja2's, with a limit on work, and without what makes much of little."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.filters import do_indent
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_environment

NODE = 20  # work of a node of syntax, each time that the block around it is entered; a result takes its length
REFUSED = (  # filters and functions that write as much as a number says, or change a dict; no known template has them
    *("batch", "center", "expandtabs", "format", "format_map", "generate_lorem_ipsum", "ljust", "rjust"),
    *("round", "slice", "to_bytes", "wordwrap", "zfill", "clear", "pop", "popitem", "setdefault", "update"),
)


class Compiler(CodeGenerator):
    """jinja2's compiler, whose programs pay for each block of statements that they enter, and for results."""

    def blockvisit(self, body: Iterable[nodes.Node], frame: Any) -> None:
        frame.eval_ctx.volatile = True  # or filters of constants would be computed here, without a limit
        inside = sum(len([*node.find_all(nodes.Node)]) for node in body)
        self.writeline(f"environment.paid('', {NODE * (1 + inside)})")
        super().blockvisit(body, frame)

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> None:
        pays = isinstance(node, nodes.Call | nodes.Filter | nodes.Concat | nodes.Add)
        pays = pays or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        self.write("environment.paid(" if pays else "")
        super().visit(node, *args, **kwargs)
        self.write(")" if pays else "")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, which may do as much work as is `left`."""

    intercepted_binops = frozenset(("*", "/", "//", "%", "**"))
    code_generator_class = Compiler
    left = 0

    def paid(self, result: Any, work: int = 1) -> Any:
        self.left -= work + (len(result) if isinstance(result, Sized) else 0)
        if self.left < 0:
            raise SecurityError("it takes more work or memory than a rendering may")
        return result

    def concat(self, pieces: Iterable[str]) -> Any:  # what the template, a macro or a block writes
        return "".join(map(self.paid, pieces))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and isinstance(left, str) and isinstance(right, int):  # paid before it is there
            self.paid("", len(left) * abs(right))
        elif operator == "**" or not all(isinstance(each, int | float) and abs(each) < 2**64 for each in (left, right)):
            raise SecurityError(f"{operator} of these values is not allowed in a template")
        return super().call_binop(context, operator, left, right)

    def is_safe_callable(self, obj: Any) -> bool:
        return getattr(obj, "__name__", "") not in REFUSED and super().is_safe_callable(obj)


@pass_environment
def indent(sandbox: Sandbox, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Return what jinja2's filter returns, which is paid before it is there."""
    sandbox.paid("", (len(text.splitlines()) + 1) * (abs(width) if isinstance(width, int) else len(width)))
    return do_indent(text, width, first, blank)
