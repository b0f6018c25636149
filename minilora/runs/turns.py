"""A conversation as the text that a chat template makes of it, and where in that text the assistant speaks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from minilora.errors import DataError
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import TrainOn
from minilora.runs.formats import Conversation, Fields

Span = tuple[int, int]
FROM, TO = "\ufdd4", "\ufdd5"  # Unicode noncharacters, which mark answers where the template does not


def written(conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> tuple[str, list[Span]]:
    """The text of a conversation, and the spans of it that are learned.

    Raises:
        DataError: the model has no chat template, or it leaves something out, or the answers cannot be found.
    """
    if tokenizer.template is None:
        raise DataError(
            "a conversation needs a chat template, and the model has none: take an instruct model, give --prompt-style "
            "alpaca, instruction or a .jinja file, or use rows of prompt and completion"
        )
    if train_on == "all":
        text = tokenizer.template.render(conversation.messages, tools=conversation.tools)
        learned = [(0, len(text))]
    else:
        text, learned = tokenizer.template.render_spans(conversation.messages, tools=conversation.tools)
        learned = _joined(learned) or _assistant_spans(text, conversation, tokenizer, train_on)
        learned = learned if train_on == "assistant" else learned[-1:]
    _check_whole(text, conversation, tokenizer, train_on)
    return text, learned


def _check_whole(text: str, conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> None:
    """What is asked and what is learned must be in the text: some templates want content as text, some as parts."""
    messages = conversation.messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    for i, message in enumerate(messages):
        if message["role"] == "user" or (message["role"] == "assistant" and (train_on != "completion" or i == last)):
            content = message.get("content") or ""
            said = content if isinstance(content, str) else "".join(part["text"] for part in content)
            wanted = {said, message.get("instruction", said)}  # an alpaca row's question is given in two ways
            if not any(each.rpartition("</think>")[2].strip() in text for each in wanted):  # thoughts may be left out
                raise DataError(
                    f"the chat template leaves out what message {i} says; it may want content as text, or as parts"
                )
            if message.get("tool_calls"):
                silent = [*messages[:i], {**message, "tool_calls": None}, *messages[i + 1 :]]
                if tokenizer.render(silent, tools=conversation.tools) == text:
                    raise DataError(f"the chat template leaves out the tool calls of message {i}")


def _joined(spans: list[Span]) -> list[Span]:
    """Spans that touch as one: a template may mark an answer and its closing token apart."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined


def _assistant_spans(text: str, conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> list[Span]:
    """Where the assistant speaks, for templates that do not mark it: from the prompt for an answer to the turn's end.

    The text up to an answer must be how the whole text begins; or else the answers themselves must be found in it.
    """
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    spans, found = [], None
    for number, i in list(enumerate(turns)) if train_on == "assistant" else [(-1, turns[-1])]:
        span = _turn(text, conversation, i, tokenizer)
        if span is None:
            found = found or _answers(text, conversation, tokenizer)
            if not found:
                advice = "; --train-on completion learns the last answer only" if train_on == "assistant" else ""
                raise DataError(
                    f"the chat template renders message {i}, or those before it, differently once others follow, or "
                    f"does not begin an answer as it asks for one, so its tokens cannot be found{advice}"
                )
            span = found[number]
        spans.append(span)
    return spans


def _turn(text: str, conversation: Conversation, i: int, tokenizer: Tokenizer) -> Span | None:
    """Where message i is in the text, which begins as the template renders the messages up to it; None if not so."""
    messages, tools = conversation.messages, conversation.tools
    try:
        through = tokenizer.render(messages[: i + 1], tools=tools)
        before = tokenizer.render(messages[: max(i, 1)], add_generation_prompt=True, tools=tools)
    except DataError:  # some templates refuse a conversation that breaks off
        return None
    if not text.startswith(through):  # phi3's closes the whole text, not the turn, with the end token
        through = through.removesuffix(tokenizer.special_tokens.get("eos_token", ""))
    if i == 0:  # no message comes before, but the header that asks for an answer stands in the turn
        header = before.removeprefix(through)
        before = through[: through.index(header) + len(header)] if header in through else before
    return (len(before), len(through)) if text.startswith(through) and through.startswith(before) else None


def _answers(text: str, conversation: Conversation, tokenizer: Tokenizer) -> list[Span] | None:
    """Every answer in the text, found by marks around what is written of it, with what closes it; None if that fails.

    Of an answer that is more than its content, tool calls say, the marks would miss the rest.
    """

    def pieces(messages: Sequence[Fields]) -> list[str]:
        return tokenizer.render(messages, tools=conversation.tools).replace(TO, FROM).split(FROM)

    messages, last = list(conversation.messages), 0
    for i, message in enumerate(conversation.messages):
        content = message.get("content")
        if message["role"] == "assistant":
            if not isinstance(content, str) or not content.strip() or _has_more(message):
                return None
            last = i
            for core in (content, content.strip()):  # many templates strip
                messages[i] = {**message, "content": content.replace(core, f"{FROM}{core}{TO}", 1)}
                if "".join(pieces(messages)) == text:
                    break
    found, closing = pieces(messages), pieces(messages[: last + 1])[-1]
    answers = sum(message["role"] == "assistant" for message in messages)
    is_whole = "".join(found) == text and len(found) == 2 * answers + 1
    if not (is_whole and all(after.startswith(closing) for after in found[2::2])):
        return None
    ends = list(accumulate(map(len, found)))
    return [(begin, end + len(closing)) for begin, end in zip(ends[0::2], ends[1::2], strict=False)]


def _has_more(answer: Fields) -> bool:
    return any(value for key, value in answer.items() if key not in ("role", "content", "name", "weight"))
