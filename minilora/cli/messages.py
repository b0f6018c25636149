"""What commands say: what is unusual about a base and its adapters; what a run begins with, and what it has changed."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.adapters.attach import count_parameters
from minilora.adapters.layout import base_model_of, base_quantization
from minilora.cli import say
from minilora.data import Example
from minilora.errors import printable
from minilora.files import MANIFEST, changed_files, read_manifest
from minilora.llama import Llama
from minilora.models.bitsandbytes import describe_in_words, describe_quantization
from minilora.models.config import describe_other_parts, trained_length
from minilora.models.hub import Location, unpinned
from minilora.models.prompts import read_prompts
from minilora.models.tokenizer import Tokenizer
from minilora.runs.evaluate import prompt_of

if TYPE_CHECKING:  # only `finetune` imports it
    from minilora.runs.directory import Run, RunSummary
    from minilora.runs.loop import TrainResult

SHOWN = 3  # answers to held-out rows
SHOWN_CHARACTERS = 1000  # of one answer


def base_notes(base: Location, adapters: Sequence[Path], quantization: Mapping[str, Any]) -> Iterator[str]:
    """Yield what has changed in files, how the base is quantized, and which adapters were trained on another base.

    `quantization` is that of `describe_quantization`, or empty where it does not matter.
    """
    yield from changed_notes([base.path, *adapters])
    if quantization.get("quantize", "none") != "none":
        yield f"the base model is {describe_in_words(quantization)}"
    for path in adapters:
        recorded = base_model_of(path)
        if recorded and not _is_named(base, recorded):
            yield f"{path}: was trained on the model {recorded!r:.200}; this one is {base.name!r}"
        trained = base_quantization(path) or {}
        if quantization and any(quantization.get(key) != value for key, value in trained.items()):
            words = describe_in_words(trained)
            yield f"{path}: was trained on a base that is {words}; this one is {describe_in_words(quantization)}"


def changed_notes(directories: Iterable[Path]) -> Iterator[str]:
    """Yield which files changed since minilora wrote them, except weights, the card and the Modelfile."""
    exempt = (".safetensors", "README.md", "Modelfile")  # `inspect` finds changed weights; the others are the user's
    for directory in directories:
        if (directory / MANIFEST).is_file():
            there = [name for name in read_manifest(directory) if (directory / name).is_file()]
            if changed := changed_files(directory, [name for name in there if not name.endswith(exempt)]):
                yield f"{directory}: changed since it was written: {', '.join(changed)}"


def say_prompts(directory: Path) -> None:
    """Say what programs that use another chat template need to ask as in the training."""
    prompts, elsewhere = read_prompts(directory), "a program that does not use its chat template"
    if prompts.thinking is not None:
        say(f"{elsewhere} needs enable_thinking={prompts.thinking}, as in the training")
    if prompts.system:
        message = json.dumps({"role": "system", "content": prompts.system}, ensure_ascii=False)
        say(f"{elsewhere} needs the system prompt of the training: messages start with {message}")


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
    yield from base_notes(run.base.location, run.base.adapters, describe_quantization(model))
    if not data.test:
        yield "no row is held out, so there is no held-out loss: give more rows, --eval-split or --eval-data"
    longest, limit = max(len(example.tokens) for example in data.train), trained_length(model.config)
    if longest > limit:
        yield f"the longest row has {longest} tokens, and the model was trained on at most {limit}: see --max-length"
    if data.tokenizer.template and not data.train.conversations:
        yield (
            "the training rows are plain text, so the model's chat template is not used; to use it, name "
            "their columns: --columns instruction=FIELD,output=FIELD"
        )
    for name, rows in data.splits.items():
        if rows is not data.train and (repeated := repeated_prompts(rows, data.train, data.tokenizer)):
            same = "the prompt of a training row, or one that differs in case and spaces only"
            yield f"{repeated} of {len(rows)} {name} rows have {same}: they are not new to the model"
        if rows.truncated:
            yield f"{rows.truncated} {name} rows were cut to --max-length; left without a label: {rows.unlabelled}"
        if rows.dropped_thoughts:
            yield f"{rows.dropped_thoughts} {name} rows have thoughts in earlier answers, which the template leaves out"
        if rows.quoted:
            yield f"{rows.quoted} {name} rows have control tokens in their text; they act only with --allow-special"
        if rows.bad:
            yield describe_skipped(f"{name} ", rows.bad)


def repeated_prompts(held_out: Sequence[Example], training: Sequence[Example], tokenizer: Tokenizer) -> int:
    """Return the number of held-out rows that begin with the prompt of a training row, or equal one that has none.

    Case and white space are ignored. A prompt has more than one token, which may be BOS.
    """

    def text_of(row: Example) -> str:
        prompt = prompt_of(row)
        text = tokenizer.decode(prompt if len(prompt) > 1 else row.tokens, skip_special_tokens=False)
        return "".join(text.casefold().split())

    texts = list(map(text_of, held_out))
    repeated = {*texts}.intersection(map(text_of, training))
    return sum(text in repeated for text in texts)


def say_start(run: Run, model: Llama) -> None:
    """Say what the run begins with."""
    weight = model.model.embed_tokens.weight
    count = count_parameters(model)
    data = run.data
    training = run.plan.training
    say(
        f"{count.trainable:,} of {count.total:,} parameters are trained ({count.trainable / count.total:.2%})\n"
        f"{counted(len(data.train), 'row')} to learn from, {len(data.test):,} held out; "
        f"batches of {training.batch_size}, learning rate {training.learning_rate:g}\n"
        f"{weight.dtype} on {weight.device}".replace("torch.", "")
    )
    if parts := describe_other_parts(run.base.location.path):
        say(f"only the text model is read and trained, not {parts}")
    for note in run_notes(run, model):
        say(note)
    for problem in run.history.damaged:
        say(f"skipped a damaged checkpoint: {problem}")
    if run.history.step:
        say(f"resuming from step {run.history.step}")
    elif run.history.starts:
        say("starting again at step 0: there is no checkpoint to resume from")


def report(run: Run, result: TrainResult, summary: RunSummary, answers: Sequence[Mapping[str, Any]]) -> None:
    """Print what the run has changed, as a table, and show the first answers to held-out rows."""
    forgetting = summary.general
    if result.kept != result.steps:
        say(f"the adapter of step {result.kept} had the lowest loss of all evaluations and is the one kept")
    has_accuracy = summary.after.accuracy is not None
    lines = [f"{'':<10}{'held-out loss':>15}" + (f"{'accuracy':>12}" if has_accuracy else "")]
    for name, scores in {"base": summary.before, "start": summary.start, "adapter": summary.after}.items():
        if scores is None:
            continue
        loss = "-" if scores.loss is None else f"{scores.loss:.4f}"
        lines.append(f"{name:<10}{loss:>15}" + ("" if scores.accuracy is None else f"{scores.accuracy:>12.4f}"))
    if forgetting:
        share = math.exp(-forgetting.kl)  # exp E[log q/p] with tokens of p, a geometric mean
        loss = f"loss {forgetting.before:.4f} -> {forgetting.after:.4f}"
        lines.append(f"general text: {loss}, KL to the base {forgetting.kl:.4f}")
        if share <= 0.95:  # else the factor says nothing
            lines.append(
                f"  (KL: a token drawn from the base is {share:.2g} times as likely as before, a geometric mean)"
            )
    lines.append(f"{counted(result.steps, 'step')}, {result.tokens:,} tokens, {result.seconds:.1f} s")
    print("\n".join(lines), flush=True)
    width = shutil.get_terminal_size().columns
    for row in answers[: min(SHOWN, run.settings.run.samples)]:
        say(shorten(str(row["prompt"]), width, keeps_end=True))
        for name, key in (("wanted", "wanted"), ("base", "base"), ("adapter", "text")):
            title, text = f"  {name:<8}-> ", shorten(str(row[key]), SHOWN_CHARACTERS)
            say(textwrap.fill(text, width, initial_indent=title, subsequent_indent=" " * len(title)) or title)
    print(f"adapter written to {run.settings.run.out}", flush=True)
    out = shlex.quote(str(Path(run.settings.run.out)))
    say(f"next:\n  minilora generate --adapter {out} --prompt TEXT --compare-base")
    say(f"  minilora merge --adapter {out} --out {out}-merged")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def describe_skipped(kind: str, bad: Sequence[str]) -> str:
    """Return a message with the number of rows of a kind that were skipped, and the reasons for the first five."""
    return "\n  ".join((f"skipped {counted(len(bad), f'{kind}row')} that cannot be used:", *bad[:5]))


def shorten(text: str, most: int, keeps_end: bool = False) -> str:
    """Return a text in one line of at most that many characters: its beginning, or its end."""
    text = printable(" ".join(text.split()))
    if len(text) <= most:
        return text
    return "…" + text[1 - most :] if keeps_end else text[: most - 1] + "…"
