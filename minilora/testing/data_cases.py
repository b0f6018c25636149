"""Cases of the laws of the loss over labelled tokens: inputs drawn from a seed, right results, and known wrong ones."""

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

    def shifted(self, shift: int) -> Array:
        """Return the label `shift` positions further in the same row; -100 beyond its ends."""
        found = np.full_like(self.labels, IGNORED)
        for row in set(self.row.tolist()):
            own = np.flatnonzero(self.row == row)
            to, source = own[max(0, -shift) : len(own) - max(0, shift)], own[max(0, shift) : len(own) + min(0, shift)]
            found[to] = self.labels[source]
        return found

    @property
    def right(self) -> tuple[Array, Array]:
        """The label that each position predicts, and its weight in the loss: 1/N or 0."""
        targets = self.shifted(1)
        learned = targets != IGNORED
        return targets, learned / max(1, learned.sum())

    def wrong(self) -> dict[str, tuple[Array, Array]]:
        """Return targets and weights that known mistakes have in place of the right ones; not all differ from them."""
        targets, weights = self.right
        learned = (targets != IGNORED).astype(float)
        n, positions, rows = max(1.0, learned.sum()), len(targets), self.row.max() + 1
        inner = np.diff(self.row, append=rows) == 0  # not the last position of its row
        found = {
            "the sum of the losses is not divided": (targets, learned),
            "the sum is divided by the number of labels twice": (targets, learned / n**2),
            "the sum is divided by all positions instead of the labels": (targets, learned / positions),
            "the sum is divided by all positions but the last of each row": (targets, learned / max(1, inner.sum())),
            "the sum is divided by the number of rows": (targets, learned / rows),
            "the labels are counted before the shift: the first of a row counts": (
                targets,
                learned / max(1, (self.labels != IGNORED).sum()),
            ),
            "positions without a label, such as padding, are counted with token 0": (
                np.where(inner, np.maximum(targets, 0), IGNORED),
                inner / max(1, inner.sum()),
            ),
            "token 0 is taken for padding and not learned": _mean(np.where(targets == 0, IGNORED, targets)),
            "the loss has the wrong sign": (targets, -weights),
            "it is the mean of the means of the rows": (targets, self._of_means(targets, self.row, rows)),
            "it is the mean of the means of the rows that have labels": (targets, self._of_means(targets, self.row)),
            "nothing is shifted: logits at t are compared with the label at t": _mean(self.labels),
            "the shift is made twice: logits at t predict the label at t + 2": _mean(self.shifted(2)),
            "the shift goes the wrong way: logits at t predict the label at t - 1": _mean(self.shifted(-1)),
            "the labels are rolled: the last position of a row predicts its first label": _mean(
                np.where(inner, targets, self.labels[np.searchsorted(self.row, self.row)])
            ),
            "the rows are shifted as one: the last position of a row predicts the first label of the next": _mean(
                np.append(self.labels[1:], IGNORED)
            ),
        }
        for shift, name, lost in ((0, "late", "first"), (2, "early", "last")):
            cause = f"the label mask is one position {name}: the {lost} token of each labelled stretch is lost"
            is_kept = (self.shifted(shift) != IGNORED) & inner
            kept = np.where(is_kept, targets, IGNORED)
            found[cause] = _mean(kept)
            found[f"{cause}, but still counted"] = kept, (kept != IGNORED) / n
            found[f"{cause}, and -100 is taken for token 0"] = _mean(np.where(is_kept, np.maximum(targets, 0), IGNORED))
        return found | (self._wrong_accumulations() if self.group.any() else {})

    def _wrong_accumulations(self) -> dict[str, tuple[Array, Array]]:
        targets, weights = self.right
        learned, groups = (targets != IGNORED).astype(float), self.group.max() + 1
        first, last = (self.group == g for g in (0, groups - 1))
        means = self._of_means(targets, self.group, groups)
        found = {
            "it is the mean of the means of the micro-batches": means,
            "it is the mean of the means of the micro-batches that have labels": self._of_means(targets, self.group),
            "the means of the micro-batches are added": means * groups,
            "it is divided by the number of micro-batches, too": weights / groups,
            "it is divided by the number of micro-batches twice": means / groups,
            "the sum is divided by the number of micro-batches instead of the labels": learned / groups,
            "the sum is divided by the labels of the last micro-batch": learned / max(1, learned[last].sum()),
            "the sum is divided by the labels of the first micro-batch": learned / max(1, learned[first].sum()),
            "the gradient is that of the last micro-batch only": self._of_means(targets, self.group, 1) * last,
            "the gradient is that of the last micro-batch only, divided by all labels": weights * last,
            "the gradient is that of the first micro-batch only": self._of_means(targets, self.group, 1) * first,
        }
        return {cause: (targets, weight) for cause, weight in found.items()}

    def _of_means(self, targets: Array, part: Array, parts: int | None = None) -> Array:
        """Return the weights of a mean of means over parts: all, or those that have labels."""
        learned = targets != IGNORED
        counts = np.bincount(part, learned)
        return learned / np.maximum(1, counts)[part] / (parts or max(1, (counts > 0).sum()))


