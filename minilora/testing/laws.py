"""What a law of an implementation is: cases, comparisons within a derived bound, and the message of a failure.

The laws themselves are in `lora_laws`, `nf4_laws`, `data_laws`, `chat_laws` and `directory_laws`; `checks` has what is
called.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NoReturn

import numpy as np

from minilora.testing.cases import rounded
from minilora.testing.compare import UNITS, Array, Bounded, Worst, as_array, worst

__tracebackhide__ = True  # pytest shows the line that calls this module
ROUNDED = "the error is of float32's size: something is rounded to float32, or an ε is added"
COARSER = UNITS["float32"] / UNITS["float64"]
PAIRS = ("nf4", "double_quant")  # kinds of which two functions are checked together
NAMED = 2  # causes in a message; where more fit, none is likely
FAR = 5.0  # bounds between the right result and that of a mistake which is named


class CheckFailure(AssertionError):  # noqa: N818  # an assertion that failed, as pytest shows it
    """An implementation breaks a law.

    Attributes:
        law: its id, such as "lora-gradients".
        case: the smallest case that fails.
        found: what was wrong and the likely causes, without the name of the law and its statement.
        causes: known mistakes that explain most failing cases, more than half; several if they cannot be told apart.
    """

    def __init__(self, message: str, law: str, case: object, causes: tuple[str, ...] = (), found: str = ""):
        super().__init__(message)
        self.law, self.case, self.causes, self.found = law, case, causes, found


class NotApplicable(Exception):  # noqa: N818  # no error: an implementation does not have what the law is about
    """A law does not apply to an implementation, such as that of dropout to one without dropout."""


@dataclass(frozen=True)
class Comparison:
    """A result of an implementation beside what it should be."""

    what: str  # its name, such as "dA"
    actual: Any  # an array, or an exception that was raised in its place
    expected: Bounded | Array  # without a bound, bits must be equal
    mistakes: Callable[[], Mapping[str, Array]] = dict  # returns known wrong values, by what was done wrong
    describe: Callable[[tuple[int, ...]], str] = lambda index: ""  # returns the input at an index, in words
    base: Array | None = None  # what the result is without the update, if it has one

    def worst(self) -> Worst:
        found = worst(self.actual, self.expected)
        where = self.describe(found.index) if found.ratio > 1 else ""
        return replace(found, where=f"{where}: " * bool(where))

    def causes(self) -> dict[str, bool]:
        """Return the mistakes that differ from the right result, and whether the wrong one is theirs."""
        if isinstance(self.actual, Exception):
            return {}
        right = self.expected if isinstance(self.expected, Bounded) else Bounded.exact(self.expected)
        with np.errstate(all="ignore"):
            mistakes = {cause: as_array(wrong) for cause, wrong in self.mistakes().items()}
        coarse = right.error * COARSER
        is_sharp = right.dtype == "float64" and coarse.max(initial=0.0) < 1e-3 * abs(right.value).max(initial=0.0)
        if is_sharp and worst(self.actual, right.value, coarse).ratio <= 1:
            return {ROUNDED: True}
        candidates = {cause: wrong for cause, wrong in mistakes.items() if wrong.shape == right.value.shape}
        return {
            cause: worst(self.actual, wrong, 4 * right.error).ratio <= 1
            for cause, wrong in candidates.items()
            if worst(wrong, right).ratio > FAR
        }


@dataclass(frozen=True)
class Claim:
    """A statement about an implementation that is true or not, where there is no number to compare."""

    what: str  # what it is about, such as "the labelled text"
    problem: str = ""  # what was found, and what is accepted; "" if the claim is true
    likely: frozenset[str] = frozenset()  # known mistakes that have this result
    actual: ClassVar[None] = None

    def worst(self) -> Worst:
        assert not self.problem, self.problem
        return Worst(0.0, (), 0.0, 0.0, 0.0)

    def causes(self) -> dict[str, bool]:
        return dict.fromkeys(self.likely, True)


@dataclass(frozen=True)
class Report:
    """What a law found: the comparison that used most of its bound, and how many there were."""

    law: str
    statement: str
    ratio: float
    comparisons: int

    @property
    def checked(self) -> bool:
        """Whether anything was compared: not where the law is about an option that the implementation does not take."""
        return self.comparisons > 0

    def __str__(self) -> str:
        used = f"{self.ratio:.3f}" if self.checked else "–"
        return f"{self.law:16} {used:>5}  {self.statement}"


@dataclass(frozen=True)
class Failure:
    """A comparison that failed, of one case."""

    case: object
    comparison: Comparison | Claim
    text: str  # of the worst number, or of the exception


@dataclass(frozen=True)
class Law:
    """A law of one kind of callable."""

    kind: str  # of what it is a law: "lora", "nf4", …
    name: str  # unique in its kind
    statement: str  # the law in words
    cases: Callable[[], Iterable[Any]]  # from small to large; of what takes no input, such as files, None alone
    compare: Callable[[Any, Any], Iterator[Comparison | Claim]]  # (implementation, case) -> comparisons
    known: str = ""  # a deviation that must still be there: the text of its cause, or a part of what was found
    skip: Callable[[str], Any] | None = None  # is told why the law does not apply, such as `pytest.skip`

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.name}"

    def check(self, implementation: Any, case: Any = None) -> Report:
        """Check an implementation, for one case or for all.

        Raises:
            CheckFailure: it breaks the law, or a known deviation is no longer there.
            NotApplicable: the law is about something that the implementation does not have.
            TypeError: the implementation is no pair, and two functions are checked together.
        """
        if self.kind in PAIRS and not (isinstance(implementation, tuple | list) and len(implementation) == 2):
            raise TypeError(f"{self.kind} is checked with a pair (quantize, dequantize)")
        try:
            report = self._check(implementation, case)
        except NotApplicable as reason:
            if self.skip is None:
                raise
            self.skip(str(reason))
            return Report(self.id, self.statement, 0.0, 0)
        except CheckFailure as failure:
            if self.known and self.known in failure.found:
                return Report(self.id, f"known deviation: {self.known}", float("inf"), 1)
            raise
        if self.known:
            raise CheckFailure(f"{self.id}: the known deviation {self.known!r} is no longer there", self.id, case)
        return report

    def _check(self, implementation: Any, case: Any) -> Report:
        ratio, count, failures = 0.0, 0, list[Failure]()
        cases = list(self.cases()) if case is None else [case]
        for each in cases:
            for comparison in self._comparisons(implementation, each):
                count += 1
                try:
                    if isinstance(comparison.actual, Exception):
                        raise comparison.actual
                    found = comparison.worst()
                    ratio, text = max(ratio, found.ratio), str(found)
                    is_right = found.ratio <= 1
                except Exception as error:  # of the implementation, whatever it is, or a wrong shape
                    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                    is_right, text = False, f"{kind}{error}"
                    comparison = replace(comparison, actual=error) if isinstance(comparison, Comparison) else comparison
                if not is_right:
                    failures.append(Failure(each, comparison, text))
        if failures:
            self._fail(failures, len({id(failure.case) for failure in failures}), len(cases))
        return Report(self.id, self.statement, ratio, count)

    def _comparisons(self, implementation: Any, case: Any) -> Iterator[Comparison | Claim]:
        try:
            yield from self.compare(implementation, case)
        except (NotApplicable, CheckFailure):
            raise
        except Exception as error:
            yield Comparison("the call", error, Bounded.exact(0.0))

    def _fail(self, failures: list[Failure], failing: int, cases: int) -> NoReturn:
        first = failures[0]
        causes, alternatives = explanations(failures)
        causes = causes or patterns([failure.comparison for failure in failures])
        has_case = first.case is not None
        likely = [f"  likely cause: {cause}" for cause in causes]
        if alternatives > NAMED:
            likely = [f"  {alternatives} known mistakes have this result: see `causes` of this failure"]
        what = f"{first.comparison.what}: wrong"
        lines = [
            f"{self.id}: {what}" + f" in {failing} of {cases} cases" * has_case,
            f"  law: {self.statement}",
            *[f"  smallest failing case: {first.case}"] * has_case,
            f"  {first.text}",
            *likely,
        ]
        found = "\n".join([what, first.text, *causes])
        if has_case:
            lines += [
                "  to repeat:",
                f"    from minilora.testing import {type(first.case).__name__}, laws",
                f"    case = {short_repr(first.case)}",
                f'    laws("{self.kind}")["{self.name}"].check(implementation, case)',
            ]
        raised = first.comparison.actual if isinstance(first.comparison.actual, Exception) else None
        raise CheckFailure("\n".join(lines), self.id, first.case, tuple(causes), found) from raised


def short_repr(case: Any) -> str:
    """Return the call that makes a case, without arguments that have their default."""
    given = [(f.name, getattr(case, f.name)) for f in fields(case) if f.repr and getattr(case, f.name) != f.default]
    return f"{type(case).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


def explanations(failures: list[Failure]) -> tuple[list[str], int]:
    """Return the known mistakes that explain most failing cases, more than half, and how many explain one result.

    Exceptions are not explained.
    """
    cases, votes = dict[int, list[dict[str, bool]]](), Counter[str]()
    for failure in failures:
        cases.setdefault(id(failure.case), []).append(failure.comparison.causes())
    for found in cases.values():  # of one case: what explains a comparison, and is not refuted by another
        votes.update({cause for each in found for cause in each if all(other.get(cause, True) for other in found)})
    most = max([len(cases) // 2 + 1, *votes.values()])
    causes = [cause for cause in sorted(votes) if votes[cause] == (len(cases) if cause == ROUNDED else most)]
    return causes, max(len({*causes} & {*each}) for found in cases.values() for each in found)


def patterns(wrong: list[Any]) -> list[str]:
    """Return what all wrong results have in common: they are 16-bit numbers, or one multiple of the right ones."""
    for each in wrong:
        if isinstance(each.actual, Exception) or not isinstance(getattr(each, "expected", None), Bounded):
            return []
    bases = [0.0 if each.base is None else each.base for each in wrong]
    numbers = [
        np.array(np.broadcast_arrays(as_array(each.actual), each.expected.value, each.expected.error, base))
        for each, base in zip(wrong, bases, strict=True)
    ]
    found, right, error, base = np.concatenate([each.reshape(4, -1) for each in numbers], axis=1)
    if all(each.expected.dtype in ("float32", "float64") for each in wrong) and found.any():
        for dtype in ("bfloat16", "float16"):
            if np.array_equal(found, rounded(found, dtype)) and not np.array_equal(right, rounded(right, dtype)):
                return [f"every number found is a {dtype}"]
    with np.errstate(all="ignore"):
        share = (right - base) / error**2
        factor = float((share * (found - base)).sum() / (share * (right - base)).sum())
        is_multiple = (abs(base + factor * (right - base) - found) <= 4 * max(1, abs(factor)) * error).all()
    is_far = (abs(found - right) > 100 * error).any()  # else any factor near 1 fits
    if not is_multiple or not is_far or found.size < 3:
        return []
    what = "the result" if wrong[0].base is None else "the update"
    binary = " (log₂, not ln)" if abs(factor * np.log(2) - 1) < 1e-6 else ""
    return [f"{what} is {factor:.6g} times the right one{binary}"]


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Return those of the options that a function takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in options.items() if takes_all or name in parameters}
