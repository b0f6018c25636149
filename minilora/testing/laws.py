"""What a law of an implementation is: cases, comparisons within a derived bound, and the message of a failure.

The laws themselves are in the files `*_laws`; `checks` has what is called.
"""

import functools
import inspect
import math
import unittest
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
import torch

from minilora.testing.cases import rounded
from minilora.testing.catalogue import CATALOGUE
from minilora.testing.compare import GRADIENT_PARITY, UNITS, Array, Bounded, as_array, relative, worst

__tracebackhide__ = True  # pytest shows the line that calls this module
Tried = tuple[Any, list[Any]]  # a case and its comparisons
TRIED = 10  # cases at most in which mistakes of the catalogue are tried
CALL = "the call"  # what is wrong where an exception is raised
RANDOM = torch.Generator().manual_seed(0).get_state()


class CheckFailure(AssertionError):  # noqa: N818  # an assertion that failed, as pytest shows it
    """An implementation breaks a law.

    Attributes:
        law: its id, such as "lora-gradients".
        case: the smallest case that fails.
        causes: mistakes of the catalogue that have the same result in three quarters of the failing cases, and in no
            fewer than another, and keep what the implementation keeps of this law and of those before it, in the modes
            of the failing cases.
    """

    def __init__(self, message: str, law: str, case: object, causes: tuple[str, ...] = ()):
        super().__init__(message)
        self.law, self.case, self.causes = law, case, causes


class NotApplicable(unittest.SkipTest):  # by which pytest skips a test
    """A law does not apply, such as that of dropout to a layer without dropout; pytest skips such a test."""


@dataclass(frozen=True)
class Comparison:
    """A result of an implementation, and what it should be."""

    name: str  # such as "dA"
    actual: Any  # an array, or an exception that was raised in its place
    expected: Bounded | Array  # without a bound, bits must be equal

    def __post_init__(self) -> None:
        if not isinstance(self.actual, Exception):
            try:
                object.__setattr__(self, "actual", as_array(self.actual).copy())  # the implementation may change it
            except AssertionError as error:
                object.__setattr__(self, "actual", error)

    @property
    def right(self) -> Array:
        return self.expected.value if isinstance(self.expected, Bounded) else as_array(self.expected)

    @functools.cached_property
    def verdict(self) -> tuple[float, str]:
        """How much of its bound the worst number uses, and what was found there."""
        try:
            if isinstance(self.actual, Exception):
                raise self.actual
            return worst(self.actual, self.expected)
        except Exception as error:  # of the implementation, whatever it is, or a wrong shape
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            is_numpy = "numpy" in str(error) or "ScalarType" in str(error)  # a dtype that numpy does not have
            hint = "; `on_numpy` adapts callables on numpy arrays" if is_numpy else ""
            return float("inf"), f"{kind}{error}{hint}"

    @property
    def holds(self) -> bool:
        return self.verdict[0] <= 1

    def is_like(self, other: Any) -> bool:
        """Return whether another result or claim is the same, except for rounding: within the bound, or to float32."""
        if isinstance(self.actual, Exception) or isinstance(other, Exception):
            return repr(self.actual) == repr(other)
        if self.actual.shape != other.shape:
            return False
        ours, theirs = (np.nan_to_num(array, nan=np.inf, posinf=np.inf) for array in (self.actual, other))
        allowed = GRADIENT_PARITY * abs(ours).max(where=np.isfinite(ours), initial=0.0)
        if isinstance(self.expected, Bounded) and self.expected.error.shape == other.shape:
            allowed = allowed + 4 * self.expected.error
        return worst(ours, theirs, allowed)[0] <= 1


def claim(name: str, problem: str) -> Comparison:
    """Return a statement about an implementation that is true or not: `problem` is what was found, or ""."""
    return Comparison(name, AssertionError(problem) if problem else 0.0, np.asarray(0.0))


@dataclass(frozen=True)
class Report:
    """What a law found: how much of its bound the worst of its comparisons used, and how many there were.

    `checked` is False where the law is about an option that the implementation does not take.
    """

    law: str
    statement: str
    ratio: float
    comparisons: int

    @property
    def checked(self) -> bool:
        return self.comparisons > 0

    def __str__(self) -> str:
        used = f"{self.ratio:.3f}" if self.checked else "–"
        return f"{self.law:20} {used:>5}  {self.statement}"


