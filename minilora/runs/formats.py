"""Formats of rows: a row is recognised by its fields, and read as a prompt with its completion or as a conversation.

    {"messages": [{"role": …, "content": …}, …]}        a conversation (OpenAI), maybe with `tools`
    {"conversations": [{"from": …, "value": …}, …]}     a conversation (ShareGPT), maybe with `tools`
    {"instruction": …, "input": …, "output": …}         an instruction and its answer (Alpaca)
    {"prompt": …, "completion": …}                      plain text; or a conversation in two lists of messages (TRL)
    {"text": …}                                         plain text, all of it a completion

A conversation may have its system prompt in a field `system`. Errors name the field of the file. In rows to
generate from (`parse_prompt`), `output`, `completion` or the assistant's last turn may be missing.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from minilora.errors import DataError, in_recipe
from minilora.models.prompts import REASONING

Fields = dict[str, Any]
MAX_DEPTH = 32  # of nested objects and lists in a message or a tool
ROLES = ("assistant", "developer", "system", "tool", "user")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
PAIRS = (("question", "answer"), ("input", "output"), ("instruction", "response"))  # frequent names of other formats
EMPTY = "it is empty, so there is nothing to train on"
UNASKED = "it is empty, so nothing is asked; text without a question goes in the field `text`"


@dataclass(frozen=True)
class Row:
    """A row as it was read; `source` is "file:line", and `problem` is why there are no fields, if there are none."""

    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    problem: str = ""


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, which is context, and its completion, which is trained on, as plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """A conversation: messages as chat templates take them, and the tools that the assistant may call."""

    messages: list[Fields]
    tools: list[Any] | None = None
    thinking: bool | None = None  # whether its last answer has thoughts, or should have; None: as the template asks

    @property
    def variables(self) -> dict[str, Any]:
        """What a chat template takes besides the messages, under the names of transformers."""
        return {"tools": self.tools, "enable_thinking": self.thinking}

    @property
    def system(self) -> str | None:
        """The system prompt that it begins with."""
        return text_of(self.messages[0]) if self.messages[0]["role"] == "system" else None


def parse_row(fields: Fields, system: str | None = None) -> PromptCompletion | Conversation:
    """Recognise the format of a row and check its fields; `system` is the system prompt of rows that have none."""
    _check_unicode(fields, "")
    parsed, own = _format_of(fields)(fields), _optional_text(fields, "system")
    if isinstance(parsed, list):
        return _as_conversation(parsed, own, _tools(fields), system)
    if given := own or system:
        raise DataError(
            f"system: found {given!r:.60}, but plain text has no place for a system prompt; if you gave "
            "none, it is the one that the model or the adapter was trained with; an empty system prompt leaves it out"
        )
    return parsed


def parse_prompt(fields: Fields, system: str | None = None) -> PromptCompletion | Conversation:
    """Parse a row to generate from: its last answer is dropped, and may be missing or malformed."""
    answer = {"role": "assistant", "content": "…"}  # in place of the row's own, if there is one
    if "instruction" in fields:
        fields = {**fields, "output": "…"}
    if "prompt" in fields:
        fields = {**fields, "completion": [answer] if isinstance(fields["prompt"], list) else "…"}
    for key in ("messages", "conversations"):
        if isinstance(turns := fields.get(key), list):
            last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
            has_answer = last.get("role", last.get("from")) in ("assistant", "gpt")
            fields = {**fields, key: [*(turns[:-1] if has_answer else turns), answer]}
    if _format_of(fields) is _from_prompt_completion and fields["prompt"] == "":
        return PromptCompletion("", "")  # the model begins a text
    parsed = parse_row(fields, system)
    if isinstance(parsed, PromptCompletion):
        return PromptCompletion(parsed.prompt, "")
    return Conversation(parsed.messages[:-1], parsed.tools)


def text_of(message: Fields) -> str:
    """Return the content of a message as text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def thoughts_of(message: Fields) -> str:
    """Return what an answer says as its reasoning, in a field or else in its content; "" if it has none."""
    content = text_of(message).rpartition("</think>")[0].rpartition("<think>")[2]
    return next((message[key] for key in REASONING if isinstance(message.get(key), str)), content).strip()


