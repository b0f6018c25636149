"""Conversations as text: how a model is asked for an answer, and what is learned of a conversation.

    text that asks for the answer (`ask`)  +  the answer and the end of its turn, as the template writes them

A model is trained on this text and asked with its first part, so that both are the same. What a conversation says and
the template leaves out is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from minilora.data import Span
from minilora.errors import DataError
from minilora.models.prompts import REASONING
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import TrainOn
from minilora.runs.formats import Conversation, Fields

OPEN, CLOSE = "\ufdd4", "\ufdd5"  # noncharacters, which no text holds
REMEDY = "; remove it, or take a template with a place for it: --prompt-style FILE.jinja"


def ask(conversation: Conversation, tokenizer: Tokenizer) -> str:
    """Render a conversation that waits for an answer: the text before the answer, in training as in generation.

    Raises:
        DataError: the template leaves out what a message says, or the tools.
    """
    messages, tools = conversation.messages, conversation.tools
    text = tokenizer.render(messages, add_generation_prompt=True, tools=tools)
    _check_complete(text, conversation, tokenizer, is_question=True)
    return text


def encode_question(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of `ask`, in which the control tokens of messages are plain text."""
    quoted = Conversation(tokenizer.quote(conversation.messages), tokenizer.quote(conversation.tools))
    return tokenizer.encode(ask(quoted, tokenizer), add_special_tokens=False)


def render_conversation(
    conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn
) -> tuple[str, list[Span], bool]:
    """Render a conversation up to its last answer; every answer that is learned follows what `ask` returns for it.

    Returns the text, the spans of it that are trained on, and whether the template alone would write other text before
    the last answer than where it asks for one. An answer ends with its turn, or where the template marks its end. An
    answer before the first question is not learned, because nothing asks for it.
    """
    if tokenizer.template is None:
        raise DataError(
            "a conversation needs a chat template, and the model has none: take an instruct model, give --prompt-style "
            "alpaca, instruction or a .jinja file, or use rows of prompt and completion"
        )
    messages, tools = conversation.messages, conversation.tools
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all":
        text = tokenizer.render(messages, tools=tools)
        _check_complete(text, conversation, tokenizer, is_question=False)
        for i in answers[:-1]:
            _check_calls(Conversation(messages[: i + 1], tools), tokenizer)
        _check_answer(text, Conversation(messages[: answers[-1] + 1], tools), tokenizer)
        return text, [(0, len(text))], False
    *earlier, last = answers
    if last == 0:
        raise DataError("no message comes before the answer, so nothing asks for it; --train-on all learns it")
    conversation = Conversation(messages[: last + 1], tools)
    asked = ask(Conversation(messages[:last], tools), tokenizer)
    text, marked = tokenizer.template.render_spans(conversation.messages, tools)
    is_moved = not text.startswith(asked)
    if is_moved:
        answer, marked = _answer_alone(conversation, tokenizer)
        text, marked = asked + answer, [(len(asked) + begin, len(asked) + end) for begin, end in marked]
    learned = _learned_spans(marked, len(asked), len(text)) or [(len(asked), len(text))]
    _check_answer(text[len(asked) :], conversation, tokenizer)
    if train_on == "assistant":
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), last)
        for i in reversed([i for i in earlier if i > first]):
            _check_calls(Conversation(messages[: i + 1], tools), tokenizer)
            learned = [*_earlier_answer(text, marked, conversation, i, learned[0][0], tokenizer), *learned]
    return text, learned, is_moved


def _learned_spans(marked: list[Span], begin: int, end: int) -> list[Span]:
    """Return the marked spans of an answer that lies in [begin, end); the first of them begins with the answer."""
    ends = [(max(first, begin), last) for first, last in marked if first < last and begin < last <= end]
    return [(begin, ends[0][1]), *ends[1:]] if ends else []


def _earlier_answer(
    text: str, marked: list[Span], conversation: Conversation, i: int, following: int, tokenizer: Tokenizer
) -> list[Span]:
    """Return the spans of answer i, which ends before the place `following`."""
    asked = tokenizer.render(conversation.messages[:i], add_generation_prompt=True, tools=conversation.tools)
    begin = len(asked)
    if text.startswith(asked):
        spans = _learned_spans(marked, begin, following)
        end = spans[-1][1] if spans else _end_of_turn(text, conversation, i, tokenizer)
        if end and _is_written(text[begin:end], conversation.messages[i]):
            return spans or [(begin, end)]
    raise DataError(
        f"the chat template renders message {i}, or those before it, differently once others follow, or does not begin "
        "an answer as it asks for one, so its tokens cannot be found; --train-on completion learns the last answer only"
    )


