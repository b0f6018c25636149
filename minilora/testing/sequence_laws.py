"""Laws of documents that share a batch, and of generation with a cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minilora.testing.compare import Bounded, as_array
from minilora.testing.laws import Comparison, Law, NotApplicable, claim, unpacked

ALLOWED = {"float64": 1e-10, "float32": 1e-4, "float16": 2.0**-7, "bfloat16": 2.0**-4}  # of the largest number
Tokens = list[int]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Lengths:
    """Token sequences of these lengths, drawn from a seed: `tokens(vocabulary)`; `new` are to be generated."""

    lengths: tuple[int, ...] = (3, 2)
    seed: int = 0
    new: int = 6
    has_equal: bool = False  # sequences of equal lengths are equal
    common: int = 0  # how many tokens at the ends are those of the first
    alike: int = 0  # how many tokens at the beginnings are those of the first

    def tokens(self, vocabulary: int) -> list[Tokens]:
        rng = np.random.default_rng(self.seed)
        drawn = [rng.integers(0, vocabulary, length).tolist() for length in self.lengths]
        if self.common:
            drawn = [tokens[: -self.common] + drawn[0][-self.common :] for tokens in drawn]
        drawn = [drawn[0][: self.alike] + tokens[self.alike :] for tokens in drawn]
        first = {len(tokens): tokens for tokens in reversed(drawn)}
        return [list(first[len(tokens)]) for tokens in drawn] if self.has_equal else drawn


def allowed(result: Any) -> float:
    """Return the allowed error of a result relative to the largest number, by its dtype."""
    return ALLOWED.get(str(getattr(result, "dtype", "float64")).removeprefix("torch."), ALLOWED["float32"])


def near(right: Any, result: Any) -> Bounded:
    """Return a result that another one has to equal, except for rounding in its dtype."""
    value = as_array(right)
    return Bounded(value, np.full(value.shape, allowed(result) * abs(value).max(initial=1.0)))


# --- documents in one batch ---


def results(run: Call, documents: list[Tokens]) -> list[Any]:
    """Return the result of each document, or of one number, the mean loss, the sum of the losses."""
    given = [list(document) for document in documents]
    result = run(given)
    assert given == documents, "the documents, which are only read, are others after the call"
    if isinstance(result, list | tuple):
        assert len(result) == len(documents), f"found {len(result)} results for {len(documents)} documents"
        return list(result)
    predictions = sum(len(document) - 1 for document in documents)
    return [result * predictions if predictions else torch.zeros(())]  # the mean of nothing may be NaN


def result_of(run: Call, document: Tokens) -> Any:
    """Return the result of a document by itself."""
    (result,) = results(run, [document])
    shape, T = as_array(result).shape, len(document)
    accepted = f"accepted are logits ({T}, V), losses ({T - 1},) or one number"
    is_accepted = shape in ((), (T - 1,)) or (len(shape) == 2 and shape[0] == T)
    assert is_accepted, f"found the shape {shape} for a document of {T} tokens; {accepted}"
    return result


def by_itself(case: Lengths, run: Call, vocabulary: int, *_: Any) -> Iterator[Comparison]:
    documents = case.tokens(vocabulary)
    right = [result_of(run, document) for document in documents]
    for place, order in (("in a batch with the others", 1), ("in reverse order", -1)):
        together, alone = results(run, documents[::order]), right[::order]
        if len(together) == len(alone):
            for i, result in enumerate(together):
                yield Comparison(f"document {i} {place}", result, near(alone[i], result))
        else:
            total = sum(as_array(own) for own in alone)
            yield Comparison(f"the sum of the losses {place}", together[0], near(total, together[0]))


def causal(case: Lengths, run: Call, vocabulary: int, *_: Any) -> Iterator[Comparison]:
    for i, document in enumerate(case.tokens(vocabulary)):
        T = len(document)
        for place in sorted({T // 4, T // 2, T - 1}):
            changed = [*document[:place], (document[place] + 1) % vocabulary, *document[place + 1 :]]
            own, other = (result_of(run, tokens) for tokens in (document, changed))
            if T > 1 and np.array_equal(as_array(own), as_array(other)):
                raise AssertionError("found the same result for other tokens: nothing can be compared")
            if as_array(own).ndim:
                before = slice(max(0, place + len(own) - T))  # of losses, that of the token itself is the one before
                name = f"document {i} by itself, in front of token {place}, which is another,"
                yield Comparison(name, as_array(other)[before], near(own, own)[before])


def summed_gradients(
    case: Lengths, run: Call, vocabulary: int, parameters: Sequence[torch.Tensor] = ()
) -> Iterator[Comparison]:
    if not parameters:
        raise NotApplicable("no parameters were given")
    documents = case.tokens(vocabulary)
    together = slopes(run, documents, parameters)
    if max(case.lengths) > 1 and not any(found.any() for found in together):
        raise AssertionError("found 0 for all parameters; accepted are results with gradients, without `no_grad`")
    alone = [slopes(run, [document], parameters) for document in documents]
    for i, found in enumerate(together):
        yield Comparison(f"the gradient of parameter {i}", found, near(sum(own[i] for own in alone), found))


def slopes(run: Call, documents: list[Tokens], parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of the sum of the results, each number of which is weighted by its place."""
    total = torch.zeros(())
    for result in results(run, documents):
        weight = torch.arange(1, result.numel() + 1, device=result.device, dtype=result.dtype).reshape(result.shape)
        total = total.to(result) + (result * weight.cos()).sum()
    if not total.requires_grad:  # of single tokens, or under no_grad
        return [torch.zeros_like(parameter) for parameter in parameters]
    return list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))


