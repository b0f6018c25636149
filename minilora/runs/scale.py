"""Forecast a step of several ranks: the FLOP of one, the bytes that it sends, and the seconds by a stated model.

Every term is a product of sizes. A step has G micro-batches, which are dealt out to N ranks; each computes g of them,
and then the gradients of all are added. `runs/memory` forecasts the bytes that a rank holds.

    N  ranks    G  gradient_accumulation_steps    g = ⌈G/N⌉    T  tokens of a micro-batch    M  labelled ones
    P  numbers that are trained    S  bytes of all blocks    m, n  inputs and outputs of a linear    r  rank
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minilora.runs.memory import Plan
from minilora.runs.sizes import BLOCKS, FLOAT32, Shapes, base_bytes, embedding_learns, parameter_shapes, trained_sizes

# Linears of a block that have the same input, in the order of the forward pass; fused ones begin likewise.
GROUPS = (
    ("self_attn.q", "self_attn.k", "self_attn.v"),
    ("self_attn.o",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
)


@dataclass(frozen=True)
class Step:
    """What one rank does in a step.

    Attributes:
        flop: of matrix products and attention.
        reduced: bytes that it sends for the sum of the gradients.
        gathered: bytes that it sends for the weights of blocks that are sharded.
    """

    flop: int
    reduced: int
    gathered: int

    def seconds(self, gemm_rate: float, bandwidth: float) -> float:
        """Return the time of a step.

        t = max(FLOP / gemm_rate, gathered / bandwidth) + reduced / bandwidth

        The larger of the two, because the next block's weights are gathered while a block is computed. The gradients
        are complete only after the backward pass, so their sum overlaps with nothing. All ranks are as fast, and
        have micro-batches of one size; latency is not counted.

        >>> Step(flop=600, reduced=10, gathered=20).seconds(gemm_rate=100, bandwidth=5)
        8.0
        """
        return max(self.flop / gemm_rate, self.gathered / bandwidth) + self.reduced / bandwidth


def forecast_step(plan: Plan) -> Step:
    """Compute what a rank does in a step that has all its micro-batches, the largest of the run.

    FLOP = g · `batch_flop`;    reduced = 2 (N-1)/N · 4 P;    gathered = g · 2 (N-1)/N · S

    A ring adds the gradients, P numbers in float32, in 2 (N-1) messages of an N-th of them. Each block is gathered in
    the forward pass and again in the backward pass, which also computes it again where the plan says so.

    Raises:
        TargetError: the adapter's config names modules that the model does not have.
    """
    config, N = plan.config, plan.world
    g = -(-plan.training.gradient_accumulation_steps // N)
    shapes = parameter_shapes(config, plan.classes)
    factors, others, ranks = trained_sizes(plan.lora, shapes, config.tie_word_embeddings)
    S = sum(base_bytes(config, plan.quantization, plan.dtype, shapes, N).blocks) if plan.shard == "base" else 0
    reduced = 2 * (N - 1) * FLOAT32 * sum(factors + others) // N
    return Step(g * batch_flop(plan, shapes, ranks), reduced, g * 2 * (N - 1) * S // N)


def batch_flop(plan: Plan, shapes: Shapes, ranks: Mapping[str, int]) -> int:
    """Count the FLOP of the forward and backward pass of the largest micro-batch.

    linear:     2 T m n  forward,  2 T m n  dx,  2 T m n  dW where it is trained
    adapter:    2 T r (m + n)  forward,  2 T r (m + 2 n)  dA and dB,  2 T r m  dx
    attention:  4 H E p  forward,  10 H E p  backward, of which 2 H E p compute the scores again

    p = Σ min(t, window) over the tokens t of every document counts the pairs of query and key. There is no dx where
    nothing before the linear is trained. The head has M rows instead of T. What is recomputed takes its forward pass
    twice, but for a last linear without an adapter, of whose output nothing is needed. Of DoRA, the norms of weights
    are not counted.
    """
    config, recompute, (lengths, M) = plan.config, plan.training.recompute, plan.batch()
    learns, total, T = embedding_learns(plan.lora, ranks), 0, sum(lengths)

    def linear(name: str, tokens: int, is_recomputed: bool) -> int:
        (n, m), rank = shapes[name], ranks.get(name.removesuffix(".weight"))
        r, is_trained = rank or 0, rank == 0
        times = 1 + (is_recomputed and not (name.endswith("down_proj.weight") and r == 0))  # it would be the last
        return 2 * tokens * (m * n * (times + learns + is_trained) + r * (times * (m + n) + m + 2 * n + learns * m))

    for i, window in enumerate(config.windows):
        for group in GROUPS:
            starts = tuple(f"{BLOCKS}{i}.{part}" for part in group)
            names = [name for name, shape in shapes.items() if name.startswith(starts) and len(shape) == 2]
            again = recompute == "block" or (recompute == "mlp" and group[0].startswith("mlp"))
            total += sum(linear(name, T, again) for name in names)
            learns = learns or any(name.removesuffix(".weight") in ranks for name in names)
            if group == GROUPS[0]:
                pairs = sum(_pairs(length, window or length) for length in lengths)
                total += config.num_attention_heads * config.head_dim * pairs * (4 + 4 * again + 10 * learns)
    return total + linear("score.weight" if plan.classes else "lm_head.weight", M, False)


def _pairs(length: int, window: int) -> int:
    """Return Σ min(t, window) over t = 1 … length."""
    seen = min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen
