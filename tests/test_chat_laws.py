"""The laws of label masks: right masks pass, and each mistake is found and named."""

import numpy as np
import pytest

from minilora.data import IGNORE_INDEX, label_tokens
from minilora.runs.encoders import render_conversation
from minilora.runs.formats import Conversation
from minilora.testing import Chat, CheckFailure, check_chat_mask, laws
from tests.text import CHATML, DEFAULT_SYSTEM, MARKED


def split_words(messages):
    """The tokens of a small template: words and white space; which are learned."""
    tokens, flags = [], []
    for message in messages:
        words = message["content"].replace(" ", "\0 \0").replace("\n", "\0\n\0").split("\0")
        tokens += ["<|", message["role"], "|>\n", *words, "<|end|>", "\n"]
        flags += [False] * 3 + [message["role"] == "assistant"] * (len(words) + 1) + [False]
    return tokens, flags


def test_a_right_mask_passes():
    assert len(check_chat_mask(split_words)) == 7


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

    check_chat_mask(render)


def masked(change):
    """The template above with other labels: `change` gets the tokens, the right labels, and the role of each."""

    def render(messages):
        tokens, flags = split_words(messages)
        counts = [len(split_words([message])[0]) for message in messages]
        roles = [m["role"] for m, count in zip(messages, counts, strict=True) for _ in range(count)]
        return tokens, change(tokens, flags, roles)

    return render


def replies_only(first, last):
    """Labels of some replies, by their numbers."""

    def change(tokens, flags, roles):
        starts = [i for i, role in enumerate(roles) if role == "assistant" and tokens[i] == "<|"]
        chosen = range(len(starts))[first:last]
        return [flag and sum(start < i for start in starts) - 1 in chosen for i, flag in enumerate(flags)]

    return change


MASKS = {
    "the mask is one token late": lambda tokens, flags, roles: [False, *flags[:-1]],
    "the mask is one token early": lambda tokens, flags, roles: [*flags[1:], False],
    "tokens of the user or of the system are learned": lambda tokens, flags, roles: [
        flag or (role == "user" and token not in ("<|", "user", "|>\n", "<|end|>", "\n"))
        for token, flag, role in zip(tokens, flags, roles, strict=True)
    ],
    "the header in front of a reply is learned": lambda tokens, flags, roles: [role == "assistant" for role in roles],
    "the end token after a reply is not learned": lambda tokens, flags, roles: [
        flag and token != "<|end|>" for token, flag in zip(tokens, flags, strict=True)
    ],
    "a part of a reply is not learned": lambda tokens, flags, roles: [
        flag and token not in ("No,", "a") for token, flag in zip(tokens, flags, strict=True)
    ],
    "only the last reply is learned": replies_only(-1, None),
    "only the first reply is learned": replies_only(0, 1),
    "everything is learned": lambda tokens, flags, roles: [True] * len(tokens),
    "nothing is learned": lambda tokens, flags, roles: [False] * len(tokens),
}


@pytest.mark.parametrize("cause", MASKS)
def test_a_mistake_of_a_mask_is_named(cause):
    with pytest.raises(CheckFailure, match=r"learned are .*\n  accepted are .*⟦No, night.<\|end\|>") as failure:
        check_chat_mask(masked(MASKS[cause]))
    assert failure.value.causes == (cause,)


def trimming(messages):
    return split_words([{**message, "content": message["content"].strip()} for message in messages])


def test_a_template_may_strip_white_space_around_a_text():
    check_chat_mask(trimming)


def found_by_text(messages):
    """Learns the first place where a reply's text is."""
    tokens, _ = split_words(messages)
    text, ends = "".join(tokens), np.cumsum([len(token) for token in tokens])
    replies = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
    spans = [(text.find(reply), text.find(reply) + len(reply)) for reply in replies]
    return tokens, [any(begin < end <= last for begin, last in spans) for end in ends]


def without_end(messages):
    kept = [pair for pair in zip(*split_words(messages), strict=True) if pair[0] not in ("<|end|>", "\n")]
    return [token for token, _ in kept], [flag for _, flag in kept]


WRONG_TEXTS = {  # the law that finds it, and a part of the message
    "a reply's words elsewhere": ("repeats", found_by_text, "learned are"),
    "no labels for some tokens": ("turns", lambda m: (split_words(m)[0], split_words(m)[1][:-1]), "labels for"),
    "the first messages are lost": ("system", lambda m: split_words(m[-2:]), "every message's text"),
    "the order of messages": ("turns", lambda m: split_words(m[::-1]), "learned are|every message's text"),
    "letters are lost": (
        "unicode",
        lambda m: split_words([{**each, "content": each["content"].encode("ascii", "ignore").decode()} for each in m]),
        "every message's text",
    ),
    "no end token": ("turns", without_end, "no end token stands after a reply|end token after a reply is not learned"),
    "white space in the text that is not learned": (
        "white_space",
        masked(lambda t, f, r: [flag and bool(token.strip()) for token, flag in zip(t, f, strict=True)]),
        "a part of a reply is not learned",
    ),
    "empty replies have no end token": (
        "empty",
        masked(lambda t, f, r: [flag and t[i - 1] != "" for i, flag in enumerate(f)]),
        "the end token after a reply is not learned",
    ),
}


@pytest.mark.parametrize("mistake", WRONG_TEXTS)
def test_each_law_of_masks_finds_what_breaks_it(mistake):
    law, render, said = WRONG_TEXTS[mistake]
    with pytest.raises(CheckFailure, match=said):
        laws("chat_mask")[law].check(render)


def test_a_case_of_a_conversation_can_be_repeated_from_its_text():
    with pytest.raises(CheckFailure) as failure:
        laws("chat_mask")["turns"].check(masked(MASKS["everything is learned"]))
    assert failure.value.case == Chat((("user", "Is it day?"), ("assistant", "No, night.")))
    assert f"case = {failure.value.case!r}" in str(failure.value)
