"""Held-out loss, accuracy among choices, exact match, answers, and forgetting on general text.

Except for generated text, batches are dealt out to the ranks of a run, and each rank returns the scores of all rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from minilora.adapter import disable_adapter
from minilora.data import IGNORE_INDEX, Example, collate
from minilora.definition import to_device
from minilora.errors import DataError
from minilora.llama import Checkpointing, Documents, Llama
from minilora.models.generate import evaluating, generate
from minilora.models.tokenizer import Tokenizer
from minilora.runs import processes, sampler
from minilora.runs.encoders import Dataset
from minilora.runs.sampler import RowIndices, eval_groups, kept_random_state
from minilora.training import token_loss

CACHE_BYTES = 2**29  # of keys and values of a batch of answers; those of Llama-2-7B are 0.5 MB a token
DRIFT_TOKENS = 128  # whose probabilities of the whole vocabulary are held at once
MAX_CHOICES = 64
THOUGHTS = 1024  # tokens of thoughts before an answer
Choices = Sequence[tuple[int, ...]]
Progress = Callable[[int, int], None]  # called with the number of rows that are done, and of all
Metrics = Mapping[str, tuple[Any, Any]]  # name -> (sum, count), numbers or tensors of one number
T = TypeVar("T")


def _ignore(done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Forgetting:
    """A run's forgetting: loss on general text of the base and with the adapter, and the divergence between them."""

    before: float
    after: float
    kl: float


@dataclass(frozen=True)
class Scores:
    """A model's held-out loss, and its accuracy where the data has choices; None where there are none."""

    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Question:
    """A held-out row that asks for an answer."""

    fields: dict[str, Any]  # of the row, with its prompt as text, and the answer that is wanted
    tokens: list[int]  # of the prompt
    limit: int  # tokens of an answer


def prompt_of(example: Example) -> list[int]:
    """Return the tokens before the first learned one."""
    return example.tokens[: next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)]


def answer_of(example: Example) -> tuple[int, ...]:
    """Return the learned tokens after the prompt, up to the first that is not learned."""
    return tuple(takewhile(lambda label: label != IGNORE_INDEX, example.labels[len(prompt_of(example)) :]))


def evaluate(
    model: Llama, examples: Sequence[Example], choices: Choices | None, progress: Progress = _ignore
) -> Scores:
    """Return the loss of a model, and its accuracy among `choices` if there are any."""
    if not examples:
        return Scores(None, None)
    loss = held_out_loss(model, examples, progress)
    return Scores(loss, choice_accuracy(model, examples, choices, progress) if choices else None)


def held_out_loss(model: Llama, examples: Sequence[Example], progress: Progress = _ignore) -> float:
    """Return Σ -log p over all labelled tokens / their number."""
    check_examples(model, examples)
    groups = eval_groups(len(example.tokens) for example in examples)
    return mean_loss(model, example_loss, examples, groups, progress)["loss"]


def check_examples(model: Any, examples: Sequence[Example]) -> None:
    """Raise a `DataError` for a row that is no `Example`, without one label per token, or with an unknown token.

    A wrong number of labels would shift those of later rows; a GPU reports an unknown token without its place.
    """
    size = model.model.embed_tokens.num_embeddings
    for example in examples:
        if not isinstance(example, Example):
            raise DataError(f"found the row {example!r:.60}, need an ml.Example, as load_dataset makes them, or loss=")
        if (labels := len(example.labels)) != (T := len(example.tokens)):
            raise DataError(f"{example.source!r} has {labels} labels for {T} tokens; need one for each")
        learned = [label for label in example.labels if label != IGNORE_INDEX]
        if wrong := [token for token in (*example.tokens, *learned) if not 0 <= token < size]:
            raise DataError(f"{example.source!r} holds token {wrong[0]}; the model has tokens 0 to {size - 1}")


def example_loss(model: Any, examples: Iterable[Example], checkpointing: Checkpointing = "none") -> tuple[Tensor, int]:
    """Sum the losses of the labels of examples, laid end to end; return it with their number."""
    return token_loss(model, collate(examples, next(model.parameters()).device), checkpointing)


def mean_loss(
    model: nn.Module,
    loss: Callable[[Any, Any], tuple[Any, ...]],
    rows: Sequence[Any],
    groups: Iterable[RowIndices],
    progress: Progress = _ignore,
    seed: int = 0,
) -> dict[str, float]:
    """Return {"loss": Σ sum / Σ count over all rows} with the means of the metrics; each group is a forward pass.

    A loss that samples draws the same samples at every evaluation of a run.
    """
    device = next(model.parameters()).device

    def compute(group: RowIndices) -> Metrics:
        with kept_random_state(device, f"{seed}/held-out/{group[0]}"):
            total, count, *metrics = loss(model, [rows[row] for row in group])
        return as_numbers([{"loss": (total.detach().reshape(()), count), **dict(*metrics)}])[0]

    scores = means(_map_groups(model, groups, len(rows), compute, progress))
    if "loss" not in scores:
        raise DataError("no token of the held-out rows has a label (the loss returned the count 0)")
    return scores


