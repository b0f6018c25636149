"""GRPO: sample a group of answers to each prompt, and make those more likely whose reward is above the group's mean.

    A_i = (R_i - mean R) / (std R + 1e-4)                  R: the rewards of the answers to one prompt    [GRPO §4.1.2]
    L_i = mean_t [β (e^δ - δ - 1) - min(ρ A_i, clip(ρ, 1 - ε, 1 + ε) A_i)]                               [GRPO eq. 3, 4]
    ρ = π(o_t) / π_old(o_t),   δ = log π_ref(o_t) - log π(o_t)

π_old is the model that sampled the answers, and π_ref the model with its adapter disabled. A row has the tokens of a
prompt, and whatever the reward needs:

    model, tokenizer = ml.load_model("path/to/model"), ml.load_tokenizer("path/to/model")
    rows = [{"prompt": tokenizer.encode(f"{a} + {b} ="), "answer": f" {a + b}"} for a in range(20) for b in range(20)]
    loss = partial(grpo_loss, tokenizer=tokenizer, reward=lambda row, text: float(text == row["answer"]))
    ml.attach(model, ml.LoraConfig())
    config = ml.TrainConfig(learning_rate=1e-4, batch_size=8)
    ml.train(model, rows, config, ml.Tracker("tensorboard", "out"), checkpoint_dir="out/checkpoints", loss=loss)

`tensorboard --logdir out` shows the progress as `reward`. A group with equal rewards has no advantage to learn from:
`no_advantage` is the share of such answers. ρ is 1, except for rounding, dropout and samples drawn earlier.

    [GRPO]  Shao et al. 2024, DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import minilora as ml
from minilora.data import IGNORE_INDEX, collate
from minilora.llama import Documents, Llama

Row = Mapping[str, Any]
Result = tuple[Tensor, int, dict[str, Any]]


class Sample(NamedTuple):
    example: ml.Example  # a prompt and an answer, whose tokens are the labels
    log_probs: Sequence[float]  # log π_old of each label
    reward: float
    advantage: float


def draw(
    model: Llama,
    rows: Sequence[Row],
    tokenizer: ml.Tokenizer,
    reward: Callable[[Row, str], float],
    group: int = 8,
    max_new_tokens: int = 64,
) -> list[Sample]:
    """Sample answers to prompts, and compare the reward of each with its group."""
    if group < 2:
        raise ml.ConfigError(f"group is {group}: an answer is compared with others to its prompt; need at least 2")
    prompts = [list(row["prompt"]) for row in rows]
    answers = ml.generate(model, prompts, max_new_tokens, 1.0, stop_ids=tokenizer.stop_ids, n=group, log_probs=True)
    rewards = [float(reward(rows[i // group], tokenizer.decode(answer))) for i, answer in enumerate(answers)]
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    samples = []
    for i, (answer, advantage) in enumerate(zip(answers, advantages.flatten().tolist(), strict=True)):
        prompt = prompts[i // group]
        drawn = [*answer] if answer.stop is None else [*answer, answer.stop]
        example = ml.Example(prompt + drawn, [IGNORE_INDEX] * len(prompt) + drawn)
        samples.append(Sample(example, answer.log_probs, rewards[i], advantage))
    return samples


def log_probs(model: Llama, rows: Sequence[ml.Example]) -> Tensor:
    """Return the log probability of each label, row after row, (labels,)."""
    batch = collate(rows, next(model.parameters()).device)
    hidden = model.model(batch.tokens, Documents(batch.lengths))
    logits = model.get_output_embeddings()(hidden[batch.label_positions])  # (labels, V)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(wide, batch.labels, reduction="none")


def clipped_loss(model: Llama, samples: Sequence[Sample], clip: float = 0.2, beta: float = 0.04) -> Result:
    """Return the sum of the losses of samples, their number, and metrics."""
    policy = log_probs(model, [sample.example for sample in samples])
    with torch.no_grad(), ml.disable_adapter(model):
        reference = log_probs(model, [sample.example for sample in samples])
    lengths = torch.tensor([len(sample.log_probs) for sample in samples], device=policy.device)
    old = policy.new_tensor([number for sample in samples for number in sample.log_probs])
    advantage = policy.new_tensor([sample.advantage for sample in samples]).repeat_interleave(lengths)
    ratio = (policy - old).exp()
    delta = reference - policy
    gain = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    kl = delta.exp() - delta - 1
    n, tokens = len(samples), len(policy)
    metrics = {"reward": (sum(sample.reward for sample in samples), n), "length": (tokens, n)}
    metrics |= {"kl": (kl.sum(), tokens), "clipped": (((ratio - 1).abs() > clip).sum(), tokens)}
    metrics["no_advantage"] = sum(abs(sample.advantage) < 1e-6 for sample in samples), n
    return ((beta * kl - gain) / lengths.repeat_interleave(lengths)).sum(), n, metrics


def grpo_loss(model: Llama, rows: Sequence[Row], *, clip: float = 0.2, beta: float = 0.04, **drawing: Any) -> Result:
    """Sample answers to the prompts of rows, and return their `clipped_loss`."""
    return clipped_loss(model, draw(model, rows, **drawing), clip, beta)
