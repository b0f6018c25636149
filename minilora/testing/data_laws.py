"""Laws of the loss over labelled tokens, and of gradient accumulation over micro-batches and ranks; and their cases."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.testing.cases import rounded, tensor
from minilora.testing.compare import Array, Bounded, as_array, has_one_backward
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted, both, claim
from minilora.testing.reference import IGNORED

LossFn = Callable[[Tensor, Tensor], Any]
Row = tuple[Array, Array]  # x (T, D), labels (T)

# --- cases: inputs drawn from a seed, and right results with their bounds ---


def labels_of(row: str, tokens: Array) -> Array:
    """Return the labels of a row, in which "x" is a token with a label and "." one without: (T) -> (T)."""
    return np.where([character == "x" for character in row], tokens, IGNORED)


def targets_of(labels: Array) -> Array:
    """Return the label that each position predicts, the next one; -100 at the end of a row: (..., T) -> (..., T)."""
    return np.concatenate([labels[..., 1:], np.full_like(labels[..., :1], IGNORED)], axis=-1)


def slopes_of(z: Bounded, targets: Array) -> Bounded:
    """Return softmax - onehot: z (N, V), targets (N) -> (N, V)."""
    return (z - z.log_sum_exp().reshape(-1, 1)).exp() - np.eye(z.value.shape[1])[targets]


@dataclass(frozen=True)
class MaskedLogits:
    """`logits` (B, T, V) and `labels` (B, T), "x" with a label, "." without, with the right `loss` and `gradient`."""

    rows: tuple[str, ...] = (".xx",)
    vocabulary: int = 5
    spread: float = 3.0  # standard deviation of the logits
    seed: int = 0
    dtype: str = "float64"
    times: int = 1  # each row is repeated in itself
    tokens: tuple[int, ...] = ()  # in turn; drawn if not given
    result_dtype: str = ""  # in which the loss is computed; `dtype` if not given

    @cached_property
    def _drawn(self) -> tuple[Array, Array]:
        rng, rows = np.random.default_rng(self.seed), [row * self.times for row in self.rows]
        shape = len(rows), len(rows[0])
        logits = rounded(self.spread * rng.standard_normal((*shape, self.vocabulary)), self.dtype)
        tokens = np.resize(self.tokens, shape) if self.tokens else rng.integers(0, self.vocabulary, shape)
        labels = np.array(list(map(labels_of, rows, tokens)))
        return logits, labels

    logits = property(lambda self: self._drawn[0])
    labels = property(lambda self: self._drawn[1])

    @property
    def is_predicted(self) -> Array:
        """Whether the logits at each position predict a label, (B, T)."""
        return targets_of(self.labels) != IGNORED

    @cached_property
    def loss(self) -> Bounded:
        """L = 1/N Σ (log Σ exp(logits) - logits[label])."""
        z, targets = self._predicted
        return ((z.log_sum_exp() - z[np.arange(len(targets)), targets]) / max(1, len(targets))).total()

    @cached_property
    def gradient(self) -> Bounded:
        """dL/dlogits, exactly 0 where no label is predicted."""
        z, targets = self._predicted
        slopes = slopes_of(z, targets) * (Bounded.exact(np.ones(1), z.dtype) / max(1, len(targets)))
        value, error = np.zeros((2, *self.logits.shape))
        value[self.is_predicted], error[self.is_predicted] = slopes.value, slopes.error
        return Bounded(value, error, z.dtype)

    @property
    def _predicted(self) -> tuple[Bounded, Array]:
        chosen, dtype = self.is_predicted, self.result_dtype or self.dtype
        return Bounded.exact(rounded(self.logits[chosen], dtype), dtype), targets_of(self.labels)[chosen]


def padded(rows: Sequence[Row]) -> tuple[Array, Array]:
    """Return x (B, T, D) and labels (B, T) of rows; shorter ones are padded at their ends."""
    length = max(len(labels) for _, labels in rows)
    x = [np.pad(own, ((0, length - len(own)), (0, 0))) for own, _ in rows]
    labels = [np.pad(own, (0, length - len(own)), constant_values=IGNORED) for _, own in rows]
    return np.array(x), np.array(labels)


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batches of rows of one length each, "x" a token with a label, and the right `gradient` of W in x Wᵀ."""

    groups: tuple[tuple[str, ...], ...] = ((".xx",), (".x", "xx"))
    width: int = 3
    vocabulary: int = 4
    seed: int = 0
    dtype: str = "float64"
    spread: float = 1.0  # standard deviation of x

    @cached_property
    def W(self) -> Array:
        return rounded(np.random.default_rng(self.seed).standard_normal((self.vocabulary, self.width)), self.dtype)

    @cached_property
    def rows(self) -> list[list[Row]]:
        rng = np.random.default_rng(self.seed + 1000)
        return [[self._drawn(rng, text) for text in texts] for texts in self.groups]

    def _drawn(self, rng: np.random.Generator, text: str) -> Row:
        x = rounded(self.spread * rng.standard_normal((len(text), self.width)), self.dtype)
        return x, labels_of(text, rng.integers(0, self.vocabulary, len(text)))

    @cached_property
    def gradient(self) -> Bounded:
        """dL/dW = 1/N Σ (softmax - onehot) xᵀ, of sums divided at last or of means multiplied by their shares."""
        every = [row for rows in self.rows for row in rows]
        targets = np.concatenate([targets_of(labels) for _, labels in every])
        is_learned = targets != IGNORED
        inputs = np.concatenate([x for x, _ in every])[is_learned]
        x, W = Bounded.exact(inputs, self.dtype), Bounded.exact(self.W, self.dtype)
        z, n = x @ W.T, max(1, int(is_learned.sum()))
        slopes = slopes_of(z, targets[is_learned])
        return ((slopes.T @ x) / n).widened((slopes / n * n / n).T @ x)