def _end_of_turn(text: str, conversation: Conversation, i: int, tokenizer: Tokenizer) -> int | None:
    """Return where turn i of a rendered conversation ends, if the template does not mark it; None if it is not found.

    The messages up to it are rendered as a prefix of the text; where they are not, a mark behind the answer shows it.
    """

    def render(messages: Sequence[Fields]) -> str:
        return tokenizer.render(messages, tools=conversation.tools)

    messages, content = conversation.messages, conversation.messages[i].get("content")
    through = render(messages[: i + 1])
    for prefix in (through, through.removesuffix(tokenizer.special_tokens.get("eos_token", ""))):
        if text.startswith(prefix):  # phi3's template closes the whole text, not the turn, with the end token
            return len(prefix)
    for core in (content, content.rstrip()) if isinstance(content, str) else ():  # many templates strip
        marked = {**messages[i], "content": core + CLOSE}
        answer, _, rest = render([*messages[:i], marked, *messages[i + 1 :]]).partition(CLOSE)
        closing = render([*messages[:i], marked]).rpartition(CLOSE)[2]
        if answer + rest == text and rest.startswith(closing):
            return len(answer + closing)
    return None


def _answer_alone(conversation: Conversation, tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """Return the last answer as it follows the text that asks for it, and the spans of it that the template marks.

    Some templates write other text before an answer than where they ask for one: Mistral's without the system prompt,
    R1's without `<think>`. The answer is found after its question alone; thoughts that were begun are ended.
    """
    *before, answer = conversation.messages
    question = [message for message in before if message["role"] == "user"][-1:] or before[-1:]
    render, tools = tokenizer.render, conversation.tools
    asked, bare = render(question, add_generation_prompt=True, tools=tools), render(question, tools=tools)
    probe = render([*question, {"role": "assistant", "content": OPEN}], tools=tools)
    assert tokenizer.template is not None
    text, marked = tokenizer.template.render_spans([*question, answer], tools)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(asked, probe, strict=False))
    header = "".join(character for character, _ in same)
    bare = bare.removesuffix(tokenizer.special_tokens.get("eos_token", ""))  # with which some close every text
    begun, written = asked[len(header) :], probe[len(header) :].partition(OPEN)[0]  # after what both begin with
    if not (header.startswith(bare) and text.startswith(header)) or (begun.strip() and written.strip()):
        raise DataError(
            "the chat template does not begin the last answer as it asks for one, or asks for one without thoughts; "
            "--prompt-style FILE.jinja takes another template"
        )
    rest, thoughts = text[len(header) :], ""
    if "<think>" in begun and "</think>" not in rest:
        rest, thoughts = rest.lstrip("\n"), f"{_thoughts(answer)}\n</think>\n\n".lstrip("\n")
    shift = len(thoughts) + len(rest) - len(text)
    return thoughts + rest, [(begin + shift, end + shift) for begin, end in marked]


def _content(message: Fields) -> str:
    """Return the content of a message as text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _thoughts(message: Fields) -> str:
    """Return what an answer says as its reasoning, in a field or in its content; "" if it has none."""
    fields = (message.get(key) for key in REASONING)
    content = _content(message).rpartition("</think>")[0].rpartition("<think>")[2]
    return next((text for text in fields if isinstance(text, str) and text.strip()), content).strip()


def _is_written(text: str, message: Fields) -> bool:
    """Return whether a text has all that an answer says, its thoughts as well."""
    parts = [*re.split("</?think>", _content(message)), _thoughts(message)]
    return all(part.strip() in text for part in parts)


def _check_answer(text: str, conversation: Conversation, tokenizer: Tokenizer) -> None:
    """Raise a DataError if the template leaves out what the last message says, or its tool calls."""
    *before, message = conversation.messages
    if not _is_written(text, message):
        raise DataError(f"the chat template leaves out what message {len(before)} says, or its thoughts{REMEDY}")
    _check_calls(conversation, tokenizer)


def _check_calls(conversation: Conversation, tokenizer: Tokenizer) -> None:
    """Raise a DataError if the template leaves out tool calls of the last message, which other names would show."""
    *before, message = conversation.messages
    whole, calls = None, message.get("tool_calls") or []
    for i, call in enumerate(calls):
        called = call.get("function", call)
        other = {**called, "name": f"{called['name']}_"}
        changed = [*calls[:i], {**call, "function": other} if "function" in call else other, *calls[i + 1 :]]
        whole = whole or tokenizer.render(conversation.messages, tools=conversation.tools)
        if whole == tokenizer.render([*before, {**message, "tool_calls": changed}], tools=conversation.tools):
            raise DataError(f"the chat template leaves out the tool calls of message {len(before)}{REMEDY}")


def _check_complete(text: str, conversation: Conversation, tokenizer: Tokenizer, is_question: bool) -> None:
    """Raise a DataError if the template leaves out what a message says, which marks in their place show, or the tools.

    Thoughts may be left out, and in a question what was answered earlier.
    """
    messages, tools = conversation.messages, conversation.tools
    marked = list(messages)
    for i, message in enumerate(messages):
        if message.get("content") and not (is_question and message["role"] == "assistant"):
            texts = {"content", "instruction"} & message.keys()  # an Alpaca row has its question in both
            marked[i] = {**message, **dict.fromkeys(texts, f"{OPEN}{i}{CLOSE}")}
    shown = tokenizer.render(marked, is_question, tools)
    for i, message in enumerate(messages):
        if marked[i] is not message and f"{OPEN}{i}{CLOSE}" not in shown:
            raise DataError(f"the chat template leaves out what message {i} says, of role {message['role']}{REMEDY}")
    if tools and tokenizer.render(messages, is_question) == text:
        raise DataError(f"the chat template leaves out the tools{REMEDY}")
