"""Conversations as text: how a model is asked for an answer, and which tokens of it are labelled.

    text that asks for the answer (`ask`)  +  the answer and the end of its turn, as the template writes them

A model is trained on this text and asked with its first part, so that both are the same. If the template
leaves out something that the conversation says, this is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from minilora.data import Span
from minilora.errors import DataError
from minilora.models.tokenizer import Tokenizer
from minilora.runs.formats import Conversation, Fields, text_of, thoughts_of
from minilora.runs.settings import TrainOn

if TYPE_CHECKING:  # jinja2 is imported for models with a template only
    from minilora.models.template import ChatTemplate

ANSWER = "\ufdd4"  # a noncharacter, which no text has
NO_THOUGHTS = re.compile(r"<think>\s*</think>\s*")
REMEDY = "; remove it, or give a template with a place for it as prompt_style"


def ask(conversation: Conversation, tokenizer: Tokenizer) -> str:
    """Render a conversation that waits for an answer: the text before the answer, in training as in generation."""
    text = tokenizer.render(conversation.messages, add_generation_prompt=True, **conversation.variables)
    check_context(text, conversation, tokenizer, is_question=True)
    return text


def encode_question(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of `ask`, in which the control tokens of messages are plain text."""
    quoted = Conversation(**{name: tokenizer.quote(value) for name, value in vars(conversation).items()})
    return tokenizer.encode(ask(quoted, tokenizer), add_special_tokens=False)


