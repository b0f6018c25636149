"""Forecast how much memory a run takes, and choose and check what fits.

The model is built on the device "meta", which has no storage, with its adapter. Weights, gradients and moments are the
sizes of its parameters. What a step needs besides is counted while one block of each kind, and the loss, run there
forward and backward (`runs/live.py`). Only what an evaluation takes, what ranks exchange and what libraries hold is
estimated.

    N  tokens of a micro-batch    D  hidden_size
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.adapters.attach import attach
from minilora.adapters.config import LoraConfig
from minilora.kernels.attention import OutlinedAttention
from minilora.llama import Checkpointing, Llama, LlamaConfig, cross_entropy
from minilora.models.bitsandbytes import QuantizeConfig, is_four_bit
from minilora.models.checkpoint import assign, build_on_meta
from minilora.models.shard import avoid_scalars
from minilora.nf4 import NF4Linear
from minilora.runs import world
from minilora.runs.config import TrainConfig
from minilora.runs.evaluate import DRIFT_TOKENS
from minilora.runs.live import Need, measure
from minilora.runs.objective import eval_groups
from minilora.runs.sampler import plan_steps, set_dropout_step
from minilora.runs.system import free_memory_bytes

WIDE = 4  # bytes of a float32
FORGETTING_COPIES = 5  # tensors of all tokens' probabilities that exist at once in `measure_forgetting`
# What a process holds besides tensors, measured in the benchmarks on a CPU; on a GPU only the share is assumed.
LIBRARIES = 200_000_000  # loaded by PyTorch and its kernels in the first step
FRAGMENTS = 0.1  # of the activations and working tensors: freed memory in pieces that nothing fits into
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

    def checkpointed(self, way: Checkpointing) -> Plan:
        """Return the plan with another gradient checkpointing."""
        return replace(self, training=replace(self.training, gradient_checkpointing=way))

    def batch(self) -> tuple[list[int], int]:
        """Return the tokens of each row of the largest micro-batch, and its number of labelled tokens."""
        steps = plan_steps(np.asarray(self.rows)[:, 0], self.training)
        rows = np.asarray(self.rows)[steps.batch(int(steps.tokens.argmax()))]
        return rows[:, 0].tolist(), int(rows[:, 1].sum())


@dataclass(frozen=True)
class Forecast:
    """A forecast of the bytes at the peak of a run."""

    weights: int  # of the base, dense or in four bits
    adapters: int  # what is trained besides them, and a copy of the best so far
    gradients: int  # of everything that is trained
    moments: int
    activations: int  # what autograd saves of a micro-batch
    # The most that lives besides: in the loss, in a block's backward pass, or in an evaluation, which needs no
    # activations. Of a base that is sharded also the weights of two blocks: the one that is computed, and the next.
    working: int
    overhead: int  # what libraries hold besides tensors

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


def forecast(plan: Plan) -> Forecast:
    """Forecast the memory of a plan, whose gradient checkpointing is not "auto".

    Raises:
        TargetError: the adapter's config names modules that the model does not have.
    """
    model, shards = build_base(plan), plan.world if plan.shard == "base" else 1
    layers, base = model.model.layers, _tensor_bytes(model)
    blocks = [sum(_share_bytes(p, shards) for p in block.parameters()) for block in layers]
    weights = base - _tensor_bytes(layers) + sum(blocks)
    if plan.lora is None:
        model.requires_grad_(True)
    else:
        with torch.device("meta"):  # start values would take memory
            attach(model, plan.lora)
    set_dropout_step(model.to("meta").train(), 0)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    best = gradients if plan.training.keep == "best" else 0
    adapters = _tensor_bytes(model) - base + best
    sent = gradients if plan.world > 1 else 0  # the buffer in which the ranks' gradients are added
    gathered = 2 * shards * max(blocks) if shards > 1 else 0
    kept, working = _measure_step(plan, model)
    working = max(working, sent - kept, _evaluation_bytes(plan) - kept) + gathered
    overhead = int(FRAGMENTS * (kept + working)) + (LIBRARIES if plan.device.type == "cpu" else 0)
    return Forecast(weights, adapters, gradients, 2 * gradients, kept, working, overhead)


def build_base(plan: Plan) -> Llama:
    """Build the base model without storage, in the dtype of the computation, or with linears in four bits."""
    source, quantization = plan.config.source, plan.quantization
    model = build_on_meta(plan.config).to(plan.dtype).requires_grad_(False)
    if is_four_bit(source):
        quantization = QuantizeConfig("nf4", bool(source["quantization_config"].get("bnb_4bit_use_double_quant")))
    linears = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear)}
    packed: dict[Any, NF4Linear] = {}  # one of each shape, since to quantize without storage is slow too
    for path in quantization.chosen(list(linears)):
        weight = linears[path].weight
        if weight.shape not in packed:
            packed[weight.shape] = NF4Linear.quantize(weight, None, quantization.double_quant)
            avoid_scalars(packed[weight.shape])
        assign(model, f"{path}.weight", copy.deepcopy(packed[weight.shape]))
    return model


def _tensor_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _share_bytes(parameter: Tensor, shards: int) -> int:
    """Return the bytes of a rank's share of the rows of a parameter, ⌈rows / shards⌉ of them."""
    return -(-len(parameter) // shards) * (parameter.nbytes // len(parameter))


def _evaluation_bytes(plan: Plan) -> int:
    """Return what the largest forward pass of an evaluation takes, within an MLP and for tokens' probabilities."""
    batches = (np.asarray(split)[rows].sum() for split in plan.evaluated for rows in eval_groups(split))
    N, config = max(map(int, batches), default=0), plan.config
    mlp = 3 * plan.dtype.itemsize * N * (config.hidden_size + config.intermediate_size)
    return mlp + FORGETTING_COPIES * WIDE * min(N, DRIFT_TOKENS) * config.vocab_size


def _measure_step(plan: Plan, model: Any) -> tuple[int, int]:
    """Return what autograd saves of the largest micro-batch, and the most that lives besides."""
    (lengths, labelled), decoder, way = plan.batch(), model.model, plan.training.gradient_checkpointing
    N, D = sum(lengths), plan.config.hidden_size
    angles = plan.config.rope.rotation([range(length) for length in lengths], torch.device("cpu"))
    rotation = tuple(table.to("meta", plan.dtype) for table in angles)
    tokens, positions, labels = (torch.empty(n, dtype=torch.int64, device="meta") for n in (N, labelled, labelled))
    inputs = (*rotation, tokens, positions, labels)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    known = (*model.parameters(), *model.buffers(), *gradients, *inputs)

    def hidden(learns: bool) -> Tensor:
        return torch.empty(N, D, dtype=plan.dtype, device="meta", requires_grad=learns)

    def loss() -> Tensor:
        x = hidden(any(p.requires_grad for p in decoder.parameters()))
        return cross_entropy(decoder.norm(x).index_select(0, positions), labels, model.get_output_embeddings())

    def run(block: Any, learns: bool) -> Tensor:
        arguments = (hidden(learns), rotation, OutlinedAttention(plan.device, lengths), way)
        return checkpoint(block, *arguments, use_reentrant=False) if way == "block" else block(*arguments)

    last, embedding = measure(loss, known), decoder.embed_tokens.weight
    # The gradient of a tied head waits for that of the embedding.
    waiting = embedding.nbytes if embedding.requires_grad and plan.config.tie_word_embeddings else 0
    kept, working = sum(tensor.nbytes for tensor in inputs), last.kept + last.working
    learns, needs = any(p.requires_grad for p in decoder.embed_tokens.parameters()), dict[Any, Need]()
    for block, window in zip(decoder.layers, plan.config.windows, strict=True):
        kind = (learns, window, *((name, p.shape, p.requires_grad) for name, p in block.named_parameters()))
        if kind not in needs:
            needs[kind] = measure(partial(run, block, learns), known)
        kept += needs[kind].kept
        working = max(working, needs[kind].working + waiting)
        learns = needs[kind].learns
    return kept, working


def choose_plan(plan: Plan) -> tuple[Plan, Forecast]:
    """Replace "auto" of the gradient checkpointing by the fastest that fits, else by the leanest."""
    way = plan.training.gradient_checkpointing
    ways: Sequence[Any] = get_args(Checkpointing) if way == "auto" else (way,)
    for each in ways:
        chosen = plan.checkpointed(each)
        found = forecast(chosen)
        if fits(chosen, found):
            break
    return chosen, found


def fits(plan: Plan, found: Forecast) -> bool:
    """Return whether a run fits into the memory of every rank."""
    free = free_memory_bytes(plan.device)
    return not world.any_rank(free is not None and found.peak > free)


def amount(size: int) -> str:
    """Format a number of bytes; GB are 10⁹ bytes."""
    power = min((len(str(size)) - 1) // 3, 3)
    return f"{size / 1000**power:,.1f} {('', 'kB', 'MB', 'GB')[power]}" if power else f"{size} bytes"