# --- generation ---


def greedy(case: Lengths, generate: Call, logits: Call, vocabulary: int) -> Iterator[Comparison]:
    prompts = case.tokens(vocabulary)
    for way, chosen in (("", prompts), (" in reverse order", prompts[::-1]), (" by itself", prompts[:1])):
        given = [list(prompt) for prompt in chosen]
        answers = generate(given, case.new)
        yield claim("the prompts", "" if given == chosen else "they are only read, and others after the call")
        counts = f"found {len(answers)} answers to {len(chosen)} prompts"
        yield claim(f"the answers{way}", "" if len(answers) == len(chosen) else counts)
        for i, (prompt, answer) in enumerate(zip(chosen, answers, strict=False)):
            yield claim(f"the answer to prompt {i}{way}", unlikely(logits, prompt, list(map(int, answer)), case.new))


def unlikely(logits: Call, prompt: Tokens, answer: Tokens, new: int) -> str:
    """Say which token of an answer has not the largest logit of a model that computes all tokens anew; or ""."""
    if len(answer) != new:
        return f"found {len(answer)} tokens; accepted are {new}"
    found = logits(prompt + answer[:-1])
    rows = as_array(found)[len(prompt) - 1 :]
    for i, (token, row) in enumerate(zip(answer, rows, strict=True)):
        if not row[token] >= row.max() - allowed(found) * abs(row).max():
            return f"token {i} is {token}, of logit {row[token]:.6g}; accepted is {row.argmax()}, of {row.max():.6g}"
    return ""


_LENGTHS = ((2,), (3, 2), (2, 3, 5), (1, 4), (4, 1, 1), (5, 5, 5), (9, 2, 17), (2, 4, 1, 3, 2, 6, 3, 1, 5))
CASES = [Lengths(lengths, seed) for seed, lengths in enumerate(_LENGTHS)]
CASES += [Lengths((4, 3, 4, 4, 3), has_equal=True), Lengths((420, 1, 8, 20))]
SEVERAL = CASES[1:]
MANY = Lengths((2, 1, 3) * 8, new=40)  # some of the tokens are nearly as likely as the next ones
ALIKE = Lengths((40, 33, 21, 37), new=30, alike=21)
LONG = Lengths((345, 130, 200, 270), new=75)  # from 130 to 420 tokens
PROMPTS = [*CASES, Lengths((40,) * 4, common=24), ALIKE, Lengths((20, 90), new=45), MANY, LONG]
_ALONE = "each document has the result that it has by itself, whatever its neighbours"
_GREEDY = "each new token is the likeliest of a model that keeps no cache"
LAWS = (
    Law("packing", "alone", _ALONE, SEVERAL, unpacked(by_itself)),
    Law("packing", "causal", "a token changes results, and none in front of it", SEVERAL, unpacked(causal)),
    Law("packing", "gradients", "gradients are the sums of the documents' own", SEVERAL, unpacked(summed_gradients)),
    Law("generation", "greedy", _GREEDY, PROMPTS, unpacked(greedy)),
)
