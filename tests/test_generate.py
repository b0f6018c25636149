"""Generation: greedy and sampled, with a cache and without."""

import math
import re
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora import ConfigError, ShapeError
from minilora.models.generate import evaluating, probabilities
from minilora.testing.compare import assert_maths
from tests.models import SIZES, examples, families, long, randn, seeds, tiny_model, token_ids

V = SIZES["vocab_size"]
few = examples(0.2)
prompt_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=3)
NEW = 17  # documents grow to more than any rotation of the tiny models was trained on


def prompts_of(seed, lengths):
    return [part.tolist() for part in token_ids(seed, sum(lengths)).split(lengths)]


# --- greedy ---


@families
@few
@given(seeds, prompt_lengths)
def test_greedy_takes_the_likeliest_token_after_the_whole_text_so_far(family, seed, lengths):
    model, prompts = tiny_model(family, seed), prompts_of(seed, lengths)
    written = ml.generate(model, prompts, NEW)
    for prompt, new in zip(prompts, written, strict=True):
        for n, token in enumerate(new):
            assert token == model(torch.tensor([prompt + new[:n]]))[0, -1].argmax()
        assert len(new) == NEW


@pytest.mark.parametrize("family", [*long("llama"), "gemma3"])
@few
@given(seeds, prompt_lengths, st.sets(st.integers(0, V - 1), min_size=5, max_size=20))
def test_a_stop_token_ends_a_continuation_and_is_left_out(family, seed, lengths, stop_ids):
    model, prompts = tiny_model(family, seed), prompts_of(seed, lengths)
    free = ml.generate(model, prompts, NEW)
    ends = [next((i for i, token in enumerate(new) if token in stop_ids), NEW) for new in free]
    stopped = ml.generate(model, prompts, NEW, stop_ids=stop_ids)
    assert stopped == [new[:end] for new, end in zip(free, ends, strict=True)]


@few
@given(seeds, prompt_lengths, st.sets(st.integers(0, V - 1), min_size=5, max_size=20))
def test_a_row_that_has_ended_is_computed_no_more(seed, lengths, stop_ids):
    model, prompts, counts = tiny_model("llama", seed), prompts_of(seed, lengths), []
    model.model.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    written = ml.generate(model, prompts, NEW, stop_ids=stop_ids)
    calls = [min(len(new) + 1, NEW) for new in written]  # the last one of some gives the token that ends them
    given = [length if n == 0 else 1 for length, end in zip(lengths, calls, strict=True) for n in range(end)]
    assert sum(counts) == sum(given)


