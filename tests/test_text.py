"""Text token by token: what was shown is never taken back, and nothing is left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.cli.streaming import TextStream
from tests.models import examples
from tests.test_quote import source_of

KINDS = ("metaspace", "byte-level", "unigram")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    found = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp("tokenizer")
        (directory / "tokenizer.json").write_text(source_of(kind), encoding="utf-8")
        found[kind] = ml.load_tokenizer(directory)
    return found


def stream_of(tokenizer, tokens):
    """A stream of these tokens, not finished, and the pieces that it has shown and will."""
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    for token in tokens:
        stream.add(token)
        assert "".join(pieces) == stream.text
    return stream, pieces


@st.composite
def some_tokens(draw, tokenizer):
    """Any tokens, often the same few."""
    pool = draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=6))
    return draw(st.lists(st.sampled_from(pool) | st.integers(0, len(tokenizer) - 1), max_size=30))


@pytest.mark.parametrize("kind", KINDS)
@examples(3)
@given(st.data())
def test_all_that_is_shown_is_the_text_of_all_tokens(loaded, kind, data):
    tokens = data.draw(some_tokens(loaded[kind]))
    stream, pieces = stream_of(loaded[kind], tokens)
    assert stream.finish() == "".join(pieces) == loaded[kind].decode(tokens)


@pytest.mark.parametrize("kind", ["unigram", "byte-level"])
def test_a_character_of_several_tokens_is_shown_once_it_is_whole(loaded, kind):
    tokens = loaded[kind].encode("a😀b")
    assert len(tokens) > 3
    _, pieces = stream_of(loaded[kind], tokens)
    assert pieces in (["a", "😀", "b"], ["a", "😀b"])
