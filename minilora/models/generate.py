"""Text from a model: one token at a time, with a KV cache.

    B  prompts of a batch, or documents    T  tokens of a prompt    V  vocab_size    N  tokens asked about
    S  keys that are seen    H, K  query and key heads    E  head_dim

[Nucleus]  Holtzman et al. 2019, The Curious Case of Neural Text Degeneration
[Top-k]    Fan et al. 2018, Hierarchical Neural Story Generation
"""

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.definition import to_device
from minilora.errors import ConfigError, ShapeError, TrainingError
from minilora.llama import Llama, LlamaConfig, causal_attention

OnToken = Callable[[int, int], bool | None]  # (row, token) -> True to end the row


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients and dropout, and restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:  # the outer ones first
            if module.training != mode:
                module.train(mode)  # which a module may override, to merge and unmerge weights


class KVCache:
    """The cached keys and values of a batch, so that a new token computes one row instead of all.

    A layer's are two tensors that are allocated once; new rows are written in place, and attention reads views. Each
    call gives the number of new tokens of each document, 0 for one that has ended.
    """

    def __init__(self, config: LlamaConfig, documents: int, capacity: int, device: torch.device):
        self.lengths = [0] * documents  # cached tokens of each
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values of those that attend, (B, K, capacity, E)
        self.states: dict[nn.Module, Tensor] = {}  # of others: last inputs of a convolution, memory of a delta rule
        self._capacity, self._device = capacity, device
        self._windows = set(config.windows)

    def repeat(self, n: int) -> None:
        """Replace each document by n copies, which follow each other."""
        if n > 1:
            self.lengths = [length for length in self.lengths for _ in range(n)]
            for i, (keys, values) in enumerate(self.layers):
                self.layers[i] = keys.repeat_interleave(n, 0), values.repeat_interleave(n, 0)
            self.states = {layer: state.repeat_interleave(n, 0) for layer, state in self.states.items()}

    def begin(self, lengths: Sequence[int]) -> None:
        """Begin a call with these numbers of new tokens, for all layers; positions in each document become `spans`."""
        spans = [range(before, before + new) for before, new in zip(self.lengths, lengths, strict=True)]
        self._new, self._layer = list(lengths), 0
        self.lengths = [span.stop for span in spans]
        places = [(document, position) for document, span in enumerate(spans) for position in span]
        self._documents, self._positions = to_device(torch.tensor(places), self._device).unbind(1)
        self._views = {window: self._common_view(window) for window in self._windows} if max(lengths) == 1 else {}
        self.spans = spans

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Cache the next layer's new keys and values, and compute the attention of its queries.

        Shapes: q (N, H, E), k (N, K, E), v (N, K, E) -> (N, H, E)
        """
        if self._layer == len(self.layers):
            shape = (len(self.lengths), k.size(1), self._capacity, k.size(2))
            self.layers.append((k.new_zeros(shape), v.new_zeros(shape)))  # masked rows must be finite: 0 · NaN is NaN
        keys, values = self.layers[self._layer]
        self._layer += 1
        keys[self._documents, :, self._positions] = k
        values[self._documents, :, self._positions] = v
        if self._views:
            seen, mask = self._views[window]
            queries = q.new_zeros(len(self._new), *q.shape[1:]).index_copy(0, self._documents, q)
            return decode_attention(queries, keys[:, :, seen], values[:, :, seen], mask)[self._documents]
        parts, end = [], 0
        for document, (new, total) in enumerate(zip(self._new, self.lengths, strict=True)):
            if new:
                first = 0 if window is None else max(0, total - new + 1 - window)  # the furthest that a query looks
                k, v = (rows[document, :, first:total].transpose(0, 1) for rows in (keys, values))  # (S, K, E)
                end += new
                parts.append(causal_attention(q[end - new : end], k, v, [new], [total - first], window))
        return torch.cat(parts)

    def state(self, layer: nn.Module, like: Tensor, *shape: int) -> Tensor:
        """Return what a layer keeps of each document, (B, *shape), for it to change in place; 0 at first."""
        if layer not in self.states:
            self.states[layer] = like.new_zeros(len(self.lengths), *shape)
        return self.states[layer]

    def extend(self, layer: nn.Module, x: Tensor, count: int) -> list[Tensor]:
        """Divide a layer's new inputs into documents, each after its `count` last ones; keep the last of the new.

        Before the first token of a document they are 0.

        Shapes: x (N, D) -> (count + new, D) for each document
        """
        cached = self.state(layer, x, count, x.size(1))
        extended = []
        for document, new in enumerate(x.split(self._new)):
            extended.append(torch.cat((cached[document], new)))
            cached[document] = extended[-1][len(new) :]
        return extended

    def _common_view(self, window: int | None) -> tuple[slice, Tensor | None]:
        """Return the keys that one query of each document sees, and a mask if one sees less than all of them.

        A key in a common product takes about half the time of one in a product of its own.

        Shapes: -> mask (B, 1, 1, S)
        """
        spans = [(0 if window is None else max(0, total - window), total) for total in self.lengths]
        running = [span for span, new in zip(spans, self._new, strict=True) if new]
        begin, end = min(first for first, _ in running), max(total for _, total in running)
        if all(span == (begin, end) for span in spans):
            return slice(begin, end), None
        position = torch.arange(begin, end, device=self._device)
        first, total = to_device(torch.tensor(spans), self._device).T.unsqueeze(2)
        visible = (position >= first) & (position < total)
        return slice(begin, end), visible[:, None, None]


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute o = softmax(q kᵀ/√E) v for one query of each document; query head h reads key head ⌊h·K/H⌋.

    The query heads that share keys are rows of one product, so no key is read twice.

    Shapes: q (B, H, E), keys (B, K, S, E), values (B, K, S, E), mask (B, 1, 1, S) -> (B, H, E)
    """
    queries = q.unflatten(1, (keys.size(1), -1))  # (B, K, H/K, E)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).flatten(1, 2)


