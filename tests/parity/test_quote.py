"""Ours and transformers' way to keep control tokens in messages from acting, and what it makes of our prompt styles.

Theirs encodes each such token by itself; ours encodes the text as a whole, as it was in training. The two agree where
no token spans the ends of the control token, which letters beside it ensure. Theirs also takes added tokens that the
template writes, special or not, for control tokens; but not those in the keys of tools.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.runs.encoders import with_prompt_style
from tests.text import CHATML, CLOSE, SPECIAL, conversation, write_tokenizer

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")

words = st.text(st.sampled_from("thecatz"), min_size=1, max_size=4)
texts = st.lists(st.tuples(words, st.sampled_from(SPECIAL)), min_size=1, max_size=3)
hostile = st.builds(lambda pairs, end: "".join(map("".join, pairs)) + end, texts, words) | st.sampled_from(SPECIAL)
turns = st.lists(st.tuples(hostile, hostile), min_size=1, max_size=2)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    ours = write_tokenizer(directory := tmp_path_factory.mktemp("tokenizer"), template=CHATML, eos=CLOSE)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return ours, theirs


@given(turns, st.booleans())
def test_control_tokens_in_messages_are_the_same_plain_text(tokenizers, turns, add_generation_prompt):
    ours, theirs = tokenizers
    messages = conversation(turns)
    expected = theirs.apply_chat_template(
        messages,
        add_generation_prompt=add_generation_prompt,
        sanitize_control_tokens=True,
        tokenize=True,
        return_dict=False,
    )
    assert ours.encode_chat(messages, add_generation_prompt) == expected
    assert ours.encode(ours.render(messages, add_generation_prompt)) != expected


STYLED = [
    conversation([("a", "b")]),
    conversation([(" a ", "b\n"), ("c", "d")], "Be brief."),
    [{"role": "user", "content": "a\n\nb", "instruction": "a", "input": "b"}, {"role": "assistant", "content": "c"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "c"}],
    [{"role": "tool", "content": "a"}],
]


@pytest.mark.parametrize("style", ["alpaca", "instruction"])
@pytest.mark.parametrize("post", ["none", "bos"])
def test_a_saved_prompt_style_renders_the_same(tmp_path, style, post):
    with_prompt_style(write_tokenizer(tmp_path / "old", post=post, chat_template="old"), style).save(tmp_path / "new")
    ours = ml.load_tokenizer(tmp_path / "new")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "new")
    for messages in STYLED[:-1]:
        for asked, prompt in ((messages, False), (messages[:-1], True)):
            text = theirs.apply_chat_template(asked, add_generation_prompt=prompt, tokenize=False)
            assert ours.render(asked, add_generation_prompt=prompt) == text
        theirs_marked = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        text, spans = ours.template.render_spans(messages)
        ids, places = ours.encode_spans(text, add_special_tokens=False)
        said = [int(any(b < last and e > first for first, last in spans)) for b, e in places]
        assert (ids, said) == (theirs_marked["input_ids"], theirs_marked["assistant_masks"])
    with pytest.raises(ml.DataError, match="no place for"):
        ours.render(STYLED[-1])
    with pytest.raises(Exception, match="no place for"):
        theirs.apply_chat_template(STYLED[-1], tokenize=False)
