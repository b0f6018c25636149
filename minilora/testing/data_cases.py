"""Cases of the laws of the loss over labelled tokens: inputs drawn from a seed, and right results with their bounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minilora.testing.cases import rounded
from minilora.testing.compare import Array, Bounded
from minilora.testing.reference import IGNORED

Row = tuple[Array, Array]  # x (T, D), labels (T)


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

    def __str__(self) -> str:
        return f"logits {self.logits.shape}, labels {' '.join(self.rows)} (x: a label, .: -100), {self.dtype}"

    @cached_property
    def _drawn(self) -> tuple[Array, Array]:
        rng, shape = np.random.default_rng(self.seed), (len(self.rows), len(self.rows[0]))
        logits = rounded(self.spread * rng.standard_normal((*shape, self.vocabulary)), self.dtype)
        tokens = rng.integers(0, self.vocabulary, shape)
        return logits, np.array(list(map(labels_of, self.rows, tokens)))

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
        share = Bounded.exact(np.ones(1), self.dtype) / max(1, len(targets))
        slopes = slopes_of(z, targets) * share
        value, error = np.zeros((2, *self.logits.shape))
        value[self.is_predicted], error[self.is_predicted] = slopes.value, slopes.error
        return Bounded(value, error, self.dtype)

    @property
    def _predicted(self) -> tuple[Bounded, Array]:
        chosen = self.is_predicted
        return Bounded.exact(self.logits[chosen], self.dtype), targets_of(self.labels)[chosen]


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

    def __str__(self) -> str:
        rows = " | ".join(" ".join(rows) for rows in self.groups)
        return f"micro-batches {rows} (x: a label, .: -100), W {(self.vocabulary, self.width)}, {self.dtype}"

    @cached_property
    def W(self) -> Array:
        return rounded(np.random.default_rng(self.seed).standard_normal((self.vocabulary, self.width)), self.dtype)

    @cached_property
    def rows(self) -> list[list[Row]]:
        """The rows of each micro-batch."""
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
