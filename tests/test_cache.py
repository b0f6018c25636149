"""The cache: what it answers is causal attention, and nothing else than its documents is read or copied."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.models.generate import KVCache, decode_attention
from minilora.testing.compare import assert_maths, assert_precision
from tests import reference_model
from tests.models import allocated, long, randn, seeds, sizes, tiny_config

CPU = torch.device("cpu")
E, WINDOW = 6, 5  # of the tiny mistral


def filled(lengths, seed=0, capacity=64, family="mistral"):
    """A cache that holds so many tokens of each document in its first layer."""
    config = tiny_config(family)
    cache = KVCache(config, len(lengths), capacity, CPU)
    add(cache, lengths, seed, config.windows[0])
    return cache


def rows(lengths, seed):
    """q, k and v of so many new tokens."""
    return (randn(seed + i, sum(lengths), heads, E) for i, heads in enumerate((4, 2, 2)))


def add(cache, lengths, seed, window):
    """What the cache answers to so many new tokens of each document."""
    cache.begin(lengths)
    return cache.attend(*rows(lengths, seed), window)


@st.composite
def calls(draw):
    """What each call brings of each document, often one token, sometimes none."""
    documents = draw(st.integers(1, 4))
    news = st.lists(st.sampled_from([0, 1, 1, 1, 2, 9]), min_size=documents, max_size=documents).filter(any)
    return draw(st.lists(news, min_size=1, max_size=5))


@given(seeds, calls(), st.sampled_from([None, 1, WINDOW, 99]))
def test_the_answer_is_causal_attention_over_all_that_was_given(seed, calls, window):
    config = tiny_config("mistral", sliding_window=window)
    cache = KVCache(config, len(calls[0]), 64, CPU)
    past = [[torch.empty(0, 2, E, dtype=torch.float64)] * 2 for _ in calls[0]]
    for n, lengths in enumerate(calls):
        q, k, v = rows(lengths, seed + 10 * n)
        new = zip(k.split(lengths), v.split(lengths), strict=True)
        past = [[torch.cat(pair) for pair in zip(*each, strict=True)] for each in zip(past, new, strict=True)]
        asking = [(length, *each) for length, each in zip(lengths, past, strict=True) if length]
        keys, values = (torch.cat([each[i] for each in asking]) for i in (1, 2))
        spans = [length for length, *_ in asking], [len(each[1]) for each in asking]
        expected = reference_model.causal_attention(q.numpy(), keys.numpy(), values.numpy(), *spans, window)
        assert_maths(add(cache, lengths, seed + 10 * n, window), expected)
        assert cache.lengths == [len(keys) for keys, _ in past]


@given(seeds, st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_what_lies_beyond_a_document_is_not_looked_at(seed, lengths):
    clean, littered = filled(lengths), filled(lengths)
    for document, length in enumerate(lengths):
        for held in littered.layers[0]:
            held[document, :, length:] = 1e6
    ones = [1] * len(lengths)
    assert torch.equal(add(littered, ones, seed, WINDOW), add(clean, ones, seed, WINDOW))


@given(seeds, sizes, st.integers(WINDOW, 20), st.integers(1, 3))
def test_beyond_a_window_nothing_is_read(seed, documents, length, new):
    clean, littered, news = filled([length] * documents), filled([length] * documents), [new] * documents
    for held in littered.layers[0]:
        held[..., : length + 1 - WINDOW, :] = torch.nan
    assert torch.equal(add(littered, news, seed, WINDOW), add(clean, news, seed, WINDOW))


def test_a_new_cache_holds_no_nan():
    """In a common view it would count 0 times, and still be one."""
    for held in filled([3, 1]).layers[0]:
        assert not held[:, :, 3:].any()


@pytest.mark.parametrize("lengths", [*long([50, 50], [50, 40]), [50, 1, 1]])
def test_a_step_copies_nothing_of_what_is_held(lengths):
    ones = [1] * len(lengths)
    short, long = (filled([k * n for n in lengths], capacity=6_000, family="llama") for k in (1, 100))
    few, many = (allocated(lambda: add(cache, ones, 1, None))[1] for cache in (short, long))  # noqa: B023
    more = 8 * 2 * E * 99 * sum(lengths)  # bytes of keys, and as many of values
    assert many - few < more / 2  # who sees which keys is a number a key


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3), st.integers(1, 200))
def test_one_query_of_each_document_as_precisely_as_plain_attention(seed, dtype, documents, keys):
    q, k, v = randn(seed, documents, 4, E, dtype=dtype), *randn(seed + 1, 2, documents, 2, keys, E, dtype=dtype)

    def plain(q, k, v):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return ((q.unsqueeze(2) @ k.mT / E**0.5).softmax(-1) @ v).squeeze(2)

    assert_precision(decode_attention(q, k, v), plain(q, k, v), plain(q.double(), k.double(), v.double()))
