"""On-policy distillation: at each token of its own answers, the student learns the probabilities of a teacher.

    L = Σ_t KL(π(·|y_<t) ‖ π_T(·|y_<t)) / number of tokens,   y ~ π       [GKD §3.1 with λ = 1, reverse KL]

The KL sums over the whole vocabulary. The gradient treats the sampled y as a constant, as in GKD. A row is the list of
tokens of a prompt. Student and teacher must have the same vocabulary.

    student, teacher = ml.load_model("small"), ml.load_model("large").requires_grad_(False)
    tokenizer = ml.load_tokenizer("small")
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    ml.attach(student, ml.LoraConfig())
    loss = partial(distillation_loss, teacher=teacher, stop_ids=tokenizer.stop_ids)
    ml.train(student, rows, ml.TrainConfig(learning_rate=1e-4), ml.Tracker("jsonl", "out"), loss=loss)

    N  tokens of answers    V  vocab_size

    [GKD]  Agarwal et al. 2023, On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

import minilora as ml
from minilora.data import IGNORE_INDEX, Batch, collate
from minilora.llama import Documents, Llama


def draw(
    model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
) -> list[ml.Example]:
    """Sample an answer to each prompt; the labels are the sampled tokens, including the stop token."""
    answers = ml.generate(model, prompts, max_new_tokens, temperature=1.0, stop_ids=stop_ids)
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        drawn = [*answer] if answer.stop is None else [*answer, answer.stop]
        examples.append(ml.Example([*prompt, *drawn], [IGNORE_INDEX] * len(prompt) + drawn))
    return examples


def log_distributions(model: Llama, batch: Batch) -> Tensor:
    """Return the log probabilities of the whole vocabulary at each position that predicts a label, (N, V)."""
    hidden = model.model(batch.tokens, Documents(batch.lengths))
    logits = model.get_output_embeddings()(hidden[batch.label_positions])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def reverse_kl(student: Llama, teacher: Llama, examples: Sequence[ml.Example]) -> tuple[Tensor, int, dict[str, Any]]:
    """Return the sum of KL(π ‖ π_T) over the labels, their number, and metrics.

    `agreement` is how often student and teacher have the same most likely token.
    """
    batch = collate(examples, next(student.parameters()).device)
    log_p = log_distributions(student, batch)
    with torch.no_grad():
        log_q = log_distributions(teacher, batch)
    n = len(batch.labels)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return (log_p.exp() * (log_p - log_q)).sum(), n, {"agreement": (agreement, n), "length": (n, len(examples))}


def distillation_loss(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    teacher: Llama,
    stop_ids: Collection[int],
    max_new_tokens: int = 64,
) -> tuple[Tensor, int, dict[str, Any]]:
    """Sample answers of the student, and return their `reverse_kl`."""
    return reverse_kl(model, teacher, draw(model, prompts, max_new_tokens, stop_ids))
