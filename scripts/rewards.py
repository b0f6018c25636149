"""The curve of rewards in docs/results.md: recipes/grpo.py teaches the built-in model to answer right, by rewards only.

    python scripts/rewards.py     writes docs/figures/rewards.json and docs/figures/rewards.svg (extra `plot`)

The model first learns from 80 rows with answers, so that it is right now and then. This is the base of GRPO, which sees
the other 1,520 questions. The reward is 1 if a program finds that an answer is the category and ends there, and else 0.
Held-out questions are the first 200 of the test rows, with 8 answers to each. No setting was tuned.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import minilora as ml  # noqa: E402
from minilora.files import ASSETS  # noqa: E402
from recipes.grpo import grpo_loss  # noqa: E402  # the checkout is no installed package

SEEDS = (0, 1, 2)
LABELLED = 80
FILE = ROOT / "docs" / "figures" / "rewards.json"


def questions(split: str, tokenizer: ml.Tokenizer) -> list[dict[str, Any]]:
    """Return the rows of a split as GRPO takes them: the tokens of the prompt, and the answer for the reward."""
    lines = (ASSETS / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [{"prompt": tokenizer.encode(row["prompt"]), "answer": row["completion"]} for row in rows]


def is_right(row: Mapping[str, Any], text: str) -> float:
    return float(text == row["answer"])


def train(seed: int) -> dict[str, Any]:
    """Return the mean reward of each step, and that of the held-out questions before and every ten steps."""
    model, tokenizer = ml.load_model("minilora/builtin", "float32"), ml.load_tokenizer("minilora/builtin")
    labelled = ml.load_dataset(ASSETS / "data" / "train.jsonl", tokenizer)[:LABELLED]
    ml.attach(model, ml.LoraConfig(), seed=seed)
    ml.train(model, labelled, ml.TrainConfig(batch_size=8, learning_rate=2e-3, seed=seed))
    ml.merge(model)

    ml.attach(model, ml.LoraConfig(), seed=seed)
    rows, held_out = questions("train", tokenizer)[LABELLED:], questions("test", tokenizer)[:200]
    loss = partial(grpo_loss, tokenizer=tokenizer, reward=is_right, max_new_tokens=3)
    torch.manual_seed(seed)
    with torch.no_grad():
        total, count = loss(model, held_out)[2]["reward"]
    records: list[Mapping[str, Any]] = []
    config = ml.TrainConfig(batch_size=8, max_steps=100, learning_rate=2e-3, eval_steps=10, seed=seed)
    ml.train(model, rows, config, records.append, held_out, loss=loss)
    evaluations = {record["step"]: round(record["eval_reward"], 4) for record in records if "eval_reward" in record}
    rewards = [round(record["reward"], 4) for record in records if "reward" in record]
    return {"seed": seed, "held_out": {0: round(total / count, 4), **evaluations}, "rewards": rewards}


def write(results: Sequence[Mapping[str, Any]]) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    facts = {"command": "python scripts/rewards.py", "machine": machine, "torch": torch.__version__}
    lines = ",\n".join(map(json.dumps, results))
    FILE.write_text(f'{json.dumps(facts)[:-1]}, "results": [\n{lines}\n]}}\n', encoding="utf-8")


def draw(results: Sequence[Mapping[str, Any]]) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "minilora", "svg.fonttype": "none"}
    figure = Figure(figsize=(6.4, 3.0), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for result, color in zip(results, ("#0072B2", "#D55E00", "#009E73"), strict=True):
        axes.plot(range(1, 101), result["rewards"], color=color, alpha=0.25, linewidth=1)
        axes.plot(*zip(*result["held_out"].items(), strict=True), "o-", color=color, label=f"seed {result['seed']}")
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(FILE.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    results = []
    for seed in SEEDS:
        results.append(train(seed))
        print(json.dumps(results[-1]["held_out"]), flush=True)
    write(results)
    draw(results)


if __name__ == "__main__":
    main()
