import copy
import math
import random

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.models import generate as generation
from minilora.models.generate import generate
from minilora.runs import evaluate, sampler
from minilora.runs.encoders import Dataset, encode_rows
from minilora.runs.evaluate import answer_of, choice_accuracy, held_out_loss, measure_forgetting, prompt_of
from minilora.runs.formats import Row
from minilora.testing.compare import assert_maths
from tests.models import examples, seeds, tiny_model
from tests.training import adapted, number, plain_loss, random_rows

few = examples(0.5)
families = st.sampled_from(["llama", "qwen2", "smollm3-window"])
budgets = st.sampled_from([1, 7, 30, 4096])
tokens = st.integers(1, 3)  # few of them, so that choices begin and end alike
CLOSING = (60, 59)


def row(prompt, answer):
    return ml.Example([*prompt, *answer], [IGNORE_INDEX] * len(prompt) + list(answer))


def measured(budget, function, *args):
    """The result with so many tokens in a forward pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "EVAL_TOKENS", budget)
        return function(*args)


# --- held-out loss ---


@few
@given(families, seeds, budgets)
def test_the_held_out_loss_is_the_mean_over_labelled_tokens_in_whatever_groups(family, seed, budget):
    model, rows = tiny_model(family), random_rows(seed, 6)
    assert_maths(number(measured(budget, held_out_loss, model, rows)), plain_loss(model, rows))


def test_evaluation_knows_no_dropout():
    model, rows = adapted(lora_dropout=0.5).train(), random_rows(1, 4)
    assert_maths(number(held_out_loss(model, rows)), plain_loss(adapted(), rows))


# --- forgetting ---


def probabilities(model, row):
    """Of the next token after each position of a row, as Python numbers, by exponentials and their sum."""
    for logits in model(torch.tensor([row.tokens]))[0].tolist():
        powers = [math.exp(logit - max(logits)) for logit in logits]
        yield [power / math.fsum(powers) for power in powers]


@few
@given(families, seeds, budgets, st.sampled_from([1, 3, 512]))
def test_forgetting_is_two_losses_and_the_mean_divergence(family, seed, budget, chunk):
    base, model, rows = tiny_model(family), adapted(family), random_rows(seed, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "DRIFT_TOKENS", chunk)
        found = measured(budget, measure_forgetting, model, rows)
    divergences = []
    for row in rows:
        for i, (p, q) in enumerate(zip(probabilities(base, row), probabilities(model, row), strict=True)):
            if row.labels[i + 1 : i + 2] not in ([], [IGNORE_INDEX]):
                divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert_maths(number(found.before), plain_loss(base, rows))
    assert_maths(number(found.after), plain_loss(model, rows))
    assert_maths(number(found.kl), number(math.fsum(divergences) / len(divergences)))
    assert found.kl > 1e-3  # or the divergence the other way round would hardly differ


def test_of_a_model_without_adapters_the_base_is_given():
    model, rows = adapted(), random_rows(1, 3)
    expected = measure_forgetting(model, rows)
    ml.merge(model)
    found = measure_forgetting(model, rows, base=tiny_model())
    assert_maths(number([found.before, found.after, found.kl]), number([expected.before, expected.after, expected.kl]))


@pytest.mark.parametrize("post", ["none", "bos"])
def test_an_exact_match_needs_a_prompt_of_more_than_the_tokenizer_adds(tokenizer, post):
    tokenizer = tokenizer(post=post)
    rows = encode_rows([Row({"text": "the cat"}, "a.jsonl:3")], tokenizer, ml.DataConfig())
    assert prompt_of(rows[0]) == tokenizer.encode("")
    with pytest.raises(ml.DataError, match=r"a\.jsonl:3: exact match needs a prompt"):
        evaluate.exact_match(tiny_model(), rows, tokenizer)


# --- choices ---


def is_nested(answers):
    return any(a != b and b[: len(a)] == a for a in answers for b in answers)


def compared(choices):
    """The choices without what they all end in, but not so short that one begins another."""
    endings = [k for k in range(min(map(len, choices))) if len({choice[len(choice) - k :] for choice in choices}) == 1]
    fitting = [k for k in endings if not is_nested([choice[: len(choice) - k] for choice in choices])]
    return [choice[: len(choice) - max(fitting, default=0)] for choice in choices]


def plain_accuracy(model, rows, choices):
    """Each choice after each prompt by itself, from full logits."""
    correct = 0
    for each in rows:
        scores = []
        for answer in compared(choices):
            logs = model(torch.tensor([[*prompt_of(each), *answer]]))[0].log_softmax(-1)
            first = len(prompt_of(each)) - 1
            scores.append(sum(logs[first + i, token].item() for i, token in enumerate(answer)))
        correct += choices[scores.index(max(scores))] == answer_of(each)
    return correct / len(rows)


answers = st.lists(tokens, min_size=1, max_size=3).map(tuple)


@given(st.lists(answers, min_size=2, max_size=6, unique=True), st.integers(0, 2), seeds, budgets)
@example([(1,), (2,), (3,)], 1, 0, 30)  # one token: the prompt alone is run
@example([(1, 2), (1, 3), (2, 1)], 2, 0, 7)  # stems are shared
@example([(1, 2, 3), (2, 3), (3, 1, 3)], 0, 0, 4096)  # endings are shared
@example([(1, 2), (3, 4), (5, 6), (1, 7), (3, 8)], 0, 3, 4096)  # no ending is shared
@example([(1, 2), (3, 4), (5, 6)], 0, 1, 4096)
@example([(1,), (1, 2), (1, 2, 3)], 1, 0, 4096)  # one begins another: their closing tokens decide
def test_the_chosen_answer_is_the_likeliest_of_the_choices_computed_one_by_one(answers, closing, seed, budget):
    choices = [(*answer, *CLOSING[:closing]) for answer in answers]
    draw = random.Random(seed)
    prompts = [[draw.randrange(61) for _ in range(draw.randint(1, 5))] for _ in range(5)]
    rows = [row(prompt, draw.choice([*choices, (7, 7)])) for prompt in prompts]  # (7, 7) is no choice: always wrong
    model = tiny_model(num_hidden_layers=1)
    assert measured(budget, choice_accuracy, model, rows, choices) == plain_accuracy(model, rows, choices)


@given(st.integers(1, 70), st.integers(1, 5), seeds)
@example(64, 4, 0)
@example(65, 4, 0)
@example(2, 4, 0)
@example(1, 5, 0)
def test_answers_are_choices_if_there_are_2_to_64_and_each_comes_4_times_on_average(distinct, times, seed):
    answers = [(3, i, 60) for i in range(distinct)]
    draw = random.Random(seed)
    rows = [row([1], answer) for answer in answers + draw.choices(answers, k=distinct * (times - 1))]
    draw.shuffle(rows)
    assert evaluate.find_choices(rows) == (answers if 2 <= distinct <= 64 and times >= 4 else None)


def test_a_row_that_is_cut_in_its_answer_is_no_choice_and_counts_for_no_accuracy(tokenizer):
    tokenizer, model = tokenizer(), tiny_model(vocab_size=400)
    rows = [Row({"prompt": f"{i}?", "completion": " yes" if i % 3 else " no"}, f"a:{i}") for i in range(9)]
    cut = Row({"prompt": "the cat? " * 20, "completion": " yes"}, "a:9")
    limit = len(tokenizer.encode("the cat? " * 20 + " yes")) - 1
    encoded = [encode_rows(each, tokenizer, ml.DataConfig(max_length=limit)) for each in (rows, [*rows, cut])]
    assert (len(encoded[1]), encoded[1].truncated) == (10, 1)
    choices = evaluate.find_choices(encoded[0])
    assert len(choices) == 2
    assert evaluate.find_choices(encoded[1]) == choices
    assert choice_accuracy(model, encoded[1], choices) == choice_accuracy(model, encoded[0], choices)
    tokenizer = copy.copy(tokenizer)
    tokenizer.stop_ids = {*range(400)} - {*tokenizer.encode(" yes")}  # so the model writes nothing
    assert evaluate.exact_match(model, encoded[1], tokenizer) == evaluate.exact_match(model, encoded[0], tokenizer) > 0
    with pytest.raises(ml.DataError, match="all are cut"):
        evaluate.exact_match(model, Dataset(encoded[1][9:], encoded[1].cut), tokenizer)


# --- exact match ---


def greedy(model, prompt, stop, limit):
    """The likeliest token again and again, from full logits."""
    written = []
    while len(written) < limit:
        token = model(torch.tensor([[*prompt, *written]]))[0, -1].argmax().item()
        if token in stop:
            break
        written.append(token)
    return written


@few
@given(seeds, budgets)
def test_an_exact_match_is_what_the_model_writes_greedily_until_it_stops(tokenizer, seed, budget):
    """An end token is no part of it, also where the tokenizer does not mark it as special."""
    tokenizer, draw = copy.copy(tokenizer()), random.Random(seed)
    model = tiny_model(vocab_size=400, num_hidden_layers=1)
    prompts = [[draw.randrange(4, 400) for _ in range(3)] for _ in range(4)]
    free = greedy(model, prompts[0], (), 6)
    ends = [i for i, token in enumerate(free) if i and token not in free[:i] and tokenizer.decode(free[:i]).strip()]
    assume(ends)
    tokenizer.stop_ids = {free[ends[0]]}
    answers = [greedy(model, prompt, tokenizer.stop_ids, 4) or [5] for prompt in prompts]
    answers[1] = [*answers[1][:-1], 399 - answers[1][-1]]
    space = tokenizer.encode(" ")
    asked = list(zip(prompts, answers, strict=True))
    asked.append((prompts[0], [*space, *answers[0], *space]))  # white space at the ends does not count
    right = [
        tokenizer.decode(greedy(model, prompt, tokenizer.stop_ids, len(answer) + 1)).strip()
        == tokenizer.decode(answer).strip()
        for prompt, answer in asked
    ]
    assert right[0]
    assert right[-1]
    rows, shown = [row(prompt, [*answer, *tokenizer.stop_ids]) for prompt, answer in asked], []
    found = measured(budget, evaluate.exact_match, model, rows, tokenizer, lambda *done: shown.append(done))
    assert found == sum(right) / len(rows)
    assert shown[-1] == (5, 5)
    assert len(shown) == {1: 6, 7: 6, 4096: 2}.get(budget, len(shown))  # a row has at least 5 tokens


@few
@given(seeds, budgets)
def test_each_answer_has_its_own_limit_whatever_else_is_in_its_batch(tokenizer, seed, budget):
    tokenizer, draw = copy.copy(tokenizer()), random.Random(seed)
    model = tiny_model(vocab_size=400, num_hidden_layers=1)
    prompts = [[draw.randrange(4, 400) for _ in range(draw.randint(1, 3))] for _ in range(5)]
    limits = [draw.randint(1, 9) for _ in prompts]
    tokenizer.stop_ids = {greedy(model, prompts[0], (), 3)[2]}
    found = measured(budget, evaluate.write_answers, model, tokenizer, prompts, limits)
    pairs = list(zip(prompts, limits, strict=True))
    assert found == [greedy(model, prompt, tokenizer.stop_ids, limit) for prompt, limit in pairs]


def test_a_batch_of_answers_has_rows_of_like_length_and_a_bounded_number_of_tokens(tokenizer, monkeypatch):
    model = tiny_model(vocab_size=400)
    prompts, limits, batches = [[5] * n for n in (3, 9, 4, 2, 3)], [1, 2, 2, 3, 3], []
    write = generation.generate

    def noted(model, prompts, max_new_tokens, **options):
        batches.append(([len(prompt) for prompt in prompts], max_new_tokens))
        return write(model, prompts, max_new_tokens, **options)

    monkeypatch.setattr(evaluate, "generate", noted)
    free = evaluate.write_answers(model, tokenizer(), prompts, limits)
    config = model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 8  # float64
    monkeypatch.setattr(evaluate, "CACHE_BYTES", 15 * a_token)
    assert evaluate.write_answers(model, tokenizer(), prompts, limits) == free
    assert batches == [([3, 2, 4, 3, 9], 3), ([3, 2, 4], 3), ([3], 3), ([9], 2)]


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: held_out_loss(model, random_rows(0, 4)),
        lambda model: choice_accuracy(model, random_rows(0, 4), [(1,), (2,)]),
        lambda model: generate(model, [[1, 2]], max_new_tokens=2),
    ],
)
def test_measuring_and_generating_leave_the_mode_of_each_part_as_it_was(measure):
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    measure(model)
    assert [module.training for module in model.modules()] == modes
