"""What a solution of exercise 1 must do."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minilora.testing.reference import lora_forward, lora_merged_weight

# one name is in another: at its end, at its beginning, or as a module in a module
PATHS = [f"model.layers.{end}" for end in ("1.x", "11.x", "1.x.down", "1.x_up")]
PATHS += [f"{start}.model.layers.1.x" for start in ("audio", "vision")]


def draw(*shape: int) -> Tensor:
    """A matrix of random numbers, of these sizes the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def difference(found: object, right: Tensor, case: str) -> float:
    """How far a tensor is from the right one; what is no such tensor is an AssertionError."""
    assert isinstance(found, Tensor), f"{case}: this returns {type(found).__name__}, need a tensor"
    assert found.shape == right.shape, f"{case}: the shape is {tuple(found.shape)}, need {tuple(right.shape)}"
    return float((found.detach().double() - right).abs().max())


def check_alpha_for(answer: ModuleType) -> None:
    """s·r, and with rsLoRA s·√r."""
    for s, r, use_rslora in ((2.0, 16, False), (1.75, 4, False), (8.0, 16, True), (3.5, 4, True)):
        found, right = answer.alpha_for(s, r, use_rslora), s * (math.sqrt(r) if use_rslora else r)
        assert isinstance(found, float), f"alpha_for returns {type(found).__name__}, need a float"
        case = f"s {s:g}, r {r}, use_rslora {use_rslora}"
        assert math.isclose(found, right), f"{case}: with your alpha, s is {found / right:g} times what it should be"


def check_count(answer: ModuleType) -> None:
    """r·(in + out) for each linear but the head, and the share of the sum of it and all in·out."""
    several = {"k": (576, 192), "up": (576, 1536), "down": (1536, 576), "lm_head": (576, 2048)}
    for linears, r in (({"a": (5, 5)}, 1), ({"a": (576, 1536)}, 1), ({"a": (5, 5), "b": (5, 5)}, 1), (several, 16)):
        right = r * sum(sum(size) for path, size in linears.items() if path != "lm_head")
        case = f"rank {r}, (in, out) {linears}"
        found, share = answer.count(linears, r)
        assert found == right, f"{case}: {found:,} numbers, {'more' if found > right else 'fewer'} than A and B have"
        whole = right + sum(math.prod(size) for size in linears.values())
        assert math.isclose(share, right / whole), (
            f"{case}: the share is {share * whole / right:.3f} times the right one"
        )


def check_forward(answer: ModuleType) -> None:
    """`forward` equals loops, and takes no more products than the narrow way."""
    x, W, A, B = draw(3, 40), draw(30, 40), draw(2, 40), draw(30, 2)
    s = torch.tensor([7.0, 0.5, -2.0], dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        found = answer.forward(x, W, A, B, s)
    one = torch.from_numpy(lora_forward(*(each.numpy() for each in (x, W)), None, A.numpy(), B.numpy(), 1.0)) - x @ W.T
    right = x @ W.T + s[:, None] * one
    case = f"x {tuple(x.shape)}, W {tuple(W.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, s {s.tolist()}"
    error = difference(found, right, case)
    if error > 1e-9:
        known = {
            "W x": x @ W.T,
            "the update": right - x @ W.T,
            "y without s": x @ W.T + one,
            "y with s twice": x @ W.T + s[:, None] ** 2 * one,
            "y with the first row's s in all rows": x @ W.T + s[0] * one,
        }
        names = [name for name, value in known.items() if difference(found, value, case) < 1e-9]
        what = f"this is {names[0]}" if names else f"y is off by up to {error:.2g}"
        raise AssertionError(f"{case}: {what}")
    products = counter.get_total_flops() // 2
    need = 3 * (40 * 30 + 2 * (40 + 30))
    assert products <= need, f"{case}: y is right, but it took {products:,} products, and {need:,} are enough"


def check_merge(answer: ModuleType) -> None:
    """`merge` equals loops, for one, two and no adapters, and changes nothing that it was given."""
    W, A1, B1, A2, B2 = given = draw(5, 7), draw(2, 7), draw(5, 2), draw(3, 7), draw(5, 3)
    before = [tensor.clone() for tensor in given]
    for adapters in ([(A1, B1, 0.5)], [(A1, B1, 0.5), (A2, B2, 7.0)], []):
        right = W.numpy()
        for A, B, s in adapters:
            right = lora_merged_weight(right, A.numpy(), B.numpy(), s)
        case = f"with {len(adapters)} adapters of scale {[s for *_, s in adapters]}"
        error = difference(answer.merge(W, adapters), torch.from_numpy(right), case)
        assert error < 1e-12, f"{case}: the weight is off by up to {error:.2g}"
        changed = [name for name, old, new in zip(("W", "A", "B"), before, given, strict=False) if not old.equal(new)]
        assert not changed, f"{case}: the {changed[0]} that was given is another one afterwards"


def check_read_update(answer: ModuleType) -> None:
    """`read_update` finds the tensors of a path among others, and the scale that belongs to its rank."""
    generator = torch.Generator().manual_seed(3)
    pattern = {"model.layers.1.x.down": 2, "vision.model.layers.1.x": 3}
    ranks = {path: pattern.get(path, 4) for path in PATHS}
    factors = {
        path: tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((r, 7), (5, r)))
        for path, r in ranks.items()
    }
    for path, use_rslora in itertools.product(PATHS, (False, True)):
        with tempfile.TemporaryDirectory() as name:
            tensors = {
                f"base_model.model.{path}.lora_{letter}.weight": tensor
                for path, pair in factors.items()
                for letter, tensor in zip("AB", pair, strict=True)
            }
            save_file(tensors, Path(name) / "adapter_model.safetensors")
            config = {"r": 4, "lora_alpha": 12, "use_rslora": use_rslora, "rank_pattern": pattern}
            (Path(name) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            found = answer.read_update(Path(name), path)
        case = f"{path}, adapter_config.json {config}"
        updates = {each: 12 / len(A) ** (0.5 if use_rslora else 1) * B @ A for each, (A, B) in factors.items()}
        error = difference(found, updates[path], case)
        sizes = {each: float((found * update).sum() / update.square().sum()) for each, update in updates.items()}
        nearest = [each for each, size in sizes.items() if difference(found, size * updates[each], case) < 1e-9]
        what = f"the update is off by up to {error:.2g}"
        if path in nearest:
            what += f"; it is {sizes[path]:.2f} times the right one"
        elif nearest:
            what = f"this is the update of {nearest[0]}, which is in the file too"
        assert error < 1e-9, f"{case}: {what}"
