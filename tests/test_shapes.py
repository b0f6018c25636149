"""The shapes that docstrings of the six pages state, for which sizes are drawn."""

import inspect
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora import adapter, data, llama, lora, nf4, training
from minilora.definition import Definition
from tests.models import document_lengths, randn, seeds, sizes, token_ids

PAGES = (adapter, data, llama, lora, nf4, training)
FUNCTIONS = {
    name: getattr(member, "function", member)
    for page in PAGES
    for name, member in vars(page).items()
    if (inspect.isfunction(member) or isinstance(member, Definition)) and member.__module__ == page.__name__
}
SHAPED = [name for name, function in FUNCTIONS.items() if re.search("Shapes:.*->", function.__doc__ or "")]
OTHERS = {"eps": 1e-6, "scale": 0.5, "p": 0.3, "window": 3, "dtype": torch.bfloat16}
BYTES = ("packed", "codes")  # arguments of uint8
DIM = r"[\w/.⌈⌉]+"
SHAPE = rf"\((?:|{DIM}(?:, {DIM})*)\)"
ARGUMENT = rf"(\w+) (?:({SHAPE})|sum (\w+)|\w+ numbers)"
PART = rf"\w+ ({SHAPE})(?: (\w+))?"
RESULT = rf"{SHAPE}|[a-z]+|{PART}(?:, {PART})*"


def read_shapes(docstring):
    """`Shapes: name (dim, dim), name sum DIM -> (dim, dim)` -> shapes by name, sums by name, and those of the results.

    A result may be named, with a dtype, and have the shape that an argument is; there may be several.

    >>> read_shapes("Shapes: x (..., D), lengths sum N -> ()")
    ({'x': ['...', 'D']}, {'lengths': 'N'}, [([], '')])
    >>> read_shapes("Shapes: x (N) -> codes (⌈N/2⌉) uint8, scale ()")[-1]
    [(['⌈N/2⌉'], 'uint8'), ([], '')]
    """
    line = re.search(rf"^\s*Shapes: (?:{ARGUMENT}(?:, {ARGUMENT})*)? ?-> (?:{RESULT})$", docstring, re.MULTILINE)
    if line is None:
        raise ValueError(f"no readable line `Shapes:` in {docstring!r}")
    arguments, result = line[0].split("Shapes: ")[1].split("-> ")
    shapes, sums = {}, {}
    for name, shape, total in re.findall(ARGUMENT, arguments):
        if total:
            sums[name] = total
        elif shape:
            shapes[name] = re.findall(DIM, shape)
    parts = re.findall(PART, result) or [(result, "")]
    return shapes, sums, [(re.findall(DIM, shape), dtype) for shape, dtype in parts]


@st.composite
def dimensions(draw):
    """A size for each letter, or several: documents in N and S, H a multiple of K, R at most E."""
    lengths, kv_heads, half = draw(document_lengths), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    split = {"N": lengths, "S": [n + draw(st.integers(0, 4)) for n in lengths]}
    named = {name: draw(sizes) for name in ("in", "out", "r", "D", "F", "V")}
    group, rest = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    heads = {"K": kv_heads, "H": kv_heads * group, "R/2": half, "E": 2 * half + rest}
    letters = named | heads | {letter: sum(parts) for letter, parts in split.items()}
    letters |= {"B": len(lengths), "T": max(lengths) + draw(st.integers(0, 2))}
    letters["width"] = letters["T"]
    return {letter: [size] for letter, size in letters.items()} | {"...": draw(st.lists(sizes, max_size=2))}, split


@st.composite
def packed_dimensions(draw):
    """Rows and columns of a weight, of up to 9 · 40 blocks."""
    shape = [draw(sizes), draw(st.integers(1, 40 * 64))]
    n = math.prod(shape)
    b = math.ceil(n / 64)
    letters = {"out": shape[0], "in": shape[1], "n": n, "b": b, "⌈n/2⌉": (n + 1) // 2, "⌈b/256⌉": math.ceil(b / 256)}
    more = {"shape": shape, "...": draw(st.lists(sizes, max_size=2))}
    return {letter: [size] for letter, size in letters.items()} | {"256": [256], "1": [1]} | more, {}


def argument(name, shape, seed, V, dtype):
    if name in ("labels", "input_ids"):
        return token_ids(seed, *shape, high=V)
    if name == "seed":
        return torch.tensor(seed)
    return token_ids(seed, *shape, high=256).byte() if name in BYTES else randn(seed, *shape, dtype=dtype)


def linear(letters, is_packed, dtype):
    out, inner = (letters[name][0] for name in ("out", "in"))
    layer = nn.Linear(inner, out).to(dtype)
    return nf4.NF4Linear.quantize(layer.weight) if is_packed else layer


@pytest.mark.parametrize("name", SHAPED)
@given(data=st.data(), seed=seeds)
def test_a_function_has_the_shapes_that_its_docstring_states(name, data, seed):
    function, is_packed = FUNCTIONS[name], FUNCTIONS[name].__module__ == nf4.__name__
    letters, split = data.draw(packed_dimensions() if is_packed else dimensions())
    shapes, sums, results = read_shapes(function.__doc__)

    def sizes_of(shape):
        return [size for dim in shape for size in letters[dim]]

    D, V, width = (letters.get(letter, [1])[0] for letter in ("D", "V", "width"))
    dtype = torch.float32 if is_packed else torch.float64
    layer = linear(letters, is_packed, dtype)
    others = OTHERS | {"head": nn.Linear(D, V).double(), "shape": letters.get("shape"), "base": layer, "layer": layer}
    others |= {"lengths": split.get("N"), "width": width}
    arguments = {other: others[other] for other in inspect.signature(function).parameters if other in others}
    arguments |= {key: split[letter] for key, letter in sums.items()}
    arguments |= {key: argument(key, sizes_of(shape), seed, V, dtype) for key, shape in shapes.items()}
    found = function(**arguments)
    tensors = [each for each in found if isinstance(each, torch.Tensor)] if isinstance(found, tuple) else [found]
    for tensor, (shape, kind) in zip(tensors, results, strict=True):
        assert list(tensor.shape) == sizes_of(shape)
        assert not kind or str(tensor.dtype) == f"torch.{kind}"
