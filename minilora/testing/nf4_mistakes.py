"""Known mistakes of 4-bit weights, as what they compute: with them a wrong result is explained."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minilora.testing.compare import Array, Bounded
from minilora.testing.nf4_cases import LEVELS, NESTED, AbsmaxVector, NF4Weight, QuantizedLinear, absmax_levels


def as_float32(array: Array) -> Array:
    """Round numbers to float32, as a wrong implementation does: where the right number is 0, no error is allowed."""
    return array.astype(np.float32).astype(np.float64)


OTHER_LEVELS = {  # by code
    "the levels are those of FP4": [s * level / 12 for s in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)],
    "the codes are those of a uniform Int4, -8 … 7": np.arange(-8, 8) / 7,
    "the levels are 16 even steps from -1 to 1": np.linspace(-1, 1, 16),
}
TABLES = {cause: as_float32(np.array(levels)) for cause, levels in OTHER_LEVELS.items()}


class Wrong(NamedTuple):
    """A wrong quantization: a code and an absmax for each weight, and the levels in use."""

    codes: Array
    absmax: Array
    levels: Array = LEVELS

    @property
    def values(self) -> Array:
        return as_float32(self.levels[self.codes] * self.absmax)


def wrong_quantizations(case: NF4Weight) -> dict[str, Wrong]:
    """Return what is stored by mistake."""
    flat, absmax = case.W.reshape(-1), case.of_each(case.absmax)
    x, codes = divided(flat, absmax), case.codes
    found = {cause: Wrong(nearest(divided(flat, scale)), scale) for cause, scale in wrong_absmaxes(case).items()}
    found |= {cause: Wrong(nearest(x, levels), absmax, levels) for cause, levels in TABLES.items()}
    above, below = (LEVELS[1:] < x[:, None]).sum(1), (LEVELS[1:] <= x[:, None]).sum(1)
    ceiling = np.where(LEVELS[below] == x, below, np.minimum(above + 1, 15))
    swapped = swap(codes)
    mistakes = {
        "the two nibbles of a byte are swapped": swapped,
        "the codebook is off by one: codes are one too high": (codes + 1) % 16,
        "the codebook is off by one: codes are one too low": (codes - 1) % 16,
        "codes are rounded down instead of to the nearest level": below,
        "codes are rounded up instead of to the nearest level": ceiling,
        "the sign is lost": nearest(abs(x)),
        "the sign is changed": nearest(-x),
        "a tie gets the upper level": 15 - nearest(x, LEVELS[::-1]),
        "the levels are in falling order": 15 - codes,
        "codes are in the order of the columns: the weight is transposed": nearest(transposed(case)),
    }
    return found | {cause: Wrong(wrong, absmax) for cause, wrong in mistakes.items()}


def wrong_absmaxes(case: NF4Weight) -> dict[str, Array]:
    """Return the absmax that a weight is divided by, by mistake: (n)."""
    W, flat, bs = case.W, case.W.reshape(-1), case.block_size
    blocks = [flat[i : i + bs] for i in range(0, flat.size, bs)]
    found = {
        "the absmax is the largest w instead of the largest |w|": case.of_each(np.array([b.max() for b in blocks])),
        "the absmax is the mean of |w|": case.of_each(np.array([abs(b).mean() for b in blocks])),
        "the absmax is the standard deviation": case.of_each(np.array([b.std() for b in blocks])),
        "the absmax is the range max - min": case.of_each(np.array([np.ptp(b) for b in blocks])),
        "the absmax is the Euclidean norm": case.of_each(np.array([np.sqrt((b * b).sum()) for b in blocks])),
        "the absmax is that of a row instead of a block": np.repeat(abs(W).max(1), case.columns),
        "the absmax is that of a column instead of a block": np.tile(abs(W).max(0), case.rows),
        "the absmax is that of the whole weight instead of a block": largest(flat, flat.size),
        "blocks begin anew at each row": np.concatenate([largest(row, bs) for row in W]),
        "the weight is not divided by absmax": np.ones(flat.size),
    }
    sizes = {size: f"blocks have {size} weights instead of {bs}" for size in (bs // 2, 2 * bs, 4 * bs)}
    sizes |= {64: "blocks have 64 weights, whatever block_size is"}
    return found | {cause: largest(flat, size) for size, cause in sizes.items() if size != bs}


def wrong_stored_absmaxes(case: NF4Weight) -> dict[str, Array]:
    """Return the absmaxes that are stored by mistake: (b), or of another number."""
    begins = np.arange(0, case.W.size, case.block_size)
    with np.errstate(divide="ignore"):
        found = {"1/absmax is stored": 1 / case.absmax, "absmax² is stored": case.absmax**2}
    found["the last block is left out"] = np.append(case.absmax[:-1], 0.0)
    each = {cause: absmax[begins] for cause, absmax in wrong_absmaxes(case).items() if "row" not in cause}
    rows = {"the absmax is that of a row instead of a block": abs(case.W).max(1)}
    return {cause: as_float32(wrong) for cause, wrong in (found | each | rows).items()}


def wrong_values(case: NF4Weight) -> dict[str, Array]:
    """Return what is dequantized by mistake from the right codes and absmaxes: (rows, columns)."""
    codes, absmax, i = case.codes, case.of_each(case.absmax), np.arange(case.W.size)
    row, column = np.divmod(i, case.columns)
    bs, last = case.block_size, len(case.absmax) - 1
    places = {
        "the absmax is that of a row instead of a block": row,
        "the absmax is that of a column instead of a block": column,
        "one absmax is used for all": 0 * i,
        f"each row is taken for whole blocks, ⌊in/{bs}⌋ of them": row * (case.columns // bs) + column // bs,
        "blocks begin anew at each row": row * -(-case.columns // bs) + column // bs,
        f"blocks have {bs // 2} weights instead of {bs}": i // (bs // 2),
        f"blocks have {2 * bs} weights instead of {bs}": i // (2 * bs),
        "blocks have 64 weights, whatever block_size is": i // 64,
    }
    level = LEVELS[codes]
    found = {cause: level * case.absmax[np.minimum(place, last)] for cause, place in places.items()}
    found |= {cause: levels[codes] * absmax for cause, levels in TABLES.items()}
    found |= {
        "the two nibbles of a byte are swapped": LEVELS[swap(codes)] * absmax,
        "the codebook is off by one: levels are one too high": LEVELS[(codes + 1) % 16] * absmax,
        "the codebook is off by one: levels are one too low": LEVELS[codes - 1] * absmax,
        "the levels are in falling order": LEVELS[15 - codes] * absmax,
        "the sign is lost": abs(level) * absmax,
        "the sign is changed": -level * absmax,
        "the absmax is not multiplied": level,
        "the absmax is multiplied twice": level * absmax**2,
        "codes are multiplied instead of their levels": codes * absmax,
    }
    found["the weight is transposed"] = (level * absmax).reshape(case.columns, case.rows).T.reshape(-1)
    return {cause: as_float32(wrong).reshape(case.rows, case.columns) for cause, wrong in found.items()}


def wrong_offsets(case: AbsmaxVector) -> dict[str, Array]:
    a = case.absmax
    found = {"is omitted": 0.0, "is the median": np.median(a), "is the smallest": a.min(), "is the largest": a.max()}
    found |= {"is the middle of the range": (a.min() + a.max()) / 2, "is subtracted": -a.mean(), "is the sum": a.sum()}
    found |= {"is the mean of the first 256": a[:NESTED].mean()}
    return {f"the offset {what} instead of the mean": np.asarray(wrong) for what, wrong in found.items()}


def wrong_nested_scales(case: AbsmaxVector) -> dict[str, Array]:
    """Return the scale of each absmax, by mistake: (b)."""
    rest = case.absmax - case.offset.value
    sizes = {f"blocks have {size} absmaxes instead of {NESTED}": largest(rest, size) for size in (64, 128, 512)}
    return sizes | {
        "the scale is the largest absmax: the offset is not subtracted": largest(case.absmax, NESTED),
        "the scale is the largest absmax - offset, without its absolute value": largest(np.maximum(rest, 0), NESTED),
        "one scale is used for all absmaxes": largest(rest, case.count),
        "the scales are dropped": np.ones(case.count),
    }


def wrong_nested_codes(case: AbsmaxVector) -> dict[str, Array]:
    """Return the codes of absmaxes that are stored by mistake: (b)."""
    levels, codes, scales, rest = absmax_levels().value, case.codes, case.of_each.value, case.rest.value
    x = divided(rest, scales)
    found = {cause: nearest(divided(rest, scale), levels) for cause, scale in wrong_nested_scales(case).items()}
    return found | {
        "the offset is not subtracted": nearest(divided(case.absmax, scales), levels),
        "the levels are even steps from -1 to 1": nearest(x, np.linspace(-1, 1, 256)),
        "the codes are those of a uniform Int8": np.round(127 * x) + 128,
        "the codes are signed": codes - 128,
        "the codebook is off by one": (codes + 1) % 256,
        "the codebook is off by one: codes are one too low": (codes - 1) % 256,
        "codes are rounded down instead of to the nearest level": np.maximum((levels <= x[:, None]).sum(1) - 1, 0),
        "the sign is lost": nearest(abs(x), levels),
    }


def wrong_nested_values(case: AbsmaxVector) -> dict[str, Array]:
    """Return the absmaxes that are dequantized by mistake: (b)."""
    levels, codes, i = absmax_levels().value, case.codes, np.arange(case.count)
    scales, mean = case.scales.value, case.offset.value
    level, scale = levels[codes], scales[i // NESTED]
    last = len(scales) - 1
    return {
        "the offset is omitted": level * scale,
        "the offset is subtracted": level * scale - mean,
        "the offset is added before the product": (level + mean) * scale,
        "the scales are dropped": level + mean,
        "one scale is used for all absmaxes": level * scales[0] + mean,
        "blocks have 64 absmaxes instead of 256": level * scales[np.minimum(i // 64, last)] + mean,
        "blocks have 128 absmaxes instead of 256": level * scales[np.minimum(i // 128, last)] + mean,
        "the levels are even steps from -1 to 1": np.linspace(-1, 1, 256)[codes] * scale + mean,
        "the codes are those of a uniform Int8": (codes - 128.0) / 127 * scale + mean,
        "the codebook is off by one": levels[(codes + 1) % 256] * scale + mean,
        "the codebook is off by one: levels are one too low": levels[codes - 1] * scale + mean,
    }


def wrong_weights(case: QuantizedLinear) -> dict[str, Array]:
    """Return the weights (out, in) that a 4-bit linear layer applies by mistake."""
    weight, shape = case.weight, (case.outer, case.inner)
    found = wrong_values(weight)
    found |= {cause: wrong.values.reshape(shape) for cause, wrong in wrong_quantizations(weight).items()}
    if case.double_quant:
        each = wrong_nested_values(case.absmaxes).items()
        found = {cause: weight.times(Bounded.exact(wrong, "float32")).value for cause, wrong in each}
        found["double quantization is ignored"] = weight.values.value
    found["the dense weight is used instead of the quantized one"] = case.weight.W
    return found


def wrong_linears(case: QuantizedLinear) -> dict[str, tuple[Array, Array]]:
    """Return, for each mistake, the weight and the bias that are applied in place of the right ones."""
    b, dense = np.zeros(case.outer) if case.b is None else case.b, case.dense.value
    found = {cause: (weight, b) for cause, weight in wrong_weights(case).items()}
    biases = {"the bias is missing": 0 * b, "the bias is added twice": 2 * b, "the bias is subtracted": -b}
    return found | {cause: (dense, wrong) for cause, wrong in biases.items()}


def nearest(x: Array, levels: Array = LEVELS) -> Array:
    return abs(x[:, None] - levels).argmin(1)


def largest(flat: Array, size: int) -> Array:
    """Return the largest |number| of each block, at each of its numbers."""
    return np.repeat(np.maximum.reduceat(abs(flat), np.arange(0, flat.size, size)), size)[: flat.size]


def divided(w: Array, scale: Array) -> Array:
    return np.divide(w, scale, out=np.zeros_like(w), where=scale != 0)


def swap(codes: Array) -> Array:
    """Return the codes with the two of each byte exchanged; beside a last one alone stands that of 0."""
    return np.append(codes, np.full(len(codes) % 2, 7)).reshape(-1, 2)[:, ::-1].reshape(-1)[: len(codes)]


def transposed(case: NF4Weight) -> Array:
    """Return w / absmax of the columns laid end to end."""
    other = case.W.T.reshape(-1)
    return divided(other, largest(other, case.block_size))