# --- the loss ---

UPSTREAM = -4.0  # the gradient that comes from above: a loss may be scaled, or be one of several


def loss(loss_fn: LossFn, case: MaskedLogits) -> Iterator[Comparison]:
    ways: Sequence[tuple[str, Any, Any]] = (
        ("", nullcontext, "C"),
        (" under no_grad", torch.no_grad, "C"),
        (" under inference_mode", torch.inference_mode, "C"),
        (" of transposed views", nullcontext, "F"),
    )
    for mode, context, order in ways:
        logits, labels = (np.array(array, order=order) for array in (case.logits, case.labels))
        given = tensor(logits, case.dtype), tensor(labels, "int64")
        try:
            with context():
                actual = loss_fn(*given)
        except RuntimeError:  # a loss may refuse views
            if order == "F":
                return
            raise
        yield Comparison(f"the loss{mode}", actual, replace(case, result_dtype=computed(case, actual)).loss)
        yield Comparison(f"logits{mode}, which are only read", given[0], case.logits)
        yield Comparison(f"labels{mode}, which are only read", given[1], case.labels)


def computed(case: MaskedLogits, result: Any) -> str:
    """Return the dtype of a loss, float32 if it is: some cast logits to float32, whatever they are."""
    is_float32 = str(getattr(result, "dtype", "")).removeprefix("torch.") == "float32"
    return "float32" if is_float32 else case.dtype


