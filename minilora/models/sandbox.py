"""The sandbox of chat templates: jinja2's immutable sandbox with limits on loops, output and the size of integers.

jinja2 keeps a template from Python's internals and from changing its arguments, but not from running forever or filling
the memory. Here each turn of a loop has a cost, and each operation that of its two largest operands multiplied (added,
where nothing is multiplied), charged before it runs. Costs depend on template and conversation, never on a clock.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LIMIT, LIMIT_PER_CHARACTER = 20_000_000, 2000  # cost of a rendering: in all, and more for each character it is given
STEP, NODE = 100, 40  # cost of an operation or an element; of a node of syntax, each time that its loop or macro runs
INTEGER_BITS = 64
SHALLOW = frozenset(  # operations that do not read what their first operand holds
    "length first last default d items keys values get list map select reject selectattr rejectattr "  # noqa: SIM905
    "dict Namespace safe_range".split()
)
REFUSED = frozenset(("pprint", "random", "striptags", "sum", "urlize", "wordwrap"))  # random, or quadratic in time
STAR = re.compile(r"%(\([^)]*\))?[-+ #0]*(\d*\.)?\*")  # widths that are taken from operands, for % and for format
NESTED = re.compile(r"\{[^{}]*(\[|:[^{}]*\{)")
READING = (nodes.Output, nodes.Compare, nodes.Operand, nodes.Concat, nodes.List, nodes.Tuple, nodes.Pair, nodes.Neg)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, in which the cost of a rendering is limited."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, filters: Mapping[str, Any], functions: Mapping[str, Any], **options: Any):
        super().__init__(**options)
        self._rendering = threading.local()  # empty while jinja2 compiles, which cannot compute constants then
        filters = {**self.filters, **filters}
        self.filters = {name: self._charged(name, each) for name, each in filters.items() if name not in REFUSED}
        self.filters |= {"format": self._charged("%", filters["format"]), "_read": self._read}
        for name, test in self.tests.items():
            self.tests[name] = self._charged(name if name in ("lower", "upper") else "first", test)
        self.globals |= functions
        del self.globals["lipsum"]

    def start(self, given: Any) -> None:
        """Begin a rendering in this thread."""
        self._rendering.sizes = {}  # id: size, and the container, so that it stays alive
        self._rendering.left = LIMIT + LIMIT_PER_CHARACTER * self._size(given)

    def _spend(self, cost: float) -> None:
        self._rendering.left -= STEP + cost
        if not self._rendering.left >= 0:
            raise SecurityError("it takes more work or memory than a rendering may")

    def _size(self, value: Any) -> int:
        """The characters of a text; of a container, what it would be when written out."""
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, Namespace):  # it can change, and hold itself
            raise SecurityError("a namespace is read as a whole")
        if not isinstance(value, Collection):
            return value.bit_length() if isinstance(value, int) else 1
        sizes = self._rendering.sizes
        if id(value) not in sizes:
            parts = chain(value.keys(), value.values()) if isinstance(value, Mapping) else value
            sizes[id(value)] = STEP + sum(STEP + self._size(part) for part in parts), value
        return sizes[id(value)][0]

    def _charge(self, name: str, first: Any, *others: Any) -> None:
        if any(isinstance(value, int) and value.bit_length() > INTEGER_BITS for value in (first, *others)):
            raise SecurityError(f"an integer has more than {INTEGER_BITS} bits")
        if name in SHALLOW:
            return self._spend(sum(map(self._size, others), len(first) if isinstance(first, str) else 0))
        sizes = [1, self._size(first), *map(self._size, others)]
        if name == "+":
            return self._spend(sum(sizes))
        sizes += [10 * abs(value) for value in others if isinstance(value, int)]  # a width, a count, an exponent
        if name in ("%", "format", "format_map"):
            pattern = str(first).replace("{{", "")
            if (STAR if name == "%" else NESTED).search(pattern):
                raise SecurityError("a width in a format string is taken from a value")
            sizes += map(int, re.findall(r"\d+", pattern))  # each may be a width
        return self._spend(math.prod(sorted(sizes)[-2:]))

    def _charged(self, name: str, function: Any) -> Any:
        skipped = 1 if getattr(function, "jinja_pass_arg", None) else 0  # jinja2's own context comes first

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self._charge(name, *args[skipped:], *kwargs.values())
            result = function(*args, **kwargs)
            return map(self._read, result) if isinstance(result, Iterator) else result

        return charged

    def _read(self, value: Any, cost: float = 0) -> Any:
        self._spend(abs(cost) + self._size(value))  # a template can name this filter, too
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(function, Macro):  # whose body pays
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            given = [value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")]  # jinja2's own
            self._charge(getattr(function, "__name__", type(function).__name__), owner, *args, *given)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = [side for side in (left, right) if isinstance(side, int | float)]
        if operator == "**" and isinstance(right, int) and right > INTEGER_BITS:
            raise SecurityError(f"an exponent is larger than {INTEGER_BITS}")
        if operator == "*" and len(numbers) == 1:
            self._spend(abs(numbers[0]) * self._size(right if left is numbers[0] else left))
        else:
            self._charge("%" if operator == "%" and isinstance(left, str) else "+", left, right)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # dict.update would change its argument
        of_class = isinstance(obj, type) and attr != "fromkeys"
        return not of_class and attr not in REFUSED and super().is_safe_attribute(obj, attr, value)


class Metered(NodeTransformer):
    """Passes what jinja2 compiles to plain Python through the filter `_read`: operands, and each turn of a loop."""

    def generic_visit(self, node: Any) -> Any:
        super().generic_visit(node)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
            cost = sum(NODE + len(getattr(inner, "data", "")) for inner in node.find_all(nodes.Node))
            node.body.insert(0, nodes.ExprStmt(_read(nodes.Const(None, lineno=node.lineno), cost), lineno=node.lineno))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = _read(node.test, NODE)
        elif isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                return _read(node)
            node.arg = _read(node.arg)
        elif isinstance(node, READING) and getattr(node, "ctx", "load") == "load":
            for field, value in node.iter_fields():
                setattr(node, field, [*map(_read, value)] if isinstance(value, list) else _read(value))
        return node


def _read(node: Any, cost: int = 0) -> Any:
    if not cost and (isinstance(node, nodes.Literal) or not isinstance(node, nodes.Expr)):
        return node
    return nodes.Filter(node, "_read", [nodes.Const(cost)], [], None, None, lineno=node.lineno)
