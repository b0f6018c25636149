"""The cache: what it answers is causal attention, and nothing else than its documents is read or copied."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.models.generate import KVCache, decode_attention
from minilora.testing.compare import assert_precision
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


NEW = st.lists(st.sampled_from([0, 1, 1, 2, 9]), min_size=3, max_size=3).filter(any)  # tokens of each document


@given(seeds, st.lists(NEW, min_size=1, max_size=5), st.integers(0, 3))
def test_a_convolution_sees_its_last_inputs_and_0_before_a_document(seed, calls, count):
    cache, layer = KVCache(tiny_config(), len(calls[0]), 64, CPU), torch.nn.Identity()
    past = [torch.zeros(count, 3, dtype=torch.float64) for _ in calls[0]]
    for n, lengths in enumerate(calls):
        cache.begin(lengths)
        new = randn(seed + n, sum(lengths), 3)
        past = [torch.cat(pair) for pair in zip(past, new.split(lengths), strict=True)]
        for found, rows, length in zip(cache.extend(layer, new, count), past, lengths, strict=True):
            assert torch.equal(found, rows[len(rows) - count - length :])