def _format_of(fields: Fields) -> "Format":
    for keys, read in FORMATS.items():
        if fields.keys() >= {*keys}:
            return read
    if fields.keys() >= {"chosen", "rejected"}:
        one = "to train only on the chosen answers, give columns prompt=prompt,completion=chosen"
        raise DataError(f"found the fields {sorted(fields)}: pairs of answers are for DPO; {in_recipe('dpo')}; {one}")
    names = {name.lower(): name for name in fields}
    texts = [name for name, value in fields.items() if isinstance(value, str) and not value.isnumeric()]
    pairs = [(names[asked], names[answer]) for asked, answer in PAIRS if names.keys() >= {asked, answer}]
    asked, answer = next(pair for pair in (*pairs, texts[:2], ("QUESTION", "ANSWER")) if len(pair) == 2)
    context = next((f",input={names[name]}" for name in ("input", "context") if name in names.keys() - {asked}), "")
    known = " or ".join("+".join(keys) for keys in FORMATS)
    raise DataError(
        f"found the fields {sorted(fields)}, need {known}; give columns instruction={asked}{context},"
        f"output={answer}, or columns prompt={asked},completion={answer} for plain text; "
        "the first line of a CSV has to name its columns"
    )


def _as_conversation(messages: list[Fields], own: str, tools: list[Any] | None, system: str | None) -> Conversation:
    """Put the system prompt, the row's `own` or that of all rows, before the messages."""
    has_system = messages[0]["role"] in ("system", "developer")
    if has_system and messages[1:] and not text_of(messages[0]):  # an empty one is none, as where the model is asked
        return _as_conversation(messages[1:], own, tools, system)
    if own and has_system:
        raise DataError(f"system: found {own!r:.60}, but the first message is a system prompt as well; leave one out")
    if has_system:
        messages = [{**messages[0], "role": "system"}, *messages[1:]]  # the name that templates know
    elif system := own or system:
        messages = [{"role": "system", "content": system}, *messages]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError("no message has role 'assistant', so there is no answer to train on")
    return Conversation(messages, tools, bool(thoughts_of(answers[-1])))


# --- the formats; each returns plain text or the checked messages of a conversation ---


def _from_messages(fields: Fields, key: str = "messages") -> list[Fields]:
    return [_check_message(message, where) for where, message in _entries(fields, key)]


def _from_sharegpt(fields: Fields) -> list[Fields]:
    """Convert entries with `from` and `value`; in some files they have the keys of messages already."""
    messages = []
    for where, entry in _entries(fields, "conversations"):
        if "from" not in entry and "role" in entry:
            messages.append(_check_message(entry, where))
            continue
        speaker = entry.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise DataError(f"{where}.from: found {speaker!r:.60}, accepted are {sorted(SHAREGPT_ROLES)}")
        role = SHAREGPT_ROLES[speaker]
        content = check_text(entry.get("value"), f"{where}.value", role == "assistant", role == "user")
        messages.append({"role": role, "content": content})
    return messages


def _from_alpaca(fields: Fields) -> list[Fields]:
    """Convert Alpaca's fields to messages; the question keeps `instruction` and `input` for templates that use them."""
    if fields.get("history"):
        raise DataError("history: earlier turns are read only from `messages` or `conversations`")
    instruction = check_text(fields["instruction"], "instruction", is_question=True)
    extra = _optional_text(fields, "input")
    question = f"{instruction}\n\n{extra}" if extra else instruction
    asked = {"role": "user", "content": question, "instruction": instruction, "input": extra}
    answered = {"role": "assistant", "content": check_text(fields["output"], "output", is_target=True)}
    return [asked, answered]


def _from_prompt_completion(fields: Fields) -> PromptCompletion | list[Fields]:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError("prompt, completion: found text and a list, need two texts or two lists of messages")
    if not isinstance(prompt, list):
        prompt = check_text(prompt, "prompt", is_question=True)
        return PromptCompletion(prompt, check_text(completion, "completion", is_target=True))
    messages = [*_from_messages(fields, "prompt"), *_from_messages(fields, "completion")]
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise DataError("completion: need one message of role 'assistant'; more are for `messages`")
    return messages


