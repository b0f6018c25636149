"""What a solution of exercise 7 must do."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import ModuleType

import torch
from torch import Tensor, nn

WIDTH, RANK, SCALE = 6, 2, 3.0
NAMES = ("q_proj", "proj", "up", "gate")
SHARED = ("blocks.0.mlp.up", "blocks.0.mlp.gate", "blocks.1.mlp.up", "blocks.1.mlp.gate")  # one linear
PLACES = ("blocks.0.q_proj", "blocks.1.q_proj", "blocks.1.mlp.proj", *SHARED)
OTHERS = ("blocks.0.out_proj", "blocks.1.out_proj", "blocks.0.mlp.proj", "head")


class Adapter(nn.Module):
    """An adapter whose B is not zero, so that it shows whether it is there."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.linspace(-1, 1, RANK * WIDTH).view(RANK, WIDTH))
        self.B = nn.Parameter(torch.linspace(1, 2, WIDTH * RANK).view(WIDTH, RANK))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + SCALE * (x @ self.A.T) @ self.B.T
        return y


class MLP(nn.Module):
    """A linear with two names, and `proj`, which is a linear in one block and something else in the other."""

    def __init__(self, up: nn.Linear, proj: nn.Module):
        super().__init__()
        self.up = self.gate = up
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(self.up(x) * self.gate(x).sigmoid())
        return y


class Block(nn.Module):
    """A block with two linears of its own, and an MLP that may share one with another block."""

    def __init__(self, up: nn.Linear, proj: nn.Module):
        super().__init__()
        self.q_proj, self.out_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = MLP(up, proj)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.out_proj(self.q_proj(x).tanh()))
        return y


def make_model() -> nn.Module:
    """Two blocks that share `up`, and a head."""
    torch.manual_seed(0)
    up = nn.Linear(WIDTH, WIDTH)
    blocks = nn.Sequential(Block(up, nn.Tanh()), Block(up, nn.Linear(WIDTH, WIDTH)))
    return nn.Sequential(OrderedDict[str, nn.Module](blocks=blocks, head=nn.Linear(WIDTH, 3))).double()


def places_of(model: nn.Module, path: str) -> list[str]:
    """All paths at which the module of a path stands."""
    module = model.get_submodule(path)
    return [name for name, each in model.named_modules(remove_duplicate=False) if each is module]


def check_largest_rank(answer: ModuleType) -> None:
    """One rank more would be too many numbers, and this one is not."""
    block = [(160, 160), (160, 80), (160, 80), (160, 160), (160, 400), (160, 400), (400, 160)]
    for shapes, budget in ((block, 84_000), ([(6, 4)], 10), ([(6, 4)], 9), (2 * [(6, 4)], 59)):
        found = answer.largest_rank(list(shapes), budget)
        case = f"linears {shapes}, {budget:,} numbers"
        used = numbers_of(shapes, found)
        assert used <= budget, f"{case}: adapters of rank {found} have {used:,}"
        assert numbers_of(shapes, found + 1) > budget, f"{case}: rank {found} has {used:,}, and there is room for more"


def numbers_of(shapes: list[tuple[int, int]], r: int) -> int:
    """The numbers of real A and B of this rank."""
    return sum(torch.empty(r, width).numel() + torch.empty(out, r).numel() for width, out in shapes)


def check_count_places(answer: ModuleType) -> None:
    """Each path of a linear is counted, also if it is a second path of the same one."""
    model = make_model()
    paths = [name for name, each in model.named_modules(remove_duplicate=False) if isinstance(each, nn.Linear)]
    found = dict(answer.count_places(model))
    for path in paths:
        name = path.rpartition(".")[2]
        count = sum(each.rpartition(".")[2] == name for each in paths)
        assert found.get(name) == count, (
            f"{path} is a linear, and of the name {name} you count {found.get(name, 0)} places, need {count}. "
            f"That linear has the paths {places_of(model, path)}"
        )
    assert len(found) == len({path.rpartition(".")[2] for path in paths}), f"you count {[*found]}; not all are linears"


def check_attach(answer: ModuleType) -> None:
    """Adapters stand where they should, one for each linear; they alone are trained, and the model uses them."""
    model = make_model()
    plain = copy.deepcopy(model)
    made: list[Adapter] = []

    def wrap(linear: nn.Linear) -> Adapter:
        assert isinstance(linear, nn.Linear), f"wrap is given {type(linear).__name__}, need a linear"
        made.append(Adapter(linear).double())
        return made[-1]

    count = answer.attach(model, NAMES, wrap)
    for path in PLACES:
        found = type(model.get_submodule(path)).__name__
        assert found == "Adapter", (
            f"{path} is {found}, need an adapter. The places of this linear in the model are {places_of(plain, path)}"
        )
    for path in OTHERS:
        found = type(model.get_submodule(path)).__name__
        assert found == type(plain.get_submodule(path)).__name__, (
            f"{path} is {found}, and should be as it was: names are {NAMES}, whole, and only linears are meant"
        )
    first, second = (model.get_submodule(f"blocks.{i}.mlp.up") for i in (0, 1))
    assert first is second, (
        "blocks.0.mlp.up and blocks.1.mlp.up are one linear, and have two adapters: need one for both"
    )
    assert len(made) == 4, f"wrap is called {len(made)} times for 4 linears"
    assert count == 4, f"attach returns {count!r}, need 4, the number of adapters"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in ("A", "B")}
    assert own <= trained, f"{min(own - trained)} is frozen, so nothing would be learned"
    assert trained <= own, f"{min(trained - own)} is trained, need only the adapters"
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    for linear in {plain.get_submodule(path) for path in PLACES}:
        linear.weight.data += SCALE * (made[0].B @ made[0].A).detach()
    assert torch.allclose(model(x), plain(x), rtol=1e-9), "the model does not compute W x + s·B A x at each place"