def as_numbers(measured: Sequence[Metrics]) -> list[Metrics]:
    """Replace tensors of one number by the numbers, which are copied from the device together."""
    leaves, places = tree_flatten([*measured])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return tree_unflatten([next(numbers) if isinstance(leaf, Tensor) else leaf for leaf in leaves], places)


def means(parts: Iterable[Metrics]) -> dict[str, float]:
    """Return Σ sum / Σ count of each metric, except of metrics that count nothing."""
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, (total, count) in part.items():
            totals[name] += total
            counts[name] += count
    return {name: totals[name] / count for name, count in counts.items() if count}


def measure_forgetting(
    model: Llama, examples: Sequence[Example], progress: Progress = _ignore, base: Llama | None = None
) -> Forgetting | None:
    """Measure on general text how far training has moved a model, with probabilities q, from its base, p.

    kl = mean over labelled tokens of Σ_v p(v) (log p(v) - log q(v)), over the whole vocabulary, in float32 at least.
    The base is the model without its adapters, unless one is given. Without text the result is None.
    """
    if not examples:
        return None
    check_examples(model, examples)
    device = next(model.parameters()).device
    before = model if base is None else base
    as_before = partial(disable_adapter, model) if base is None else nullcontext

    def compute(rows: RowIndices) -> list[float]:
        batch = collate([examples[row] for row in rows], device)
        with as_before():
            expected = before.model(batch.tokens, Documents(batch.lengths))
        hidden = model.model(batch.tokens, Documents(batch.lengths))
        sums = torch.zeros(3, dtype=torch.float64)
        chunks = zip(batch.label_positions.split(DRIFT_TOKENS), batch.labels.split(DRIFT_TOKENS), strict=True)
        for chunk, labels in chunks:
            with as_before():
                log_p = _log_probabilities(before.lm_head(expected[chunk]))
            log_q = _log_probabilities(model.lm_head(hidden[chunk]))
            targets = labels.unsqueeze(-1)
            losses = [-log.gather(-1, targets).sum() for log in (log_p, log_q)]
            kl = (log_p.exp() * (log_p - log_q)).sum()
            sums += torch.stack((*losses, kl)).cpu()
        return [*sums.tolist(), len(batch.labels)]

    groups = eval_groups(len(example.tokens) for example in examples)
    sums = _map_groups(model, groups, len(examples), compute, progress)
    *totals, count = map(sum, zip(*sums, strict=True))
    return Forgetting(*(total / count for total in totals))


def _map_groups(
    model: nn.Module, groups: Iterable[RowIndices], total: int, compute: Callable[[RowIndices], T], progress: Progress
) -> list[T]:
    """Return what `compute` returns for each group of rows, of all ranks; report how many rows of all are done."""
    progress(0, total)
    results = []
    with evaluating(model):
        for rows, is_counted in processes.split_for_rank(list(groups)):
            result = compute(rows)
            if is_counted:
                results.append(result)
            progress(rows[-1] + 1, total)
    return [result for rank in processes.all_gather(results) for result in rank]


