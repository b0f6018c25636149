"""Text from a model: one token at a time, with a KV cache.

[Nucleus]  Holtzman et al. 2019, The Curious Case of Neural Text Degeneration
[Top-k]    Fan et al. 2018, Hierarchical Neural Story Generation
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, ShapeError, TrainingError
from minilora.model.llama import KVCache, Llama


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout, for as long as the block lasts."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(was_training)


def generate(
    model: Llama,
    input_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue each prompt by at most `max_new_tokens` tokens; a stop token ends one and is not returned.

    Args:
        model: the model, with whatever adapters are active.
        input_ids: (B, T) token ids, or B lists of any lengths.
        max_new_tokens: where to stop at the latest.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before sampling.
        top_p: sample from the fewest tokens that have this probability together  [Nucleus §3.1].
        top_k: sample from the k likeliest tokens; 0: from all  [Top-k §5.4].
        seed: of the sampling.
        stop_ids: tokens that end a continuation.
        use_cache: keep keys and values instead of computing them again; the result is the same.

    Raises:
        ConfigError: a number that cannot work.
        ShapeError: a prompt is empty.
        TrainingError: the model computes NaN.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} (at least 1), temperature {temperature} (at least 0), "
            f"top_p {top_p} (above 0, at most 1), top_k {top_k} (at least 0)"
        )
    prompts = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(prompt) for prompt in input_ids]
    if not prompts or not all(prompts):
        raise ShapeError("every prompt needs at least one token")
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        choose = partial(pick, temperature=temperature, top_p=top_p, top_k=top_k, generator=generator)
        return _continued(model, prompts, max_new_tokens, choose, stop_ids, use_cache)


def _continued(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    stop_ids: Collection[int],
    use_cache: bool,
) -> list[list[int]]:
    weight = model.model.embed_tokens.weight
    capacity = max(map(len, prompts)) + max_new_tokens
    cache = KVCache(model.config, len(prompts), capacity, weight.dtype, weight.device) if use_cache else None
    written: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    feed = prompts
    for _ in range(max_new_tokens):
        tokens = torch.tensor([token for document in feed for token in document], device=weight.device)
        lengths = [len(document) for document in feed]
        hidden = model.model(tokens, lengths, cache=cache)
        last = torch.tensor(lengths, device=weight.device).cumsum(0) - 1
        logits = model.lm_head(hidden[last])
        if logits.isnan().any():
            raise TrainingError("the model computes NaN: its weights or an adapter's are not finite, or too large")
        chosen = choose(logits).tolist()
        for row in sorted(running):
            if chosen[row] in stop_ids:
                running.discard(row)
            else:
                written[row].append(chosen[row])
        if not running:
            break
        feed = [[token] for token in chosen]
        for row in running:
            if cache is not None and model.config.rope.changes(cache.lengths[row], cache.lengths[row] + 1):
                cache.lengths[row] = 0  # what is cached holds no longer
            if cache is None or cache.lengths[row] == 0:
                feed[row] = [*prompts[row], *written[row]]
    return written


def pick(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token for each row of logits, drawn on the CPU, so that every device draws the same.

    Shapes: logits (B, V) -> (B)
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float().cpu() / temperature
    if top_k:
        floor = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the likelier ones; the likeliest always stays
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
