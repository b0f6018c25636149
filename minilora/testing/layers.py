"""Layers made for drawn cases, and called in the mode of a case, forward and backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.testing.cases import TWICE, AdaptedLinear, interned, strided, tensor
from minilora.testing.compare import Array, has_one_backward
from minilora.testing.laws import NotApplicable, accepted, mode

Make = Callable[..., Any]


class Built(NamedTuple):
    """A layer that was made for a case, and the tensors that it was given."""

    layer: Any
    given: dict[str, Tensor]  # W, b, A, B, magnitude

    def parts(self, name: str, y: Any = None) -> list[tuple[Tensor, bool]]:
        """Return the tensors that are W, A, B, … in the layer, or its rows in order, and whether each is transposed.

        It is the tensor that was given, or tensors that y was computed from, or parameters; [] if none are.
        """
        given, reached = self.given[name], leaves(y) if isinstance(y, Tensor) else []
        own = [*reached, *(self.layer.parameters() if hasattr(self.layer, "parameters") else ())]
        own.sort(key=lambda part: part is not given and not isinstance(part, nn.Parameter))  # x may have equal numbers
        both = [(part, is_turned) for part in own for is_turned in ((False, True) if part.ndim == 2 else (False,))]
        both.sort(key=lambda each: (turned(*each).shape != given.shape, -each[0].numel()))
        rest, found = given.detach().flatten(), []
        while len(rest):
            for each in both:
                flat = turned(*each).detach().to(rest).flatten()
                if 0 < len(flat) <= len(rest) and torch.equal(flat, rest[: len(flat)]):
                    found.append(each)
                    rest = rest[len(flat) :]
                    break
            else:
                return []
        return found

    def gradient(self, name: str, y: Tensor) -> Any:
        """Return the gradient of A, B or magnitude after a backward pass from y: zeros if there is none."""
        if not (parts := self.parts(name, y)):
            way = "`torch.func.functional_call` can pass parts of the given tensor"
            return AssertionError(f"no parameter of the layer is {name}, its transpose or its rows; {way}")
        gradients = [turned(torch.zeros_like(p) if p.grad is None else p.grad, flip).flatten() for p, flip in parts]
        return torch.cat(gradients).reshape(self.given[name].shape)


def turned(matrix: Tensor, is_turned: bool) -> Tensor:
    return matrix.T if is_turned else matrix


def leaves(y: Tensor) -> list[Tensor]:
    """Return the tensors that a backward pass from y gives a gradient."""
    found, seen, nodes = list[Tensor](), set[Any](), [y.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            nodes += [following for following, _ in node.next_functions]
    return found


def make_layer(make: Make, case: AdaptedLinear, **options: Any) -> tuple[Built, AdaptedLinear]:
    """Make the layer of a case; the case is returned with W's norm as magnitude where the maker takes none."""
    options = {"dropout": 0.0} | options
    if case.method == "dora":
        options |= {"use_dora": True} | ({"magnitude": None} if case.has_magnitude else {})
    extra = accepted(make, **options, **({"use_rslora": True} if case.use_rslora else {}))
    if case.method == "dora" and case.use_rslora and "use_rslora" not in extra:
        raise NotApplicable("the layer takes no `use_rslora`")
    if case.method == "dora" and "magnitude" not in extra:
        case = replace(case, has_magnitude=False)
    given = {name: placed(case.arrays[name], case) for name in ("W", "A", "B", "magnitude")}
    for name in ("A", "B", "magnitude"):
        given[name].requires_grad_()
    if "magnitude" in extra:
        extra["magnitude"] = given["magnitude"]
    b = None if case.b is None else placed(case.b, case)
    layer = make(given["W"], b, given["A"], given["B"], case.alpha, **extra)
    if case.mode == "again":
        other, _ = make_layer(make, replace(case, seed=case.seed + 1, mode="train"), **options)
        other.layer(placed(case.x, case))
    return Built(layer, given if b is None else given | {"b": b}), interned(case)


def placed(array: Array, case: Any) -> Tensor:
    """Return an array as a tensor; in the mode "strided" its numbers are not next to each other, nor the first."""
    packed = tensor(array, case.dtype)
    return strided(packed) if mode(case) == "strided" else packed


def set_mode(layer: Any, training: bool) -> None:
    """Call train() or eval() twice: the second call changes nothing, as where a layer merges in the first."""
    for _ in range(2 if hasattr(layer, "train") else 0):
        if layer.train(training) is None and isinstance(layer, nn.Module):
            raise AssertionError("train() and eval() return None, expected the layer")


def recording(case: Any) -> AbstractContextManager[Any]:
    """Return the context of a call in the mode of a case: whether autograd records it."""
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    return contexts.get(mode(case), nullcontext)()


def input_of(layer: Any, case: Any) -> Tensor:
    """Return x, after the calls that come first in the mode of a case."""
    x = placed(case.x, case)
    set_mode(layer, mode(case) not in ("eval", "inference", "back"))
    if mode(case) == "again":
        layer(x.mul_(2))
        layer(x[..., None, :])
        x.mul_(0.5)
    if mode(case) == "back":
        with torch.inference_mode():
            layer(x)
        set_mode(layer, training=True)
    return x


def called(layer: Any, case: Any) -> tuple[Tensor, Any]:
    """Call a layer in the mode of a case, and again with another input; return x and y, which stays as it was."""
    x = input_of(layer, case)
    with recording(case):
        y = layer(x)
        layer(2 * x)
    return x, y


def backward(
    layer: Any, case: Any, needs_dx: bool = True, context: AbstractContextManager[Any] | None = None, others: Any = ()
) -> tuple[Tensor, Tensor]:
    """Run a forward and a backward pass of Σ dy·y; return x, whose gradient is 0 where there is none, and y.

    In `TWICE` these are two passes, in "again" of one graph; in "no_grad" they come after such a call. Between forward
    and backward this layer and others are called with another input, which changes nothing.
    """
    if hasattr(layer, "is_numpy"):
        raise NotApplicable("the layer computes in numpy: it has no gradients")
    x = input_of(layer, case)
    if mode(case) == "no_grad":
        with torch.no_grad():
            layer(x)
    x.requires_grad_(needs_dx or mode(case) in ("eval", "inference"))  # a layer that has merged has no other gradient
    passes, is_retained = 2 if mode(case) in TWICE else 1, mode(case) == "again"
    for i in range(passes):
        x.grad = None
        if i == 0 or not is_retained:
            with context or nullcontext():
                y = layer(x)
                for each in (layer, *others):
                    each(2 * x)
        if not y.requires_grad:
            raise AssertionError("the layer's output has no gradient")
        dy = placed(case.dy, case).to(y.dtype)
        try:
            y.backward(dy, retain_graph=is_retained)
        except RuntimeError as error:
            if not has_one_backward(error):
                raise
            is_retained = False
            y.backward(dy)
    x.grad = torch.zeros_like(x) if x.grad is None else x.grad
    return x, y


def changed(given: Any, result: Any) -> Any:
    """Return the result of a function, or what it was given and has changed, if it returned nothing."""
    return given if result is None else result
