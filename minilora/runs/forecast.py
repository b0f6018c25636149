"""Forecast how much memory a run takes, and choose what fits.

The model is built on the device "meta", with its adapter. There a tensor has a shape and no numbers, and the code that
a run will execute allocates and frees what it would on another device. Weights, gradients and moments are the sizes of
parameters. A step with one block of each kind runs there, and what lives is counted, so no formula has to follow the
code. Only what ranks exchange and what libraries hold is estimated.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.adapter import linear_layers
from minilora.adapters.attach import attach
from minilora.adapters.config import LoraConfig
from minilora.errors import TrainingError
from minilora.kernels.attention import MetaAttention
from minilora.llama import Checkpointing, Llama, LlamaConfig, assign, cross_entropy
from minilora.models.bitsandbytes import QuantizeConfig, is_four_bit
from minilora.models.checkpoint import build_on_meta
from minilora.nf4 import NF4Linear
from minilora.runs import processes
from minilora.runs.memory import amount, free_memory_bytes
from minilora.runs.sampler import adapters_with_dropout, plan_steps, seed_dropout
from minilora.runs.settings import TrainConfig

Shard = Literal["none", "base"]

# Memory of a process that tensors do not take, measured in the benchmarks on a CPU; on a GPU only the share is assumed.
LIBRARIES = 175_000_000  # loaded by PyTorch and its kernels in the first step
FRAGMENTS = 0.1  # of the activations and working tensors: freed memory in pieces that nothing fits into


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    config: LlamaConfig
    lora: LoraConfig | None  # None trains all weights
    training: TrainConfig
    quantization: QuantizeConfig
    dtype: torch.dtype
    device: torch.device
    rows: Sequence[tuple[int, int]]  # tokens and labelled tokens of each training row
    ranks: int = 1
    shard: Shard = "none"  # "base": each rank keeps its share of the rows of the blocks' frozen weights
    free: int | None = None  # bytes of memory on every rank, if known

    def has_room(self, size: int) -> bool:
        """Return whether so many bytes are free on every rank."""
        return self.free is None or size <= self.free


@dataclass(frozen=True)
class Forecast:
    """A forecast of the bytes at the peak of a run."""

    weights: int  # of the base, dense or 4-bit
    adapters: int  # the trained parameters that are not in `weights`, and a copy of the best so far
    gradients: int  # of everything that is trained
    moments: int
    activations: int  # what autograd saves of a micro-batch
    working: int  # peak of temporaries beyond `activations`; of a sharded base also the weights of two blocks
    overhead: int  # memory of libraries

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


Forecasts = Mapping[str, Forecast]


def forecast(plan: Plan) -> Forecasts:
    """Forecast the memory of one rank of a run, with each kind of gradient checkpointing."""
    model = _build_base(plan)
    base, blocks = _tensor_bytes(model), [*map(_tensor_bytes, model.model.layers)]
    shards = plan.ranks if plan.shard == "base" else 1
    weights = base - sum(blocks) + sum(blocks) // shards
    if plan.lora is None:
        model.requires_grad_(True)
    else:
        with torch.device("meta"):  # start values would take memory
            attach(model, plan.lora)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    best = gradients if plan.training.keep == "best" else 0
    adapters = _tensor_bytes(model) - base + best
    sent = gradients if plan.ranks > 1 else 0  # the buffer in which the ranks' gradients are added
    gathered = 2 * max(blocks) if shards > 1 else 0
    libraries = LIBRARIES if plan.device.type == "cpu" else 0
    seed_dropout(adapters_with_dropout(model.to("meta").train()), 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    micro_batches = (batch for step in plan_steps(len(plan.rows), plan.training) for batch in step)
    largest = max(micro_batches, key=lambda batch: sum(plan.rows[row][0] for row in batch))
    forecasts: dict[str, Forecast] = {}
    for way in get_args(Checkpointing):
        kept, most = _measure_step(plan, model, [plan.rows[row] for row in largest], way)
        working = max(most, sent - kept) + gathered
        overhead = int(FRAGMENTS * (kept + working)) + libraries
        forecasts[way] = Forecast(weights, adapters, gradients, 2 * gradients, kept, working, overhead)
    return forecasts


def _build_base(plan: Plan) -> Llama:
    """Build the base model without storage, in the dtype of the computation, or with 4-bit linears."""
    source, quantization = plan.config.source, plan.quantization
    model = build_on_meta(plan.config).to(plan.dtype).requires_grad_(False)
    if is_four_bit(source):
        quantization = QuantizeConfig("nf4", bool(source["quantization_config"].get("bnb_4bit_use_double_quant")))
    linears = linear_layers(model)
    for path in quantization.chosen(linears):
        packed = NF4Linear.quantize(linears[path].weight, None, quantization.double_quant)
        assign(model, f"{path}.weight", packed)
    return model


def _tensor_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all storages that operations made, and that still live, except those of `known` tensors."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.most = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._sizes = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()

    @property
    def now(self) -> int:
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count its results that are no views of tensors that were there."""
        result = func(*args, **(kwargs or {}))
        storages = {tensor.untyped_storage() for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
        self._sizes.update((storage, storage.nbytes()) for storage in storages if storage not in self._known)
        self.most = max(self.most, self.now)
        return result


def _measure_step(plan: Plan, model: Llama, rows: Sequence[tuple[int, int]], way: Checkpointing) -> tuple[int, int]:
    """Return what autograd saves of a micro-batch, and the peak of temporaries beyond that.

    `rows` has the tokens and labelled tokens of its rows. A step runs through one block of each kind, whose share
    counts as often as there are such blocks.
    """
    decoder, blocks = model.model, model.model.layers
    kinds: dict[Any, list[nn.Module]] = {}
    learns = any(p.requires_grad for p in decoder.embed_tokens.parameters())
    for block, window in zip(blocks, plan.config.windows, strict=True):
        kind = (learns, window, *((name, p.shape, p.requires_grad) for name, p in block.named_parameters()))
        kinds[kind] = [*kinds.pop(kind, []), block]  # in the order of their last blocks, where the backward pass begins
        learns = learns or any(p.requires_grad for p in block.parameters())
    decoder.layers = nn.ModuleList(alike[0] for alike in kinds.values())
    lengths, labelled = zip(*rows, strict=True)
    tokens = torch.empty(sum(lengths), dtype=torch.int64, device="meta")
    targets = tokens[: sum(labelled)]
    marks: list[int] = []  # bytes that live before each block, and after the last one
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with MemoryCounter([*model.parameters(), *model.buffers(), *gradients]) as live:
        modules = (*decoder.layers, decoder.norm)
        hooks = [module.register_forward_pre_hook(lambda *_: marks.append(live.now)) for module in modules]
        hidden = decoder(tokens, MetaAttention(plan.device, lengths), way).index_select(0, targets)
        loss = cross_entropy(hidden, targets, model.get_output_embeddings())
        del hidden
        kept = live.now
        for hook in hooks:  # a block that is recomputed runs once more
            hook.remove()
        loss.backward()
    decoder.layers = blocks
    saved = zip(kinds.values(), pairwise(marks), strict=True)
    more = sum((len(alike) - 1) * (after - before) for alike, (before, after) in saved)
    return kept + more, live.most - kept


def choose_plan(plan: Plan) -> tuple[Plan, Forecasts]:
    """Replace "auto" of the gradient checkpointing by the fastest that fits, else by the leanest."""
    forecasts = forecast(plan)
    free = (size for size in processes.all_gather(free_memory_bytes(plan.device)) if size is not None)
    plan = replace(plan, free=min(free, default=None))
    if plan.training.gradient_checkpointing == "auto":
        ways = [way for way in get_args(Checkpointing) if plan.has_room(forecasts[way].peak)]
        training = replace(plan.training, gradient_checkpointing=ways[0] if ways else "block")
        plan = replace(plan, training=training)
    return plan, forecasts


def check_memory(plan: Plan, forecasts: Forecasts) -> None:
    """Raise a `TrainingError` if a run does not fit into memory."""
    chosen = forecasts[plan.training.gradient_checkpointing]
    if not plan.has_room(chosen.peak):
        raise TrainingError(
            f"the run needs {amount(chosen.peak)} of memory, and {amount(plan.free or 0)} are "
            f"free on {plan.device}; what helps is a smaller --batch-size with more --gradient-accumulation-steps (the "
            "gradient is the same), --gradient-checkpointing block, --quantize nf4, a smaller --max-length, or --shard "
            "base with several ranks; --dry-run shows what each takes, and --force runs all the same"
        )