def gradient(loss_fn: LossFn, case: MaskedLogits) -> Iterator[Comparison]:
    logits = tensor(case.logits, case.dtype).requires_grad_()
    given, labels = logits.clone(), tensor(case.labels, "int64")
    result = loss_fn(given, labels)
    if not isinstance(result, Tensor):
        raise NotApplicable("the loss is no tensor of PyTorch: it has no gradient")
    if not result.requires_grad:
        raise AssertionError("the loss has no gradient")
    slopes = partial(torch.autograd.grad, inputs=logits, grad_outputs=torch.full_like(result, UPSTREAM))
    right = replace(case, result_dtype=computed(case, result) if case.dtype == "float64" else "").gradient
    try:
        found = [slopes(result, retain_graph=True, materialize_grads=True)[0] / UPSTREAM for _ in range(2)]
    except RuntimeError as error:
        if not has_one_backward(error):
            raise
        found = [slopes(loss_fn(given, labels), materialize_grads=True)[0] / UPSTREAM]
    for again, own in zip(("", ", of a second backward pass"), found, strict=False):
        yield Comparison(f"the gradient of logits{again}", own, right)
    yield Comparison("logits, which are only read", given, as_array(logits))
    yield Comparison("labels, which are only read", labels, case.labels)


def nothing(loss_fn: LossFn, case: MaskedLogits) -> Iterator[Comparison]:
    try:
        found = float(as_array(loss_fn(tensor(case.logits, case.dtype), tensor(case.labels, "int64"))))
    except NotApplicable:
        raise
    except Exception:  # an error is as right as nan
        found = math.nan
    problem = "" if found == 0 or math.isnan(found) else f"found {found:g}; accepted are 0, nan and an error"
    yield claim("the loss without labels", problem)


# --- accumulation ---

ONE_RANK = {"all_reduce": lambda value: value, "rank": 0, "world_size": 1}


def accumulated(step_fn: Callable[..., Any], case: MicroBatches) -> Iterator[Comparison]:
    W, given = tensor(case.W, case.dtype), tensors(case, case.rows)
    batches = list(given)
    yield Comparison("dW", step_fn(W, batches, **accepted(step_fn, **ONE_RANK)), case.gradient)
    changed = f"found {len(batches)} after the call, expected {len(given)}"
    yield claim("the number of micro-batches", "" if len(batches) == len(given) else changed)
    yield Comparison("W, which is only read", W, case.W)
    for i, (own, right) in enumerate(zip(given, map(padded, case.rows), strict=True)):
        for name, now, before in zip(("x", "labels"), own, right, strict=True):
            yield Comparison(f"{name} of micro-batch {i}, which is only read", now, before)


def tensors(case: MicroBatches, groups: list[list[Row]]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor(x, case.dtype), tensor(labels, "int64")) for x, labels in map(padded, groups)]


# --- divided among ranks ---


class Waits(BaseException):
    """A rank calls `all_reduce`, and others have not yet done so."""


def over_ranks(step_fn: Callable[..., Any], case: MicroBatches) -> Iterator[Comparison]:
    if not accepted(step_fn, all_reduce=None):
        raise NotApplicable("the step takes no `all_reduce`")
    for world_size in range(1, len(case.rows) + 1):
        for rank, dW in enumerate(on_ranks(step_fn, case, world_size)):
            yield Comparison(f"dW of rank {rank} of {world_size}", dW, case.gradient)


def on_ranks(step_fn: Callable[..., Any], case: MicroBatches, world_size: int) -> list[Any]:
    """Run a step on one rank after another, all from the start again once another of their sums is known."""
    sums = list[Tensor]()
    while True:
        waiting, results = list[Tensor](), list[Any]()

        def all_reduce(known: Iterator[Tensor], value: Any) -> Tensor:
            for total in known:
                return total.clone()
            waiting.append(torch.as_tensor(value).detach().clone())  # noqa: B023  # called before the next round
            raise Waits

        for rank in range(world_size):
            options = {"all_reduce": partial(all_reduce, iter(sums)), "rank": rank, "world_size": world_size}
            shard = tensors(case, case.rows[rank::world_size])
            with suppress(Waits):
                results.append(step_fn(tensor(case.W, case.dtype), shard, **accepted(step_fn, **options)))
        if not waiting:
            return results
        if results:
            raise AssertionError("found ranks that call `all_reduce` less often than others, which wait forever")
        sums.append(torch.stack(waiting).sum(0))


# --- the tables ---