def _from_text(fields: Fields) -> PromptCompletion:
    if "label" in fields:
        raise DataError(
            "text, label: found both; give columns prompt=text,completion=label to train on labels, or text=text; "
            f"classes: {in_recipe('classify_texts')}"
        )
    return PromptCompletion("", check_text(fields["text"], "text", is_target=True))


Format = Callable[[Fields], PromptCompletion | list[Fields]]
FORMATS: dict[tuple[str, ...], Format] = {  # the fields that a format is recognised by, the first that fits
    ("messages",): _from_messages,
    ("conversations",): _from_sharegpt,
    ("instruction", "output"): _from_alpaca,
    ("prompt", "completion"): _from_prompt_completion,
    ("text",): _from_text,
}


# --- what they share ---


def _entries(fields: Fields, key: str) -> Iterator[tuple[str, Fields]]:
    """Yield the objects of a list, each after its name for errors."""
    values = fields[key]
    if not isinstance(values, list) or not values:
        raise DataError(f"{key}: found {values!r:.60}, need a list of messages")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(f"{key}[{i}]: found {value!r:.60}, need an object with role and content")
        yield f"{key}[{i}]", value


def _check_message(message: Fields, where: str) -> Fields:
    """Return a message after checking the types of its fields."""
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise DataError(f"{where}.role: found {role!r:.60}, accepted are {list(ROLES)}")
    if "content" not in message and not calls:
        raise DataError(f"{where}.content: it is missing; found the keys {sorted(message)}")
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise DataError(f'{where}.content[{i}]: found {part!r:.60}, need {{"type": "text", "text": …}}')
    elif not isinstance(content, str | None) or (content is None and role != "assistant"):
        raise DataError(f"{where}.content: found {content!r:.60}, need text or a list of parts")
    if calls:
        entries = calls if isinstance(calls, list) else [None]
        functions = [call.get("function", call) if isinstance(call, dict) else None for call in entries]
        if not all(isinstance(called, dict) and isinstance(called.get("name"), str) for called in functions):
            need = "need a list of calls, each with the name of a function"
            raise DataError(f"{where}.tool_calls: found {calls!r:.60}, {need}")
    else:
        check_text(text_of(message), f"{where}.content", role == "assistant", role == "user")
    if message.get("weight") not in (None, 1):
        raise DataError(f"{where}.weight: found {message['weight']!r:.60}; only 1 is supported, or the key left out")
    return message


def _tools(fields: Fields) -> list[Any] | None:
    """Return `tools`, which are JSON text in some files."""
    tools = fields.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools: found {tools!r:.60}, need JSON") from error
        _check_unicode(tools, "tools")
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise DataError(f"tools: found {tools!r:.60}, need a list of objects")
    return tools


def _optional_text(fields: Fields, key: str) -> str:
    value = fields.get(key)
    return "" if value is None else check_text(value, key)


def check_text(value: Any, where: str, is_target: bool = False, is_question: bool = False) -> str:
    """Return a value that has to be text: not empty if it is trained on, and not blank if it is a question."""
    if not isinstance(value, str):
        raise DataError(f"{where}: found {value!r:.60}, need text")
    if is_target and not value:
        raise DataError(f"{where}: {EMPTY}")
    if is_question and not value.strip():
        raise DataError(f"{where}: {UNASKED}")
    return value


def _check_unicode(value: Any, where: str, depth: int = 0) -> None:
    """Refuse lone surrogates, and the noncharacters that minilora uses as marks, in any nested text."""
    if depth > MAX_DEPTH:
        raise DataError(f"{where:.60}: nested more than {MAX_DEPTH} deep")
    if isinstance(value, str) and (found := re.search("[\ud800-\udfff\ufdd0-\ufdef]", value)):
        raise DataError(f"{where}: found U+{ord(found[0]):04X}, which is not a character")
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_unicode(key, where)
            _check_unicode(entry, f"{where}.{key}" if where else key, depth + 1)
    if isinstance(value, list):
        for i, entry in enumerate(value):
            _check_unicode(entry, f"{where}[{i}]", depth + 1)