def render_conversation(conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> tuple[str, list[Span]]:
    """Render a conversation up to its last answer; every answer that is learned follows what `ask` returns for it.

    Returns the text, and the spans of it that are trained on. An answer ends with its turn, or where the template marks
    its end. An answer before the first question is not learned, because nothing asks for it.
    """
    template = _template_of(tokenizer)
    messages = conversation.messages
    *earlier, last = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    if train_on == "all":
        text = template.render(messages, **conversation.variables)
        check_context(text, conversation, tokenizer, is_question=False)
        check_answer(text, messages[last], last)
        blocks = NO_THOUGHTS.finditer(text) if template.has_thinking else ()  # which asking for an answer writes
        edges = [0, *(edge for block in blocks for edge in block.span()), len(text)]
        return text, list(zip(edges[::2], edges[1::2], strict=True))
    if last == 0:
        raise DataError(
            "no message comes before the answer, so nothing asks for it; train_on all trains on it all the same"
        )
    first_question = next((i for i, message in enumerate(messages) if message["role"] == "user"), last)
    earlier = [i for i in earlier if i > first_question and train_on == "assistant"]
    for i in (*earlier, last):
        if messages[i].get("tool_calls"):
            check_messages(replace(conversation, messages=messages[: i + 1]), [i], tokenizer, is_question=False)
    conversation = replace(conversation, messages=messages[: last + 1])

    asked = ask(replace(conversation, messages=messages[:last]), tokenizer)
    text, marked = template.render_spans(conversation.messages, **conversation.variables)
    if not text.startswith(asked):
        answer, marked = _answer_alone(conversation, template)
        text, marked = asked + answer, [(len(asked) + begin, len(asked) + end) for begin, end in marked]
    check_answer(text[len(asked) :], messages[last], last)
    learned = _marked_spans(marked, len(asked), len(text)) or [(len(asked), len(text))]
    for i in reversed(earlier):
        learned = [*_earlier_answer(text, marked, conversation, i, learned[0][0], tokenizer), *learned]
    return text, learned


def _template_of(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.template is None:
        raise DataError(
            "a conversation needs a chat template, and the model has none: take an instruct model, give prompt_style "
            "alpaca, instruction or a .jinja file, or use rows of prompt and completion"
        )
    if tokenizer.template.always_asks:
        raise DataError(
            "the chat template ignores add_generation_prompt, so the end of an answer cannot be found; give a .jinja "
            "file that uses it as prompt_style"
        )
    return tokenizer.template


def _marked_spans(marked: Sequence[Span], begin: int, end: int) -> list[Span]:
    """Return what the template marks of an answer in [begin, end); the first span begins with the answer."""
    spans = [(max(first, begin), last) for first, last in marked if first < last and begin < last <= end]
    return [(begin, spans[0][1]), *spans[1:]] if spans else []


def _earlier_answer(
    text: str, marked: Sequence[Span], conversation: Conversation, i: int, following: int, tokenizer: Tokenizer
) -> list[Span]:
    """Return the spans of answer i, which ends before the place `following`.

    It begins where the text that asks for it ends. It ends where the template marks that, or else as it does where it
    is the last.
    """
    *before, answer = conversation.messages[: i + 1]
    variables = replace(conversation, thinking=bool(thoughts_of(answer))).variables
    asked = tokenizer.render(before, add_generation_prompt=True, **variables)
    begin = len(asked)
    spans = _marked_spans(marked, begin, following)
    if text.startswith(asked):
        whole = tokenizer.render([*before, answer], **variables)
        without_eos = whole.removesuffix(tokenizer.special_tokens.get("eos_token", ""))  # which phi3 writes once
        for turn in [text[begin : spans[-1][1]]] if spans else [whole[begin:], without_eos[begin:]]:
            if text.startswith(turn, begin) and is_written(turn, answer):
                return spans or [(begin, begin + len(turn))]
    raise DataError(
        f"the tokens of message {i} cannot be found: the chat template writes it, or one before it, differently when "
        "others follow, or begins an answer with other text than it asks with; train_on completion trains on the last "
        "answer only"
    )


def _answer_alone(conversation: Conversation, template: ChatTemplate) -> tuple[str, list[Span]]:
    """Return the last answer as it follows the text that asks for it, and the spans of it that the template marks.

    Some templates write other text before an answer than where they ask for one: Mistral's without the system prompt,
    R1's without `<think>`. The answer is rendered after its question only; thoughts that were begun are ended.
    """
    *before, answer = conversation.messages
    variables = conversation.variables
    question = [message for message in before if message["role"] == "user"][-1:] or before[-1:]
    text, marked = template.render_spans([*question, answer], **variables)
    asked = template.render(question, add_generation_prompt=True, **variables)
    probe = template.render([*question, {"role": "assistant", "content": ANSWER}], **variables)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(asked, probe, strict=False))
    header = asked[: len(list(same))]
    begun, written = asked[len(header) :], probe[len(header) :].partition(ANSWER)[0]  # after what both begin with
    if not text.startswith(header) or (begun.strip() and written.strip()):
        raise DataError(
            "the chat template begins the last answer with other text than it asks with, or asks for an answer without "
            "thoughts; give another template as prompt_style"
        )
    rest, thoughts = text[len(header) :], ""
    if "<think>" in begun and "</think>" not in rest:
        rest, thoughts = rest.lstrip("\n"), f"{thoughts_of(answer)}\n</think>\n\n".lstrip("\n")
    shift = len(thoughts) + len(rest) - len(text)
    return thoughts + rest, [(begin + shift, end + shift) for begin, end in marked]


def check_context(text: str, conversation: Conversation, tokenizer: Tokenizer, is_question: bool) -> None:
    """Raise a DataError if a rendered conversation lacks the tools, or what a message says.

    Thoughts may be left out, and in a question what was answered earlier.
    """
    messages = conversation.messages
    which = [i for i, message in enumerate(messages) if message["role"] != "assistant" or not is_question]
    check_messages(conversation, which, tokenizer, is_question)
    without_tools = replace(conversation, tools=None).variables
    if conversation.tools and tokenizer.render(messages, is_question, **without_tools) == text:
        raise DataError(f"the chat template leaves out the tools{REMEDY}")


def check_messages(conversation: Conversation, which: Sequence[int], tokenizer: Tokenizer, is_question: bool) -> None:
    """Raise a DataError if the template leaves out the content or a tool call of some messages.

    Marks are put in place of contents and of the names of functions, and have to be in the rendered text.
    """
    messages = list(conversation.messages)
    for i in which:
        messages[i] = _marked(messages[i], i)
    text = tokenizer.render(messages, is_question, **conversation.variables)
    for i in which:
        message = conversation.messages[i]
        if message.get("content") and _mark(i, "content") not in text:
            raise DataError(
                f"the chat template leaves out the content of message {i} (role {message['role']!r}){REMEDY}"
            )
        if any(_mark(i, k) not in text for k in range(len(message.get("tool_calls") or ()))):
            raise DataError(f"the chat template leaves out the tool calls of message {i}{REMEDY}")


def _marked(message: Fields, i: int) -> Fields:
    marked = dict(message)
    if message.get("content"):
        texts = {"content", "instruction"} & message.keys()  # an Alpaca row has its question in both
        marked |= dict.fromkeys(texts, _mark(i, "content"))
    if message.get("tool_calls"):
        marked["tool_calls"] = [_renamed(call, _mark(i, k)) for k, call in enumerate(message["tool_calls"])]
    return marked


def _mark(i: int, part: str | int) -> str:
    return f"mark{i}of{part}end"


def _renamed(call: Fields, name: str) -> Fields:
    """Return a tool call with another name for its function."""
    return {**call, "function": _renamed(call["function"], name)} if "function" in call else {**call, "name": name}


def check_answer(text: str, message: Fields, i: int) -> None:
    """Raise a DataError if a text lacks what answer i says, or its thoughts."""
    if not is_written(text, message):
        raise DataError(f"the chat template leaves out the content of message {i}, or its thoughts{REMEDY}")


def is_written(text: str, message: Fields) -> bool:
    """Return whether a text has all that an answer says, its thoughts and the functions that it calls as well."""
    called = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    parts = [*re.split("</?think>", text_of(message)), thoughts_of(message), *called]
    return all(part.strip() in text for part in parts)
