"""What a conversation says and its chat template leaves out: an error, or it would be asked or learned in part."""

import re
from collections.abc import Sequence
from dataclasses import replace

from minilora.errors import DataError
from minilora.models.tokenizer import Tokenizer
from minilora.runs.formats import Conversation, Fields, text_of, thoughts_of

REMEDY = "; remove it, or give a template with a place for it as prompt_style"


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
            raise DataError(f"the chat template leaves out what message {i} says, of role {message['role']}{REMEDY}")
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
        raise DataError(f"the chat template leaves out what message {i} says, or its thoughts{REMEDY}")


def is_written(text: str, message: Fields) -> bool:
    """Return whether a text has all that an answer says, its thoughts and the functions that it calls as well."""
    called = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    parts = [*re.split("</?think>", text_of(message)), thoughts_of(message), *called]
    return all(part.strip() in text for part in parts)
