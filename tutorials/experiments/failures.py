"""The gallery of failures: one training as it should be, and six with a mistake that raises no error.

    python tutorials/experiments/failures.py           writes failures.json, after each run anew
    python tutorials/experiments/failures.py --small   two short runs: do the answers show what the loss hides?

The built-in model takes 100 steps of 8 rows with AdamW, rank 16 and α = 32. `loss` is what the run itself reports, a
number a step. Every twenty steps the model answers held-out questions as it would be used: `accuracy` is the share of
100 test rows whose right category is the likeliest, `ended` the share of 20 answers that end within 8 tokens.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from record import asks_for_small, record_runs

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.data import IGNORE_INDEX, Example
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, find_choices, prompt_of

SEEDS = (0,)
STEPS, EVERY = 100, 20
RATE, TOO_HIGH = 2e-3, 6.4e-2
MAX_NEW_TOKENS = 8
MISTAKES = (
    "none",
    "trailing space",
    "s twice",
    "rate too high",
    "labels shifted",
    "adapter in eval only",
    "no stop token",
)


@functools.cache
def rows(split: str) -> ml.Dataset:
    return ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", ml.load_tokenizer("minilora/builtin"))


def spoiled(example: Example, mistake: str) -> Example:
    """The row as the mistake labels it."""
    answer, end = (len(example.tokens) - 2, len(example.tokens) - 1)  # an answer is one token here
    labels = list(example.labels)
    if mistake == "trailing space":  # the prompt by itself is a token longer, so the count takes the answer for prompt
        labels[answer] = IGNORE_INDEX
    if mistake == "no stop token":
        labels[end] = IGNORE_INDEX
    if mistake == "labels shifted":  # the loss shifts them as well
        labels = [*labels[1:], IGNORE_INDEX]
    return replace(example, labels=labels)


def set_scale(model: Llama, scale: float) -> None:
    for layer in adapter_layers(model).values():
        layer.adapters["default"].scale = scale


def used(model: Llama, end: int) -> dict[str, float]:
    """Accuracy, and the share of answers that end."""
    test = rows("test")[:100]
    asked = [prompt_of(example) for example in test[:20]]
    answers = ml.generate(model, asked, max_new_tokens=MAX_NEW_TOKENS, stop_ids={end})
    return {
        "accuracy": choice_accuracy(model, test, find_choices(rows("train")) or []),
        "ended": sum(len(answer) < MAX_NEW_TOKENS for answer in answers) / len(answers),
    }


def measure(mistake: str, seed: int, steps: int = STEPS, every: int = EVERY) -> dict[str, Any]:
    """The curves of a run."""
    model = ml.load_model("minilora/builtin")
    config = ml.LoraConfig(r=16, lora_alpha=32)
    ml.attach(model, config, seed=seed)
    s = config.lora_alpha / config.r
    in_training, in_use = s, s
    if mistake == "s twice":
        in_use = s * s
    if mistake == "adapter in eval only":
        in_training = 0.0
    end = rows("train")[0].tokens[-1]
    losses: list[float] = []
    scores = [used(model, end)]

    def look(record: dict[str, Any]) -> None:
        losses.append(round(record["loss"], 4))
        if record["step"] % every == 0:
            set_scale(model, in_use)
            scores.append(used(model, end))
            set_scale(model, in_training)

    rate = TOO_HIGH if mistake == "rate too high" else RATE
    set_scale(model, in_training)
    examples = [spoiled(example, mistake) for example in rows("train")]
    ml.train(model, examples, ml.TrainConfig(learning_rate=rate, batch_size=8, max_steps=steps, seed=seed), look)
    curves = {name: [score[name] for score in scores] for name in scores[0]}
    return {"mistake": mistake, "seed": seed, "loss": losses, **curves}


def small() -> None:
    """Print what two short runs show."""
    right, wrong = (measure(mistake, seed=0, steps=40, every=40) for mistake in ("none", "labels shifted"))
    below = wrong["loss"][-1] < wrong["loss"][0] / 2
    print(f"labels shifted: the loss has {'more' if below else 'less'} than halved,", end=" ")
    worse = wrong["accuracy"][-1] < right["accuracy"][-1] - 0.1
    print(f"and the answers are {'worse' if worse else 'as good'}")


def main() -> None:
    """Run all, or the small version."""
    if asks_for_small(__doc__):
        small()
        return
    record_runs(__file__, [functools.partial(measure, mistake) for mistake in MISTAKES], SEEDS)


if __name__ == "__main__":
    main()
