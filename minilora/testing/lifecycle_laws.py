"""Laws of an adapter's life: saved, switched, merged, resumed, recomputed, divided among ranks.

All have one shape: two ways that have to lead to one result. What is loaded computes what was saved, and k steps, saved
and loaded, and k more are 2k steps. So an implementation is compared with itself; whether its layer is right is for
`lora_laws`.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from minilora.testing.cases import AdaptedLinear, scaled, tensor
from minilora.testing.compare import PARITY, UNITS, Array, Bounded, as_array
from minilora.testing.data_laws import BATCHES, EMPTY, MicroBatches, tensors
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted, claim, unpacked
from minilora.testing.lora_laws import leaves, linear_cases, make_layer, set_mode
from minilora.testing.nf4_cases import NF4Weight
from minilora.testing.sequence_laws import near

Call = Callable[..., Any]
Results = Iterator[Comparison]
CYCLES = 100  # of merging
HALF_GAP = 0.151904  # of the two levels of NF4 that are farthest apart

# --- a small model and its adapters ---


@dataclass(frozen=True)
class AdaptedModel:
    """A small model, `build()`, and the `configs` of its adapters by name, in the words of PEFT's LoraConfig.

    It is a Sequential of `embed_tokens`, `layers`, `norm` and `lm_head`, whose weight is the embedding's; of the two
    layers each has `q_proj`, `up_proj` and `down_proj`. Its tokens are below 11.
    """

    configs: dict[str, dict[str, Any]]
    seed: int = 0

    def build(self) -> nn.Module:
        """Return the model, frozen; its numbers are the same in each call."""
        sizes = {"q_proj": (6, 6), "up_proj": (6, 9), "down_proj": (9, 6)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            layers = [{name: nn.Linear(*size) for name, size in sizes.items()} | {"act": nn.Tanh()} for _ in range(2)]
        head.weight = embedding.weight
        blocks = nn.Sequential(*(nn.Sequential(OrderedDict(layer)) for layer in layers))
        parts = {"embed_tokens": embedding, "layers": blocks, "norm": nn.LayerNorm(6), "lm_head": head}
        return nn.Sequential(OrderedDict(parts)).requires_grad_(False)


def attached(attach: Call, model: Any, **options: Any) -> Any:
    taken = accepted(attach, **options)
    if lacking := [name for name in options if name not in taken]:
        raise NotApplicable(f"`attach` takes no `{lacking[0]}`")
    return changed(model, attach(model, **taken))


def changed(given: Any, result: Any) -> Any:
    """Return the result of a function, or what it was given and has changed, if it returned nothing."""
    return given if result is None else result


def logits(model: Any) -> Array:
    """Return the logits of all tokens in evaluation mode."""
    set_mode(model, training=False)
    with torch.no_grad():
        return as_array(model(torch.arange(11))).copy()


def same(name: str, found: Array, right: Array) -> Comparison:
    return Comparison(name, found, Bounded(right, np.full(right.shape, PARITY * abs(right).max())))


def is_same(found: Array, right: Array) -> bool:
    return same("", found, right).holds


def trainable(model: Any) -> list[nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise NotApplicable("the model is no module of PyTorch")
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: Any, steps: int = 3) -> None:
    """Make steps of descent, all of one size, in all that requires a gradient."""
    if not (parameters := trainable(model)):
        raise AssertionError("found no parameter that requires a gradient: nothing is trained")
    set_mode(model, training=True)
    for _ in range(steps):
        y = model(torch.arange(11))
        dy = (y - torch.arange(y.numel()).cos().view_as(y)).detach()
        gradients = torch.autograd.grad(y, parameters, dy, allow_unused=True) if y.requires_grad else [None]
        for parameter, gradient in zip(parameters, gradients, strict=False):
            if gradient is None:
                raise AssertionError("found logits that do not depend on all that requires a gradient")
            parameter.data -= 0.03 * gradient.sign()


# --- saved and loaded ---


def roundtrip(case: AdaptedModel, attach: Call, save: Call, load: Call) -> Results:
    model = attached(attach, case.build(), **case.configs["default"])
    train(model)
    right = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        for times in ("once", "twice"):
            path, base = Path(folder, times), case.build()
            save(model, path)
            yield same(f"the logits after saving {times}", logits(model), right)
            model = changed(base, load(base, path))
            yield same(f"the logits of what was saved and loaded {times}", logits(model), right)


# --- several adapters ---


@dataclass
class Several:
    """A model, and for each of its adapters the right logits, and how many numbers are trained where it is alone."""

    case: AdaptedModel
    attach: Call
    switch: Call
    has_steps: bool  # of training, after each operation; without them, a switch to each adapter, and back
    model: Any = None
    right: dict[str, Array] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        for name in self.case.configs:
            self.add(name)
            self.train(name)

    def add(self, name: str) -> None:
        alone = attached(self.attach, self.case.build(), name=name, **self.case.configs[name])
        self.sizes[name] = sum(parameter.numel() for parameter in trainable(alone))
        self.model = attached(self.attach, self.model, name=name, **self.case.configs[name])
        self.right[name] = logits(self.case.build())  # a new adapter changes nothing

    def train(self, name: str) -> None:
        self.switch(self.model, name)
        train(self.model)
        self.right[name] = logits(self.model)

    def acts(self, when: str, name: str = "") -> Results:
        """Compare the logits with those of an adapter, or any; and claim that a step changes those that act, only."""
        known = [logits(self.case.build()), *self.right.values()]
        try:
            y = logits(self.model)
        except Exception as error:
            yield Comparison(f"the logits {when}", error, known[0])
            return
        right = self.right.get(name, next((own for own in known if is_same(y, own)), known[0]))
        yield same(f"the logits {when}", y, right)
        if not self.has_steps:
            for other in (*self.right, *self.right):
                self.switch(self.model, other)
                when += f", switching to {other!r}"
                yield same(f"the logits {when}", logits(self.model), self.right[other])
            return
        if name not in self.right and is_same(y, known[0]) and not trainable(self.model):
            return  # the base acts
        size, alone = sum(parameter.numel() for parameter in trainable(self.model)), self.sizes.get(name)
        problem = "" if size == alone or name not in self.right else f"found {size}, and {alone} where it is alone"
        yield claim(f"the number of trained numbers {when}", problem)
        train(self.model, steps=1)
        y, before, self.right = logits(self.model), self.right, {}
        for other in before:
            self.switch(self.model, other)
            self.right[other] = logits(self.model)
        acting = [other for other, own in self.right.items() if is_same(y, own)]
        trained = [other for other, own in self.right.items() if not is_same(own, before[other])]
        found = (
            f"after a step the logits are those with {acting or 'none of them'}, and other than before with {trained}"
        )
        found += "" if name else "; or a new one does not begin as the base"
        yield claim(f"what is trained {when}", "" if acting == trained and acting else found)


@cache
def first_without_steps(scenario: Call) -> Call:
    """Return a comparison that is made twice: what is wrong before a step of training is not a mistake of the step."""

    def compare(case: AdaptedModel, attach: Call, switch: Call, *others: Any) -> Results:
        for has_steps in (False, True):
            yield from scenario(Several(case, attach, switch, has_steps, case.build()), *others)

    return unpacked(compare)


def switched(state: Several, *_: Any) -> Results:
    for name in state.case.configs:
        state.add(name)
        yield from state.acts(f"after adding {name!r}")
        state.train(name)
    for name in (*state.case.configs, *reversed(state.case.configs)):
        state.switch(state.model, name)
        yield from state.acts(f"after switching to {name!r}", name)


def disabled(state: Several, disable: Call | None = None, _: Any = None) -> Results:
    if disable is None:
        raise NotApplicable("no `disabled` was given")
    state.begin()
    for name in state.case.configs:
        for is_interrupted in (False, True):
            state.switch(state.model, name)
            with suppress(InterruptedError), disable(state.model):
                yield same(f"the logits with {name!r} disabled", logits(state.model), logits(state.case.build()))
                if is_interrupted:
                    raise InterruptedError
            yield from state.acts(f"after {name!r} was disabled" + ", until an error" * is_interrupted, name)


def deleted(state: Several, _: Any = None, delete: Call | None = None) -> Results:
    if delete is None:
        raise NotApplicable("no `delete` was given")
    state.begin()
    first, acting, last = state.case.configs
    for name, again in ((last, last), (first, ""), (acting, acting)):
        state.switch(state.model, acting)
        delete(state.model, name)
        del state.right[name]
        yield from state.acts(f"after deleting {name!r} while {acting!r} acts", acting)
        for other in [*state.right]:
            state.switch(state.model, other)
            yield from state.acts(f"after deleting {name!r} and switching to {other!r}", other)
        if again:
            state.add(again)
            state.switch(state.model, again)
            yield from state.acts(f"after adding {again!r} again", again)


def switched_and_disabled(state: Several, disable: Call | None = None, _: Any = None) -> Results:
    yield from switched(state)
    if disable is not None:
        yield from disabled(replace(state, model=state.case.build(), right={}), disable)


# --- merged and unmerged ---


def cycles_of_floats(case: AdaptedLinear, make: Call, merge: Call, unmerge: Call) -> Results:
    """Errors must not add up in 16 bits: those of many cycles would be as large as the weight."""
    W, A, B = (Bounded.exact(abs(array), case.dtype) for array in (case.W, case.A, case.B))
    rounding = 2 * (W + scaled(B, A, case.scale)).error  # of W + s·B A, and of what is left when s·B A is subtracted
    yield from cycles(case, make, merge, unmerge, rounding, adds_up=case.dtype in ("float32", "float64"))


def cycles_of_nf4(case: AdaptedLinear, make: Call, merge: Call, unmerge: Call) -> Results:
    """The base is in NF4, and may be quantized again: by half a gap g of a block's absmax, and by g·(1 + g) of it."""
    if not accepted(make, quantize="nf4"):
        raise NotApplicable("the layer takes no `quantize`")
    W = NF4Weight(case.outer, case.inner, seed=case.seed).values.value
    case = case.changed(W=W.astype(np.float32))  # which NF4 has without an error
    size = abs(case.W) + abs(case.scale * case.B @ case.A)
    absmax = size.reshape(-1, 64).max(1).repeat(64).reshape(size.shape)
    yield from cycles(case, make, merge, unmerge, HALF_GAP * (2 + HALF_GAP) * absmax, adds_up=False, quantize="nf4")


def cycles(
    case: AdaptedLinear, make: Call, merge: Call, unmerge: Call, allowed: Array, adds_up: bool, **options: Any
) -> Results:
    """Compare the weight that a layer applies, merged and unmerged, in the first and the last cycles.

    B is another one in each cycle. What a merge and unmerging it may change of the weight is `allowed`.
    """
    built, probe = make_layer(make, replace(case, lead=(case.inner,)).changed(x=np.eye(case.inner)), **options)
    layer, x = built.layer, tensor(probe.x, probe.dtype)
    parts = [] if hasattr(layer, "is_numpy") else built.parts("B", layer(x))
    trained = [(part, part.detach().to(torch.float64, copy=True)) for part, _ in parts]

    def applied(when: str, merges: int) -> Comparison:
        y = probe.changed(B=factor * probe.B).y
        error = y.error + allowed.T * (merges if adds_up else min(merges, 1))
        return Comparison(f"layer(1), the weight that is applied, {when}", layer(x), replace(y, error=error))

    factor, before = 1.0, len(leaves(layer(x))) if parts else 0
    for i in range(CYCLES + 1):
        if trained and i > 1:  # the first merge has to keep B as it was
            factor = (-1) ** i * (1 - i / (3 * CYCLES))
            for part, B in trained:
                part.data.copy_(factor * B)
        if i in (0, 1, CYCLES):
            yield applied(f"after {i} cycles", merges=i)
        for _ in range(2):  # the second call of eval() or train() changes nothing
            set_mode(layer, training=i % 3 > 0)
        layer = changed(layer, merge(layer))
        if i in (0, CYCLES):
            yield applied(f"merged after {i} cycles", merges=i + 1)
        layer = changed(layer, unmerge(layer))
        set_mode(layer, training=True)
    after = len(leaves(layer(x))) if parts else 0
    yield claim("what is trained", "" if after == before else f"found {after} tensors, and {before} at first")


