"""Fine-tune and forget little: on rows of other text the probabilities stay those of the base.

    L = (Σ -log q(y) over the task's labels + β Σ KL(p ‖ q) over the general rows' tokens) / number of the task's labels

q is the model, p the same model with its adapter off; the KL sums over the whole vocabulary. At the start q = p, and
the penalty and its gradient are 0. General rows are drawn anew at each call, a `share` of the rows of the task.

    model, tokenizer = ml.load_model("path/to/model"), ml.load_tokenizer("path/to/model")
    rows, general = (ml.load_dataset(file, tokenizer) for file in ("rows.jsonl", "general.jsonl"))
    ml.attach(model, ml.LoraConfig())
    ml.train(model, rows, ml.TrainConfig(), ml.Tracker("jsonl", "out"), loss=partial(penalized_loss, general=general))

    N  tokens of the general rows    V  vocab_size
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import minilora as ml
from minilora.data import Batch, collate
from minilora.llama import Documents, Llama
from minilora.training import token_loss


def log_distributions(model: Llama, batch: Batch) -> Tensor:
    """Return the log probabilities of the whole vocabulary at each position that predicts a label, (N, V)."""
    hidden = model.model(batch.tokens, Documents(batch.lengths))
    logits = model.get_output_embeddings()(hidden[batch.label_positions])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl_to_base(model: Llama, rows: Sequence[ml.Example]) -> tuple[Tensor, int]:
    """Return the sum of KL(p ‖ q) over the labels, and their number."""
    batch = collate(rows, next(model.parameters()).device)
    log_q = log_distributions(model, batch)
    with torch.no_grad(), ml.disable_adapter(model):
        log_p = log_distributions(model, batch)
    return (log_p.exp() * (log_p - log_q)).sum(), len(batch.labels)


def penalized_loss(
    model: Llama,
    rows: Sequence[ml.Example],
    *,
    general: Sequence[ml.Example],
    beta: float = 1.0,
    share: float = 1 / 16,
) -> tuple[Tensor, int, dict[str, Any]]:
    """Return the loss of the rows with the penalty, the number of their labels, and the KL as a metric."""
    total, count = token_loss(model, collate(rows, next(model.parameters()).device))
    drawn = torch.randint(len(general), (max(1, round(share * len(rows))),)).tolist()
    kl, tokens = kl_to_base(model, [general[i] for i in drawn])
    return total + beta * kl, count, {"kl": (kl.detach(), tokens)}