def logits_of(
    *all_rows: tuple[str, ...], spread: float = 3.0, dtypes: tuple[str, ...] = ("float64", "float32")
) -> list[MaskedLogits]:
    """Return a case of each of these rows in each dtype; the laws share them."""
    return [
        MaskedLogits(rows, (3, 5, 17)[seed % 3], spread, seed, dtype)
        for dtype in dtypes
        for seed, rows in enumerate(all_rows)
    ]


def batches_of(*all_groups: tuple[tuple[str, ...], ...]) -> list[MicroBatches]:
    """Return a case of each of these micro-batches in each dtype; the laws share them."""
    return [
        MicroBatches(groups, 2 + seed % 3, (4, 3, 9)[seed % 3], seed, dtype, spread=(1.0, 8.0)[seed % 2])
        for dtype in ("float64", "float32")
        for seed, groups in enumerate(all_groups)
    ]


_SMALL = (".x", "xx", ".xx", "x.x", ".x. xxx", ".xx ...", "..x.", "...x", ".... .xx. x...", "....xxx. .xx.x...")
_ROWS = [tuple(rows.split()) for rows in (*_SMALL, ".xxxxxxxxxxx ..........x.", "..xxx.xx .x...... xxxxxxxx ......xx")]
LOGITS = logits_of(*_ROWS)
LOGITS += [
    MaskedLogits(("x",), 7, dtype="float32", times=1099),
    MaskedLogits(("..xx", "x.x."), 2053, dtype="float32"),
    MaskedLogits((".x", "xx"), 2053, dtype="float32", times=5, tokens=(0, 64, 128, 256, 512, 1024, 2048, 2052)),
    MaskedLogits((".x.", "xxx") * 20, 7, dtype="float32"),
]
NO_LABELS = logits_of(("...",), ("x..", "..."))
HUGE = logits_of(*_ROWS[:6], spread=1e4)
LOW = logits_of(*_ROWS[:10], dtypes=("bfloat16", "float16"))
LOW += [  # a running sum of 8192 stops growing, and the others have no such number of labels
    MaskedLogits(("x",), 7, dtype=dtype, times=times)
    for dtype, times in (("bfloat16", 258), ("bfloat16", 8193), ("float16", 2050), ("float16", 8193))
]
GROUPS = (
    ((".x",), (".x",)),
    ((".xx",), (".x.",)),
    ((".x",), ("xxxx",), ("..x",)),
    ((".xx", "..x"), (".x..", "xxxx")),
    (("....xx..", ".x......"), ("xxxxxxxxxx",), ("..x", ".x."), (".x",)),
    (("..x",), ("xxx",), (".x",)) * 6,
    ((".x",), ("." + "x" * 99,)),
)
SINGLE = batches_of(((".x",),), ((".xx.", "...x"),), ((".x", "xxxx", "..x", "...", "x.x", ".xxx"),))
BATCHES = batches_of(*GROUPS)
EMPTY = batches_of(((".xx",), ("...",)), ((".x",), ("..",), ("xxx",)))
_LOSS = (
    ("value", "L = 1/N Σ -log p(label at t + 1 | logits at t), N labels in all rows", LOGITS, loss),
    ("gradient", "dL/dlogits = (softmax - onehot)/N where a label follows, else exactly 0", LOGITS, gradient),
    ("no_labels", "a batch without labels has the loss 0 or nan, or is an error", NO_LABELS, nothing),
    ("huge", "the loss of logits of 10⁴ is finite", HUGE, both(loss, gradient)),
    ("16-bit", "the loss and its gradient in bfloat16 and float16", LOW, both(loss, gradient)),
)
_STEP = "k micro-batches give the gradient of one batch, d/dW 1/N Σ of all losses, N labels, however rows are grouped"
LAWS = (
    *(Law("loss_masking", *row) for row in _LOSS),
    Law("accumulation", "value", _STEP, SINGLE + BATCHES + EMPTY, accumulated),
    Law("ranks", "gradient", "each rank gets the gradient of one batch", BATCHES + EMPTY, over_ranks),
)