def _mean(targets: Array) -> tuple[Array, Array]:
    return targets, (targets != IGNORED) / max(1, (targets != IGNORED).sum())


def places(groups: tuple[tuple[str, ...], ...], tokens: Array) -> Places:
    """Return the positions of micro-batches of rows, in which "x" is a label and "." is none."""
    rows = [(group, row) for group, rows in enumerate(groups) for row in rows]
    is_label = np.array([character == "x" for _, row in rows for character in row])
    return Places(
        np.where(is_label, tokens, IGNORED),
        np.repeat(np.arange(len(rows)), [len(row) for _, row in rows]),
        np.repeat([group for group, _ in rows], [len(row) for _, row in rows]),
    )


def losses(logits: Array, targets: Array) -> Array:
    """-log p(target) at each position, 0 where there is none; for mistakes: `reference` has the right ones."""
    most = logits.max(-1)
    log_sum = np.log(np.exp(logits - most[:, None]).sum(-1)) + most
    return np.where(targets == IGNORED, 0, log_sum - logits[np.arange(len(logits)), np.maximum(targets, 0)])


def loss_gradients(logits: Array, targets: Array, weights: Array) -> Array:
    """weight · (softmax - onehot) at each position."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    shares[np.arange(len(logits)), np.maximum(targets, 0)] -= 1
    return np.asarray(weights)[:, None] * shares


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
        return self.places.shifted(1).reshape(self.tokens.shape) != IGNORED

    @property
    def _predicted(self) -> tuple[Bounded, Array]:
        chosen = self.is_predicted
        return Bounded.exact(self.logits[chosen], self.dtype), self.places.shifted(1).reshape(chosen.shape)[chosen]

    def wrong_losses(self) -> dict[str, Array]:
        flat = self.logits.reshape(-1, self.vocabulary)
        found = {cause: weights @ losses(flat, targets) for cause, (targets, weights) in self.places.wrong().items()}
        overflow = "exp overflows, or the logarithm is that of a probability of 0: use log_softmax"
        return found | {overflow: np.asarray(np.inf)}

    def wrong_gradients(self) -> dict[str, Array]:
        flat, table = self.logits.reshape(-1, self.vocabulary), self.places.wrong()
        found = {cause: loss_gradients(flat, targets, weights) for cause, (targets, weights) in table.items()}
        return {cause: gradient.reshape(self.logits.shape) for cause, gradient in found.items()}

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
        targets, _ = self.places.right
        is_learned = targets != IGNORED
        x, W = Bounded.exact(self.x[is_learned], self.dtype), Bounded.exact(self.W, self.dtype)
        z, n = x @ W.T, max(1, int(is_learned.sum()))
        slopes = (z - z.log_sum_exp().reshape(-1, 1)).exp() - np.eye(self.vocabulary)[targets[is_learned]]
        bound = (slopes / n * n / n).T @ x
        exact = accumulated_gradient(self.W, list(self.batches()))
        return Bounded(exact, bound.widened((slopes.T @ x) / n).error, self.dtype)

    def wrong_gradients(self, groups: Groups = ()) -> dict[str, Array]:
        logits, found = self.x @ self.W.T, self.places
        if groups:
            group_of = {row: group for group, rows in enumerate(groups) for row in rows}
            found = replace(found, group=np.array([group_of[row] for row in found.row.tolist()]))
        return {
            cause: loss_gradients(logits, targets, weights).T @ self.x
            for cause, (targets, weights) in found.wrong().items()
        }
