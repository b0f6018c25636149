"""The kernel of the gated delta rule: products of matrices for a chunk of tokens at a time, of all documents together.

Within a chunk of C tokens let G_i be the sum of g up to token i, D_ij = exp(G_i - G_j) for j ≤ i,
and β and exp(G) factors of rows. With rows u_i = β_i (v_i - S k_i), the changes that token i makes, the rule is a
triangular system  [Delta §3.2; GDN §3.3]:

    (I + tril(β k kᵀ ∘ D, -1)) [U W] = β [v  exp(G) k];  u = U - W Sᵀ
    o = exp(G) q Sᵀ + (q kᵀ ∘ D) u;  S ← exp(G_C) S + uᵀ (exp(G_C - G) k)

Only S passes from one chunk to the next. The backward pass computes all of it again: what autograd keeps of a chunk is
several times as large as q, k and v.

    N  tokens laid end to end    H  heads          E  width of queries and keys    M  chunks of all documents
    B  documents                 K  key heads      F  width of values              C  tokens of a chunk

    [Delta]  Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length
    [GDN]    Yang et al. 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.definition import kernel, no_autocast, to_device
from minilora.models import delta_rule

CHUNK = 64  # as in transformers


@kernel(of=delta_rule.gated_delta_rule)
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lengths: Sequence[int], states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `delta_rule.gated_delta_rule`."""
    if not torch.is_grad_enabled() and max(lengths) == 1:  # a step of generation
        return delta_rule.gated_delta_rule.function(q, k, v, g, beta, lengths, states)
    return _GatedDeltaRule.apply(lengths, states, q, k, v, g, beta)


class _GatedDeltaRule(torch.autograd.Function):
    """Saved are the inputs; the backward pass is that of the chunks, computed again."""

    @staticmethod
    def forward(ctx: Any, lengths: Sequence[int], states: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states, *inputs)
        ctx.lengths = lengths
        o, last = _by_chunks(lengths, states, *inputs)
        ctx.mark_non_differentiable(last)
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(is_needed) for x, is_needed in zip(inputs, needed, strict=True)]
            o, _ = _by_chunks(ctx.lengths, states, *leaves)
            grads = iter(torch.autograd.grad(o, [leaf for leaf in leaves if leaf.requires_grad], do))
        return None, None, *(next(grads) if is_needed else None for is_needed in needed)


def _by_chunks(
    lengths: Sequence[int], states: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    if states is None:
        states = v.new_zeros(len(lengths), v.size(1), v.size(2), k.size(2))
    dtype, wide, H = v.dtype, torch.promote_types(v.dtype, torch.float32), v.size(1)
    running, (longest_first, back, tokens, places) = _chunks(tuple(lengths), min(CHUNK, max(lengths)), v.device)

    def chunks(x: Tensor) -> Tensor:
        """Return a matrix for each chunk and head: (N, H or K, ...) -> (M, H, C, ...)."""
        padded = torch.cat((x.to(wide), x.new_zeros(1, *x.shape[1:], dtype=wide)))  # 0 changes no state
        return padded[places].transpose(1, 2).repeat_interleave(H // x.size(1), dim=1)

    with no_autocast(v.device.type):
        q, k, v, g, beta = (chunks(x) for x in (q, k, v, g, beta[..., None]))
        C = g.size(-1)
        between = g[..., None].expand(*g.shape, C).tril(-1).cumsum(-2)  # G_i - G_j, without cancellation
        D = between.masked_fill(torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1), -torch.inf).exp()
        exp_G = g.cumsum(-1).exp()[..., None]
        right = beta * torch.cat((v, exp_G * k), dim=-1)
        solved = torch.linalg.solve_triangular(beta * (k @ k.mT) * D, right, upper=False, unitriangular=True)
        U, W = solved.split([v.size(-1), k.size(-1)], dim=-1)
        tensors = U, W, exp_G * q, (q @ k.mT) * D, D[..., -1, :, None] * k, exp_G[..., -1:, :]
        S, outputs = states.to(wide)[longest_first], []
        for U, W, queries, inside, keys, faded in zip(*(x.split(running) for x in tensors), strict=True):
            own = S[: len(U)]  # of the documents that have such a chunk
            u = U - W @ own.mT
            outputs.append(queries @ own.mT + inside @ u)
            S = torch.cat((faded * own + u.mT @ keys, S[len(U) :]))
    o = torch.cat(outputs).transpose(1, 2).flatten(0, 1)  # (M·C, H, F)
    return o[tokens].to(dtype), S[back].detach()


@functools.lru_cache(maxsize=8)  # all layers of a pass ask for the same, which is copied to the device once
def _chunks(lengths: tuple[int, ...], size: int, device: torch.device) -> tuple[list[int], list[Tensor]]:
    """Divide documents into chunks: the first ones of all documents, then the second ones, and so on.

    Return how many documents have a first chunk, a second one, and so on; the documents from the longest to the
    shortest, and the place of each among them; the place of each token in the chunks; and the tokens of the chunks, N
    beyond the end of a document.

    >>> _chunks((1, 3), 2, torch.device("cpu"))
    ([2, 1], [tensor([1, 0]), tensor([1, 0]), tensor([2, 0, 1, 4]), tensor([[1, 2],
            [0, 4],
            [3, 4]])])
    """
    total = sum(lengths)
    with torch.inference_mode(False), torch.device("cpu"):  # in training, indices are kept for the backward pass
        longest_first = torch.tensor(lengths).argsort(descending=True, stable=True)
        tokens = torch.arange(total).split(list(lengths))
        documents = [F.pad(part, (0, -len(part) % size), value=total).view(-1, size) for part in tokens]
        ordered = [documents[i] for i in longest_first]
        running = [sum(len(part) > i for part in documents) for i in range(len(ordered[0]))]
        places = torch.cat([ordered[document][i] for i, count in enumerate(running) for document in range(count)])
        parts = longest_first, longest_first.argsort(), places.argsort()[:total], places
        *others, places = to_device(torch.cat(parts), device).split([len(part) for part in parts])
    return running, [*others, places.view(-1, size)]
