"""Chat templates: a conversation becomes text, as transformers 5 renders it.

A template is code from a model's author, so it runs in jinja2's immutable sandbox, with limits on its size, on what it
writes and on repeating strings. `{% generation %} … {% endgeneration %}` marks what the assistant says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilora.errors import DataError, FormatError

Message = Mapping[str, Any]
TEMPLATE_LIMIT = 256_000  # characters of a template
OUTPUT_LIMIT = 8_000_000  # characters that it may write
BEGIN, END = "\ufdd0", "\ufdd1"  # Unicode noncharacters: no text may hold them, so they can mark spans
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that a message's reasoning is passed under
MISTAKES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)  # that a template's code can make
EXHAUSTED = (RecursionError, MemoryError, SyntaxError)  # SyntaxError: nested deeper than Python compiles


class ChatTemplate:
    """One chat template.

    Args:
        source: the Jinja text.
        special_tokens: `bos_token`, `eos_token`, … as the template may name them.

    Raises:
        FormatError: the text is too long, or not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        if len(source) > TEMPLATE_LIMIT:
            raise FormatError(f"chat template: {len(source)} characters; at most {TEMPLATE_LIMIT} are accepted")
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, *EXHAUSTED) as error:
            raise FormatError(f"chat template: {_reason(error)}") from error

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as text.

        Raises:
            DataError: there are no messages, or the template refuses them.
        """
        return self.render_spans(messages, add_generation_prompt, tools)[0]

    def render_spans(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where the template's `generation` blocks lie in it."""
        normalized = _normalized(messages)
        if any(mark in json.dumps([normalized, tools], ensure_ascii=False, default=str) for mark in (BEGIN, END)):
            raise DataError("a message or a tool holds U+FDD0 or U+FDD1, which are not characters")
        pieces = self._run(normalized, add_generation_prompt, tools)
        text, spans, begin = "", [], 0
        for i, piece in enumerate(pieces.replace(END, BEGIN).split(BEGIN)):
            begin, text = len(text), text + piece
            if i % 2:  # pieces alternate: outside, inside, outside, …
                spans.append((begin, len(text)))
        return text, spans

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Sequence[Any] | None) -> str:
        written, size = [], 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                written.append(piece)
                size += len(piece)
                if size > OUTPUT_LIMIT:
                    _raise(f"wrote more than {OUTPUT_LIMIT} characters")
        except (jinja2.TemplateError, *MISTAKES, *EXHAUSTED) as error:
            raise DataError(f"chat template: {_reason(error)}") from error
        return "".join(written)


def _normalized(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What transformers does first: keys without a value are dropped, reasoning gets all the names it goes by."""
    if not messages:
        raise DataError("a conversation needs at least one message")
    normalized = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise DataError(f"a message must be an object with role and content, found {type(message).__name__}")
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in REASONING if key in kept), None)
        normalized.append(
            kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        )
    return normalized


class _Generation(Extension):
    """The `generation` tag: its body, between marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads a class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: jinja2.runtime.Macro) -> str:
        return BEGIN + caller() + END


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox limits `range`; this one also limits what `*` and `**` can make of little."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, str | list | tuple) else abs(side) for side in (left, right)]
        if sizes[0] * sizes[1] > OUTPUT_LIMIT or (operator == "**" and max(sizes) > 1000):
            raise jinja2.exceptions.SecurityError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that begin with an underscore: those lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any):  # jinja2's own signature, so that namespace(self=…) works
        for name in dict(*args[1:], **kwargs):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class _Dict:
    """`dict(…)` and `dict.fromkeys(…)`, and no way from there to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
