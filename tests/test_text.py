"""Text token by token: what was shown is never taken back, and nothing is left out."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.cli.write import TextStream
from tests.models import examples
from tests.test_quote import source_of

KINDS = ("metaspace", "byte-level", "unigram", "word piece")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    found = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp("tokenizer")
        (directory / "tokenizer.json").write_text(source_of(kind), encoding="utf-8")
        found[kind] = ml.load_tokenizer(directory)
    return found


def cut(text, stops):
    """The text before the first stop string, by trying all places."""
    return next((text[:i] for i in range(len(text)) if any(text[i:].startswith(stop) for stop in stops)), text)


def stream_of(tokenizer, tokens, stops=()):
    """A stream of these tokens, not finished, and the pieces that it has shown and will."""
    pieces = []
    stream = TextStream(tokenizer, stops, pieces.append)
    for token in tokens:
        assert stream.add(token) == stream.is_stopped
        assert "".join(pieces) == stream.text
    return stream, pieces


@st.composite
def tokens_and_stops(draw, tokenizer):
    """Any tokens, often the same few; stop strings that are mostly from their text."""
    pool = draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=6))
    tokens = draw(st.lists(st.sampled_from(pool) | st.integers(0, len(tokenizer) - 1), max_size=30))
    text = tokenizer.decode(tokens)
    places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 5))
    parts = st.builds(lambda place, more: text[place[0] : sum(place)] + more, places, st.sampled_from(["", "zq"]))
    return tokens, draw(st.lists(parts.filter(bool), max_size=3))


@pytest.mark.parametrize("kind", KINDS)
@examples(3)
@given(st.data())
def test_all_that_is_shown_is_the_text_of_all_tokens_before_the_first_stop_string(loaded, kind, data):
    tokenizer = loaded[kind]
    tokens, stops = data.draw(tokens_and_stops(tokenizer))
    stream, pieces = stream_of(tokenizer, tokens, stops)
    text = tokenizer.decode(tokens)
    assert stream.finish() == "".join(pieces) == cut(text, stops)
    assert stream.is_stopped == any(stop in text for stop in stops)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@example("abab", ["bb", "aba"])
@example("aab", ["ab", "aabb"])
def test_a_stop_is_told_as_soon_as_it_is_certain_and_nothing_is_held_that_cannot_begin_one(loaded, text, stops):
    tokenizer = loaded["unigram"]
    stream = TextStream(tokenizer, stops)
    for n, letter in enumerate(text, start=1):
        stream.add(tokenizer.token_id(letter))
        futures = [cut(text[:n] + more, stops) for more in ["", "z", *(stop[i:] for stop in stops for i in range(4))]]
        assert stream.text == min(futures, key=len)  # what all futures have in common
        assert stream.is_stopped == (len(set(futures)) == 1)


@pytest.mark.parametrize("kind", ["unigram", "byte-level"])
def test_a_character_of_several_tokens_is_shown_once_it_is_whole(loaded, kind):
    tokens = loaded[kind].encode("a😀b")
    assert len(tokens) > 3
    _, pieces = stream_of(loaded[kind], tokens)
    assert pieces in (["a", "😀", "b"], ["a", "😀b"])


def test_an_empty_stop_string_is_refused(loaded):
    with pytest.raises(ml.ConfigError, match="stop string is empty"):
        TextStream(loaded["unigram"], ["a", ""])
