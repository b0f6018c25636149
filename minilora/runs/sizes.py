"""Count from a model's config and a batch what a run holds, computes and sends.

Every term is a product of sizes. `runs/memory` adds the bytes of tensors that live for a while.

A base that is sharded over N ranks keeps of each tensor of a block ⌈rows / N⌉ rows; the embedding, the last norm and
the head are whole on every rank. A step has G micro-batches, which are dealt out to the ranks; each computes g of them,
and then the gradients of all are added.

    N  ranks    G  gradient_accumulation_steps    g = ⌈G/N⌉    T  tokens of a micro-batch    M  labelled ones
    P  numbers that are trained    S  bytes of all blocks    m, n  inputs and outputs of a linear    r  rank
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from minilora.adapters.config import LoraConfig, select_saved, select_targets
from minilora.llama import LlamaConfig
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import build_model
from minilora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from minilora.runs.config import TrainConfig
from minilora.runs.seeded import plan_steps

WIDE = 4  # bytes of a float32: of what is trained, of sums, of probabilities
EMBEDDING_PATH = "model.embed_tokens"
BLOCKS = "model.layers."  # how the names of the blocks' tensors begin
# Linears of a block that have the same input, in the order of the forward pass; fused ones begin likewise.
GROUPS = (
    ("self_attn.q", "self_attn.k", "self_attn.v"),
    ("self_attn.o",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
)
Shapes = dict[str, tuple[int, ...]]
RowBytes = tuple[int, int]  # of a tensor: how many there are, and bytes of one
Shard = Literal["none", "base"]


@dataclass(frozen=True)
class Plan:
    """A run's properties that its memory depends on."""

    config: LlamaConfig
    lora: LoraConfig | None  # None trains all weights
    training: TrainConfig
    quantization: QuantizeConfig
    dtype: torch.dtype
    device: torch.device
    rows: Sequence[tuple[int, int]] | NDArray[Any]  # tokens and labelled tokens of each training row, (rows, 2)
    evaluated: Sequence[Sequence[int] | NDArray[Any]] = ()  # tokens of each row of every split that is evaluated
    world: int = 1  # number of ranks; the forecast is that of one
    shard: Shard = "none"  # "base": each rank holds its share of the rows of the blocks' frozen weights

    def batch(self) -> tuple[list[int], int]:
        """Return the tokens of each row of the largest micro-batch, and its number of labelled tokens."""
        steps = plan_steps(np.asarray(self.rows)[:, 0], self.training)
        rows = np.asarray(self.rows)[steps.batch(int(steps.tokens.argmax()))]
        return rows[:, 0].tolist(), int(rows[:, 1].sum())


def parameter_shapes(config: LlamaConfig) -> Shapes:
    """Return the names and shapes of a decoder's parameters, including the head's also where it is tied.

    Its blocks are alike, so only one is built.
    """
    with torch.device("meta"):
        short = build_model(replace(config, num_hidden_layers=1)).model
        block = {name: tuple(p.shape) for name, p in short.layers[0].named_parameters()}
    shapes: Shapes = {f"{EMBEDDING_PATH}.weight": tuple(short.embed_tokens.weight.shape)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"{BLOCKS}{i}.{name}": shape for name, shape in block.items()}
    D, V = config.hidden_size, config.vocab_size
    return {**shapes, "model.norm.weight": (D,), "lm_head.weight": (V, D)}


def embedding_learns(lora: LoraConfig | None, ranks: Mapping[str, int]) -> bool:
    """Return whether the gradient goes back to the embedding; `ranks` are those of `trained_sizes`."""
    return lora is None or EMBEDDING_PATH in ranks or lora.trainable_token_indices is not None


