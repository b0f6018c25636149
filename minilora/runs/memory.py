"""How much memory training takes, told without taking it.

The model's own forward pass, loss and backward pass run on stand-ins: tensors with shape, dtype and device, but without
numbers. Meanwhile an account is kept of all storages that live. So there is no second description of the model that
could drift from it, and what PyTorch's autograd keeps is found and not guessed.

What a kernel takes and gives back within itself is not seen, nor what the process holds besides tensors.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.adapters.attach import disable_adapter, set_dropout_step
from minilora.adapters.find import adapter_layers
from minilora.errors import TrainingError
from minilora.models import ops
from minilora.models.recompute import Recompute
from minilora.runs.batch import plan_steps
from minilora.runs.config import TrainConfig
from minilora.runs.data import Example
from minilora.runs.diagnose import free_memory_bytes
from minilora.runs.evaluate import DRIFT_TOKENS
from minilora.runs.flat import Flat
from minilora.runs.objective import groups_to_evaluate
from minilora.runs.optimizer import learning

if TYPE_CHECKING:
    from minilora.models.classifier import Classifier
    from minilora.models.llama import Llama

ROOM = 0.8  # of what is free: the rest is for what no forecast sees
DOCUMENTS = 16  # that are traced; more are laid together
HEAD_CHUNKS = 2  # of the loss that are traced: the others take what these do, but for their gradient
UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
MOMENTS = 2  # numbers that AdamW holds for each that it trains, in the same dtype


@dataclass(frozen=True)
class Forecast:
    """Bytes that a step takes.

    weights, adapters: the parameters, those of adapters apart, with their copy in the dtype of the computation.
    gradients, optimizer: of those that are trained; gradients live all the time.
    activations: what lives at the end of the trunk's forward pass besides.
    head_chunk: what the loss takes on top of it.
    peak: the most that lives at once. It is no sum: what the backward pass or an evaluation takes for a moment may be
        more than the loss does.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    head_chunk: int
    peak: int


def forecast(
    model: Llama | Classifier,
    lengths: Sequence[int],
    labelled: int,
    config: TrainConfig,
    device: torch.device,
    evaluated: Sequence[int] = (),
) -> Forecast:
    """What training the model as it is takes on a device. No number of the model is read: it may be on "meta".

    Where all layers are alike, one more takes what one more takes: two and three tell the rest.

    Args:
        model: a `Llama` with what is to be trained.
        lengths: tokens of each row of a micro-batch.
        labelled: how many of its tokens are learned.
        config: how it is trained.
        device: where; it has to be there.
        evaluated: tokens of each row of the largest batch of an evaluation, if there are any.
    """
    own = {p for layer in adapter_layers(model).values() for p in {*layer.parameters()} - {*layer.base.parameters()}}
    adapters, trained = _bytes(own), _bytes(p for p in model.parameters() if p.requires_grad)
    weights = _bytes(model.parameters()) - adapters
    depth = len(model.model.layers)
    if depth > 3 and _alike(model):
        two, three = (_traced(model, layers, lengths, labelled, config, device, evaluated) for layers in (2, 3))
        found = _Trace(*(last + (depth - 3) * (last - first) for first, last in zip(two, three, strict=True)))
    else:
        found = _traced(model, depth, lengths, labelled, config, device, evaluated)
    best = trained if config.keep == "best" else 0  # a copy of what is trained
    moments = MOMENTS * found.gradients
    peak = found.held + moments + best + max(found.step, found.measuring)
    return Forecast(
        weights, adapters + found.casts, found.gradients, moments, found.activations, found.head_chunk, peak
    )


class _Trace(NamedTuple):
    """Bytes: what lives between steps, without moments, of it gradients and casts; and what parts of a step add."""

    held: int
    gradients: int
    casts: int
    activations: int
    head_chunk: int
    step: int
    measuring: int


