"""The processes of a run, its *ranks*, on `torch.distributed`: what each computes, and what they exchange.

Ranks hold the same adapters. A step's micro-batches are dealt out to them; then the gradients are added, and each rank
makes the same update. Everywhere else a run is the same code on every rank, and the first one writes and reports.
Without a process group there is one rank, and these functions do nothing.

    rank 0   micro-batches 0, N, 2N, …  ┐
    …                                   ├  Σ of gradients, losses and counts  →  the same step on N ranks
    rank k   k, N + k, 2N + k, …        ┘
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from minilora.errors import ConfigError, MiniloraError, TrainingError
from minilora.models.checkpoint import usable_device

P = ParamSpec("P")
T = TypeVar("T")
TIMEOUT = timedelta(hours=1)  # of a wait for another rank: the first one may be encoding the data


def size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this rank is the one that writes files and reports."""
    return size() == 1 or dist.get_rank() == 0


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the ranks that torchrun's environment variables name, for as long as the block lasts; give the device.

    On CUDA a rank uses the GPU of its local number, and NCCL; on the CPU it uses gloo. All but the first are silent.
    """
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and size() == 1
    if joins and device in ("auto", "cuda") and torch.cuda.is_available():
        # Chosen before any call of CUDA: a rank would open a context on GPU 0 too.
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    chosen = usable_device(device)
    with ExitStack() as stack:
        if joins:
            if chosen.type == "cuda":
                torch.cuda.set_device(chosen)
            try:
                # NCCL for tensors on a GPU, gloo for those on the CPU
                _communicate(dist.init_process_group, timeout=TIMEOUT)
            except ValueError as error:
                raise ConfigError(f"WORLD_SIZE is set, but {error}; start several processes by torchrun") from error
            stack.callback(dist.destroy_process_group)
            stack.callback(gc.collect)  # of a sharded model, whose hooks would keep the group alive
        if not is_main_process():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield chosen


def split_for_rank(items: Sequence[T]) -> list[tuple[T, bool]]:
    """Return the items of this rank, and whether each counts: rank k has items k, N + k, 2N + k, …

    Ranks have equally many: one that has fewer repeats the last item, which does not count. Where weights are sharded
    all ranks have to compute together.
    """
    ranks = size()
    own = [(item, True) for item in items[dist.get_rank() if ranks > 1 else 0 :: ranks]]
    return own + [(item, False) for item in items[-1:]] * (-(-len(items) // ranks) - len(own))


def all_reduce_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks: all travel in one buffer, in float32 or wider."""
    if size() == 1:
        return
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    buffer = torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors])
    _communicate(dist.all_reduce, buffer)
    for tensor, part in zip(tensors, buffer.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def all_gather(value: T) -> list[T]:
    """Return the value of every rank, which can be any object that can be pickled."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    _communicate(dist.all_gather_object, values, value)
    return values


def differing_keys(values: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ between ranks."""
    first, *others = all_gather({key: repr(value) for key, value in values.items()})
    return sorted({key for other in others for key, _ in first.items() ^ other.items()})


def run_on_rank0(compute: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Return on every rank what the first one computes, or raise its error, once it is done."""
    result: Any = None
    if is_main_process():
        try:
            result = compute(*arguments, **keywords)
        except (MiniloraError, OSError) as error:
            result = error
    result = all_gather(result)[0]
    if isinstance(result, Exception):
        raise result
    return result


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the first rank's."""
    for tensor in tensors if size() > 1 else ():
        _communicate(dist.broadcast, tensor.detach(), 0)


def _communicate(function: Callable[P, object], *arguments: P.args, **keywords: P.kwargs) -> None:
    """Call a function in which all ranks take part, and say in words that another rank does not answer."""
    try:
        function(*arguments, **keywords)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        reason = str(error).partition(". ")[0]
        raise TrainingError(
            f"rank {os.environ.get('RANK', '?')}: another process of the run does not answer ({reason:.200}); "
            "the same command resumes from the newest checkpoint, if there is one"
        ) from error
