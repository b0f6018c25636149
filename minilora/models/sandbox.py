"""The sandbox that chat templates run in: jinja2's, where everything that a template does has a price.

jinja2's immutable sandbox keeps a template away from Python's internals and from changing what it is given, but not
from running forever or filling the memory. Here each operation pays before it runs: with the size of what it reads or,
unless it is known not to multiply, with the product of its two largest operands. What a rendering can pay is limited,
and so are its time, its memory and every value in it. Prices depend on template and conversation, never on the clock.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from string import Formatter
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

WORK = 30_000_000  # what a rendering may pay, in characters read or written
STEP = 100  # the price of an operation, and of an element of a list
NODE = 40  # the price of a piece of syntax, each time that the loop or macro around it runs
POINTER = 8  # the price of an element that is only copied
ALLOWANCE = 2000  # what it may pay more for each character that it is given
UNKNOWN = 100  # the least factor for an operation that is not listed below

# What these read beside their first operand is small, and of the first they read only the outside.
SHALLOW = frozenset(
    "length first last default d items keys values get list map select reject selectattr rejectattr".split()  # noqa: SIM905
)
# What these make is not larger than what they read.
LINEAR = frozenset(
    "split rsplit splitlines strip lstrip rstrip startswith endswith removeprefix removesuffix "  # noqa: SIM905
    "partition rpartition find rfind index rindex count lower upper capitalize trim string safe escape e tojson "
    "int float abs attr reverse dictsort sort unique min max Dict Namespace _raise safe_range".split()
)
# The tests that read their operands; the others look at the outside.
READING_TESTS = frozenset("lower upper in eq equalto == ne != gt greaterthan > ge >= lt lessthan < le <=".split())  # noqa: SIM905
REFUSED = ("pprint", "random", "striptags", "sum", "urlize", "wordwrap")  # slow for their input, or random
STAR = re.compile(r"%(\([^)]*\))?[-+ #0]*(\d*\.)?\*")  # a width that is taken from a value


class Meter(threading.local):
    """What is left to pay with, in this thread's rendering."""

    def __init__(self) -> None:
        self.start()

    def start(self, given: Any = None) -> None:
        self._known: dict[int, tuple[int, Any]] = {}  # id: weight, and the container, so that it stays alive
        self._left: float = WORK + ALLOWANCE * self.weigh(given)

    def pay(self, price: float) -> None:
        """Raises SecurityError: nothing is left to pay with."""
        self._left -= price
        if not self._left >= 0:
            raise SecurityError("it takes more work or memory than a rendering may")

    def weigh(self, value: Any) -> int:
        """The characters of a text, the bits of an integer; of a container, all that it would be when written out.

        Templates cannot change containers, so each is measured once, however often others hold it.
        """
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, int):
            return value.bit_length()
        if not isinstance(value, Collection):
            return 1
        if id(value) not in self._known:
            parts = chain(value.keys(), value.values()) if isinstance(value, Mapping) else value
            self._known[id(value)] = STEP + sum(STEP + self.weigh(part) for part in parts), value
        return self._known[id(value)][0]

    def charge(self, name: str, first: Any, *others: Any) -> None:
        """Pay for the operation called `name`.

        Raises:
            SecurityError: it costs more than is left, or templates cannot use it.
        """
        if name in REFUSED:
            raise SecurityError(f"{name} is not available")
        if name in SHALLOW:
            price: float = sum(map(self.weigh, others)) + (len(first) if isinstance(first, str) else 0)
        elif name in LINEAR:
            price = sum(map(self.weigh, (first, *others)))
        elif name == "replace" and len(others) >= 2 and all(isinstance(value, str) for value in (first, *others[:2])):
            price = len(first) + first.count(others[0]) * len(others[1])
        elif name in ("format", "format_map") and isinstance(first, str):
            price = len(first) * max(_largest_width(first), *map(self.weigh, others), 1)
        else:
            numbers = [abs(value) for value in others if isinstance(value, int)]
            least = 1 if name == "join" else UNKNOWN
            *_, second, largest = sorted([least, self.weigh(first), *map(self.weigh, others), *numbers])
            price = second * largest
        self.pay(STEP + price)


def _largest_width(pattern: str) -> int:
    """The largest number that a format string names, since it may be a width."""
    if STAR.search(pattern) or any("{" in (field[2] or "") for field in _fields(pattern)):
        raise SecurityError("a width in a format string is taken from a value")
    return max(map(int, re.findall(r"\d+", pattern)), default=0)


