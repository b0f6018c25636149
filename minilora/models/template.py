"""Chat templates: a conversation becomes text, as transformers 5 renders it.

A template is code from a model's author, so it runs in a `Sandbox`, with limits on its size, its work and its output.
`{% generation %} … {% endgeneration %}` marks what the assistant says.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
from collections.abc import Iterable, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilora.errors import DataError, FormatError
from minilora.models.prompts import REASONING

Message = Mapping[str, Any]
Tools = Sequence[Any] | None
TEMPLATE_LIMIT = 64_000  # characters of a template
OUTPUT_LIMIT = 8_000_000  # characters that it may write
FORMAT_LIMIT = 256  # characters of strftime_now's format
BEGIN, END = "\ufdd0", "\ufdd1"  # Unicode noncharacters: no text may hold them, so they can mark spans
PROBE = "\ufdd6"
LIMIT, LIMIT_PER_CHARACTER = 20_000_000, 2000  # cost of a rendering: in all, and more for each character it is given
NODE = 40  # cost of a node of syntax, each time that the loop or macro around it runs
# as large as a number in a text says, many times their input, or not the same twice
REFUSED = ("**", "format", "format_map", "urlencode", "random")
IS_MARKED = "is marked"  # a variable that no template can name


class ChatTemplate:
    """One chat template.

    Args:
        source: the Jinja text.
        special_tokens: `bos_token`, `eos_token`, … as the template may name them.
        now: what a template that writes the date takes for it; by default, the time of rendering.

    Raises:
        FormatError: the text is too long, or not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], now: datetime | None = None):
        if len(source) > TEMPLATE_LIMIT:
            raise FormatError(f"chat template: {len(source)} characters; at most {TEMPLATE_LIMIT} are accepted")
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._sandbox = _environment(now)
        try:
            tree = self._sandbox.parse(source)
            self._hides_generation = _hides_generation(tree)
            self._template = self._sandbox.from_string(_metered(tree))
        except Exception as error:  # also Python's compiler has limits
            raise FormatError(f"chat template: {_reason(error)}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None) -> str:
        """Return the conversation as text."""
        return self._run(self.adapt(messages), add_generation_prompt, tools, is_marked=False)

    def render_spans(self, messages: Sequence[Message], tools: Tools = None) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation as text, and the spans [begin, end) of the template's outermost `generation` blocks.

        Raises:
            DataError: as for `render`; or a `generation` block stands where the template could change its text.
        """
        if self._hides_generation:
            raise DataError(
                "chat template: a generation block stands in a macro, a set, filter or call block, a named block or a "
                "recursive loop, so what the assistant says cannot be found in the text"
            )
        if re.search(f"[{BEGIN}{END}]", json.dumps([messages, tools], ensure_ascii=False, default=str)):
            raise DataError("a message or a tool holds U+FDD0 or U+FDD1, which are not characters")
        marked = self._run(self.adapt(messages), False, tools, is_marked=True)
        text, spans = "", []
        depth = begin = 0
        for piece in re.split(f"([{BEGIN}{END}])", marked):
            if piece == BEGIN:
                if depth == 0:
                    begin = len(text)
                depth += 1
            elif piece == END:
                depth -= 1
                if depth == 0:
                    spans.append((begin, len(text)))
            else:
                text += piece
        return text, spans

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with each content as text, or as a list of parts for a template that takes no text."""
        return [self._adapt(message) if isinstance(message, Mapping) else message for message in messages]

    def _adapt(self, message: Message) -> Message:
        content = message.get("content")
        if isinstance(content, str) and not self._takes_text:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and self._takes_text:
            texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            if all(isinstance(text, str) for text in texts):
                return {**message, "content": "".join(map(str, texts))}
        return message

    @functools.cached_property
    def _takes_text(self) -> bool:
        """Whether the template writes a content that is text; those of models that see may take parts alone."""

        def is_written(content: Any) -> bool:
            try:
                return PROBE in self._run([{"role": "user", "content": content}], False, None, is_marked=False)
            except DataError:
                return False

        return is_written(PROBE) or not is_written([{"type": "text", "text": PROBE}])

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools, is_marked: bool) -> str:
        given = {"messages": _normalized(messages), "tools": tools, "documents": None}
        options = {"add_generation_prompt": add_generation_prompt, IS_MARKED: is_marked}
        written, size = [], 0
        try:
            self._sandbox.start(given)
            for piece in self._template.generate(self._special_tokens | given | options):
                written.append(piece)
                size += len(piece)
                if size > OUTPUT_LIMIT:
                    _raise(f"wrote more than {OUTPUT_LIMIT} characters")
        except Exception as error:  # a template's code can raise anything
            raise DataError(f"chat template: {_reason(error)}") from error
        return "".join(written)


