"""How good is it? Held-out loss, accuracy among choices, exact match."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from minilora.model import ops
from minilora.model.generate import evaluating, generate
from minilora.model.tokenizer import Tokenizer
from minilora.train.batch import collate, groups
from minilora.train.data import Example

if TYPE_CHECKING:
    from minilora.model.llama import Llama

EVAL_TOKENS = 4096  # tokens in a forward pass
MOST_CHOICES = 64
Choice = tuple[int, ...]


def held_out_loss(model: Llama, examples: Sequence[Example]) -> float:
    """Σ over labelled tokens of -log p / their number, over all examples together."""
    device = next(model.parameters()).device
    total, labelled = 0.0, 0
    with evaluating(model):
        for rows in _groups(examples):
            batch = collate([examples[row] for row in rows], device)
            hidden = model.model(batch.tokens, batch.lengths)
            total += ops.cross_entropy(hidden, batch.targets, model.lm_head).item()
            labelled += batch.labelled
    return total / labelled


def find_choices(examples: Sequence[Example]) -> list[Choice] | None:
    """The distinct answers, if there are few: at most 64, each given four times on average. Else None.

    There is nothing to choose by where an example has no prompt.
    """
    answers = sorted({example.answer for example in examples})
    is_few = 1 < len(answers) <= min(MOST_CHOICES, len(examples) // 4)
    return answers if is_few and all(example.prompt for example in examples) else None


def choice_accuracy(model: Llama, examples: Sequence[Example], choices: Sequence[Choice]) -> float:
    """The share of examples whose answer is the likeliest of the `choices` after the prompt.

    What all choices end in (their closing tokens) says nothing and is left off.
    """
    closing = _common_ending(choices)
    answers = [choice[: len(choice) - closing] for choice in choices]
    correct = 0
    with evaluating(model):
        for rows in _groups(examples, copies=len({answer[:-1] for answer in answers})):
            for row, scores in zip(rows, _scores(model, [examples[row].prompt for row in rows], answers), strict=True):
                correct += choices[scores.index(max(scores))] == examples[row].answer
    return correct / len(examples)


def _scores(model: Llama, prompts: Sequence[list[int]], answers: Sequence[Choice]) -> Iterator[list[float]]:
    """For each prompt, log p(answer | prompt) of each answer.

    Each distinct beginning of an answer is run once: with answers of one token that is the prompt alone.
    """
    stems = sorted({answer[:-1] for answer in answers})
    documents = [[*prompt, *stem] for prompt in prompts for stem in stems]
    lengths = [len(document) for document in documents]
    device = next(model.parameters()).device
    tokens = torch.tensor([token for document in documents for token in document], device=device)
    hidden = iter(model.model(tokens, lengths).split(lengths))
    for prompt in prompts:
        states = {stem: next(hidden)[len(prompt) - 1 :] for stem in stems}
        logs = {stem: model.lm_head(state).float().log_softmax(-1).cpu() for stem, state in states.items()}
        yield [sum(logs[answer[:-1]][j, token].item() for j, token in enumerate(answer)) for answer in answers]


def exact_match(model: Llama, examples: Sequence[Example], tokenizer: Tokenizer) -> float:
    """The share of examples whose answer is what the model writes, greedily, white space at the ends aside."""
    correct = 0
    for example in examples:
        room = len(example.answer) + 1
        written = generate(model, [example.prompt], max_new_tokens=room, stop_ids=tokenizer.stop_ids)[0]
        correct += tokenizer.decode(written).strip() == tokenizer.decode(example.answer).strip()
    return correct / len(examples)


def _groups(examples: Sequence[Example], copies: int = 1) -> Iterator[list[int]]:
    lengths = [len(example.tokens) * copies for example in examples]
    return groups(lengths, range(len(examples)), EVAL_TOKENS)


def _common_ending(choices: Sequence[Choice]) -> int:
    """How many tokens all choices share at their end, each keeping at least one.

    Without its closing token " no" would be the beginning of " no idea", and could not be less likely.
    """
    length = 0
    while length < min(map(len, choices)) - 1 and len({choice[-1 - length] for choice in choices}) == 1:
        length += 1
    while length and _is_nested([choice[: len(choice) - length] for choice in choices]):
        length -= 1
    return length


def _is_nested(answers: Sequence[Choice]) -> bool:
    """Is one of them the beginning of another?"""
    return any(after[: len(before)] == before for before, after in pairwise(sorted(answers)))