def like(implementation: Any, wrong: Any, case: Any) -> Any:
    """Return a mistake of the catalogue as something that takes the options that an implementation takes."""
    if isinstance(wrong, tuple):
        return wrong

    @functools.wraps(implementation, updated=())
    def call(*arguments: Any, **options: Any) -> Any:
        return wrong(*arguments, **accepted(wrong, **options))

    return call


@dataclass(frozen=True)
class Law:
    """A law of one kind of callable."""

    kind: str  # of what it is a law: "lora", "nf4", …
    name: str  # unique in its kind
    statement: str  # the law in words
    cases: Sequence[Any]  # from small to large; only None if nothing is drawn, as for files
    compare: Callable[[Any, Any], Iterator[Comparison]]  # (implementation, case) -> comparisons
    like: Callable[[Any, Any, Any], Any] = like  # (implementation, mistake, case) -> what is compared with it
    known: str = ""  # a deviation that must still be there: the text of its cause, or a part of what was found
    earlier: tuple["Law", ...] = field(default=(), repr=False)  # those of its kind that come before it

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.name}"

    def check(self, implementation: Any, case: Any = None) -> Report:
        """Check an implementation, for one case or for all.

        Raises:
            CheckFailure: it breaks the law, or a known deviation is no longer there.
            NotApplicable: the law is about something that the implementation does not have.
        """
        cases = self.cases if case is None else [case]
        tried = [(example, list(self.comparisons(implementation, example))) for example in cases]
        failing = [(example, results) for example, results in tried if not keeps(results)]
        if failing:
            failure = self._failure(implementation, failing, [example for example, each in tried if keeps(each)])
            if self.known and self.known in str(failure).replace(self.statement, ""):
                return Report(self.id, f"known deviation: {self.known}", float("inf"), 1)
            raise failure
        if self.known:
            raise CheckFailure(f"{self.id}: the known deviation {self.known!r} is no longer there", self.id, case)
        ratios = [result.verdict[0] for _, results in tried for result in results]
        return Report(self.id, self.statement, max(ratios, default=0.0), len(ratios))

    def comparisons(self, implementation: Any, case: Any) -> Iterator[Comparison]:
        """Yield the results of an implementation for a case, and the right ones; an exception is a result as well."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(RANDOM)  # so that a mistake draws the same masks as an implementation
            try:
                yield from self.compare(implementation, case)
            except NotApplicable:
                raise
            except Exception as error:
                yield Comparison(CALL, error, np.asarray(0.0))

    def _failure(self, implementation: Any, failing: list[Tried], passing: list[Any]) -> CheckFailure:
        case, comparisons = failing[0]
        first = next(comparison for comparison in comparisons if not comparison.holds)
        causes = less_precise(failing)
        mistakes = {} if causes or first.name == CALL else CATALOGUE.get(self.kind, {})  # none of them is an exception
        modes, kept = dict.fromkeys(mode(example) for example, _ in failing), dict.fromkeys(map(mode, passing))
        comparable = [example for example in passing if mode(example) in modes]
        misses = {
            name: self._misses(mistake, implementation, failing)
            for name, mistake in mistakes.items()
            if self._misses(mistake, implementation, spread(failing)) < math.inf
            and not self._breaks_more(mistake, implementation, comparable, tuple(modes))
        }
        causes += tuple(name for name, count in misses.items() if count == min(misses.values()))
        lines = [f"{self.id}: {first.name}: wrong", f"  law: {self.statement}", f"  {first.verdict[1]}"]
        if kept and not modes.keys() & kept.keys():
            lines.append(f"  only in the modes {', '.join(modes)}; right in {', '.join(kept)}")
        lines += [f"  likely cause: {cause}" for cause in causes]
        if case is not None:
            made_with = [(f.name, getattr(case, f.name), f.default) for f in fields(case) if f.repr]
            given = ", ".join(f"{name}={value!r}" for name, value, default in made_with if value != default)
            lines[0] += f" in {len(failing)} of {len(failing) + len(passing)} cases"
            lines.insert(2, f"  smallest failing case: {case}")
            lines += [
                "  to repeat:",
                f"    from minilora.testing import {type(case).__name__}, laws",
                f"    case = {type(case).__name__}({given})",
                f'    laws("{self.kind}")["{self.name}"].check(implementation, case)',
            ]
            again = self.comparisons(implementation, case)
            pairs = zip_longest(comparisons, again)
            if not all(
                our
                and their
                and (type(our.actual) is type(their.actual) is not np.ndarray or our.is_like(their.actual))
                for our, their in pairs
            ):
                lines.append("  it depends on earlier calls: now this case has other results; repeat without `case`")
        failure = CheckFailure("\n".join(lines), self.id, case, causes)
        failure.__cause__ = first.actual if isinstance(first.actual, Exception) else None
        return failure

    def _breaks_more(self, mistake: Any, implementation: Any, passing: list[Any], modes: tuple[str, ...]) -> bool:
        """Return whether a mistake breaks this law or an earlier one in a case in which the implementation keeps it."""
        cases = [(self, case) for case in spread(passing)]
        for law in self.earlier:
            cases += [(law, case) for case in spread([case for case in law.cases if mode(case) in modes])]
        for law, case in cases:
            try:
                if keeps(law.comparisons(law.like(implementation, mistake, case), case)):
                    continue
                if law is self or keeps(law.comparisons(implementation, case)):
                    return True
            except NotApplicable:
                continue
        return False

    def _misses(self, mistake: Any, implementation: Any, failing: Sequence[Tried]) -> float:
        """Return in how many failing cases a mistake has another result: infinity above 1/4, or if none is far off."""
        misses, is_far = 0, False
        for case, ours in failing:
            theirs = islice(self.comparisons(self.like(implementation, mistake, case), case), len(ours))
            is_wrong = False
            try:
                for our, their in zip_longest(ours, theirs):
                    if our is None or their is None or not our.is_like(their.actual):
                        misses += 1
                        break
                    is_wrong = is_wrong or not their.is_like(their.right)
                else:  # all are the same
                    is_far = is_far or is_wrong
            except NotApplicable:
                return math.inf
            if 4 * misses > len(failing):
                return math.inf
        return misses if is_far else math.inf


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Return those of the options that a function takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in options.items() if takes_all or name in parameters}


@functools.cache
def both(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[[Any, Any], Iterator[Comparison]]:
    """Return a comparison that makes two; the second, such as that of gradients, where it applies."""

    def compare(implementation: Any, case: Any) -> Iterator[Comparison]:
        yield from first(implementation, case)
        with suppress(NotApplicable):
            yield from second(implementation, case)

    return compare


@functools.cache
def unpacked(compare: Callable[..., Iterator[Comparison]]) -> Callable[[Any, Any], Iterator[Comparison]]:
    """Return a comparison of an implementation that is a tuple, by one that takes a case and what is in the tuple."""
    return lambda functions, case: compare(case, *functions)


def in_order(*files: Sequence[Law]) -> tuple[Law, ...]:
    """Return laws that know those of their kind before them, which are easier to break."""
    ordered = list[Law]()
    for law in chain(*files):
        ordered.append(replace(law, earlier=tuple(each for each in ordered if each.kind == law.kind)))
    return tuple(ordered)


def keeps(comparisons: Iterable[Comparison]) -> bool:
    return all(comparison.holds for comparison in comparisons)


def mode(case: Any) -> str:
    """Return how a case is called, such as "train" or "no_grad"; "" where there is only one way."""
    return getattr(case, "mode", "")


def spread(cases: Sequence[Any]) -> Sequence[Any]:
    """Return ten cases at most, from small to large."""
    return cases[:: 1 + len(cases) // TRIED]


def less_precise(failing: Sequence[Tried]) -> tuple[str, ...]:
    """Return the dtype in which an implementation computes, if its wrong results have no more digits than that."""
    wrong = [result for _, results in failing for result in results if not result.holds]
    if any(np.isinf(result.verdict[0]) or not isinstance(result.expected, Bounded) for result in wrong):
        return ()
    for dtype in ("bfloat16", "float16", "float32"):
        if all(
            relative(result.actual, result.right, 16 * UNITS[dtype]) <= 1
            and UNITS[result.expected.dtype] < UNITS[dtype]
            and np.array_equal(rounded(result.actual, dtype), result.actual)
            for result in wrong
        ):
            return (f"it is computed in {dtype}",)
    return ()
