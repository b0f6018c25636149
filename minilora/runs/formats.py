"""What a row means: which text is read, and which is learned. Five shapes are recognised, each row by itself.

    {"messages": [{"role": …, "content": …}, …]}        a conversation (OpenAI); tools beside it
    {"conversations": [{"from": …, "value": …}, …]}     a conversation (ShareGPT); tools beside it
    {"instruction": …, "input": …, "output": …}         a question and its answer (Alpaca); history beside it
    {"prompt": …, "completion": …}                      plain text; or a conversation in two lists of messages (TRL)
    {"text": …}                                         plain text, all of it learned

A conversation may have its system prompt in a field `system`. Errors name the field that the file has. Whoever only
asks needs no answer: without `output` or `completion`, or a last turn of the assistant, a row is a question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minilora.errors import DataError
from minilora.runs.config import DataConfig

Fields = dict[str, Any]
SHAPES = "messages; conversations; instruction and output; prompt and completion; text"
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
DEPTH = 32  # objects and lists within each other in a message or a tool
# role -> which roles may follow; "" is before the first message
FOLLOWS = {
    "": ("system", "developer", "user", "assistant"),
    "system": ("user", "assistant"),
    "developer": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
EMPTY = "it is empty, so there is nothing to learn"


@dataclass(frozen=True)
class Passage:
    """Plain text: the prompt is read, the completion learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and the tools that the assistant may call."""

    messages: list[Fields]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class _Turn:
    """A message, and the field that it was read from."""

    message: Fields
    where: str

    @property
    def role(self) -> str:
        return str(self.message["role"])


def understand(fields: Fields, config: DataConfig) -> Passage | Conversation:
    """The meaning of a row's fields.

    Raises:
        DataError: they are of no known shape, or one has the wrong type or order or is empty; the field is named.
    """
    if config.text_field is not None:
        _check_no_system(config.system)
        return Passage("", text_of(fields, config.text_field, is_learned=True))
    turns = _turns(fields)
    if turns is None:
        return _passage(fields, config)
    own = text_of(fields, "system", default="")
    system = own or config.system
    if own and turns[0].role in ("system", "developer"):
        raise DataError(f"system: found {own!r:.60}, but {turns[0].where} is a system prompt, too; need one")
    if system and turns[0].role not in ("system", "developer"):
        turns = [_Turn({"role": "system", "content": system}, "system"), *turns]
    _check_order(turns)
    for turn in turns:
        _check_characters(turn.message, turn.where)
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{turns[0].where.partition('[')[0]}: no message has role 'assistant': nothing to learn")
    return Conversation([turn.message for turn in turns], _tools(fields))


def understand_question(fields: Fields, config: DataConfig) -> Passage | Conversation:
    """What a row asks: its meaning without its last answer, which is not looked at and need not be there.

    Raises:
        DataError: as for `understand`.
    """
    meaning = understand(_answered(fields), config)
    if isinstance(meaning, Passage):
        return Passage(meaning.prompt, "")
    return Conversation(meaning.messages[:-1], meaning.tools)


def _answered(fields: Fields) -> Fields:
    """The fields with "…" for an answer, in place of their own if there is one."""
    answer = {"role": "assistant", "content": "…"}
    if "instruction" in fields:
        fields = {**fields, "output": "…"}
    if "prompt" in fields:
        fields = {**fields, "completion": [answer] if isinstance(fields["prompt"], list) else "…"}
    for key in ("messages", "conversations", "prompt"):
        if isinstance(turns := fields.get(key), list):
            last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
            if SHAREGPT_ROLES.get(str(last.get("role", last.get("from")))) == "assistant":
                turns = turns[:-1]
            fields = {**fields, key: turns if key == "prompt" else [*turns, answer]}
    return fields


def _passage(fields: Fields, config: DataConfig) -> Passage:
    if "prompt" in fields and "completion" in fields:
        if isinstance(fields["prompt"], list) != isinstance(fields["completion"], list):
            raise DataError("prompt, completion: found text and a list, need two texts or two lists of messages")
        passage = Passage(text_of(fields, "prompt"), text_of(fields, "completion", is_learned=True))
    elif "text" in fields:
        if "label" in fields:
            raise DataError(
                "text, label: a class is learned with --task SEQ_CLS, the text alone with --text-field text"
            )
        passage = Passage("", text_of(fields, "text", is_learned=True))
    elif "tokens" in fields and "labels" in fields:
        raise DataError("tokens, labels: classes are learned with --task TOKEN_CLS")
    else:
        preference = "; pairs of preferred and rejected answers are for other methods" if "chosen" in fields else ""
        raise DataError(f"keys {sorted(fields)} are of no known shape; known are {SHAPES}{preference}")
    _check_no_system(text_of(fields, "system", default="") or config.system)
    return passage


def _check_no_system(system: str | None) -> None:
    if system:
        raise DataError(f"system: found {system!r:.60}, but plain text has no place for a system prompt")


def _turns(fields: Fields) -> list[_Turn] | None:
    """The checked turns of a conversation; None if it is none."""
    if "messages" in fields:
        return _messages(fields, "messages")
    if "conversations" in fields:
        return list(map(_from_sharegpt, _entries(fields, "conversations")))
    if "instruction" in fields and "output" in fields:
        return _from_alpaca(fields)
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        completion = _messages(fields, "completion")
        if [turn.role for turn in completion] != ["assistant"]:
            found = [turn.role for turn in completion]
            raise DataError(f"completion: found roles {found}, need one 'assistant'; more are for `messages`")
        return [*_messages(fields, "prompt"), *completion]
    return None


def _from_alpaca(fields: Fields) -> list[_Turn]:
    """Alpaca's fields as messages; a template that knows `instruction` and `input` finds them apart, too."""
    turns = []
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"history: found {history!r:.60}, need a list of pairs of question and answer")
    for i, (question, answer) in enumerate(history):
        for j, (role, content) in enumerate((("user", question), ("assistant", answer))):
            where = f"history[{i}][{j}]"
            text = text_of({where: content}, where, is_learned=role == "assistant")
            turns.append(_Turn({"role": role, "content": text}, where))
    instruction, extra = text_of(fields, "instruction"), text_of(fields, "input", default="")
    question = f"{instruction}\n\n{extra}" if extra else instruction
    asked = {"role": "user", "content": question, "instruction": instruction, "input": extra}
    answered = {"role": "assistant", "content": text_of(fields, "output", is_learned=True)}
    return [*turns, _Turn(asked, "instruction"), _Turn(answered, "output")]