def test_generation_changes_no_weight_and_samples_each_prompt_anew():
    model, prompts = tiny_model().requires_grad_(), token_ids(1, 1, 5).repeat(2, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, other = ml.generate(model, prompts, NEW, temperature=2.0, seed=0)
    assert one != other
    assert ml.generate(model, prompts.tolist(), NEW, temperature=2.0, seed=0) == [one, other]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Merging(torch.nn.Linear):
    """As loralib's layers: evaluation merges what training has apart."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight += float(self.training and not mode) - float(mode and not self.training)
        return super().train(mode)


def test_a_layer_that_merges_in_evaluation_is_apart_afterwards():
    model = torch.nn.Sequential(Merging(2, 2, dtype=torch.float64))
    before = model[0].weight.detach().clone()
    with evaluating(model), evaluating(model):
        assert_maths(model[0].weight, before + 1)
    assert_maths(model[0].weight, before)
    assert model[0].training


# --- sampling ---


def allowed_probabilities(row, temperature, top_p, top_k):
    """By brute force: token by token, from the likeliest down, until there are k or they have p together."""
    weights = (row.double() / temperature).exp()
    order = sorted(range(len(row)), key=lambda token: -row[token])[: top_k or len(row)]
    total = sum(weights[token] for token in order)
    sums = [0.0, *accumulate((weights[token] / total).item() for token in order)]
    order = [token for token, before in zip(order, sums, strict=False) if before < top_p]
    allowed = torch.zeros(len(row), dtype=torch.float64)
    allowed[order] = weights[order] / sum(weights[token] for token in order)
    return allowed


temperatures, shares = st.sampled_from([0.25, 0.7, 2.0]), st.sampled_from([1e-9, 0.3, 0.8, 0.99, 1.0])
sampling = given(seeds, temperatures, shares, st.sampled_from([0, 1, 2, 5, 9, 100]))


@sampling
def test_what_is_drawn_from_is_the_softmax_of_what_top_k_and_top_p_allow(seed, temperature, top_p, top_k):
    logits = randn(seed, 4, 9)
    expected = torch.stack([allowed_probabilities(row, temperature, top_p, top_k) for row in logits])
    assert_maths(probabilities(logits, temperature, top_p, top_k), expected)


class Even(torch.nn.Module):
    """A head whose logits are the same for every token."""

    def __init__(self, row):
        super().__init__()
        self.row = row

    def forward(self, hidden):
        return self.row.expand(len(hidden), -1)


choices = {
    "top_p": st.sampled_from([0.9, 1.0]),
    "top_k": st.sampled_from([0, 9]),
    "stop_ids": st.sets(st.integers(0, V - 1), max_size=9),
}


@pytest.mark.parametrize("temperature", [*long(0.0, 2.0), 0.7])
@few
@given(seeds, st.lists(st.integers(1, 9), min_size=2, max_size=3), st.fixed_dictionaries(choices))
def test_a_batch_is_its_prompts_one_by_one_each_with_the_next_seed(temperature, seed, lengths, chosen):
    model, prompts = tiny_model("llama", seed), prompts_of(seed, lengths)
    settings = {"temperature": temperature, **chosen}
    alone = [ml.generate(model, [prompt], NEW, seed=seed + i, **settings)[0] for i, prompt in enumerate(prompts)]
    assert ml.generate(model, prompts, NEW, seed=seed, **settings) == alone


def test_a_temperature_next_to_zero_is_greedy_and_other_extremes_work():
    model, prompts = tiny_model(), [[1, 2], [3]]
    for temperature in (1e-40, 5e-324):
        assert ml.generate(model, prompts, 8, temperature=temperature) == ml.generate(model, prompts, 8)
        found = probabilities(torch.tensor([[1.0, 1.0, 0.0]]), temperature, 1.0, 0)
        assert torch.equal(found, torch.tensor([[0.5, 0.5, 0]]).double())
    for fine in ({"seed": 2**63 - 1}, {"top_k": 10**30}, {"top_p": 5e-324}, {"temperature": 1e300}):
        (new,) = ml.generate(model, [[1]], 4, **{"temperature": 1.0, **fine})
        assert len(new) == 4


@few
@given(seeds, prompt_lengths)
def test_a_seed_repeats_and_another_one_does_not(seed, lengths):
    model, prompts = tiny_model("llama", seed), prompts_of(seed, lengths)

    def sample(seed):
        return ml.generate(model, prompts, NEW, temperature=2.0, seed=seed)

    state = torch.random.get_rng_state()
    assert sample(seed) == sample(seed) != sample(seed + 1)
    assert torch.equal(torch.random.get_rng_state(), state)  # no global random state is moved


def test_without_a_seed_each_call_draws_anew_from_the_random_state_of_pytorch():
    model, prompts = tiny_model(), [[1, 2], [1, 2]]

    def sample_twice():
        torch.manual_seed(5)
        return [ml.generate(model, prompts, NEW, temperature=2.0) for _ in range(2)]

    (one, other), again = found = sample_twice()
    assert one != other
    assert found[0] != again
    assert sample_twice() == found


# --- several rows of a prompt, and their log-probabilities ---


@families
@few
@given(seeds, st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(2, 4), st.fixed_dictionaries(choices))
def test_rows_of_a_prompt_are_those_of_copies_of_it_and_it_is_computed_once(family, seed, lengths, n, chosen):
    model, prompts, counts = tiny_model(family, seed), prompts_of(seed, lengths), []
    settings = {"temperature": 1.5, "seed": seed, "log_probs": True, **chosen}
    copies = ml.generate(model, [prompt for prompt in prompts for _ in range(n)], NEW, **settings)
    model.model.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    rows = ml.generate(model, prompts, NEW, n=n, **settings)
    assert rows == copies
    assert counts[0] == sum(lengths)
    for ours, expected in zip(rows, copies, strict=True):
        assert ours.stop == expected.stop
        assert_maths(*(torch.tensor(row.log_probs, dtype=torch.float64) for row in (ours, expected)))


@families
@few
@given(seeds, prompt_lengths, st.sampled_from([0.0, 0.6, 2.0]), st.fixed_dictionaries(choices))
def test_log_probabilities_are_the_models_own_of_all_that_was_drawn(family, seed, lengths, temperature, chosen):
    model, prompts = tiny_model(family, seed), prompts_of(seed, lengths)
    settings = {"temperature": temperature, "seed": seed, "n": 2, **chosen}
    rows = ml.generate(model, prompts, NEW, log_probs=True, **settings)
    assert rows == ml.generate(model, prompts, NEW, **settings)
    for i, row in enumerate(rows):
        assert (len(row) == NEW) != (row.stop in chosen["stop_ids"])
        drawn = [*row] if row.stop is None else [*row, row.stop]
        assert len(row.log_probs) == len(drawn)
        for j, log_prob in enumerate(row.log_probs):
            expected = model(torch.tensor([prompts[i // 2] + drawn[:j]]))[0, -1].log_softmax(-1)[drawn[j]]
            assert_maths(torch.tensor(log_prob, dtype=torch.float64), expected)


# --- as it is written ---


@few
@given(seeds, prompt_lengths, st.sets(st.integers(0, V - 1), max_size=9))
def test_every_written_token_is_told_in_order(seed, lengths, stop_ids):
    model, prompts, told = tiny_model("llama", seed), prompts_of(seed, lengths), []
    written = ml.generate(model, prompts, 8, stop_ids=stop_ids, on_token=lambda *pair: told.append(pair))
    assert [[token for row, token in told if row == i] for i in range(len(prompts))] == written
    steps = [sum(row == pair[0] for pair in told[:i]) for i, (row, _) in enumerate(told)]
    assert steps == sorted(steps)  # a token of every row, then the next of every row


@pytest.mark.parametrize("family", ["llama", *long("gemma3")])
@few
@given(seeds, st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=3))
def test_who_is_told_can_end_a_row_and_no_other(family, seed, rows):
    model, prompts = tiny_model(family, seed), prompts_of(seed, [length for length, _ in rows])
    left = [end for _, end in rows]

    def count_down(row, token):
        left[row] -= 1
        return left[row] == 0

    free = ml.generate(model, prompts, NEW)
    ended = ml.generate(model, prompts, NEW, on_token=count_down)
    assert ended == [new[:end] for new, (_, end) in zip(free, rows, strict=True)]


# --- what is refused ---


WRONG = {
    "max_new_tokens": [0],
    "temperature": [-0.1, math.nan, math.inf],
    "top_p": [0.0, 1.1, math.nan],
    "top_k": [-1],
    "seed": [-1, 2**63],
    "n": [0],
}


def test_numbers_that_cannot_work_are_refused_by_name_and_all_at_once():
    model = tiny_model()
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(ConfigError, match=re.escape(f"{name} is {value}, need")):
                ml.generate(model, [[1]], **{name: value})
    with pytest.raises(ConfigError, match=r"top_p is 0.*; top_k is -1"):
        ml.generate(model, [[1]], top_p=0, top_k=-1)


TOKENS = f"; the model has tokens 0 to {V - 1}"
NO_BATCH = [
    *(([[1], [2, token]], f"prompt 1 holds token {token}{TOKENS}") for token in (-1, V, 2**40)),
    *((torch.zeros(shape, dtype=torch.long), f"found {shape}") for shape in ((3,), (), (1, 2, 3))),
    *((empty, "at least one token") for empty in ([], [[]], [[1], []], torch.zeros(2, 0, dtype=torch.long))),
    *((ids, "rows of whole numbers") for ids in ([[1.0]], [1, 2], "abc", torch.ones(1, 2))),
]


def test_what_is_no_batch_of_the_models_tokens_is_refused():
    model = tiny_model()
    for input_ids, phrase in NO_BATCH:
        with pytest.raises(ShapeError, match=re.escape(phrase)):
            ml.generate(model, input_ids)


@given(
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    seeds,
)
def test_one_logit_that_is_not_finite_is_refused(value, temperature, dtype, seed):
    model = tiny_model(dtype=dtype, num_hidden_layers=1)
    row = randn(seed, V, dtype=dtype)
    row[seed % V] = value
    model.lm_head = Even(row)
    with pytest.raises(ml.TrainingError, match="NaN or infinity"):
        ml.generate(model, [[1, 2], [3]], 1, temperature)