class Continuation(list[int]):
    """The new tokens of a row of `generate`."""

    stop: int | None = None  # the stop token that ended it
    log_probs: tuple[float, ...] = ()


def generate(
    model: Llama,
    input_ids: Tensor | Iterable[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    n: int = 1,
    log_probs: bool = False,
) -> list[Continuation]:
    """Continue each prompt by at most `max_new_tokens` tokens, n times; a stop token ends a row and is left off.

    A row is a list of tokens. Its `stop` is the stop token that ended it, or None. Its `log_probs` are the model's log
    probabilities of its tokens and of that stop token: at temperature 1, without `top_p` and `top_k`.

    With a seed, row i is what `generate(model, [input_ids[i // n]], seed=seed + i)` gives. In bfloat16 this holds up to
    rounding, which depends on the number of rows: of two nearly equally likely tokens the other one may be taken.

    Args:
        model: the model, with its active adapters.
        input_ids: (B, T) token ids, or B lists of any lengths.
        max_new_tokens: the maximum length of a continuation.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before sampling.
        top_p: sample from the fewest tokens that have this probability together  [Nucleus §3.1].
        top_k: sample from the k likeliest tokens; 0: from all  [Top-k §5.4].
        seed: of the sampling; None: each call draws anew from PyTorch's random state of the CPU.
        stop_ids: tokens that end a continuation.
        on_token: is called with row and token when a token is written; True ends the row.
        n: rows for each prompt, which is computed once: rows i·n, …, i·n + n - 1 continue prompt i.
        log_probs: whether to compute the `log_probs` of rows.

    Raises:
        ConfigError: numbers out of range, all in one message.
        ShapeError: input_ids are not rows of the model's token ids, or a prompt is empty.
        TrainingError: the model computes NaN or infinity.
    """
    _check_sampling(max_new_tokens, temperature, top_p, top_k, seed, n)
    weight = model.model.embed_tokens.weight
    prompts = _prompts(input_ids, weight.size(0))
    rows = [Continuation() for _ in range(n * len(prompts))]
    generators = [None if seed is None else torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
    cache = KVCache(model.config, len(prompts), max(map(len, prompts)) + max_new_tokens, weight.device)
    running = list(range(len(rows)))
    with evaluating(model):
        logits = _next_logits(model, prompts, cache).repeat_interleave(n, 0)
        cache.repeat(n)
        while True:
            if temperature or log_probs:
                logits = logits.cpu()
            chosen = _choose(logits, [generators[i] for i in running], temperature, top_p, top_k)
            if log_probs:
                drawn = logits.double().log_softmax(-1)[range(len(chosen)), chosen].tolist()
                for i, log_prob in zip(running, drawn, strict=True):
                    rows[i].log_probs += (log_prob,)
            written = list(zip(running, chosen, strict=True))
            running = []
            for i, token in written:
                if token in stop_ids:
                    rows[i].stop = token
                else:
                    rows[i].append(token)
                    is_ended = on_token is not None and on_token(i, token)
                    if not is_ended and len(rows[i]) < max_new_tokens:
                        running.append(i)
            if not running:
                return rows
            feed = [row[-1:] if i in running else [] for i, row in enumerate(rows)]
            logits = _next_logits(model, feed, cache)


def probabilities(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Compute softmax(logits / temperature) over the tokens that `top_k` and then `top_p` leave.

    It is computed in float64 on the CPU, so that every device draws the same.

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


def _choose(
    logits: Tensor, generators: Sequence[torch.Generator | None], temperature: float, top_p: float, top_k: int
) -> list[int]:
    """Choose the token that follows each document. Results are copied from the device once."""
    is_finite = torch.stack(logits.aminmax()).isfinite().all(0, keepdim=True)  # NaN is the least and the most
    *likeliest, all_finite = torch.cat((logits.argmax(-1), is_finite)).tolist()
    if not all_finite:
        raise TrainingError(
            "the model computes NaN or infinity: weights, perhaps an adapter's, are not finite or too large"
        )
    if temperature == 0:
        return likeliest
    chances = zip(probabilities(logits, temperature, top_p, top_k), generators, strict=True)
    return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in chances]


def _next_logits(model: Llama, feed: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Compute the logits after the last token of each document that has tokens in `feed`: (B, V), or fewer rows."""
    device = model.model.embed_tokens.weight.device
    lengths = [len(document) for document in feed]
    ends = [end - 1 for end, length in zip(accumulate(lengths), lengths, strict=True) if length]
    tokens = to_device(torch.tensor([token for document in feed for token in document]), device)
    last = to_device(torch.tensor(ends), device)
    cache.begin(lengths)
    return model.lm_head(model.model(tokens, cache)[last])


def _check_sampling(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None, n: int
) -> None:
    needs = [
        (max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, need a whole number of at least 1"),
        (0 <= temperature < math.inf, f"temperature is {temperature}, need a finite number of at least 0"),
        (0 < top_p <= 1, f"top_p is {top_p}, need a number above 0 and at most 1"),
        (top_k >= 0, f"top_k is {top_k}, need a whole number of at least 0"),
        (seed is None or 0 <= seed < 2**63, f"seed is {seed}, need a whole number of at least 0 and below 2**63"),
        (n >= 1, f"n is {n}, need a whole number of at least 1"),
    ]
    if bad := [message for is_right, message in needs if not is_right]:
        raise ConfigError("; ".join(bad))


def _prompts(input_ids: Tensor | Iterable[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Check the rows of token ids, and return them as lists."""
    if isinstance(input_ids, Tensor) and input_ids.dim() != 2:
        raise ShapeError(f"input_ids must be (B, T), found {tuple(input_ids.shape)}")
    rows = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
    try:
        prompts = [[operator.index(token) for token in row] for row in rows]
    except TypeError as error:
        raise ShapeError(f"input_ids must be rows of whole numbers, found {input_ids!r:.80}") from error
    if not prompts or not all(prompts):
        raise ShapeError("every prompt needs at least one token")
    for row, prompt in enumerate(prompts):
        if wrong := next((token for token in prompt if not 0 <= token < vocab_size), None):
            raise ShapeError(f"prompt {row} holds token {wrong}; the model has tokens 0 to {vocab_size - 1}")
    return prompts
