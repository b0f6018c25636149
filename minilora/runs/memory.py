"""Forecast how much memory a run takes, from the model's config and the batch; choose and check what fits.

Every term is a product of sizes. `layer_terms` lists what autograd saves in a layer, and has to change with the
functions whose saved tensors it counts. A test compares the forecast with the tensors alive at the peak of a step.

    N  tokens of a micro-batch    M  labelled ones    D  hidden_size    F  intermediate_size    V  vocab_size
    H  query heads    K  key heads    E  head_dim    d  bytes of a number in the dtype of the computation
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from minilora.adapters.config import LoraConfig, flag
from minilora.adapters.parts import is_from_weight
from minilora.errors import TrainingError
from minilora.kernel.attention import MAX_BATCH, block_attention, fused_attention, query_block_size, select_kernel
from minilora.kernel.llama import HEAD_LOGITS
from minilora.kernel.lora import tile_size
from minilora.llama import Checkpointing
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import resolve_dtype
from minilora.runs import world
from minilora.runs.evaluate import DRIFT_TOKENS
from minilora.runs.machine import free_memory_bytes
from minilora.runs.objective import eval_groups
from minilora.runs.seeded import plan_steps
from minilora.runs.sizes import WIDE, Plan, Shapes, Shard, base_bytes, embedding_learns, parameter_shapes, trained_sizes

DRIFT_COPIES = 5  # tensors of all tokens' probabilities that exist at once in `measure_drift`
# What the process holds besides tensors, measured in the benchmarks on a CPU; on a GPU only the share is assumed.
LIBRARIES = 165_000_000  # loaded by PyTorch and its kernels in the first step
FRAGMENTS = 0.25  # of the activations: freed memory that the C library holds and cannot use
# In bfloat16 on a CPU, oneDNN compiles a matrix product for each number of rows, and keeps the last `CACHED`. Per
# product: the growth of steps with rows of 40 to 300 tokens, over 1024, with AMX.
PRODUCT, CACHED = 1_200_000, 1024


@dataclass(frozen=True)
class Forecast:
    """A forecast of the bytes at the peak of a run."""

    weights: int  # of the base, dense or in four bits
    adapters: int  # what is trained besides them, and a copy of the best so far
    gradients: int  # of everything that is trained
    moments: int
    activations: int  # what autograd saves of a micro-batch
    # The largest of what is needed besides: the logits of a chunk of rows with their gradient, the gradients within a
    # layer with a dequantized weight, or an evaluation, which needs no activations. Of a base that is sharded also the
    # weights of two blocks: the one that is computed, and the next.
    working: int
    overhead: int  # what the C library, oneDNN and kernels hold besides tensors

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


def forecast(plan: Plan) -> Forecast:
    """Compute the terms of a plan.

    Raises:
        TargetError: the adapter's config names modules that the model does not have.
    """
    config, lora, training, d = plan.config, plan.lora, plan.training, plan.dtype.itemsize
    lengths, M = plan.batch()
    N, D, F, V = sum(lengths), config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = parameter_shapes(config)
    factors, others, ranks = trained_sizes(lora, shapes, config.tie_word_embeddings)
    gradients = WIDE * sum(factors + others)
    adapters = (lora is not None) * gradients
    if lora is not None and is_from_weight(lora.init_lora_weights):
        adapters += WIDE * sum(factors)  # the start, which is subtracted
    adapters += (training.keep == "best") * gradients

    learns = embedding_learns(lora, ranks)
    # The input of the last norm; tokens, places and labels; cos and sin.
    activations = N * (d * D + WIDE) + 8 * (N + 2 * M) + d * N * config.head_dim
    for i in range(config.num_hidden_layers):
        terms, learns = layer_terms(plan, shapes, ranks, i, lengths, learns)
        x = d * N * D * learns
        attention = sum(size for name, size in terms.items() if not name.startswith("mlp"))
        saved = {"none": sum(terms.values()), "mlp": attention + x, "block": x}[training.gradient_checkpointing]
        activations += saved
    head = _head_bytes(plan, M, ranks.get("lm_head") == 0)
    is_sharded = plan.shard == "base" and plan.world > 1
    base = base_bytes(config, plan.quantization, plan.dtype, shapes, plan.world if is_sharded else 1)
    layer = _layer_bytes(plan, lengths, ranks, terms, sum(terms.values()) - saved, base.dense)
    n = max((int(np.asarray(split)[rows].sum()) for split in plan.evaluated for rows in eval_groups(split)), default=0)
    evaluation = base.dense + 3 * d * n * (D + F) + DRIFT_COPIES * WIDE * min(n, DRIFT_TOKENS) * V
    sent = gradients * (plan.world > 1)  # the buffer in which the ranks' gradients are added
    working = max(head, layer, evaluation - activations, sent - activations) + is_sharded * 2 * max(base.blocks)
    # With recomputation, the few tensors that are kept fragment the memory that the next layer needs, in 16 bits a
    # quarter as often as in float32; and where batches differ in size, one does not fit where the last one was.
    is_checkpointed = training.gradient_checkpointing != "none"
    holes = config.num_hidden_layers * d * N * (D + F) * is_checkpointed // (1 if d == WIDE else 4)
    holes += working * bool(np.ptp(plan.rows, axis=0)[0])
    holes *= not is_sharded  # then memory is given back at once
    overhead = int(FRAGMENTS * activations) + (LIBRARIES + holes + _compiled_bytes(plan, shapes)) * (
        plan.device.type == "cpu"
    )
    return Forecast(base.held, adapters, gradients, 2 * gradients, activations, working, overhead)


def _compiled_bytes(plan: Plan, shapes: Shapes) -> int:
    """Return what oneDNN keeps of the products of all micro-batches, but for those of the first, in `LIBRARIES`."""
    if plan.dtype != torch.bfloat16:
        return 0
    steps, size = plan_steps(np.asarray(plan.rows)[:, 0], plan.training), query_block_size(plan.dtype)
    linears = {shape for name, shape in shapes.items() if len(shape) == 2 and name.startswith("model.layers.")}
    outputs, inputs = ({*sizes} for sizes in zip(*linears, strict=True))
    # x Wᵀ and dy W of each shape; x Aᵀ, h A and hᵀ x of each width of x; u Bᵀ, dy B and dyᵀ u of each width of y.
    products = (2 * len(linears) + 3 * len(inputs) + 3 * len(outputs)) * (len(np.unique(steps.tokens)) - 1)
    blocks = sum(max(1, round(n / size)) for n in np.unique(steps.lengths)[:-1])  # of queries, with six products each
    return PRODUCT * min(CACHED, products + 6 * blocks)


def _head_bytes(plan: Plan, labelled: int, is_trained: bool) -> int:
    """Return the peak of the loss: labelled rows and their gradient, the logits of a chunk of rows and theirs."""
    d, D, V = plan.dtype.itemsize, plan.config.hidden_size, plan.config.vocab_size
    rows = min(labelled, max(1, HEAD_LOGITS // V))
    tile = tile_size(plan.device)
    copies = 1 if d == WIDE else 2  # of logits in float32: 16 bits are cast before the softmax
    probabilities = WIDE * min(copies * rows * V, (copies + 1) * tile)
    total = is_trained * WIDE * V * D  # the gradient of the head's own weight, of all chunks and of one
    cast = is_trained * (d < WIDE) * d * V * D
    return d * (2 * labelled * D + 2 * rows * V + rows * D) + total + cast + max(probabilities, d * rows * D + total)


def _layer_bytes(
    plan: Plan, lengths: list[int], ranks: dict[str, int], terms: dict[str, int], again: int, dense: int
) -> int:
    """Return the peak of the gradients within the last layer, with a `dense` weight and what is computed `again`."""
    config, lora, d = plan.config, plan.lora, plan.dtype.itemsize
    N, D, F, H = sum(lengths), config.hidden_size, config.intermediate_size, config.num_attention_heads
    tied = (lora is None and config.tie_word_embeddings) * WIDE * config.vocab_size * D  # the head's gradient is kept
    norm = N * D * (d + 3 * WIDE)  # dy of the last norm, and in float32 its input, that one's gradient, their product
    done = terms["mlp product"] + terms["mlp down branch"]  # what the backward pass has freed
    gates = 3 * d * N * F  # dy, dgate and dup
    if lora is not None and lora.lora_dropout:  # in the forward pass, W x beside the update and their sum
        gates = max(
            gates, 4 * d * N * F * (config.model_type == "phi3"), done + 2 * d * N * (F + D)
        )  # or the product with the mask
    linear = d * N * (2 * F + D) + dense  # dgate, dup and dx
    if lora is not None and lora.use_dora:  # dup in float32 with its products with m/c and y, and dgate
        has_up = f"model.layers.{config.num_hidden_layers - 1}.mlp.up_proj" in ranks
        linear = max(
            linear, N * (3 * WIDE * F + (3 * WIDE * F if (config.model_type == "phi3") else d * (F if has_up else D)))
        )
    swiglu = again - done + max(gates, linear - terms["mlp gate and up"])
    T = max(lengths)
    together = min(max(1, MAX_BATCH // config.num_key_value_heads), lengths.count(T))
    scores = together * H * min(T, query_block_size(plan.dtype)) * T
    mlp = sum(size for name, size in terms.items() if name.startswith("mlp"))
    attention = again - mlp + d * (N * (D + 2 * H * config.head_dim) + 3 * scores)  # dy and do; P, dP and dS
    return tied + max(norm, swiglu, attention)


def layer_terms(
    plan: Plan, shapes: Shapes, ranks: dict[str, int], layer: int, lengths: Sequence[int], learns: bool
) -> tuple[dict[str, int], bool]:
    """Return the bytes that autograd saves of a layer by name, the MLP's as "mlp …", and if its output requires grad.

    `ranks` are those of `trained`; `learns` says whether the layer's input requires grad.
    """
    config, lora, d = plan.config, plan.lora or LoraConfig(), plan.dtype.itemsize
    D, F, E = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    kernel = select_kernel(torch.empty(0, E, dtype=plan.dtype, device=plan.device), lengths, config.windows[layer])
    keys = H if kernel is fused_attention and plan.device.type != "cpu" else K  # GPUs' kernels get them repeated
    prefix, init = f"model.layers.{layer}.", lora.init_lora_weights
    adapted = {path.removeprefix(prefix): r for path, r in ranks.items() if path.startswith(prefix)}
    attends = learns or any(path.startswith("self_attn") for path in adapted)

    def inputs(*names: str) -> int:
        """Count the input x, for the gradient of A: one for all linears, or with dropout one each, and a mask."""
        widths = [shapes[f"{prefix}{path}.weight"][1] for path in adapted if path.startswith(names)]
        return sum(widths) * (d + 1) if lora.lora_dropout else max(widths, default=0) * d

    def branches(*names: str) -> int:
        """Count u = s·A x of each adapter, and what DoRA scales, for the gradient of its magnitude."""
        own, times = [path for path, r in adapted.items() if path.startswith(names) and r], 1 + is_from_weight(init)
        return d * sum(times * adapted[path] + lora.use_dora * shapes[f"{prefix}{path}.weight"][0] for path in own)

    terms = {
        "attention norm": learns * (d * D + WIDE),  # its input, and 1/ρ
        "attention inputs": inputs("self_attn.q", "self_attn.k", "self_attn.v"),
        "attention branches": branches("self_attn"),
        "q and k norms": attends * (config.model_type == "qwen3") * (d * E + WIDE) * (H + K),
        "q, k, v": attends * d * E * (H + 2 * keys),
        "fused attention": attends * (kernel is not block_attention) * (d * E + WIDE) * H,  # its output, and Σ exp
        "attention output": inputs("self_attn.o"),
        "mlp norm": attends * (d * D + WIDE),
        "mlp inputs": inputs("mlp.gate", "mlp.up"),
        "mlp branches": branches("mlp.gate", "mlp.up"),
        "mlp gate and up": (attends or any(path.startswith(("mlp.gate", "mlp.up")) for path in adapted)) * 2 * d * F,
        "mlp product": inputs("mlp.down"),
        "mlp down branch": branches("mlp.down"),
    }
    return {name: sum(lengths) * size for name, size in terms.items()}, attends or bool(adapted)


def choose_plan(plan: Plan, shard: str, held: int = 0) -> tuple[Plan, Forecast]:
    """Replace "auto" of `shard` and of the recomputation by the fastest way that fits into memory, else the leanest.

    `held` are bytes of the forecast that are in use already, such as those of a loaded model.
    """
    way = plan.training.gradient_checkpointing
    shards: Sequence[Any] = get_args(Shard) if shard == "auto" else (shard,)
    ways = get_args(Checkpointing) if way == "auto" else (way,)
    for chosen_shard, chosen_way in product(shards, ways):  # fastest first
        training = replace(plan.training, gradient_checkpointing=chosen_way)
        chosen = replace(plan, shard=chosen_shard, training=training)
        found = forecast(chosen)
        if _fits(chosen, found, held):
            break
    return chosen, found


def _fits(plan: Plan, found: Forecast, held: int = 0) -> bool:
    """Return whether a run fits into the memory of every rank."""
    free = free_memory_bytes(plan.device)
    return not world.any_rank(free is not None and found.peak > free + held)


def check_memory(plan: Plan, found: Forecast) -> None:
    """Raise a `TrainingError` if a run does not fit into memory, with the three cheapest changes that would help."""
    free = free_memory_bytes(plan.device)
    if free is None or _fits(plan, found):
        return
    lines = [f"the run needs {amount(found.peak)} of memory, and {amount(free)} are free on {plan.device}"]
    for flags, changed, cost in _remedies(plan):
        if len(lines) <= 3 and (peak := forecast(changed).peak) < found.peak:
            lines.append(f"{flags} brings it to {amount(peak)}; {cost}")
    raise TrainingError("\n  ".join([*lines, "--force runs all the same"]))


def _remedies(plan: Plan) -> Iterator[tuple[str, Plan, str]]:
    """Yield flags that may save memory, the plan with them, and what they cost: the cheapest first."""
    training = plan.training
    more = 2 * training.gradient_accumulation_steps
    name = "batch_size" if training.batch_tokens is None else "batch_tokens"
    size = training.batch_tokens or min(training.batch_size, len(plan.rows))
    changes: dict[str, Any] = {name: (size + 1) // 2, "gradient_accumulation_steps": more}
    flags = " ".join(f"{flag(key)} {value}" for key, value in changes.items())
    is_same = training.batch_tokens is None and size % 2 == 0
    cost = "the gradient is the same" if is_same else "a step has about as many tokens"
    yield flags, replace(plan, training=replace(training, **changes)), cost
    if plan.world > 1 and plan.shard == "none" and plan.lora is not None:
        yield "--shard base", replace(plan, shard="base"), "its blocks are sent in every micro-batch"
    if training.gradient_checkpointing != "block":
        recomputed = replace(plan, training=replace(training, gradient_checkpointing="block"))
        yield "--gradient-checkpointing block", recomputed, "it takes longer"
    if plan.lora is None:
        adapted = replace(plan, lora=LoraConfig(), dtype=resolve_dtype("auto", plan.config.source, plan.device))
        yield "--method lora", adapted, "an adapter is trained, and the weights stay as they are"
    else:
        if plan.quantization.quantize == "none" and not plan.config.source.get("quantization_config"):
            packed = replace(plan, quantization=QuantizeConfig("nf4"))
            yield "--quantize nf4", packed, "a little slower, and the base is rounded"
        yield "--dtype bfloat16", replace(plan, dtype=torch.bfloat16), "the base and the computation are rounded"
    half = (int(np.max(plan.rows, axis=0)[0]) + 1) // 2
    evaluated = [np.minimum(split, half) for split in plan.evaluated]
    shorter = replace(plan, rows=np.minimum(plan.rows, half), evaluated=evaluated)
    yield f"--max-length {half}", shorter, "longer rows lose their ends"


def check_room(out: Path, found: Forecast) -> None:
    """Raise a `TrainingError` if the disk has no room for the result of a run and for one checkpoint."""
    need, free = 2 * found.gradients + found.moments, shutil.disk_usage(out).free  # a gradient is as large as a weight
    if free < need:
        raise TrainingError(
            f"{out}: the result and a checkpoint take {amount(need)}, and {amount(free)} are free on the disk; "
            "make room, or give another --out; --force runs all the same"
        )


def amount(size: int) -> str:
    """Format a number of bytes; GB are 10⁹ bytes."""
    power = min((len(str(size)) - 1) // 3, 3)
    return f"{size / 1000**power:,.1f} {('', 'kB', 'MB', 'GB')[power]}" if power else f"{size} bytes"
