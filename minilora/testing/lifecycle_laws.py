"""Laws of an adapter's life: saved and loaded, and one of several that are switched, disabled and deleted.

An implementation is compared with itself, as what is loaded with what was saved.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from minilora.testing.compare import PARITY, Array, Bounded, as_array
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted, both, claim, unpacked
from minilora.testing.layers import changed, set_mode

Call = Callable[..., Any]
Results = Iterator[Comparison]

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
        found = f"after a step the logits are those with {acting or 'none of them'}, and {trained or 'none'} changed"
        found += "" if name else "; or a new one does not begin as the base"
        yield claim(f"what is trained {when}", "" if acting == trained and acting else found)


def first_without_steps(scenario: Call) -> Call:
    """Return a comparison that is made twice: what is wrong before a step of training is not a mistake of the step."""

    def compare(case: AdaptedModel, attach: Call, switch: Call, *others: Any) -> Results:
        for has_steps in (False, True):
            yield from scenario(Several(case, attach, switch, has_steps, case.build()), *others)

    return unpacked(compare)


@first_without_steps
def switched(state: Several, *_: Any) -> Results:
    for name in state.case.configs:
        state.add(name)
        yield from state.acts(f"after adding {name!r}")
        state.train(name)
    for name in (*state.case.configs, *reversed(state.case.configs)):
        state.switch(state.model, name)
        yield from state.acts(f"after switching to {name!r}", name)


@first_without_steps
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


@first_without_steps
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
_NORMS = _several(target_modules=["up_proj"], modules_to_save=["norm"])
_NORMS[0].configs["b"]["modules_to_save"] = []  # the last one trains no norm
_BOTH = both(switched, disabled)
_LOADED = "what is saved and loaded, once and twice, computes the same"
LAWS = (
    *(
        Law("roundtrip", name, _LOADED, [AdaptedModel({"default": {**_Q_UP, **config}})], unpacked(roundtrip))
        for name, config in _SAVED.items()
    ),
    Law("adapters", "switch", _SWITCH, _SEVERAL, switched),
    Law("adapters", "disable", _DISABLE, _SEVERAL, disabled),
    Law("adapters", "delete", _DELETE, _SEVERAL, deleted),
    Law("adapters", "delete_norm", f"{_DELETE}, with modules_to_save", _NORMS, deleted),
    *(Law("adapters", name, f"{_SWITCH}, with {key}", _several(**{key: value}), _BOTH) for name, key, value in _MORE),
)
