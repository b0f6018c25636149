"""What is unusual about a run: notes that finetune prints before it trains."""

from __future__ import annotations

from collections.abc import Iterator

from minilora.adapters.attach import describe_base
from minilora.cli import describe_skipped
from minilora.cli.load import base_notes
from minilora.llama import Llama
from minilora.models.config import trained_length
from minilora.runs import world
from minilora.runs.dataset import Dataset, repeated_prompts
from minilora.runs.directory import Run

FEW_ROWS = 10


def run_notes(run: Run, model: Llama) -> Iterator[str]:
    """Yield how the base is quantized, and what is unusual about the rows."""
    data = run.data
    yield from base_notes(run.base.location, run.base.adapters, describe_base(model))
    longest, limit = data.train.lengths.max(), trained_length(model.config)
    if longest > limit:
        yield f"the longest row has {longest} tokens, and the model was made for {limit}: see --max-length"
    if data.tokenizer.template and not data.train.conversations:
        yield (
            "the training rows are plain text, for which the model's chat template is not used; write them as "
            "`messages` to use it"
        )
    if 0 < len(data.test) < FEW_ROWS:
        yield (
            f"held-out rows: {len(data.test)}, too few for their loss or accuracy to say much; "
            "--eval-split or --eval-data gives more"
        )
    if data.train.touching > len(data.train) / 2:
        yield (
            f"{data.train.touching} training rows have no white space between prompt and completion; "
            "end the prompts, or begin the completions, with a space or a line end"
        )
    if run.plan.training.gradient_accumulation_steps < world.size():
        yield (
            "some processes have nothing to do: a larger --gradient-accumulation-steps, with a smaller --batch-size, "
            "gives each its part"
        )
    for name, rows in data.splits.items():
        yield from _row_notes(name, rows, data.train)


def _row_notes(name: str, rows: Dataset, training: Dataset) -> Iterator[str]:
    """Yield how many rows of a split were cut, quote control tokens, were skipped, or are asked what is trained on."""
    if rows is not training and (repeated := repeated_prompts(rows, training)):
        yield f"{repeated} of {len(rows)} {name} rows have the prompt of a training row: they are not new to the model"
    if rows.truncated:
        yield f"{rows.truncated} {name} rows were cut to --max-length; {rows.unlabelled} of them had no label left"
    if rows.quoted:
        yield (
            f"{rows.quoted} {name} rows have control tokens in their text, which are taken as plain text; "
            "--allow-special makes them act"
        )
    if rows.bad:
        yield describe_skipped(f"{name} ", rows.bad)
