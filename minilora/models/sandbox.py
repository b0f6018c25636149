"""The sandbox of chat templates: jinja2's immutable sandbox with limits on loops, output and the size of integers.

A turn of a loop costs the size of its body, reading a value its size, and an operation the product of its two largest
operands, charged before it runs. Costs depend on the template and the conversation, never on a clock.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LIMIT, LIMIT_PER_CHARACTER = 20_000_000, 2000  # cost of a rendering: in all, and more for each character it is given
STEP, INTEGER_BITS = 100, 256  # cost of reading a value, besides its size; size of the largest integer
# operations that are random, quadratic in time, or as large as a number in a text
REFUSED = frozenset(("**", "format", "format_map", "pprint", "random", "striptags", "sum", "urlize", "wordwrap"))
SHALLOW = frozenset(  # filters, methods and tests ("is") that do not read what the elements of a container hold
    "length first last d default items keys values get list map select reject selectattr rejectattr is".split()  # noqa: SIM905
)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "%", "**"))

    def __init__(self, filters: dict[str, Any], functions: dict[str, Any], **options: Any):
        super().__init__(**options)
        self._rendering = threading.local()  # empty while jinja2 compiles, which cannot compute constants then
        self.filters = {name: self._charged(name, each) for name, each in (self.filters | filters).items()}
        self.filters["_read"] = self._read
        self.tests = {name: self._charged("is", test) for name, test in self.tests.items()}
        self.globals |= functions
        del self.globals["lipsum"], self.tests["lower"], self.tests["upper"]

    def start(self, given: Any) -> None:  # a rendering, in this thread
        self._rendering.left = math.inf
        self._rendering.left = LIMIT + LIMIT_PER_CHARACTER * self._size(given)

    def _spend(self, cost: float) -> None:
        self._rendering.left -= cost
        if not self._rendering.left >= 0:
            raise SecurityError("it takes more work or memory than a rendering may")

    def _size(self, value: Any, is_deep: bool = True) -> int:
        """Charge for reading a value, and return its characters or elements, with what those hold if it `is_deep`."""
        if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            raise SecurityError(f"an integer has more than {INTEGER_BITS} bits")
        size = len(value) if isinstance(value, Collection) else 1
        self._spend(STEP + size)
        if is_deep and isinstance(value, Namespace):  # it can change, and hold itself
            raise SecurityError("a namespace is read as a whole")
        if is_deep and isinstance(value, Collection) and not isinstance(value, str | bytes):
            parts = [*value, *value.values()] if isinstance(value, Mapping) else value
            size += sum(STEP + self._size(part) for part in parts)
        return size

    def _read(self, value: Any, cost: float = 0) -> Any:
        self._spend(abs(cost))  # a template can name this filter, too
        self._size(value)
        return value

    def _charge(self, name: str, first: Any, *others: Any) -> None:
        """Charge for an operation, or for a call of a function, where `first` is None."""
        if name in REFUSED:
            raise SecurityError(f"{name} is not allowed in a template")
        sizes = [1, self._size(first, name not in SHALLOW), *map(self._size, others)]
        sizes += [abs(value) for value in others if isinstance(value, int)]  # a width or a count
        if first is not None:
            self._spend(math.prod(sorted(sizes)[-2:]))

    def _charged(self, name: str, function: Any) -> Any:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja2's own context comes first

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self._charge(name, *args[skipped:], *kwargs.values())
            result = function(*args, **kwargs)
            return map(self._read, result) if isinstance(result, Iterator) else result

        return charged

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(function, Macro):  # whose body pays
            given = [value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")]  # jinja2's own
            self._charge(getattr(function, "__name__", ""), getattr(function, "__self__", None), *args, *given)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        name = "format" if operator == "%" and not isinstance(left, int | float) else operator
        self._charge(name, *((right, left) if operator == "*" and isinstance(left, int) else (left, right)))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # dict.update would change its argument
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)
