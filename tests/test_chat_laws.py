"""The laws of label masks: right masks pass, and each mistake is found and named."""

import json
import re
from itertools import zip_longest

import pytest

from minilora.data import IGNORE_INDEX, label_tokens
from minilora.runs.conversations import render_conversation
from minilora.runs.formats import Conversation
from minilora.testing import Chat, CheckFailure, check_chat_mask, laws
from minilora.testing.catalogue import CATALOGUE
from minilora.testing.implementations import END, render_chat
from tests.text import CHATML, DEFAULT_SYSTEM, MARKED

MISTAKES = CATALOGUE["chat_mask"]


@pytest.mark.parametrize("template", [CHATML, MARKED, DEFAULT_SYSTEM], ids=["chatml", "marked", "default system"])
@pytest.mark.parametrize("use_regex", [True, False])
def test_our_masks_pass(template, use_regex, tokenizer):
    chosen = tokenizer(use_regex=use_regex, template=template)

    def render(messages):
        text, learned = render_conversation(Conversation(messages), chosen, "assistant")
        ids, spans = chosen.encode_spans(text, add_special_tokens=False)
        is_label = [label != IGNORE_INDEX for label in label_tokens(ids, spans, learned)]
        done, tokens = 0, []
        for begin, end in spans:  # several tokens may be one character
            tokens.append(text[max(done, begin) : end])
            done = max(done, end)
        return tokens, is_label

    assert len(check_chat_mask(render)) == 12


def with_tools(
    messages, drops="", learns=("assistant",), reasons=True, calls=True, unlearned=lambda message, word: False
):
    """Render calls and results of tools; the reasoning of earlier turns is dropped."""
    tokens, flags = [], []
    for i, message in enumerate(messages):
        content = message["content"] or ""
        if message["role"] == "assistant" and (not reasons or i + 1 < len(messages)):
            content = content.rpartition("</think>")[2].lstrip("\n")
        parts = [content, *(json.dumps(call["function"]) for call in message.get("tool_calls", []) if calls)]
        words = [*re.findall(r"\w+|\W", " ".join(parts)), "[/]"]
        if message["role"] != drops:
            tokens += [f"[{message['role']}]", *words]
            flags += [False, *(message["role"] in learns and not unlearned(message, word) for word in words)]
    return tokens, flags


@pytest.mark.parametrize("cause", MISTAKES)
def test_a_mistake_of_a_mask_is_named_in_any_template(cause):
    with pytest.raises(CheckFailure, match=r"learned are .*\n  accepted are .*⟦") as failure:
        check_chat_mask(lambda messages: MISTAKES[cause](messages, with_tools))
    assert cause in failure.value.causes


@pytest.mark.parametrize("change", [lambda flags: [False] * len(flags), lambda flags: [*flags[2:], False, False]])
def test_a_wrong_mask_of_no_known_mistake_has_no_cause(change):
    def render(messages):
        tokens, flags = render_chat(messages)
        return tokens, change(flags)

    with pytest.raises(CheckFailure, match="learned are") as failure:
        check_chat_mask(render)
    assert failure.value.causes == ()


def test_a_template_may_strip_white_space_around_a_text():
    check_chat_mask(lambda m: render_chat([{**message, "content": message["content"].strip()} for message in m]))


@pytest.mark.parametrize("is_learned", [True, False])
def test_the_space_before_an_empty_reply_may_be_learned_or_not(is_learned):
    def render(messages):
        tokens, flags = [], []
        for message in messages:
            (header, *words), (_, *learned) = render_chat([message])
            tokens += [header, " ", *words]
            flags += [False, is_learned and learned[0] and not message["content"], *learned]
        return tokens, flags

    check_chat_mask(render)


def without_end(messages):
    kept = [pair for pair in zip(*render_chat(messages), strict=True) if pair[0] != END]
    return list(zip(*kept, strict=True))


def closed_once(messages):
    """Render two replies in a row with one end token, that of the last."""
    tokens, flags = [], []
    for message, following in zip_longest(messages, messages[1:], fillvalue={}):
        own, learned = render_chat([message])
        kept = -1 if message["role"] == following.get("role") else None
        tokens, flags = [*tokens, *own[:kept]], [*flags, *learned[:kept]]
    return ["<|user|>", "<|assistant|>", *tokens], [False, False, *flags]  # an introduction


