"""The laws of label masks: right masks pass, and each mistake is found and named."""

import pytest

from minilora.data import IGNORE_INDEX, label_tokens
from minilora.runs.encoders import render_conversation
from minilora.runs.formats import Conversation
from minilora.testing import Chat, CheckFailure, check_chat_mask, laws
from minilora.testing.implementations import END, render_chat
from minilora.testing.mutants import MUTANTS
from minilora.testing.mutants_data import masked
from tests.text import CHATML, DEFAULT_SYSTEM, MARKED

PLANTED = {mutant.name: mutant.plant(render_chat) for mutant in MUTANTS if mutant.kind == "chat_mask"}


@pytest.mark.parametrize("template", [CHATML, MARKED, DEFAULT_SYSTEM], ids=["chatml", "marked", "default system"])
@pytest.mark.parametrize("use_regex", [True, False])
def test_our_masks_pass(template, use_regex, tokenizer):
    chosen = tokenizer(use_regex=use_regex).with_template(template)

    def render(messages):
        text, learned = render_conversation(Conversation(messages), chosen, "assistant")
        ids, spans = chosen.encode_spans(text, add_special_tokens=False)
        is_label = [label != IGNORE_INDEX for label in label_tokens(ids, spans, learned)]
        done, tokens = 0, []
        for begin, end in spans:  # several tokens may be one character
            tokens.append(text[max(done, begin) : end])
            done = max(done, end)
        return tokens, is_label

    assert len(check_chat_mask(render)) == 7


MASKS = {
    "the mask is one token late": PLANTED["the mask is one token late"],
    "the mask is one token early": masked(lambda tokens, flags: [*flags[1:], False])(render_chat),
    "tokens of the user or of the system are learned": masked(
        lambda tokens, flags: [flag or token == "day?" for token, flag in zip(tokens, flags, strict=True)]
    )(render_chat),
    "the header in front of a reply is learned": PLANTED["the token before a reply is learned"],
    "the end token after a reply is not learned": PLANTED["the end token is not learned"],
    "a part of a reply is not learned": PLANTED["the first token of a reply is not learned"],
    "only the last reply is learned": PLANTED["only the last reply is learned"],
    "only the first reply is learned": PLANTED["only the first reply is learned"],
    "everything is learned": PLANTED["all tokens are learned"],
    "nothing is learned": masked(lambda tokens, flags: [False] * len(flags))(render_chat),
}


@pytest.mark.parametrize("cause", MASKS)
def test_a_mistake_of_a_mask_is_named(cause):
    with pytest.raises(CheckFailure, match=r"learned are .*\n  accepted are .*⟦No, night.<\|end\|>") as failure:
        check_chat_mask(MASKS[cause])
    assert failure.value.causes == (cause,)


def test_a_template_may_strip_white_space_around_a_text():
    check_chat_mask(lambda m: render_chat([{**each, "content": each["content"].strip()} for each in m]))


def without_end(messages):
    kept = [pair for pair in zip(*render_chat(messages), strict=True) if pair[0] != END]
    return list(zip(*kept, strict=True))


WRONG_TEXTS = {  # the law that finds it, and a part of the message
    "words elsewhere": ("repeats", PLANTED["a reply is found by its text, in the question, too"], "learned are"),
    "no labels for some tokens": ("turns", lambda m: (render_chat(m)[0], render_chat(m)[1][:-1]), "labels for"),
    "the first messages are lost": ("system", lambda m: render_chat(m[-2:]), "every message's text"),
    "the order of messages": ("turns", lambda m: render_chat(m[::-1]), "learned are|every message's text"),
    "letters are lost": (
        "unicode",
        lambda m: render_chat([{**each, "content": each["content"].encode("ascii", "ignore").decode()} for each in m]),
        "every message's text",
    ),
    "no end token": ("turns", without_end, "no end token stands after a reply|end token after a reply is not learned"),
    "white space in the text that is not learned": (
        "white_space",
        masked(lambda tokens, flags: [f and bool(t.strip()) for t, f in zip(tokens, flags, strict=True)])(render_chat),
        "a part of a reply is not learned",
    ),
    "empty replies have no end": ("empty", PLANTED["the end token of an empty reply is not learned"], "learned are"),
}


@pytest.mark.parametrize("mistake", WRONG_TEXTS)
def test_each_law_of_masks_finds_what_breaks_it(mistake):
    law, render, said = WRONG_TEXTS[mistake]
    with pytest.raises(CheckFailure, match=said):
        laws("chat_mask")[law].check(render)


def test_a_case_of_a_conversation_can_be_repeated_from_its_text():
    with pytest.raises(CheckFailure) as failure:
        laws("chat_mask")["turns"].check(MASKS["everything is learned"])
    assert failure.value.case == Chat((("user", "Is it day?"), ("assistant", "No, night.")))
    assert f"case = {failure.value.case!r}" in str(failure.value)