def trained_sizes(lora: LoraConfig | None, shapes: Shapes, tied: bool) -> tuple[list[int], list[int], dict[str, int]]:
    """Return the sizes of all A and B and of other trained tensors, and path -> rank, 0 for a module's own weight."""
    linears = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    if lora is None:
        own = [math.prod(shape) for name, shape in shapes.items() if not (tied and name == "lm_head.weight")]
        return [], own, dict.fromkeys(linears, 0)
    linears.remove(EMBEDDING_PATH)
    ranks = {path: lora.rank(path) for path in select_targets(linears, lora, linears[-1], [EMBEDDING_PATH])}
    sizes = {path: (lora.rank(path), *shapes[f"{path}.weight"]) for path in ranks}
    factors = [r * n for r, *widths in sizes.values() for n in widths]
    outputs = [shapes[f"{path}.weight"][path == EMBEDDING_PATH] for path in ranks]  # (in, out)
    others = outputs * (lora.use_dora + lora.lora_bias)
    parents = {name: {name[: i.start()] for i in re.finditer(r"\.", name)} for name in shapes}
    saved = set(select_saved(sorted(set().union(*parents.values())), lora))
    whole = [name for name, paths in parents.items() if paths & saved]
    adapted = {f"{path}.bias" for path in ranks}
    biases = {name for name in shapes if name.endswith(".bias") and (lora.bias == "all" or name in adapted)}
    others += [math.prod(shapes[name]) for name in {*whole, *(biases if lora.bias != "none" else ())}]
    rows = sum(map(len, lora.token_lists()))
    others += [rows * shapes[f"{EMBEDDING_PATH}.weight"][1]] if rows else []
    return factors, others, ranks | {name.removesuffix(".weight"): 0 for name in whole}


def packed_names(config: LlamaConfig, quantization: QuantizeConfig, shapes: Shapes) -> tuple[set[str], bool]:
    """Return the names of the weights that are in four bits, and whether their absmaxes are quantized again."""
    if entry := config.source.get("quantization_config"):  # a checkpoint that is in four bits already
        quantization = QuantizeConfig("nf4", bool(entry.get("bnb_4bit_use_double_quant")))
    linears = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    linears.remove(EMBEDDING_PATH)
    chosen = {f"{path}.weight" for path in quantization.chosen(linears) if path.startswith(BLOCKS)}
    return chosen, quantization.double_quant