def _from_sharegpt(turn: _Turn) -> _Turn:
    """One entry of `conversations` as a message; some files have the keys of messages already."""
    entry, where = turn.message, turn.where
    if "from" not in entry and "role" in entry:
        return _checked(turn)
    speaker = entry.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise DataError(f"{where}.from: found {speaker!r:.60}, accepted are {sorted(SHAREGPT_ROLES)}")
    role, key = SHAREGPT_ROLES[speaker], f"{where}.value"
    value = text_of({key: entry.get("value")}, key, is_learned=role == "assistant")
    if speaker != "function_call":
        return _Turn({"role": role, "content": value}, where)
    called = _from_json(value, key)
    calls = _calls(called if isinstance(called, list) else [called], key)
    return _Turn({"role": role, "tool_calls": [{"type": "function", "function": call} for call in calls]}, where)


def _messages(fields: Fields, key: str) -> list[_Turn]:
    return list(map(_checked, _entries(fields, key)))


def _entries(fields: Fields, key: str) -> Iterable[_Turn]:
    values = fields[key]
    if not isinstance(values, list) or not values:
        raise DataError(f"{key}: found {values!r:.60}, need a list of messages")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(f"{key}[{i}]: found {value!r:.60}, need an object with role and content")
        yield _Turn(value, f"{key}[{i}]")


def _checked(turn: _Turn) -> _Turn:
    """A message whose fields have the right types."""
    message, where = turn.message, turn.where
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or role not in FOLLOWS or not role:
        raise DataError(f"{where}.role: found {role!r:.60}, accepted are {sorted(filter(None, FOLLOWS))}")
    if isinstance(content, list):
        _check_parts(content, f"{where}.content")
    elif not isinstance(content, str | None) or (content is None and role != "assistant"):
        raise DataError(f"{where}.content: found {content!r:.60}, need text or a list of parts")
    if calls:
        _calls(calls, f"{where}.tool_calls")
    elif role == "assistant" and not content:
        raise DataError(f"{where}.content: {EMPTY}")
    if message.get("weight") not in (None, 1):
        raise DataError(f"{where}.weight: found {message['weight']!r:.60}; only 1 is supported, or the key left out")
    return turn


def _check_parts(parts: list[Any], where: str) -> None:
    for i, part in enumerate(parts):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise DataError(f'{where}[{i}]: found {part!r:.60}, need {{"type": "text", "text": …}}')


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls, each of which names its function."""
    if isinstance(calls, list):
        functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
        if all(isinstance(called, dict) and isinstance(called.get("name"), str) for called in functions):
            return calls
    raise DataError(f"{where}: found {calls!r:.60}, need a list of calls, each with the name of a function")


def _check_order(turns: Iterable[_Turn]) -> None:
    before = ""
    for turn in turns:
        if turn.role not in FOLLOWS[before]:
            after = f"after {before!r}" if before else "first"
            accepted = " or ".join(map(repr, FOLLOWS[before]))
            raise DataError(f"{turn.where}: found role {turn.role!r} {after}, where {accepted} is accepted")
        before = turn.role


def _tools(fields: Fields) -> list[Any] | None:
    """`tools`, which some files hold as JSON text."""
    tools = fields.get("tools") or None
    if isinstance(tools, str):
        tools = _from_json(tools, "tools") or None
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise DataError(f"tools: found {tools!r:.60}, need a list of objects")
    _check_characters(tools, "tools")
    return tools


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found {text!r:.60}, need JSON") from error


def text_of(fields: Fields, key: str, default: str | None = None, is_learned: bool = False) -> str:
    """The text of a field; with `is_learned` it must not be empty.

    Raises:
        DataError: it is no text, or holds what is no character.
    """
    value = fields.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{key}: found {value!r:.60}, need text")
    if is_learned and not value:
        raise DataError(f"{key}: {EMPTY}")
    _check_characters(value, key)
    return value


def _check_characters(value: Any, where: str, depth: int = 0) -> None:
    """No text, however deep, may hold what is no character: half of a surrogate pair, or one of minilora's marks."""
    if depth > DEPTH:
        raise DataError(f"{where:.60}: nested more than {DEPTH} deep")
    if isinstance(value, str):
        if found := re.search("[\ud800-\udfff\ufdd0-\ufdef]", value):
            raise DataError(f"{where}: found U+{ord(found[0]):04X}, which is not a character")
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_characters(key, where)
            _check_characters(entry, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            _check_characters(entry, f"{where}[{i}]", depth + 1)