# --- stopped and resumed, recomputed ---


@dataclass(frozen=True)
class Stops:
    """A run of `total` steps that stops after each of `stops`, and is resumed from its files."""

    stops: tuple[int, ...] = (2,)
    total: int = 4


def resumed(run: Callable[[Path, int, int], Any], case: Stops) -> Results:
    steps = list[int]()
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    with hook, tempfile.TemporaryDirectory() as folder:

        def arrays(name: str, stop: int, seed: int = 0) -> dict[str, Bounded]:
            steps.clear()
            path = Path(folder, name)
            path.mkdir(exist_ok=True)
            return seeded(seed, run, path, stop, case.total)

        whole = arrays("whole", case.total)
        made = len(steps)  # 0 without an optimizer of PyTorch
        yield from equal("of a second run", arrays("again", case.total), whole)
        found = arrays("stopped", case.stops[0])
        if all(np.array_equal(found[name].value, own.value) for name, own in whole.items()):
            raise AssertionError(f"found the same after {case.stops[0]} and {case.total} steps: nothing is trained")
        for last, stop in pairwise((*case.stops, case.total)):
            found = arrays("stopped", stop, seed=stop)  # another process has other random numbers
            too_many = (len(steps) - 1) * case.total > made * (stop - last + 1)  # one may restore an optimizer's state
            problem = f"found {len(steps)} optimizer steps from {last} to {stop}, and {made} in a whole run"
            yield claim("the number of steps", problem if too_many else "")
        yield from equal("of a resumed run", found, whole)