def found_by_its_text(messages):
    """Label each reply at the first place where its words are, even in the question."""
    tokens, learned = [], set()
    for message in messages:
        own, _ = render_chat([message])
        tokens += own
        if message["role"] == "assistant":
            words = own[1:-1] or own[1:]
            first = next(i for i in range(len(tokens)) if tokens[i : i + len(words)] == words)
            learned |= {*range(first, first + len(own) - 1)}
    return tokens, [i in learned for i in range(len(tokens))]


WRONG_TEXTS = {  # the law that finds it, and a part of the message
    "no end token of the first of two replies": ("two_replies", closed_once, "accepted is an end token after each"),
    "no labels for some tokens": ("turns", lambda m: (render_chat(m)[0], render_chat(m)[1][:-1]), "labels for"),
    "the first messages are lost": ("system", lambda m: render_chat(m[-2:]), "every text"),
    "a reply is found by its text": ("repeats", found_by_its_text, "learned are"),
    "no end token": ("turns", without_end, "accepted is an end token after each reply"),
}


@pytest.mark.parametrize("mistake", WRONG_TEXTS)
def test_each_law_of_masks_finds_what_breaks_it(mistake):
    law, render, said = WRONG_TEXTS[mistake]
    with pytest.raises(CheckFailure, match=said):
        laws("chat_mask")[law].check(render)


@pytest.mark.parametrize(
    ("law", "change", "lost", "case"),
    [
        ("unicode", lambda text: text.encode("ascii", "ignore").decode(), "'naïve?'", None),
        ("unicode", lambda text: text.replace("ï", ""), "'naïve?'", Chat((*Chat().turns, ("user", "naïve?")))),
        ("white_space", lambda text: re.sub(r"\s+", " ", text), "'Yes.  '", None),
        ("turns", str.lower, "'Is it day?'", None),
    ],
)
def test_a_lost_or_changed_text_has_no_mistake_of_labels_as_its_cause(law, change, lost, case):
    def render(messages):
        return render_chat([{**message, "content": change(message["content"])} for message in messages])

    with pytest.raises(CheckFailure, match=re.escape(f"in which {lost} or what follows it is lost")) as caught:
        laws("chat_mask")[law].check(render, case)
    assert caught.value.causes == ()


@pytest.mark.parametrize("reasons", [True, False])
def test_calls_of_tools_and_reasoning_that_is_kept_or_dropped_pass(reasons):
    reports = check_chat_mask(lambda messages: with_tools(messages, reasons=reasons), has_tools=True)
    assert {report.law for report in reports} >= {"chat_mask-reasoning", "chat_tools-calls"}


@pytest.mark.parametrize(
    ("law", "wrong", "word"),
    [
        ("chat_tools-calls", {"drops": "tool"}, "Qd degrees"),
        ("chat_tools-calls", {"learns": ("assistant", "tool")}, "Qd degrees"),
        ("chat_tools-calls", {"learns": ("tool",)}, "Qb"),
        ("chat_tools-calls", {"calls": False}, "Qb"),
        ("chat_mask-reasoning", {"unlearned": lambda message, word: word == "Qe"}, "Qe"),
    ],
)
def test_lost_words_and_wrong_labels_of_calls_and_reasoning_are_refused(law, wrong, word):
    with pytest.raises(CheckFailure, match=f"the word {word}: wrong"):
        laws()[law].check(lambda messages: with_tools(messages, **wrong))


def test_finding_replies_by_a_mark_that_a_question_quotes_is_refused():
    def found_by_a_mark(messages):
        tokens = [token for token in re.split(r"(<\|\w+\|>)", "".join(render_chat(messages)[0])) if token]
        flags, is_reply = [], False
        for token in tokens:
            flags.append(is_reply)
            is_reply = token == "<|assistant|>" or (is_reply and token != END)
        return tokens, flags

    with pytest.raises(CheckFailure, match="chat_mask-opening: the word Qa: wrong"):
        check_chat_mask(found_by_a_mark)


def opens_next(messages, is_learned=True):
    """Render as GLM does: the token of the user's turn ends the reply before it."""
    tokens, flags, stops = [], [], False
    for message in [*messages, {"role": "user", "content": ""}]:
        words = re.findall(r"\S+|\s+", message["content"])
        tokens += [f"<|{message['role']}|>", *words]
        flags += [stops and is_learned, *[message["role"] == "assistant"] * len(words)]
        stops = message["role"] == "assistant"
    return tokens, flags


def test_a_stop_token_that_opens_the_next_turn_passes_and_is_demanded():
    check_chat_mask(opens_next)
    with pytest.raises(CheckFailure, match="the end token after a reply is not learned"):
        check_chat_mask(lambda messages: opens_next(messages, is_learned=False))
