"""DPO: prefer the chosen one of two answers to the rejected one, by more than the base does.

    L = -log σ(β M),   M = (log π(y⁺) - log π_ref(y⁺)) - (log π(y⁻) - log π_ref(y⁻))     [DPO eq. 7]

π_ref is the model with its adapter disabled. A row has `prompt`, `chosen` and `rejected`: texts or lists of messages.

    model, tokenizer = ml.load_model("path/to/model"), ml.load_tokenizer("path/to/model")
    pairs, held_out = load_pairs("train.jsonl", tokenizer), load_pairs("valid.jsonl", tokenizer)
    ml.attach(model, ml.LoraConfig())
    config = ml.TrainConfig(learning_rate=5e-5, batch_size=8, eval_steps=20)
    ml.train(model, pairs, config, ml.Tracker("jsonl", "out"), held_out, "out/checkpoints", loss=dpo_loss)
    ml.save_adapter(model, "out")

Records have the means that TRL logs, under TRL's names. The margin can grow while both answers become less likely, so
watch `logps/chosen`: `minilora plot out --metric logps/chosen`. Fine-tune on the chosen answers first: DPO moves what
the model can already say.

    [DPO]  Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import minilora as ml
from minilora.data import collate
from minilora.llama import Documents, Llama, cross_entropy

Pair = tuple[ml.Example, ml.Example]  # the chosen and the rejected answer to a prompt


def load_pairs(path: str | Path, tokenizer: ml.Tokenizer, config: ml.DataConfig | None = None) -> list[Pair]:
    """Read pairs of answers; rows with an answer that `max_length` cuts off are left out."""
    config = config or ml.DataConfig()
    sides = []
    for side in ("chosen", "rejected"):
        columns = {"prompt": "prompt", "completion": side}
        rows = ml.load_dataset(path, tokenizer, replace(config, columns=columns))
        sides.append({row.source: row for row in rows if row.source not in rows.cut})
    chosen, rejected = sides
    return [(chosen[source], rejected[source]) for source in chosen if source in rejected]


def answer_log_probs(model: Llama, rows: Sequence[ml.Example]) -> Tensor:
    """Return log π(answer | prompt) of each row, (rows,)."""
    batch = collate(rows, next(model.parameters()).device)
    hidden = model.model(batch.tokens, Documents(batch.lengths))[batch.label_positions]
    head, lengths = model.get_output_embeddings(), [row.labelled for row in rows]
    answers = zip(hidden.split(lengths), batch.labels.split(lengths), strict=True)
    return torch.stack([-cross_entropy(states, labels, head) for states, labels in answers])


def dpo_loss(model: Llama, pairs: Sequence[Pair], beta: float = 0.1) -> tuple[Tensor, int, dict[str, Any]]:
    """Return the sum of the losses of pairs, their number, and metrics."""
    rows = [row for pair in pairs for row in pair]
    policy = answer_log_probs(model, rows)
    with torch.no_grad(), ml.disable_adapter(model):
        reference = answer_log_probs(model, rows)
    chosen, rejected = (beta * (policy - reference)).view(-1, 2).unbind(1)
    margins = chosen - rejected
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "logps/chosen": policy[0::2],
        "logps/rejected": policy[1::2],
    }
    n = len(pairs)
    return -F.logsigmoid(margins).sum(), n, {name: (values.sum(), n) for name, values in metrics.items()}
