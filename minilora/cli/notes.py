"""What is unusual about a base and its adapters, or about a run: notes that commands print before they work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.adapters.attach import describe_base
from minilora.adapters.layout import base_model_of, base_quantization
from minilora.cli import describe_skipped
from minilora.llama import Llama
from minilora.models.bitsandbytes import describe_in_words
from minilora.models.config import trained_length
from minilora.models.hub import Location, unpinned
from minilora.runs import world
from minilora.runs.dataset import Dataset, repeated_prompts

if TYPE_CHECKING:  # of finetune alone
    from minilora.runs.directory import Run

FEW_ROWS = 10


def base_notes(base: Location, adapters: Sequence[Path], quantization: Mapping[str, Any]) -> Iterator[str]:
    """Yield how the base is quantized, by `describe_base`, and which adapters were trained on another base."""
    if quantization["quantize"] != "none":
        yield f"the base model is {describe_in_words(quantization)}"
    for path in adapters:
        recorded = base_model_of(path)
        if recorded and not _is_named(base, recorded):
            yield f"{path}: was trained on the model {recorded!r:.200}; this one is {base.name!r}"
        trained = base_quantization(path) or {}
        if any(quantization.get(key) != value for key, value in trained.items()):
            words = describe_in_words(trained)
            yield f"{path}: was trained on a base that is {words}; this one is {describe_in_words(quantization)}"


def _is_named(base: Location, recorded: str) -> bool:
    """Return whether a name that an adapter records means this model: a branch or no revision means any commit."""
    repository, commit = unpinned(base.name)
    is_any_commit = commit is not None and unpinned(recorded)[1] is None
    return (
        recorded == base.name
        or Path(recorded).resolve() == base.path.resolve()
        or (is_any_commit and recorded.partition("@")[0] == repository)
    )


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