def packed_rows(shape: tuple[int, ...], double_quant: bool) -> list[RowBytes]:
    """Return the rows of the tensors of a weight in four bits: codes, absmaxes, and with double quantization theirs.

    Codes and absmaxes have the weight's rows if these are whole blocks; all else is flat.

    >>> packed_rows((3, 128), double_quant=False)
    [(3, 64), (3, 8)]
    """
    n, size = math.prod(shape), 1 if double_quant else WIDE
    blocks = -(-n // BLOCK_SIZE)
    nested = [(-(-blocks // NESTED_BLOCK_SIZE), WIDE), (1, WIDE)] if double_quant else []
    if shape[1] % BLOCK_SIZE:
        return [((n + 1) // 2, 1), (blocks, size), *nested]
    return [(shape[0], shape[1] // 2), (shape[0], shape[1] // BLOCK_SIZE * size), *nested]


class BaseBytes(NamedTuple):
    """The bytes of a base's parameters."""

    held: int  # on one rank
    blocks: list[int]  # of each block as it is gathered, with the rows that fill the last rank's share
    dense: int  # of the largest weight that is in four bits, once it is dequantized; 0 if there is none


def base_bytes(
    config: LlamaConfig, quantization: QuantizeConfig, dtype: torch.dtype, shapes: Shapes, shards: int = 1
) -> BaseBytes:
    """Count the bytes of the base's parameters, whose blocks are sharded over N ranks.

    held = Σ_others rows · size + Σ_blocks ⌈rows / N⌉ · size;    a block = N · Σ ⌈rows / N⌉ · size

    where size is that of a row.
    """
    packed, double_quant = packed_names(config, quantization, shapes)
    others, shares = 0, [0] * config.num_hidden_layers
    for name, shape in shapes.items():
        dense = (shape[0], dtype.itemsize * math.prod(shape[1:]))
        rows = packed_rows(shape, double_quant) if name in packed else [dense]
        if name.startswith(BLOCKS):
            shares[int(name.split(".")[2])] += sum(-(-count // shards) * size for count, size in rows)
        elif not (config.tie_word_embeddings and name == "lm_head.weight"):
            others += dense[0] * dense[1]
    largest = max((math.prod(shapes[name]) for name in packed), default=0)
    return BaseBytes(others + sum(shares), [shards * share for share in shares], dtype.itemsize * largest)


@dataclass(frozen=True)
class StepCost:
    """What one rank does in a step."""

    flop: int  # of matrix products and attention
    reduced: int  # bytes that it sends for the sum of the gradients
    gathered: int  # bytes that it sends for the weights of blocks that are sharded

    def seconds(self, gemm_rate: float, bandwidth: float) -> float:
        """Return the time of a step.

        t = max(FLOP / gemm_rate, gathered / bandwidth) + reduced / bandwidth

        The larger of the two, because the next block's weights are gathered while a block is computed. The gradients
        are complete only after the backward pass, so their sum overlaps with nothing. All ranks are as fast, and
        have micro-batches of one size; latency is not counted.

        >>> StepCost(flop=600, reduced=10, gathered=20).seconds(gemm_rate=100, bandwidth=5)
        8.0
        """
        return max(self.flop / gemm_rate, self.gathered / bandwidth) + self.reduced / bandwidth


def forecast_step(plan: Plan) -> StepCost:
    """Compute what a rank does in a step that has all its micro-batches, the largest of the run.

    FLOP = g · `batch_flop`;    reduced = 2 (N-1)/N · 4 P;    gathered = g · 2 (N-1)/N · S

    A ring adds the gradients, P numbers in float32, in 2 (N-1) messages of an N-th of them. Each block is gathered in
    the forward pass and again in the backward pass, which also computes it again where the plan says so.
    """
    config, N = plan.config, plan.world
    g = -(-plan.training.gradient_accumulation_steps // N)
    shapes = parameter_shapes(config)
    factors, others, ranks = trained_sizes(plan.lora, shapes, config.tie_word_embeddings)
    S = sum(base_bytes(config, plan.quantization, plan.dtype, shapes, N).blocks) if plan.shard == "base" else 0
    reduced = 2 * (N - 1) * WIDE * sum(factors + others) // N
    return StepCost(g * batch_flop(plan, shapes, ranks), reduced, g * 2 * (N - 1) * S // N)


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
    config, checkpointing, (lengths, M) = plan.config, plan.training.gradient_checkpointing, plan.batch()
    learns, total, T = embedding_learns(plan.lora, ranks), 0, sum(lengths)
    matrices: dict[str, list[str]] = {}  # the names of each block's
    for name, shape in shapes.items():
        if len(shape) == 2:
            matrices.setdefault(name.removeprefix(BLOCKS).partition(".")[0], []).append(name)

    def linear(name: str, tokens: int, is_recomputed: bool) -> int:
        (n, m), rank = shapes[name], ranks.get(name.removesuffix(".weight"))
        r, is_trained = rank or 0, rank == 0
        times = 1 + (is_recomputed and not (name.endswith("down_proj.weight") and r == 0))  # it would be the last
        return 2 * tokens * (m * n * (times + learns + is_trained) + r * (times * (m + n) + m + 2 * n + learns * m))

    for i, window in enumerate(config.windows):
        for group in GROUPS:
            starts = tuple(f"{BLOCKS}{i}.{part}" for part in group)
            names = [name for name in matrices[f"{i}"] if name.startswith(starts)]
            again = checkpointing == "block" or (checkpointing == "mlp" and group[0].startswith("mlp"))
            total += sum(linear(name, T, again) for name in names)
            learns = learns or any(name.removesuffix(".weight") in ranks for name in names)
            if group == GROUPS[0]:
                pairs = sum(_pairs(length, window or length) for length in lengths)
                total += config.num_attention_heads * config.head_dim * pairs * (4 + 4 * again + 10 * learns)
    return total + linear("lm_head.weight", M, False)


def _pairs(length: int, window: int) -> int:
    """Return Σ min(t, window) over t = 1 … length."""
    seen = min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen
