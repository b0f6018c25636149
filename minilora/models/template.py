"""Chat templates: a conversation becomes text, as transformers 5 renders it.

A template runs in jinja2's immutable sandbox, with limits on what it writes and multiplies; its time has no limit.
`{% generation %} … {% endgeneration %}` marks what the assistant says.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilora.errors import DataError, FormatError
from minilora.models.hub import reason_of
from minilora.models.prompts import REASONING

Message = Mapping[str, Any]
Tools = Sequence[Any] | None
TEMPLATE_LIMIT = 64_000  # characters of a template
TEXT_LIMIT = 10_000_000  # characters of what a template, a macro or a block writes, and of a repeated text
NUMBER_LIMIT = 2**64  # of numbers that are multiplied
BEGIN, END = "\ufdd0", "\ufdd1"  # Unicode noncharacters: no text may hold them, so they can mark spans
PROBE = "\ufdd6"
IS_MARKED = "is marked"  # a variable that no template can name
DEFAULTS = "{#- as in the training, where nothing else is asked for -#}"  # begins a line


class ChatTemplate:
    """One chat template: Jinja, which may name special tokens, and writes `now` as the date, by default today's."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], now: datetime | None = None):
        if len(source) > TEMPLATE_LIMIT:
            raise FormatError(f"chat template: {len(source)} characters; at most {TEMPLATE_LIMIT} are accepted")
        self.source = source
        self._special_tokens = dict(special_tokens)
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        sandbox.filters["tojson"] = _to_json
        sandbox.globals["raise_exception"] = _raise
        sandbox.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
        try:
            self._template = sandbox.from_string(source)
        except Exception as error:  # also Python's compiler has limits
            raise FormatError(f"chat template: {reason_of(error)}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any) -> str:
        """Return the conversation as text; the variables, such as `tools`, have transformers' names."""
        given: dict[str, Any] = {"messages": _normalized(messages), "tools": None, "documents": None}
        given |= {"add_generation_prompt": add_generation_prompt}
        given |= {name: value for name, value in variables.items() if value is not None}
        try:
            return self._template.render(self._special_tokens | given)
        except Exception as error:  # a template's code can raise anything
            raise DataError(f"chat template: {reason_of(error)}") from error

    def render_spans(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation as text, and the spans [begin, end) of the template's `generation` blocks."""
        expected = self.render(messages, **variables)
        if "endgeneration" not in self.source:
            return expected, []
        marked = self.render(messages, **variables, **{IS_MARKED: True})
        pieces = re.split(f"{BEGIN}([^{BEGIN}{END}]*){END}", marked)
        if "".join(pieces) != expected or BEGIN in expected or END in expected:
            raise DataError(
                "chat template: it nests generation blocks, or changes the text of one before it writes it, so what "
                "the assistant says cannot be found"
            )
        ends = itertools.accumulate(map(len, pieces))  # every other piece is a block
        return expected, [(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)][1::2]

    def with_defaults(self, system: str | None, thinking: bool | None) -> str:
        """Return the source with a first line that gives this system prompt and this way of asking where none is given.

        The line is for other programs. minilora gives both itself, and removes the line when it reads the template.
        """
        added = ""
        if system:
            opening = json.dumps([{"role": "system", "content": system}], ensure_ascii=False)
            is_missing = 'not messages or messages[0]["role"] not in ["system", "developer"]'
            added += f"{{%- if {is_missing} -%}}{{%- set messages = {opening} + messages -%}}{{%- endif %}}"
        if thinking is not None:
            set_way = f"{{%- set enable_thinking = {str(thinking).lower()} -%}}"
            added += f"{{%- if enable_thinking is not defined -%}}{set_way}{{%- endif %}}"
        is_added = added or self.source.startswith(DEFAULTS)  # so that only the added line is left out
        return f"{DEFAULTS}{added}\n{self.source}" if is_added else self.source

    @functools.cached_property
    def always_asks(self) -> bool:
        """Whether the template asks for another answer after each one, also where no generation prompt is wanted."""
        answered = self._probe("user", "assistant")
        asked = self._probe("user", "assistant", add_generation_prompt=True)
        followed = self._probe("user", "assistant", "user")
        return answered == asked and followed != "" and not followed.startswith(answered)

    @functools.cached_property
    def has_thinking(self) -> bool:
        """Whether the template asks in one way for an answer with thoughts, and in another for one without."""
        asked = [self._probe("user", add_generation_prompt=True, enable_thinking=way) for way in (True, False)]
        return asked[0] != asked[1]

    @functools.cached_property
    def turn_end(self) -> str:
        """What the template writes after an answer, without white space before it."""
        return self._probe("user", "assistant").rpartition(PROBE)[2].lstrip()

    def _probe(self, *roles: str, **variables: bool) -> str:
        """Return the text of some messages, after a system prompt if the template demands one; "" if it refuses."""
        messages = [{"role": role, "content": PROBE} for role in roles]
        for before in ([], [{"role": "system", "content": "a"}]):
            with suppress(DataError):
                return self.render([*before, *messages], **variables)
        return ""


def _normalized(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Drop keys without a value, join parts of text, and store reasoning under all names that templates use."""
    if not messages:
        raise DataError("a conversation needs at least one message")
    normalized = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise DataError(f"a message must be an object with role and content, found {type(message).__name__}")
        kept = {key: value for key, value in message.items() if value is not None}
        parts = kept.get("content")
        if isinstance(parts, list) and all(isinstance(part, Mapping) and "text" in part for part in parts):
            kept["content"] = "".join(str(part["text"]) for part in parts)
        reasoning = next((kept[key] for key in REASONING if key in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        normalized.append(kept)
    return normalized


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox without powers, and with limits on products and on the length of what is written."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str) and isinstance(right, int):
            is_small = len(left) * right <= TEXT_LIMIT
        else:
            is_small = all(isinstance(x, int | float) and abs(x) <= NUMBER_LIMIT for x in (left, right))
        if operator == "**" or not is_small:
            raise SecurityError(f"{operator} of these values is not allowed in a template")
        return super().call_binop(context, operator, left, right)

    def concat(self, pieces: Iterable[str]) -> str:  # of a template, a macro or a block
        written, length = [], 0
        for piece in pieces:
            written.append(piece)
            length += len(piece)
            if length > TEXT_LIMIT:
                raise SecurityError(f"it writes more than {TEXT_LIMIT} characters")
        return "".join(written)


class _Generation(Extension):
    """The tag `generation`, which puts its body between marks if those are asked for."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads a class attribute

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _marked(self, context: jinja2.runtime.Context, caller: jinja2.runtime.Macro) -> str:
        return BEGIN + caller() + END if context.get(IS_MARKED) else caller()


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return plain JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