def seeded(seed: int, function: Call, *arguments: Any) -> dict[str, Bounded]:
    """Return copies of the arrays of a mapping, a list or a single one, as what others have to be near."""
    torch.manual_seed(seed)
    result = function(*arguments)
    if not isinstance(result, Mapping):
        result = dict(enumerate(result if isinstance(result, list | tuple) else [result]))
    return {str(name): near(as_array(own).copy(), own) for name, own in result.items()}


def equal(when: str, found: Mapping[str, Bounded], right: Mapping[str, Bounded], is_exact: bool = True) -> Results:
    names = f"found {', '.join(found)}; accepted are {', '.join(right)}"
    yield claim(f"the names {when}", "" if found.keys() == right.keys() else names)
    for name, own in right.items():
        yield Comparison(f"{name} {when}", found[name].value, own.value if is_exact else own)


def recomputed(gradients: Callable[[bool, int], Any], case: None) -> Results:
    for seed in range(3):
        run = partial(seeded, seed, gradients)
        (plain, kept), (again, _) = (counted(run, False, seed) for _ in range(2))
        state = torch.get_rng_state()
        ours, less = counted(run, True, seed)
        if not any(own.value.any() for own in plain.values()):
            raise AssertionError("found 0 for all gradients")
        yield from equal("when computed twice", again, plain, is_exact=False)
        yield from equal("with recomputation", ours, plain, is_exact=False)
        yield Comparison("PyTorch's random state after recomputation", torch.get_rng_state(), as_array(state))
        found = f"found {less} numbers, and {kept} without recomputation: it saves nothing"
        yield claim("what is kept for the backward pass", found if 0 < kept <= less else "")


def counted(run: Call, *arguments: Any) -> tuple[Any, int]:
    """Return a result, and how many numbers autograd has kept when a backward pass begins, 0 without autograd."""
    kept, at_begin = list[int](), list[int]()

    def pack(own: Tensor) -> Tensor:
        kept.append(own.numel())
        return own

    def unpack(own: Tensor) -> Tensor:
        at_begin.append(sum(kept))
        return own

    with saved_tensors_hooks(pack, unpack):
        result = run(*arguments)
    return result, at_begin[0] if at_begin else sum(kept)


# --- divided among ranks ---


class Waits(BaseException):
    """A rank calls `all_reduce`, and others have not yet done so."""


def over_ranks(step_fn: Call, case: MicroBatches) -> Results:
    if not accepted(step_fn, all_reduce=None):
        raise NotApplicable("the step takes no `all_reduce`")
    for world_size in range(1, len(case.rows) + 1):
        for rank, dW in enumerate(on_ranks(step_fn, case, world_size)):
            yield Comparison(f"dW of rank {rank} of {world_size}", dW, case.gradient)


