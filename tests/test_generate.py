"""Generation: greedy and sampled, with a cache and without."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from minilora import ConfigError, ShapeError
from minilora.model.generate import pick
from tests.models import FAMILIES, SIZES, randn, seeds, tiny_model, token_ids
from tests.tolerance import assert_maths, assert_precision

V = SIZES["vocab_size"]
few = settings(max_examples=5)
prompt_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=3)
NEW = 24  # documents grow to more than any rotation of the tiny models was trained on


def prompts_of(seed, lengths):
    return [part.tolist() for part in token_ids(seed, sum(lengths)).split(lengths)]


# --- greedy ---


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2)
@given(seeds, prompt_lengths)
def test_greedy_takes_the_likeliest_token_after_the_whole_text_so_far(family, seed, lengths):
    model, prompts = tiny_model(family, seed), prompts_of(seed, lengths)
    for prompt, new in zip(prompts, ml.generate(model, prompts, NEW), strict=True):
        for n, token in enumerate(new):
            assert token == model(torch.tensor([prompt + new[:n]]))[0, -1].argmax()
        assert len(new) == NEW


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2)
@given(seeds, prompt_lengths)
def test_a_cache_changes_no_token(family, seed, lengths):
    model, prompts = tiny_model(family, seed), prompts_of(seed, lengths)
    cached, uncached = (ml.generate(model, prompts, NEW, use_cache=use) for use in (True, False))
    assert cached == uncached


@few
@given(seeds, prompt_lengths)
def test_prompts_of_unequal_lengths_are_continued_as_one_by_one(seed, lengths):
    model, prompts = tiny_model("llama", seed), prompts_of(seed, lengths)
    assert ml.generate(model, prompts, 8) == [ml.generate(model, [prompt], 8)[0] for prompt in prompts]


@few
@given(seeds)
def test_a_tensor_of_prompts_is_as_good_as_a_list(seed):
    model, prompts = tiny_model("llama", seed), token_ids(seed, 3, 5)
    assert ml.generate(model, prompts, 4) == ml.generate(model, prompts.tolist(), 4)


@pytest.mark.parametrize("family", ["llama", "llama-dynamic"])
@pytest.mark.parametrize("use_cache", [True, False])
@few
@given(seeds, prompt_lengths, st.sets(st.integers(0, V - 1), min_size=5, max_size=20))
def test_a_stop_token_ends_a_continuation_and_is_left_out(family, use_cache, seed, lengths, stop_ids):
    model, prompts = tiny_model(family, seed), prompts_of(seed, lengths)
    free = ml.generate(model, prompts, NEW)
    ends = [next((i for i, token in enumerate(new) if token in stop_ids), NEW) for new in free]
    stopped = ml.generate(model, prompts, NEW, stop_ids=stop_ids, use_cache=use_cache)
    assert stopped == [new[:end] for new, end in zip(free, ends, strict=True)]


def test_generation_makes_no_gradients_and_no_changes():
    model = tiny_model().requires_grad_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ml.generate(model, [[1, 2]], 4, temperature=1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


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


sampling = given(
    seeds,
    st.sampled_from([0.25, 0.7, 2.0]),
    st.sampled_from([1e-9, 0.3, 0.8, 0.99, 1.0]),
    st.sampled_from([0, 1, 2, 5, 9, 100]),
)


@sampling
def test_what_is_drawn_from_is_the_softmax_of_what_top_k_and_top_p_allow(seed, temperature, top_p, top_k):
    logits, seen = randn(seed, 4, 9, dtype=torch.float32), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda shares, n, generator: (seen.append(shares), shares[:, :n])[1])
        pick(logits, temperature, top_p, top_k, torch.Generator())
    (drawn_from,) = seen
    expected = torch.stack([allowed_probabilities(row, temperature, top_p, top_k) for row in logits])
    assert torch.equal(drawn_from > 0, expected > 0)
    plain = (logits / temperature).masked_fill(expected == 0, -torch.inf).softmax(-1)
    assert_precision(drawn_from, plain, expected)


@few
@sampling
def test_every_allowed_token_and_no_other_is_drawn(seed, temperature, top_p, top_k):
    row, n = randn(seed, 5, dtype=torch.float32), 20_000
    expected = allowed_probabilities(row, temperature, top_p, top_k)
    drawn = pick(row.expand(n, -1), temperature, top_p, top_k, torch.Generator().manual_seed(seed))
    shares = drawn.bincount(minlength=5) / n
    assert torch.equal(shares[expected == 0], torch.zeros(int((expected == 0).sum())))
    assert ((shares - expected).abs() <= 6 * (expected * (1 - expected) / n).sqrt()).all()  # six sigma


@few
@given(seeds, prompt_lengths, st.sampled_from([{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}]))
def test_sampling_from_one_token_is_greedy(seed, lengths, only):
    model, prompts = tiny_model("llama", seed), prompts_of(seed, lengths)
    assert ml.generate(model, prompts, 8, **{"temperature": 1.0, **only}) == ml.generate(model, prompts, 8)


@few
@given(seeds, prompt_lengths, st.booleans())
def test_a_seed_repeats_and_another_one_does_not(seed, lengths, use_cache):
    model, prompts = tiny_model("llama", seed), prompts_of(seed, lengths)

    def sample(seed):
        return ml.generate(model, prompts, NEW, temperature=2.0, seed=seed, use_cache=use_cache)

    state = torch.random.get_rng_state()
    assert sample(seed) == sample(seed) != sample(seed + 1)
    assert torch.equal(torch.random.get_rng_state(), state)  # no global random state is moved


@given(seeds)
def test_a_temperature_divides_the_logits(seed):
    row = randn(seed, 1, 9, dtype=torch.float64)
    cold, warm = (allowed_probabilities(row[0], temperature, 1.0, 0) for temperature in (0.5, 1.0))
    assert_maths(cold, warm.square() / warm.square().sum())


# --- what is refused ---


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_numbers_that_cannot_work_are_refused_by_name(wrong):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name} {value}"):
        ml.generate(tiny_model(), [[1]], **wrong)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], torch.zeros(2, 0, dtype=torch.long)])
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(ShapeError, match="at least one token"):
        ml.generate(tiny_model(), prompts)


def test_a_model_that_computes_nan_is_not_taken_at_its_word():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ml.TrainingError, match="NaN"):
        ml.generate(model, [[1, 2]], max_new_tokens=1)
