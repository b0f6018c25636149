"""The shapes that docstrings state of functions of tensors: sizes are drawn, the function is called and compared."""

import inspect
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora.adapters import functional
from minilora.models import ops
from minilora.quant import nf4
from tests.models import document_lengths, randn, seeds, sizes, token_ids

FUNCTIONS = {
    name: function
    for module in (functional, ops, nf4)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
    if any("Tensor" in str(kind) for kind in function.__annotations__.values())
    if not any("Packed" in str(kind) for kind in function.__annotations__.values())  # its own docstring has them
}
OTHERS = {"eps": 1e-6, "scale": 0.5, "p": 0.3, "window": 3, "dtype": torch.bfloat16}
BYTES = ("packed", "codes")  # arguments of uint8
DIM = r"[\w/.⌈⌉]+"
SHAPE = rf"\((?:|{DIM}(?:, {DIM})*)\)"
ARGUMENT = rf"(\w+) (?:({SHAPE})|sum (\w+))"
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
    line = re.search(rf"^\s*Shapes: ({ARGUMENT}(?:, {ARGUMENT})*) -> ({RESULT})$", docstring, re.MULTILINE)
    if line is None:
        raise ValueError(f"no readable line `Shapes:` in {docstring!r}")
    arguments, result = line[0].split("Shapes: ")[1].split(" -> ")
    shapes, sums = {}, {}
    for name, shape, total in re.findall(ARGUMENT, arguments):
        if total:
            sums[name] = total
        else:
            shapes[name] = re.findall(DIM, shape)
    parts = re.findall(PART, result) or [(result, "")]
    return shapes, sums, [(re.findall(DIM, shape), dtype) for shape, dtype in parts]


@st.composite
def dimensions(draw):
    """A size for each letter, or several: documents in N and M, H a multiple of K, R at most E."""
    lengths, kv_heads, half = draw(document_lengths), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    split = {"N": lengths, "M": [n + draw(st.integers(0, 4)) for n in lengths]}
    named = {name: draw(sizes) for name in ("in", "out", "r", "D", "F", "V")}
    group, rest = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    heads = {"K": kv_heads, "H": kv_heads * group, "R/2": half, "E": 2 * half + rest}
    letters = named | heads | {letter: sum(parts) for letter, parts in split.items()}
    return {letter: [size] for letter, size in letters.items()} | {"...": draw(st.lists(sizes, max_size=2))}, split


@st.composite
def packed_dimensions(draw):
    """Rows and columns of a weight, of up to 9 · 40 blocks."""
    shape = [draw(sizes), draw(st.integers(1, 40 * 64))]
    n = math.prod(shape)
    b = math.ceil(n / 64)
    letters = {"N": shape[0], "K": shape[1], "n": n, "b": b, "⌈n/2⌉": (n + 1) // 2, "⌈b/256⌉": math.ceil(b / 256)}
    return {letter: [size] for letter, size in letters.items()} | {"shape": shape}, {}


def argument(name, shape, seed, V, dtype):
    if name == "labels":
        return token_ids(seed, *shape, high=V)
    return token_ids(seed, *shape, high=256).byte() if name in BYTES else randn(seed, *shape, dtype=dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(data=st.data(), seed=seeds)
def test_a_function_has_the_shapes_that_its_docstring_states(name, data, seed):
    function, is_packed = FUNCTIONS[name], FUNCTIONS[name].__module__ == nf4.__name__
    letters, split = data.draw(packed_dimensions() if is_packed else dimensions())
    shapes, sums, results = read_shapes(function.__doc__)

    def sizes_of(shape):
        return [size for dim in shape for size in letters[dim]]

    D, V = (letters.get(letter, [1])[0] for letter in "DV")
    others = OTHERS | {"head": nn.Linear(D, V).double(), "shape": letters.get("shape")}
    arguments = {other: others[other] for other in inspect.signature(function).parameters if other in others}
    arguments |= {key: split[letter] for key, letter in sums.items()}
    dtype = torch.float32 if is_packed else torch.float64
    arguments |= {key: argument(key, sizes_of(shape), seed, V, dtype) for key, shape in shapes.items()}
    found = function(**arguments)
    for tensor, (shape, kind) in zip(found if isinstance(found, tuple) else [found], results, strict=True):
        assert list(tensor.shape) == sizes_of(shape)
        assert not kind or str(tensor.dtype) == f"torch.{kind}"


@given(packed_dimensions(), seeds)
def test_a_packed_weight_has_the_shapes_that_its_docstring_states(case, seed):
    letters, _ = case
    stated = re.search(rf"Shapes: ({PART}(?:, {PART})*)$", nf4.Packed.__doc__, re.MULTILINE)
    shapes = re.findall(rf"(\w+) ({SHAPE})", stated[0])
    parts = nf4.pack(randn(seed, *letters["shape"], dtype=torch.float32))._asdict()
    assert {name: list(part.shape) for name, part in parts.items()} == {
        name: [size for dim in re.findall(DIM, shape) for size in letters[dim]] for name, shape in shapes
    }


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Shapes: x -> (N)",
        "Shapes: x (N, D)",
        "Shapes: x (N D) -> (N)",
        "Shapes: x (N) -> N",
        "Shapes: x (N), -> (N)",
        "Shapes: x (N) -> a (N), (N)",
    ],
)
def test_a_line_of_shapes_in_another_grammar_is_refused(line):
    with pytest.raises(ValueError, match="no readable line"):
        read_shapes(line)