def on_ranks(step_fn: Call, case: MicroBatches, world_size: int) -> list[Any]:
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

_SAVED: dict[str, dict[str, Any]] = {  # what is saved: settings of an adapter
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.q_proj": 5, "up_proj": 2},
        "alpha_pattern": {"q_proj": 1, "layers.0.up_proj": 7.5},
    },
    "expression": {"target_modules": r".*layers\.1\.(q|up)_proj"},
    "whole_norm": {"modules_to_save": ["norm"]},
    "tied_head": {"target_modules": ["up_proj", "lm_head"]},
    "whole_head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["up_proj", "embed_tokens"]},
    "bias": {"bias": "lora_only"},
    "dora": {"use_dora": True},
}
_Q_UP = {"r": 3, "lora_alpha": 10, "target_modules": ["q_proj", "up_proj"]}
_CONFIGS: dict[str, dict[str, Any]] = {  # one name begins with another
    "a": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]},
    "ab": _Q_UP,
    "b": {"r": 2, "lora_alpha": 1, "target_modules": ["up_proj", "down_proj"]},
}


def _several(**more: Any) -> list[AdaptedModel]:
    return [AdaptedModel({name: {**config, **more} for name, config in _CONFIGS.items()})]


_SEVERAL = _several()
_MORE = (("whole_norm", "modules_to_save", ["norm"]), ("bias", "bias", "lora_only"), ("dora", "use_dora", True))
_SWITCH = "a new adapter changes nothing; after a switch one acts, and only it is trained"
_DISABLE = "disabled, the base acts, and then what acted before"
_DELETE = "a deleted one is gone, and others stay as they were"
_NORMS = AdaptedModel(  # the last one trains no norm
    {
        name: {**own, "target_modules": ["up_proj"], "modules_to_save": ["norm"] * (name != "b")}
        for name, own in _CONFIGS.items()
    }
)
_BOTH = first_without_steps(switched_and_disabled)
_LOADED = "what is saved and loaded, once and twice, computes the same"
_CYCLE = f"merged the layer applies W + s·B A, and unmerged W again, in {CYCLES} cycles"
_64, _32, _F16, _B16 = (linear_cases("lora", dtype)[12:22:3] for dtype in UNITS)
_16 = _B16 + _F16
_4 = [AdaptedLinear(inner=64, r=4, dtype="float32"), AdaptedLinear(inner=128, outer=24, r=8, dtype="float32")]
_STOPS = [Stops(), Stops((1,)), Stops((3,), 5), Stops((1, 2, 4), 6), Stops((9, 12), 13)]
LAWS = (
    *(
        Law("roundtrip", name, _LOADED, [AdaptedModel({"default": {**_Q_UP, **config}})], unpacked(roundtrip))
        for name, config in _SAVED.items()
    ),
    Law("adapters", "switch", _SWITCH, _SEVERAL, first_without_steps(switched)),
    Law("adapters", "disable", _DISABLE, _SEVERAL, first_without_steps(disabled)),
    Law("adapters", "delete", _DELETE, _SEVERAL, first_without_steps(deleted)),
    Law("adapters", "delete_norm", f"{_DELETE}, with modules_to_save", [_NORMS], first_without_steps(deleted)),
    *(Law("adapters", name, f"{_SWITCH}, with {key}", _several(**{key: value}), _BOTH) for name, key, value in _MORE),
    Law("merge_cycle", "32-bit", f"{_CYCLE} of float64 and float32", _64 + _32, unpacked(cycles_of_floats)),
    Law("merge_cycle", "16-bit", f"{_CYCLE} of 16 bits, without drift", _16, unpacked(cycles_of_floats)),
    Law("merge_cycle", "4-bit", f"{_CYCLE} of NF4, or that quantized again", _4, unpacked(cycles_of_nf4)),
    Law("resume", "exact", "k steps, saved, loaded, and k more are 2k steps, bit for bit", _STOPS, resumed),
    Law("recompute", "gradients", "it changes no gradient, dropout included, and keeps less", [None], recomputed),
    Law("ranks", "gradient", "each rank gets the gradient of one batch", BATCHES + EMPTY, over_ranks),
)
