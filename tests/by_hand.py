"""What the laws of an adapter's life take, written by hand; `test_lifecycle_laws` plants mistakes in this source."""

import math
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minilora.testing import NotApplicable, implementations  # noqa: F401  # of mistakes

# --- several adapters, saved and loaded ---

KNOWN = {"r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}


class Layer(nn.Module):
    """A frozen module, and by name what adapters add to it, or have in its place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.own = nn.ModuleDict()
        self.scales = {}
        self.active = None

    def forward(self, x):
        if self.active not in self.own:
            return self.base(x)
        y = self.own[self.active](x)
        if self.active not in self.scales:
            return y
        return self.base(x) + self.scales[self.active] * y


def attach(model, name="default", **config):
    if config.keys() - KNOWN or isinstance(config["target_modules"], str) or "embed_tokens" in config["target_modules"]:
        raise NotApplicable("it adapts linear layers by their names")
    if not hasattr(model, "configs"):
        model.configs = {}
    model.configs[name] = dict(config)
    for path, module in list(model.named_modules()):
        where = path.removesuffix(".base")
        end = where.rpartition(".")[2]
        if isinstance(module, Layer):
            continue
        if end in config.get("modules_to_save", ()):
            layer_of(model, where).own[name] = deepcopy(module)
        elif end in config["target_modules"]:
            r = first(config.get("rank_pattern"), where, config["r"])
            alpha = first(config.get("alpha_pattern"), where, config["lora_alpha"])
            A = nn.Linear(module.in_features, r, bias=False)
            B = nn.Linear(r, module.out_features, bias=False)
            nn.init.zeros_(B.weight)
            layer = layer_of(model, where)
            layer.own[name] = nn.Sequential(A, B)
            layer.scales[name] = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    switch(model, name)


def layer_of(model, path):
    """Return the layer around a module, which is made if there is none."""
    module = model.get_submodule(path)
    if not isinstance(module, Layer):
        model.set_submodule(path, Layer(module))
    return model.get_submodule(path)


def first(patterns, path, otherwise):
    return next((value for key, value in (patterns or {}).items() if f".{path}".endswith(f".{key}")), otherwise)


def layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, Layer)}


def switch(model, name):
    for layer in layers(model).values():
        layer.active = name
        for other, module in layer.own.items():
            module.requires_grad_(other == name)


@contextmanager
def disabled(model):
    before = {layer: layer.active for layer in layers(model).values()}
    for layer in before:
        layer.active = None
    try:
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


def delete(model, name):
    acted = any(layer.active == name for layer in layers(model).values())
    for layer in layers(model).values():
        if name in layer.own:
            del layer.own[name]
        layer.scales.pop(name, None)
    del model.configs[name]
    if acted:
        switch(model, next(iter(model.configs)))


def save(model, path):
    config = model.configs["default"]
    tensors = {}
    for where, layer in layers(model).items():
        if "default" in layer.own:
            for key, tensor in layer.own["default"].state_dict().items():
                tensors[f"{where}.{key}"] = tensor
    torch.save({"config": config, "tensors": tensors}, path)


def load(model, path):
    stored = torch.load(path)
    attach(model, **stored["config"])
    for where, layer in layers(model).items():
        for key, tensor in layer.own["default"].state_dict().items():
            tensor.copy_(stored["tensors"][f"{where}.{key}"])


# --- merged and unmerged ---


class Merged(nn.Module):
    """A linear layer with an adapter that keeps its weight while it is merged."""

    def __init__(self, W, b, A, B, alpha, quantize=None):
        super().__init__()
        self.W = nn.Parameter(W, requires_grad=False)
        self.b = b
        self.A, self.B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())
        self.scale = alpha / len(A)
        self.is_nf4 = quantize == "nf4"
        self.kept = None

    def forward(self, x):
        y = F.linear(x, self.W, self.b)
        return y if self.kept is not None else y + self.scale * F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def merge(self):
        self.kept = self.W.clone()
        self.W += self.scale * self.B @ self.A

    @torch.no_grad()
    def unmerge(self):
        self.W.copy_(self.kept)
        self.kept = None


# --- stopped and resumed ---


def run(path, stop, total):
    """Train with dropout, a schedule and shuffled rows up to a step, from the last checkpoint."""
    torch_state = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=torch_state)
    model[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total)
    begin = 0
    torch.manual_seed(2)
    if (path / "state.pt").exists():
        state = torch.load(path / "state.pt")
        begin = state["step"]
        model[2].load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
    rows = torch.randn(total, 3, 4, generator=torch.Generator().manual_seed(3))
    for step in range(begin, stop):
        optimizer.zero_grad()
        model(rows[step]).square().sum().backward()
        optimizer.step()
        schedule.step()
    state = {"step": stop, "model": model[2].state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "schedule": schedule.state_dict(), "rng": torch.get_rng_state()}, path / "state.pt")
    return dict(model.named_parameters())


# --- recomputed ---


def gradients(recompute, seed):
    """Return the gradients of a model of three blocks with dropout."""
    generator = torch.Generator().manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.4), nn.GELU()) for _ in range(3)]
    model = nn.Sequential(*blocks)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    h = torch.randn(6, 5, generator=generator)
    torch.manual_seed(seed)
    for block in blocks:
        h = checkpoint(block, h, use_reentrant=False) if recompute else block(h)
    h.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- divided among ranks ---


def step(W, micro_batches, all_reduce=lambda value: value):
    """Return the gradient of the mean over all labels of all ranks."""
    leaf = W.clone().requires_grad_()
    count = torch.zeros(())
    for x, labels in micro_batches:
        targets = labels[:, 1:]
        count += (targets != -100).sum()
        logits = F.linear(x, leaf)[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return all_reduce(leaf.grad) / all_reduce(count)