def find_choices(examples: Sequence[Example]) -> Choices | None:
    """Return the distinct answers if they are few: at most 64, each four times on average; else None.

    None as well if an example has no prompt, since then there is nothing to choose by. Answers that were cut are none.
    """
    examples = _uncut(examples)
    answers = {answer_of(example) for example in examples}
    is_few = 1 < len(answers) <= min(MAX_CHOICES, len(examples) // 4)
    return sorted(answers) if is_few and all(map(prompt_of, examples)) else None


def _uncut(examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples of which no label was cut off."""
    cut = examples.cut if isinstance(examples, Dataset) else ()
    return [example for example in examples if example.source not in cut]


def choice_accuracy(model: Llama, examples: Sequence[Example], choices: Choices, progress: Progress = _ignore) -> float:
    """Return the share of examples whose answer is the most likely of the `choices` after the prompt.

    The ending that all choices share, such as a closing token, is left off. Examples whose answer was cut do not count.
    """
    examples = _uncut(examples)
    closing = _common_ending(choices)
    answers = [choice[: len(choice) - closing] for choice in choices]

    def compute(rows: RowIndices) -> int:
        scores = _scores(model, [prompt_of(examples[row]) for row in rows], answers)
        chosen = [choices[values.index(max(values))] for values in scores]
        return sum(choice == answer_of(examples[row]) for row, choice in zip(rows, chosen, strict=True))

    copies = len({answer[:-1] for answer in answers})
    groups = eval_groups(copies * len(example.tokens) for example in examples)
    return sum(_map_groups(model, groups, len(examples), compute, progress)) / len(examples)


def _scores(model: Llama, prompts: Sequence[list[int]], answers: Choices) -> Iterator[list[float]]:
    """Yield for each prompt log p(answer | prompt) of each answer.

    A prompt is run once with each distinct beginning of an answer: with answers of one token, by itself.
    """
    stems = sorted({answer[:-1] for answer in answers})
    documents = [[*prompt, *stem] for prompt in prompts for stem in stems]
    lengths = [len(document) for document in documents]
    device = next(model.parameters()).device
    tokens = to_device(torch.tensor([token for document in documents for token in document]), device)
    hidden = iter(model.model(tokens, Documents(lengths)).split(lengths))
    for prompt in prompts:
        states = {stem: next(hidden)[len(prompt) - 1 :] for stem in stems}
        logs = {stem: _log_probabilities(model.lm_head(state)).cpu() for stem, state in states.items()}
        yield [sum(logs[answer[:-1]][j, token].item() for j, token in enumerate(answer)) for answer in answers]


def exact_match(model: Llama, examples: Sequence[Example], tokenizer: Tokenizer, progress: Progress = _ignore) -> float:
    """Return the share of examples whose answer the model generates, greedily, except for white space at its ends.

    Thoughts before an answer are not compared. Examples whose answer was cut do not count.
    """
    if not (examples := _uncut(examples)):
        raise DataError("exact match needs whole answers, and all are cut; a larger max_length cuts fewer")
    added = tokenizer.encode("")  # around every text, such as BOS, which is no prompt
    for example in examples:
        if (prompt := prompt_of(example)) == added[: len(prompt)]:
            raise DataError(f"{example.source}: exact match needs a prompt, and all of the row is learned")
    answers = [[*takewhile(lambda token: token not in tokenizer.stop_ids, answer_of(example))] for example in examples]
    prompts = [prompt_of(example) for example in examples]
    room = THOUGHTS if tokenizer.template and "</think>" in tokenizer.template.source else 0
    closed = [tokenizer.decode(prompt).rstrip().endswith("</think>") for prompt in prompts]
    limits = [len(answer) + (1 if no else 1 + room) for answer, no in zip(answers, closed, strict=True)]
    written = write_answers(model, tokenizer, prompts, limits, progress)
    pairs = zip(map(tokenizer.decode, written), map(tokenizer.decode, answers), strict=True)
    return sum(len({text.rpartition("</think>")[2].strip() for text in pair}) == 1 for pair in pairs) / len(examples)


def write_answers(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    progress: Progress = _ignore,
) -> list[list[int]]:
    """Return what the model writes after each prompt, greedily, and each at most as many tokens as its limit."""
    written: dict[int, list[int]] = {}
    config, size = model.config, model.model.embed_tokens.weight.element_size()
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    most = min(sampler.EVAL_TOKENS, CACHE_BYTES // a_token)
    sizes = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)  # a cache has room in each row for the longest one
    progress(0, len(prompts))
    for group in eval_groups((sizes[i] for i in order), most):
        batch = [order[place] for place in group]
        longest = max(limits[i] for i in batch)
        texts = generate(model, [prompts[i] for i in batch], longest, stop_ids=tokenizer.stop_ids)
        written |= {i: text[: limits[i]] for i, text in zip(batch, texts, strict=True)}
        progress(len(written), len(prompts))
    return [written[i] for i in range(len(prompts))]


def answer(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], most: int, progress: Progress = _ignore
) -> list[dict[str, Any]]:
    """Return held-out rows as held_out.jsonl has them: their fields, and for the first `most` both models' answers."""
    rows = [{**question.fields} for question in questions]
    if not rows[:most]:
        return rows
    prompts = [question.tokens for question in questions[:most]]
    limits = [question.limit for question in questions[:most]]

    def add_answers(key: str, finish_reason: str) -> None:
        written = write_answers(model, tokenizer, prompts, limits, progress)
        for fields, tokens, limit in zip(rows[:most], written, limits, strict=True):
            fields |= {key: tokenizer.decode(tokens), finish_reason: "length" if len(tokens) == limit else "stop"}

    with disable_adapter(model):
        add_answers("base", "base_finish_reason")
    add_answers("text", "finish_reason")
    return rows


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _common_ending(choices: Choices) -> int:
    """Return how many tokens at their end all choices share; no choice may begin another one without them.

    Without its closing token " no" would begin " no idea", and could not be less likely.
    """
    for length in range(min(map(len, choices)) - 1, 0, -1):
        answers = sorted(choice[:-length] for choice in choices)
        begins_another = any(after[: len(before)] == before for before, after in pairwise(answers))
        if len({choice[-length:] for choice in choices}) == 1 and not begins_another:
            return length
    return 0