def _traced(
    model: Llama | Classifier,
    layers: int,
    lengths: Sequence[int],
    labelled: int,
    config: TrainConfig,
    device: torch.device,
    evaluated: Sequence[int],
) -> _Trace:
    """What the first so many layers take, with all that is around them."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Account() as account:
        model = _stand_in(model, device, layers)
        flat = Flat(model, learning(model, config))
        flat.zero_grad()
        set_dropout_step(model, config.seed, 0)
        held = account.live
        with flat.cast():
            step = _step(model, _together(model, lengths), labelled, config, account)
        shown = _together(model, evaluated)
        measuring = _measured(account, lambda: _evaluation(model, shown, device)) if evaluated else 0
    gradients = _bytes(segment.gradient for segment in flat.segments)
    casts = _bytes(segment.low for segment in flat.segments if segment.low is not None)
    return _Trace(held, gradients, casts, *step, measuring)


def _alike(model: Llama | Classifier) -> bool:
    """Do all layers have tensors of the same names, shapes and kinds, and look as far?"""
    layers = (
        [
            (name, t.shape, t.dtype, t.requires_grad)
            for name, t in chain(layer.named_parameters(), layer.named_buffers())
        ]
        for layer in model.model.layers
    )
    first, *others = zip(layers, model.config.windows, model.config.rotated, strict=True)
    return all(other == first for other in others)


def largest(lengths: Sequence[int], labelled: Sequence[int], config: TrainConfig) -> tuple[list[int], int]:
    """The micro-batch of a run that has the most tokens: those of each row, and how many of all are learned."""
    batches = (rows for micro_batches in plan_steps(lengths, config) for rows in micro_batches)
    batch = max(batches, key=lambda rows: sum(lengths[row] for row in rows))
    return [lengths[row] for row in batch], sum(min(labelled[row], lengths[row]) for row in batch)


def largest_evaluation(*splits: Sequence[int]) -> list[int]:
    """The tokens of each row of the largest batch of an evaluation, of rows by their numbers of tokens."""
    batches = ([lengths[row] for row in rows] for lengths in splits for rows in groups_to_evaluate(lengths))
    return max(batches, key=sum, default=[])


def fitting(
    told: Callable[[Recompute], Forecast], free: int | None, ways: Sequence[Recompute] = get_args(Recompute)
) -> tuple[Recompute, Forecast]:
    """The way to recompute that costs the least time, of those that fit into what is free, or else the leanest one.

    Args:
        told: what a way takes.
        free: bytes; None where they are not known.
        ways: those to choose from, the fastest first.
    """
    for way in ways:
        found = told(way)
        if free is None or found.peak <= ROOM * free:
            break
    return way, found


def fitting_recompute(
    model: Llama | Classifier, dataset: Sequence[Example], held_out: Sequence[Example], config: TrainConfig
) -> Recompute:
    """The fastest way for which there is room beside the model, on its device.

    Raises:
        TrainingError: the model does something that cannot be told in advance, such as to look at its numbers.
    """
    device, held = next(model.parameters()).device, _bytes(model.parameters())
    rows = largest([len(example.tokens) for example in dataset], [example.labelled for example in dataset], config)
    evaluated = largest_evaluation([len(example.tokens) for example in held_out])

    def told(way: Recompute) -> Forecast:
        try:
            found = forecast(model, *rows, replace(config, recompute=way), device, evaluated)
        except Exception as error:  # of a module or a hook that is not ours, or of PyTorch's stand-ins
            raise TrainingError(f"recompute 'auto' cannot tell what this model takes, name a way: {error}") from error
        return replace(found, peak=found.peak - held)

    return fitting(told, free_memory_bytes(device))[0]


class _Account(TorchDispatchMode):
    """How many bytes of storage live, and the most that did, of all that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most of all calls, and no operation
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())

    def _let_go(self, place: int, size: int) -> None:
        self.known.remove(place)
        self.live -= size


def _step(
    model: Llama | Classifier, lengths: Sequence[int], labelled: int, config: TrainConfig, account: _Account
) -> tuple[int, int, int]:
    """Activations, what the loss takes beside them, and the most at once, of `train.loop`'s work on a micro-batch."""
    device = next(model.parameters()).device
    account.most = before = account.live
    tokens, labels, rows = (
        torch.empty(n, dtype=torch.int64, device=device) for n in (sum(lengths), labelled, labelled)
    )
    batch = account.live - before
    hidden = model.model(tokens, lengths, recompute=config.recompute)
    activations = account.live - before - batch
    forward, account.most = account.most, account.live
    head = model.get_output_embeddings()
    learned, traced = hidden.index_select(0, rows), HEAD_CHUNKS * ops.head_chunk(head)
    loss = ops.labelled_cross_entropy(learned[:traced], labels[:traced], head)
    untraced = learned[traced:].nbytes  # of their gradient
    with_loss, account.most = account.most + untraced, account.live
    del hidden, learned
    loss.backward()
    return activations, with_loss - before - batch - activations, max(forward, with_loss, account.most) - before


def _evaluation(model: Llama | Classifier, lengths: Sequence[int], device: torch.device) -> None:
    """What takes the most of `train.evaluate`: the base and the adapter compared on general text."""
    tokens = torch.empty(sum(lengths), dtype=torch.int64, device=device)
    with torch.no_grad(), disable_adapter(model):
        base = model.model.embed_tokens(tokens)  # as large as what the base makes of it, which takes no more to make
        hidden = model.model(tokens, lengths)
        log_p, log_q = (
            model.get_output_embeddings()(states[:DRIFT_TOKENS])
            .to(torch.promote_types(states.dtype, torch.float32))
            .log_softmax(-1)
            for states in (base, hidden)
        )
        (log_p.exp() * (log_p - log_q)).sum()


def _together(model: Llama | Classifier, lengths: Sequence[int]) -> list[int]:
    """As many tokens in fewer documents: where no layer has a window, attention keeps as much for them."""
    if len(lengths) <= DOCUMENTS or any(window is not None for window in model.config.windows):
        return list(lengths)
    each = -(-len(lengths) // DOCUMENTS)
    return [sum(lengths[i : i + each]) for i in range(0, len(lengths), each)]


def _measured(account: _Account, work: Callable[[], None]) -> int:
    """The most bytes that live while it runs, more than before."""
    account.most = before = account.live
    work()
    return account.most - before


def _stand_in(model: Llama | Classifier, device: torch.device, layers: int) -> Llama | Classifier:
    """A model of the first so many layers, with parameters and buffers of the same shapes and dtypes on the device."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    memo: dict[int, Any] = {id(buffer): empty(buffer) for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(empty(p), p.requires_grad) for p in model.parameters()}
    memo |= {id(seed): seed for layer in adapter_layers(model).values() for seed in layer.dropout_seeds.values()}
    trunk = model.model
    memo[id(trunk.layers)] = copy.deepcopy(nn.ModuleList(list(trunk.layers)[:layers]), memo)
    return copy.deepcopy(model, memo).train()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def amount(size: int) -> str:
    """Bytes as a person reads them; GB are 10⁹ bytes."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), (1, "bytes"))
    return f"{size / unit:,.1f} {name}" if unit > 1 else f"{size} {name}"
