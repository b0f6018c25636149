"""What the base and the result of a run answer to its held-out rows: OUT/held_out.jsonl.

    {"prompt": "…", "completion": "…", "wanted": "…", "base": "…", "base_finish_reason": "length", "text": "…", …}

A line has a row as it was read, its prompt as text, and what `generate --compare-base` adds; `--prompts` takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from minilora.adapter import disable_adapter
from minilora.cli.write import Written, as_fields
from minilora.llama import Llama
from minilora.runs.directory import Run
from minilora.runs.encoders import encode_prompt
from minilora.runs.evaluate import Progress, write_answers
from minilora.runs.formats import Fields, PromptCompletion, Row, parse_row
from minilora.runs.settings import DataConfig

MARGIN = 16  # tokens of an answer beyond twice those of the wanted one


def answer_held_out(run: Run, model: Llama, base: Llama | None, progress: Callable[[str], Progress]) -> list[Fields]:
    """Return each held-out row that has a prompt, with the answer that is wanted and those of base and result.

    `base` is None if it is the model without its adapter. `progress` is called with the name of each pass.
    """
    tokenizer, config = run.data.tokenizer, run.settings.data
    rows, prompts, limits = list[Fields](), list[list[int]](), list[int]()
    for row, labelled in zip(run.data.held_out, run.data.test.labelled.tolist(), strict=False):
        if (wanted := wanted_answer(row, config)) is not None:
            prompts.append(encode_prompt(row, tokenizer, config.system, "plain"))
            limits.append(2 * labelled + MARGIN)
            rows.append({"prompt": tokenizer.decode(prompts[-1]), **row.fields, "wanted": wanted})
    if not rows:
        return []
    for key, asked in (("base", base or model), ("text", model)):
        without_adapter = key == "base" and base is None
        with disable_adapter(model) if without_adapter else nullcontext():
            written = write_answers(asked, tokenizer, prompts, limits, progress(key))
        for fields, tokens, limit in zip(rows, written, limits, strict=True):
            reason = "length" if len(tokens) == limit else "stop"
            fields |= as_fields(key, Written(tokenizer.decode(tokens), reason))
    return rows


def wanted_answer(row: Row, config: DataConfig) -> Any:
    """Return what a row wants as the answer to its prompt: text, or a message; None if nothing is asked in it."""
    parsed = parse_row(row.fields, config)
    if config.train_on == "all":
        return None
    if isinstance(parsed, PromptCompletion):
        return parsed.completion if parsed.prompt else None
    last = parsed.messages[-1]
    return (last.get("content") or last) if last["role"] == "assistant" else None
