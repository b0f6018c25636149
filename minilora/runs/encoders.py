"""Tokenize rows, and label the tokens that are trained on; tokenize what a row asks.

Targets are spans of characters, which the tokenizer's offsets map to tokens. Counting the tokens of the prompt would
be wrong where one token has the end of the prompt and the beginning of the answer. Only a conversation is cut
there, because it is always asked for its answer with the same tokens.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from minilora.data import Example, Span, label_completion, label_tokens
from minilora.errors import ConfigError, DataError
from minilora.files import ASSETS, read_text
from minilora.models.tokenizer import Tokenizer
from minilora.runs.conversations import encode_question, render_conversation
from minilora.runs.formats import Conversation, PromptCompletion, Row, parse_prompt, parse_row, thoughts_of
from minilora.runs.settings import DataConfig

BAD_ROWS = 50_000  # that are skipped and kept with their reasons
SHOWN = 10_000  # rows from one line on the progress to the next


@dataclass(eq=False)
class Dataset(list[Example]):
    """A list of tokenized rows, with counts of what was changed or dropped.

    `truncated` rows were cut to `max_length`; `unlabelled` rows had no label left and were dropped, as were rows that
    cannot be used: `bad` has an error message for each. `conversations` are rows rendered by a chat template;
    in `quoted` ones control tokens are encoded as plain text, and from `dropped_thoughts` the template drops thoughts
    of earlier answers. `system` is the system prompt that all rows have, and `thinking` is whether their answers have
    thoughts (None if they differ). `cut` has the sources of rows that lost labels. A slice is a plain list.
    """

    examples: InitVar[Iterable[Example]]
    cut: set[str] = field(default_factory=set)
    truncated: int = 0
    unlabelled: int = 0
    bad: list[str] = field(default_factory=list, repr=False)
    conversations: int = 0
    quoted: int = 0
    dropped_thoughts: int = 0
    system: str | None = None
    thinking: bool | None = None

    def __post_init__(self, examples: Iterable[Example]) -> None:
        self.extend(examples)


def encode_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, config: DataConfig, show: Callable[[str], None] | None = None
) -> Dataset:
    """Tokenize and label rows, cut them to the maximum length, and drop those without a label.

    Text without a prompt is a document, which is cut into pieces. `show` is called with lines on the progress.
    """
    dataset, systems, thinking_values, first = Dataset(()), set[str | None](), set[bool | None](), ""
    for number, row in enumerate(rows, start=1):
        first = first or row.source
        if show and number % SHOWN == 0:
            show(f"encoding {row.source}")
        try:
            if row.problem:
                raise DataError(row.problem)
            parsed = parse_row(row.fields, config.system)
            whole, is_quoted, drops_thoughts = label_row(parsed, tokenizer, config)
            if not whole.labelled:
                raise DataError("no token of the row can be predicted, so there is nothing to train on")
        except DataError as error:
            dataset.bad.append(f"{row.source}: {error}")
            if not config.skip_bad_rows:
                advice = "" if row.problem and number == 1 else "; skip_bad_rows skips such rows"
                raise DataError(dataset.bad[-1] + advice) from error
            if len(dataset.bad) > BAD_ROWS:
                raise DataError(dataset.bad[-1]) from error
            continue
        dataset.quoted += is_quoted
        dataset.dropped_thoughts += drops_thoughts
        dataset.conversations += isinstance(parsed, Conversation)
        systems.add(parsed.system if isinstance(parsed, Conversation) else None)
        thinking_values.add(parsed.thinking if isinstance(parsed, Conversation) else None)
        is_document = isinstance(parsed, PromptCompletion) and not parsed.prompt
        pieces = _pieces(replace(whole, source=row.source), config.max_length, is_document)
        labelled = [piece for piece in pieces if piece.labelled]
        dataset += labelled
        dataset.truncated += len(pieces) == 1 and len(pieces[0].tokens) < len(whole.tokens)
        dataset.unlabelled += len(pieces) - len(labelled)
        if sum(piece.labelled for piece in labelled) < whole.labelled:
            dataset.cut.add(row.source)
    if dataset.bad and not dataset and not dataset.unlabelled:
        raise DataError(f"{dataset.bad[0]}; no row of {len(dataset.bad)} can be used")
    if not dataset:
        total, limit = dataset.unlabelled + len(dataset.bad), config.max_length
        skipped = f"; {len(dataset.bad)} were skipped, the first: {dataset.bad[0]}" if dataset.bad else ""
        raise DataError(
            f"{first}: no row of {total} has an answer within its first {limit} tokens; raise max_length{skipped}"
        )
    dataset.system = systems.pop() if len(systems) == 1 else None
    if len(thinking_values) == 1 and tokenizer.template and tokenizer.template.has_thinking:
        dataset.thinking = thinking_values.pop()
    return dataset


def _pieces(whole: Example, limit: int, is_document: bool) -> list[Example]:
    """Cut a row to `limit` tokens, or a document into pieces, in which each of its tokens but the first is predicted.

    A piece begins with the last token of the one before.
    """
    step = max(1, limit - 1) if is_document else len(whole.tokens)
    begins = range(0, len(whole.tokens) - 1, step)
    return [Example(whole.tokens[i : i + limit], whole.labels[i : i + limit], whole.source) for i in begins]


def label_row(
    parsed: PromptCompletion | Conversation, tokenizer: Tokenizer, config: DataConfig
) -> tuple[Example, bool, bool]:
    """Tokenize and label a row; return also whether control tokens are quoted, and whether thoughts are left out."""
    if isinstance(parsed, PromptCompletion):  # `label_completion` appends the end token, so one in the text is removed
        closing = tokenizer.special_tokens.get("eos_token", "")
        parsed = replace(parsed, completion=parsed.completion.removesuffix(closing))
    given = parsed
    if not config.allow_special:
        parsed = replace(parsed, **{name: tokenizer.quote(value) for name, value in vars(parsed).items()})
    if isinstance(parsed, PromptCompletion):
        text = parsed.prompt + parsed.completion
        tokens, spans = _encode_open(text, tokenizer) if tokenizer.eos_id is not None else tokenizer.encode_spans(text)
        begin = 0 if config.train_on == "all" else len(parsed.prompt)
        return label_completion(tokens, spans, (begin, len(text)), tokenizer.eos_id), parsed != given, False
    text, learned = render_conversation(parsed, tokenizer, config.train_on)
    answers = (message for message in parsed.messages if message["role"] == "assistant")
    drops_thoughts = any(thoughts_of(answer) not in text for answer in answers)
    return _encode_conversation(text, learned, tokenizer), parsed != given, drops_thoughts


def _encode_conversation(text: str, learned: Sequence[Span], tokenizer: Tokenizer) -> Example:
    """Tokenize a conversation, as one text where the tokens before an answer are then those that ask for it."""
    tokens, spans = tokenizer.encode_spans(text, add_special_tokens=False)
    questions = {begin: tokenizer.encode(text[:begin], add_special_tokens=False) for begin, _ in learned}
    if cuts := [begin for begin, asked in questions.items() if tokens[: len(asked)] != asked]:
        tokens, spans = [], []
        for begin, end in pairwise([0, *cuts, len(text)]):
            part, places = tokenizer.encode_spans(text[begin:end], add_special_tokens=False)
            tokens += part
            spans += [(begin + first, begin + last) for first, last in places]
    return Example(tokens, label_tokens(tokens, spans, learned))


def encode_prompt(
    row: Row, tokenizer: Tokenizer, system: str | None, form: str, thinking: bool | None = None
) -> list[int]:
    """Return the token ids of a row's prompt, the same that training has before the answer.

    The form "template" makes a `prompt` that is text and has no `completion` a user's message, if there is a template;
    "plain" does not; "raw" does not, and control tokens in the text act as such. `system` is the system prompt of
    conversations that have none; for None, the template decides on `thinking`.
    """
    try:
        if row.problem:
            raise DataError(row.problem)
        fields, text = row.fields, row.fields.get("prompt")
        if isinstance(text, str) and form == "template" and tokenizer.template and fields.get("completion") is None:
            fields = {**fields, "prompt": [{"role": "user", "content": text}]}
        parsed = parse_prompt(fields, system)
        if isinstance(parsed, PromptCompletion):
            ids, _ = _encode_open(parsed.prompt if form == "raw" else tokenizer.quote(parsed.prompt), tokenizer)
        elif form == "raw":
            raise DataError("a conversation needs the chat template, which a raw prompt leaves out")
        else:
            ids = encode_question(replace(parsed, thinking=thinking), tokenizer)
        if not ids:
            raise DataError("the prompt is empty")
    except DataError as error:
        raise DataError(f"{row.source}: {error}") from error
    return ids


def _encode_open(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
    """Tokenize a text without the tokens that a tokenizer adds at its end; one token stays."""
    ids, spans = tokenizer.encode_spans(text)
    while len(ids) > 1 and spans[-1][0] == spans[-1][1]:  # it has no characters
        ids.pop()
        spans.pop()
    return ids, spans


def with_prompt_style(tokenizer: Tokenizer, style: str, rows: Iterable[Row] = ()) -> Tokenizer:
    """Return the tokenizer with the chat template of a prompt style.

    "auto" is the tokenizer's own; if it has none and a row has an `instruction`, "alpaca".
    """
    if style == "auto":
        needs_one = tokenizer.template is None and any("instruction" in row.fields for row in rows)
        return with_prompt_style(tokenizer, "alpaca") if needs_one else tokenizer
    if style not in ("alpaca", "instruction"):
        if not style.endswith(".jinja"):
            raise ConfigError(f"prompt_style is {style!r}; accepted are auto, alpaca, instruction, and a .jinja file")
        return tokenizer.with_files({"chat_template.jinja": read_text(Path(style), is_named=True)}, origin=style)
    bos = tokenizer.token_id(tokenizer.special_tokens.get("bos_token"))
    begin = "{{ bos_token }}" if [bos] == tokenizer.encode("a")[:1] else ""  # as the tokenizer begins every text
    if tokenizer.eos_id is not None and tokenizer.token_id(tokenizer.special_tokens.get("eos_token")) is None:
        closing = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
        begin += f"{{% set eos_token = {json.dumps(closing)} %}}"
    if style == "alpaca":
        begin += "{% set preamble = true %}"
    template = begin + read_text(ASSETS / "prompts" / "instruction.jinja")
    return tokenizer.with_files({"chat_template.jinja": template})
