"""Text from a model: one token at a time, with a KV cache.

    B  prompts of a batch    T  tokens of a prompt    V  vocab_size

[Nucleus]  Holtzman et al. 2019, The Curious Case of Neural Text Degeneration
[Top-k]    Fan et al. 2018, Hierarchical Neural Story Generation
[CTRL]     Keskar et al. 2019, CTRL: A Conditional Transformer Language Model for Controllable Generation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, ShapeError, TrainingError
from minilora.model.cache import KVCache
from minilora.model.llama import Llama

OnToken = Callable[[int, int], bool | None]


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
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue each prompt by at most `max_new_tokens` tokens; a stop token ends one and is not returned.

    A batch is its prompts one by one: row i draws from a generator of its own, seeded with `seed` + i, and is what
    `generate(model, [input_ids[i]], seed=seed + i)` gives. In bfloat16 that holds up to rounding, which depends on how
    many rows are multiplied at a time: where two tokens are nearly equally likely, the other one may be taken.

    Args:
        model: the model, with whatever adapters are active.
        input_ids: (B, T) token ids, or B lists of any lengths.
        max_new_tokens: where to stop at the latest.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before sampling.
        top_p: sample from the fewest tokens that have this probability together  [Nucleus §3.1].
        top_k: sample from the k likeliest tokens; 0: from all  [Top-k §5.4].
        repetition_penalty: above 1 makes what the prompt and the text so far hold less likely  [CTRL §4.1].
        seed: of the sampling.
        stop_ids: tokens that end a continuation.
        use_cache: keep keys and values instead of computing them again; the result is the same.
        on_token: is told row and token of all that is written, as it is written; True ends that row.

    Raises:
        ConfigError: a number that cannot work; all of them in one message.
        ShapeError: input_ids are not rows of the model's token ids, or a prompt is empty.
        TrainingError: the model computes NaN or infinity.
    """
    _check(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    prompts = _prompts(input_ids, model.model.embed_tokens.weight.size(0))
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]

    def choose(logits: Tensor, documents: list[list[int]]) -> list[int]:
        if repetition_penalty != 1:
            logits = penalize(logits, documents, repetition_penalty)
        if temperature == 0:
            return logits.argmax(-1).tolist()
        chances = probabilities(logits, temperature, top_p, top_k)
        rows = zip(chances, generators, strict=True)
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]

    with evaluating(model):
        return _continued(model, prompts, max_new_tokens, choose, stop_ids, use_cache, on_token)


def penalize(logits: Tensor, documents: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """x / θ for tokens that the row's document holds, where x > 0; x · θ where x < 0  [CTRL §4.1].

    The paper divides in both cases, which makes a token with x < 0 likelier; to multiply there is transformers' way.

    Shapes: logits (B, V), documents B lists of token ids -> (B, V)
    """
    is_held = torch.zeros_like(logits, dtype=torch.bool)
    for row, document in zip(is_held, documents, strict=True):
        row[list(document)] = True
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(is_held, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def probabilities(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """softmax(logits / temperature) over the tokens that `top_k` and, of those, `top_p` leave.

    In float64 and on the CPU, so that every device draws the same.

    Shapes: logits (B, V) -> (B, V)
    """
    logits = logits.cpu().double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: no temperature makes it overflow
    if top_k:
        floor = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        chances = ordered.softmax(-1)
        before = chances.cumsum(-1) - chances  # of the likelier ones; the likeliest always stays
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return logits.softmax(-1)


def _continued(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    choose: Callable[[Tensor, list[list[int]]], list[int]],
    stop_ids: Collection[int],
    use_cache: bool,
    on_token: OnToken | None,
) -> list[list[int]]:
    """What `choose` makes of the logits, token by token. Rows that have ended are computed on and not looked at."""
    weight = model.model.embed_tokens.weight
    capacity = max(map(len, prompts)) + max_new_tokens
    cache = KVCache(model.config, len(prompts), capacity, weight.dtype, weight.device) if use_cache else None
    documents = [list(prompt) for prompt in prompts]
    running = set(range(len(prompts)))
    feed = prompts
    for _ in range(max_new_tokens):
        chosen = choose(_next_logits(model, feed, cache), documents)
        for row in sorted(running):
            if chosen[row] in stop_ids:
                running.discard(row)
                continue
            documents[row].append(chosen[row])
            if on_token is not None and on_token(row, chosen[row]):
                running.discard(row)
        if not running:
            break
        feed = [[token] for token in chosen]
        for row in running:
            if cache is not None and model.config.rope.changes(cache.lengths[row], cache.lengths[row] + 1):
                cache.lengths[row] = 0  # what is cached holds no longer
            if cache is None or cache.lengths[row] == 0:
                feed[row] = documents[row]
    return [document[len(prompt) :] for document, prompt in zip(documents, prompts, strict=True)]


def _next_logits(model: Llama, feed: Sequence[Sequence[int]], cache: KVCache | None) -> Tensor:
    """Logits (B, V) of what follows the last token of each document."""
    device = model.model.embed_tokens.weight.device
    lengths = [len(document) for document in feed]
    hidden = model.model(
        torch.tensor([token for document in feed for token in document], device=device), lengths, cache
    )
    logits = model.lm_head(hidden[torch.tensor(lengths, device=device).cumsum(0) - 1])
    if not logits.isfinite().all():
        raise TrainingError(
            "the model computes NaN or infinity: weights, its own or an adapter's, are not finite or too large"
        )
    return logits


def _check(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, repetition_penalty: float, seed: int
) -> None:
    def is_whole(value: int, least: int) -> bool:
        return isinstance(value, int) and value >= least

    needs = [
        (is_whole(max_new_tokens, 1), f"max_new_tokens {max_new_tokens}, need a whole number of at least 1"),
        (0 <= temperature < math.inf, f"temperature {temperature}, need a finite number of at least 0"),
        (0 < top_p <= 1, f"top_p {top_p}, need a number above 0 and at most 1"),
        (is_whole(top_k, 0), f"top_k {top_k}, need a whole number of at least 0"),
        (0.01 <= repetition_penalty <= 100, f"repetition_penalty {repetition_penalty}, need a number from 0.01 to 100"),
        (is_whole(seed, 0) and seed < 2**63, f"seed {seed}, need a whole number of at least 0 and below 2**63"),
    ]
    if bad := [message for is_right, message in needs if not is_right]:
        raise ConfigError("; ".join(bad))


def _prompts(input_ids: Tensor | Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """The rows of token ids as lists."""
    if isinstance(input_ids, Tensor) and input_ids.dim() != 2:
        raise ShapeError(f"input_ids must be (B, T), found {tuple(input_ids.shape)}")
    prompts = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(prompt) for prompt in input_ids]
    if not prompts or not all(prompts):
        raise ShapeError("every prompt needs at least one token")
    for row, prompt in enumerate(prompts):
        if wrong := next((token for token in prompt if not 0 <= token < vocab_size), None):
            raise ShapeError(f"prompt {row} holds token {wrong}; the model has tokens 0 to {vocab_size - 1}")
    return prompts