def _fields(pattern: str) -> Iterable[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(pattern))
    except ValueError:  # one for %
        return []


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with a meter.

    Calls, operators, filters and tests pay where jinja2 lets the environment answer for them; the rest of the syntax is
    rewritten so that its values pass through the filters `_weighed`, `_copied` and `_paying`.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(
        self,
        extensions: Sequence[type[Extension]],
        filters: Mapping[str, Callable[..., Any]],
        functions: Mapping[str, Callable[..., Any]],
    ):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, *extensions])
        self.meter = Meter()
        self.filters |= filters
        self.filters = {name: self._paid(name, function) for name, function in self.filters.items()}
        self.filters |= {"_weighed": self._weighed, "_copied": self._copied, "_paying": self._paying}
        self.tests |= {name: self._paid("first", self.tests[name]) for name in READING_TESTS}
        del self.globals["lipsum"]
        self.globals |= {"dict": Dict(), "namespace": Namespace, **functions}

    def compiled(self, tree: nodes.Template) -> jinja2.Template:
        """A parsed template, with a price for everything in it."""
        self.meter.start()  # jinja2 computes constants while it compiles
        return self.from_string(_Rewriter().visit(tree))

    def _paid(self, name: str, function: Any) -> Callable[..., Any]:
        skipped = 1 if getattr(function, "jinja_pass_arg", None) else 0  # jinja2's own context comes first

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.meter.charge(name, *args[skipped:], *kwargs.values())
            result = function(*args, **kwargs)
            return self._each(result) if isinstance(result, Iterator) else result

        return paid

    @jinja2.pass_context  # so that jinja2 does not compute it once for all when it compiles
    def _paying(self, context: jinja2.runtime.Context, price: int) -> None:
        self.meter.pay(STEP + abs(price))  # a template can name this filter, too

    @jinja2.pass_context
    def _weighed(self, context: jinja2.runtime.Context, value: Any) -> Any:
        self.meter.pay(STEP + self.meter.weigh(value))
        return value

    def _copied(self, value: Any) -> Any:
        self.meter.pay(STEP + POINTER * len(value))
        return value

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.meter.pay(STEP)
            yield value

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, Macro):
            self.meter.pay(STEP)
        else:
            name = getattr(function, "__name__", type(function).__name__)
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            self.meter.charge(name, owner, *args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is type(right) is str:  # what most templates do most
            self.meter.pay(STEP + len(left) + len(right))
            return left + right
        weigh, numbers = self.meter.weigh, [side for side in (left, right) if isinstance(side, int | float)]
        if operator == "%" and isinstance(left, str):
            self.meter.charge("format", left, right)
        elif operator == "**":
            self.meter.pay((weigh(left) * abs(right)) ** 2)
        elif operator == "*" and len(numbers) == 1:  # a number and what it repeats
            self.meter.pay(STEP + weigh(right if left is numbers[0] else left) * abs(numbers[0]))
        elif operator == "*":
            self.meter.pay(STEP + weigh(left) * weigh(right))
        else:
            self.meter.pay(STEP + weigh(left) + weigh(right))
        return super().call_binop(context, operator, left, right)

    def concat(self, pieces: Iterable[str]) -> str:  # of a macro or a block
        pieces = list(pieces)
        self.meter.pay(STEP + sum(map(len, pieces)))
        return "".join(pieces)


class _Rewriter(NodeTransformer):
    """Sends what jinja2 compiles to plain Python through a filter of the sandbox."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self._stepping(node)
        if node.test is not None:
            node.test = _filtered(node.test, "_weighed")
        return node

    def _stepping(self, node: Any) -> Any:
        """What can run more than once, with a statement that pays for it each time."""
        size = sum(1 for statement in node.body for _ in statement.find_all(nodes.Node))
        self.generic_visit(node)
        price = _filtered(nodes.Const(NODE * size, lineno=node.lineno), "_paying")
        node.body.insert(0, nodes.ExprStmt(price, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _stepping

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_weighed(part) for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        constants = [isinstance(side, nodes.Const) for side in (node.expr, *(operand.expr for operand in node.ops))]
        if any(constants) and not any(operand.op in ("in", "notin") for operand in node.ops):
            return node  # a comparison ends where the smaller side does
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_weighed(nodes.List(node.nodes, lineno=node.lineno)), "join")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(node, "_copied")
        node.arg = _weighed(node.arg)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node) if node.ctx == "load" else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _weighed(node: Any) -> nodes.Expr:
    return node if isinstance(node, nodes.Const | nodes.TemplateData) else _filtered(node, "_weighed")


class Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that begin with an underscore: those lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any):  # jinja2's own signature, so that namespace(self=…) works
        for name in dict(*args[1:], **kwargs):
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace._check(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may hold it

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")


class Dict:
    """`dict(…)` and `dict.fromkeys(…)`, and no way from there to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)
