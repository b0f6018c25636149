"""The memory of a run: how much it takes, how much is free, and what fits; freed memory that is kept.

For the forecast the model is built on the device "meta", with its adapter. There a tensor has a shape and no numbers,
and the code that a run will execute allocates and frees what it would on another device. Weights, gradients and moments
are the sizes of parameters. A step with one block of each kind runs there, and what lives is counted, so no formula has
to follow the code. Only what ranks exchange and what libraries hold is estimated.

A step frees the memory that it allocated, and the next one allocates it again. The C library returns it to the system,
which zeroes it before it is used again: that took 10 to 25 % of a step of SmolLM2 on a CPU. So the command keeps the
freed memory of small tensors while it trains (`kept_memory`).
"""

import ctypes
import os
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
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
from minilora.runs.sampler import adapters_with_dropout, plan_steps, seed_dropout
from minilora.runs.settings import TrainConfig

LINUX = Path("/")  # where /proc and /sys are


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was used so far.

    On CUDA by tensors on the device; elsewhere by the process, less what it had used when minilora was imported: the
    interpreter and PyTorch's own code.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return high_water_bytes() - AT_IMPORT


def high_water_bytes() -> int:
    """Return the most memory that the process has used so far; 0 where the system does not report it."""
    # getrusage would include the process that started this one.
    if (high_water := _kilobytes("proc/self/status", "VmHWM")) is not None:
        return high_water
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kilobytes(file: str, field: str) -> int | None:
    """Return a field of one of Linux's files, "NAME: N kB", in bytes."""
    path = LINUX / file
    match = re.search(rf"^{field}:\s+(\d+) kB$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(match[1]) * 1024 if match else None


AT_IMPORT = high_water_bytes()


def free_memory_bytes(device: torch.device) -> int | None:
    """Return the memory that is free: of the GPU on CUDA, else of the machine and within the limits of the process.

    Of the machine's, each rank that torchrun has started there gets its share. On macOS it is all of the machine's
    memory, since the system makes room as needed. None where nothing is known.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "darwin":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available, ranks = _kilobytes("proc/meminfo", "MemAvailable"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None if available is None else min([available, *_free_in_groups()]) // ranks


def _free_in_groups() -> Iterator[int]:
    """Yield the memory that is free in each control group of the process that has a limit, and in those around it."""
    groups, top = LINUX / "proc/self/cgroup", LINUX / "sys/fs/cgroup"
    found = re.search(r"^0::/(.*)$", groups.read_text(), re.MULTILINE) if groups.is_file() else None
    group = top / found[1] if found else top
    for folder in (group, *group.parents):  # in a container the path may be the one outside, and is not there
        if not folder.is_relative_to(top):
            break
        with suppress(OSError):  # no such group, or one without a limit
            most, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
            cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            if most != "max":  # files that were read, and can be read again, do not count as used
                yield max(0, int(most) - used + (int(cached[1]) if cached else 0))


def amount(size: int) -> str:
    """Format a number of bytes; GB are 10⁹ bytes."""
    power = min((len(str(size)) - 1) // 3, 3)
    return f"{size / 1000**power:,.1f} {('', 'kB', 'MB', 'GB')[power]}" if power else f"{size} bytes"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's malloc.h


@contextmanager
def kept_memory(size: int = 2**25) -> Iterator[None]:
    """Keep freed memory of tensors below a size in the process within the block; return it to the system at its end.

    Larger tensors return theirs at once: kept memory is in pieces that they do not fit into, so it would grow. glibc
    accepts sizes up to 32 MB, 2^25.
    """
    _call_libc("mallopt", M_TRIM_THRESHOLD, -1)
    _call_libc("mallopt", M_MMAP_THRESHOLD, size)
    try:
        yield
    finally:
        _call_libc("mallopt", M_MMAP_THRESHOLD, 2**25)  # both limits grow so far by themselves
        _call_libc("mallopt", M_TRIM_THRESHOLD, 2**26)
        _call_libc("malloc_trim", 0)


def _call_libc(name: str, *arguments: int) -> None:
    """Call a function of glibc; without glibc this does nothing."""
    with suppress(AttributeError, OSError, TypeError):  # no such function, no such library, Windows
        getattr(ctypes.CDLL(None), name)(*arguments)


Shard = Literal["none", "base"]

# Memory of a process that tensors do not take, measured in the benchmarks on a CPU; on a GPU only the share is assumed.
LIBRARIES = 175_000_000  # loaded by PyTorch and its kernels in the first step
FRAGMENTS = 0.1  # of the activations and working tensors: freed memory in pieces that nothing fits into


@dataclass(frozen=True)
class Plan:
    """The resolved settings of a run: what is trained, in which dtype, where, and on how many ranks."""

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
        fitting = (way for way in get_args(Checkpointing) if plan.has_room(forecasts[way].peak))
        plan = replace(plan, training=replace(plan.training, gradient_checkpointing=next(fitting, "block")))
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