def _normalized(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Drop keys without a value, and store reasoning under all names that templates use, as transformers does."""
    if not messages:
        raise DataError("a conversation needs at least one message")
    normalized = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise DataError(f"a message must be an object with role and content, found {type(message).__name__}")
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in REASONING if key in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        normalized.append(kept)
    return normalized


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


def _hides_generation(tree: nodes.Template) -> bool:
    """Return whether the text of a generation block can be changed before it is written."""
    values = (nodes.Macro, nodes.AssignBlock, nodes.FilterBlock, nodes.CallBlock, nodes.Block, nodes.For)
    return any(
        _is_generation(inner)
        for outer in tree.find_all(values)
        if not _is_generation(outer) and not (isinstance(outer, nodes.For) and not outer.recursive)
        for inner in outer.find_all(nodes.CallBlock)
    )


def _is_generation(node: nodes.Node) -> bool:
    return isinstance(node, nodes.CallBlock) and isinstance(node.call.node, nodes.ExtensionAttribute)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, with a limit on what a rendering costs, which depends on no clock.

    A turn of a loop costs the size of its body. An operation costs the product of its two largest operands, before it
    runs, and then the size of its result.
    """

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self, filters: dict[str, Any], functions: dict[str, Any], **options: Any):
        super().__init__(**options)
        self._rendering = threading.local()  # empty while jinja2 compiles, which cannot compute constants then
        filters = self.filters | filters | {"_turn": lambda value, cost: value}
        self.filters = {name: self._charged(name, function) for name, function in filters.items()}
        self.globals |= functions
        del self.globals["lipsum"]

    def start(self, given: Any) -> None:  # a rendering, in this thread
        self._rendering.left = LIMIT + LIMIT_PER_CHARACTER * len(str(given))

    def _charge(self, name: str, *operands: Any) -> None:
        if name in REFUSED:
            raise SecurityError(f"{name} is not allowed in a template")
        self._rendering.left -= math.prod(sorted(map(_size, operands))[-2:])
        if not self._rendering.left >= 0:
            raise SecurityError("it takes more work or memory than a rendering may")

    def _charged(self, name: str, function: Any) -> Any:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja2's own context comes first

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self._charge(name, *args[skipped:], *kwargs.values())
            result = function(*args, **kwargs)
            self._charge("", result)
            return result

        return charged

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        operands = [] if owner is None else [owner, *args, *kwargs.values()]  # the body of a macro is charged by itself
        self._charge(getattr(function, "__name__", ""), *operands)
        result = super().call(context, function, *args, **kwargs)
        self._charge("", result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" or isinstance(left, Sized):
            name = "format" if operator == "%" and not isinstance(left, int | float) else operator
            self._charge(name, left, right)
        return super().call_binop(context, operator, left, right)

    def concat(self, pieces: Iterable[str]) -> str:  # what a macro or a block has written
        return str(self._charged("", "".join)(list(pieces)))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # dict.update would change its argument
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)


def _size(value: Any) -> float:
    """Return a number's absolute value, or how many characters or elements a value has, with their text; 1 at least."""
    if isinstance(value, list | tuple | dict):
        held = value.values() if isinstance(value, dict) else value
        return 1 + len(value) + sum(len(each) for each in held if isinstance(each, str))
    if isinstance(value, int | float):
        return max(1, abs(value))
    return max(1, len(value)) if isinstance(value, Sized) else 1


def _metered(tree: nodes.Template) -> nodes.Template:
    """Charge for each turn of a loop or macro; `~` becomes the filter `join`, which is charged as all filters are."""
    node: Any
    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
        cost = [nodes.Const(NODE * len([*node.find_all(nodes.Node)]))]
        turn = nodes.Filter(nodes.Const(None), "_turn", cost, [], None, None)
        node.body.insert(0, nodes.ExprStmt(turn).set_lineno(node.lineno))
        if isinstance(node, nodes.For) and node.test:
            node.test = nodes.Filter(node.test, "_turn", cost, [], None, None)
    for node in [*tree.find_all(nodes.Concat)]:
        node.nodes = [nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None)]
    return tree


def _environment(now: datetime | None) -> Sandbox:
    def strftime_now(form: str) -> str:
        if len(form) > FORMAT_LIMIT:
            raise ValueError(f"strftime_now: a format of {len(form)} characters; at most {FORMAT_LIMIT} are accepted")
        return (now or datetime.now()).strftime(form)

    functions = {"raise_exception": _raise, "strftime_now": strftime_now}
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [_Generation, loopcontrols]}
    return Sandbox({"tojson": _to_json}, functions, **options)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return plain JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
