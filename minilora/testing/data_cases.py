"""Cases of the laws of the loss over labelled tokens: inputs drawn from a seed, and right results with their bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from minilora.testing.cases import rounded
from minilora.testing.compare import Array, Bounded
from minilora.testing.reference import IGNORED, accumulated_gradient, masked_loss, masked_loss_gradient

Groups = tuple[tuple[int, ...], ...]  # numbers of rows in micro-batches; () is as they are


@dataclass(frozen=True)
class Places:
    """The positions of all rows laid end to end, (P)."""

    labels: Array  # the label at each, -100 where nothing is learned
    row: Array  # the number of its row
    group: Array  # and of its micro-batch

    @property
    def targets(self) -> Array:
        """The label that each position predicts, that of the next one in its row; -100 at the end of a row."""
        is_inner = np.diff(self.row, append=-1) == 0
        return np.where(is_inner, np.roll(self.labels, -1), IGNORED)


def places(groups: tuple[tuple[str, ...], ...], tokens: Array) -> Places:
    """Return the positions of micro-batches of rows, in which "x" is a label and "." is none."""
    rows = [(group, row) for group, rows in enumerate(groups) for row in rows]
    is_label = np.array([character == "x" for _, row in rows for character in row])
    return Places(
        np.where(is_label, tokens, IGNORED),
        np.repeat(np.arange(len(rows)), [len(row) for _, row in rows]),
        np.repeat([group for group, _ in rows], [len(row) for _, row in rows]),
    )


@dataclass(frozen=True)
class MaskedLogits:
    """Rows of logits (B, T, V) and labels (B, T): "x" is a token with a label, "." one without."""

    rows: tuple[str, ...] = (".xx",)
    vocabulary: int = 5
    spread: float = 3.0  # standard deviation of the logits
    seed: int = 0
    dtype: str = "float64"
    changes: Mapping[str, Array] = field(default_factory=dict, repr=False, compare=False)  # of drawn arrays
    arrays: dict[str, Array] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rng, shape = np.random.default_rng(self.seed), (len(self.rows), len(self.rows[0]))
        drawn = {
            "logits": rounded(self.spread * rng.standard_normal((*shape, self.vocabulary)), self.dtype),
            "tokens": rng.integers(0, self.vocabulary, shape),
        }
        self.arrays.update({**drawn, **self.changes})

    def __str__(self) -> str:
        return f"logits {self.logits.shape}, labels {' '.join(self.rows)} (x: a label, .: -100), {self.dtype}"

    logits = property(lambda self: self.arrays["logits"])
    tokens = property(lambda self: self.arrays["tokens"])

    @property
    def labels(self) -> Array:
        return self.places.labels.reshape(self.tokens.shape)

    @property
    def places(self) -> Places:
        return places((self.rows,), self.tokens.ravel())

    @cached_property
    def loss(self) -> Bounded:
        """L = 1/N Σ (log Σ exp(logits) - logits[label])."""
        z, targets = self._predicted
        mean = (z.log_sum_exp() - z[np.arange(len(targets)), targets]) / max(1, len(targets))
        return Bounded(np.asarray(masked_loss(self.logits, self.labels)), mean.total().error, self.dtype)

    @cached_property
    def gradient(self) -> Bounded:
        """dL/dlogits, exactly 0 where no label is predicted."""
        z, targets = self._predicted
        slopes = (z - z.log_sum_exp().reshape(-1, 1)).exp() - np.eye(self.vocabulary)[targets]
        share = Bounded.exact(np.ones(1), self.dtype) / max(1, len(targets))
        error = np.zeros(self.logits.shape)
        error[self.is_predicted] = (slopes * share).error
        return Bounded(masked_loss_gradient(self.logits, self.labels), error, self.dtype)

    @property
    def is_predicted(self) -> Array:
        """Whether the logits at each position predict a label, (B, T)."""
        return self.places.targets.reshape(self.tokens.shape) != IGNORED

    @property
    def _predicted(self) -> tuple[Bounded, Array]:
        chosen = self.is_predicted
        return Bounded.exact(self.logits[chosen], self.dtype), self.places.targets.reshape(chosen.shape)[chosen]

    def changed(self, rows: tuple[str, ...] | None = None, **arrays: Array) -> MaskedLogits:
        """Return the case with other labels and arrays."""
        same = {"logits": self.logits, "tokens": self.tokens}
        return replace(self, rows=rows or self.rows, changes={**same, **arrays})


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batches of rows of one length each, "x" a token with a label; x (B, T, D) gives logits = x Wᵀ, W (V, D)."""

    groups: tuple[tuple[str, ...], ...] = ((".xx",), (".x", "xx"))
    width: int = 3
    vocabulary: int = 4
    seed: int = 0
    dtype: str = "float64"

    def __str__(self) -> str:
        rows = " | ".join(" ".join(rows) for rows in self.groups)
        return f"micro-batches {rows} (x: a label, .: -100), W {(self.vocabulary, self.width)}, {self.dtype}"

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """W, and x and tokens of all positions laid end to end."""
        rng, count = np.random.default_rng(self.seed), sum(len(row) for rows in self.groups for row in rows)
        W, x = rng.standard_normal((self.vocabulary, self.width)), rng.standard_normal((count, self.width))
        tokens = rng.integers(0, self.vocabulary, count)
        return {"W": rounded(W, self.dtype), "x": rounded(x, self.dtype), "tokens": tokens}

    W = property(lambda self: self.arrays["W"])
    x = property(lambda self: self.arrays["x"])

    @property
    def places(self) -> Places:
        return places(self.groups, self.arrays["tokens"])

    def batches(self, groups: Groups = ()) -> Iterator[tuple[Array, Array]]:
        """Yield x (B, T, D) and labels (B, T) of micro-batches; shorter rows are padded at their ends."""
        found, numbers = self.places, self.places.row
        for rows in groups or [sorted({*numbers[found.group == g].tolist()}) for g in range(len(self.groups))]:
            length = max(int((numbers == row).sum()) for row in rows)
            x, labels = np.zeros((len(rows), length, self.width)), np.full((len(rows), length), IGNORED)
            for to, row in enumerate(rows):
                own = numbers == row
                x[to, : own.sum()], labels[to, : own.sum()] = self.x[own], found.labels[own]
            yield x, labels

    @cached_property
    def gradient(self) -> Bounded:
        """dL/dW = 1/N Σ (softmax - onehot) xᵀ, of sums divided at last or of means multiplied by their shares."""
        targets = self.places.targets
        is_learned = targets != IGNORED
        x, W = Bounded.exact(self.x[is_learned], self.dtype), Bounded.exact(self.W, self.dtype)
        z, n = x @ W.T, max(1, int(is_learned.sum()))
        slopes = (z - z.log_sum_exp().reshape(-1, 1)).exp() - np.eye(self.vocabulary)[targets[is_learned]]
        bound = (slopes / n * n / n).T @ x
        exact = accumulated_gradient(self.W, list(self.batches()))
        return Bounded(exact, bound.widened((slopes.T @ x) / n).error, self.dtype)
