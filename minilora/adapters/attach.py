"""Attach the adapter that a `LoraConfig` describes to any `nn.Module`, delete it, or merge it; what a model has."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora import adapter
from minilora.adapters import build
from minilora.adapters.config import LoraConfig
from minilora.adapters.modules_to_save import ModulesToSave, unties
from minilora.errors import ConfigError, TargetError
from minilora.llama import Llama
from minilora.lora import AdapterWrapper
from minilora.models.fsdp import is_sharded
from minilora.nf4 import NF4Linear


def attach(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    start: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Add a new adapter to the modules that `config` selects, activate only it, and freeze everything else.

    An adapter that the model has is frozen too; `set_adapter` with both names lets both act and learn.

    The new adapter changes nothing until it is trained. With DoRA and a bias the last bit may differ, since the bias is
    added after the scaling by m/‖W‖ = 1.

    Args:
        model: any module; its modules are replaced in place.
        config: rank, scale, targets and start values; without a `task_type`, a `Llama` has "CAUSAL_LM".
        name: the adapter's name; several can be attached under different names.
        seed: of the generator that draws start values.
        dtype: of the new parameters.
        start: path of a module -> the A and B that it starts with, instead of those of `init_lora_weights`; s·B A is
            taken as a part of the weight, and subtracted from it.

    Raises:
        TargetError: nothing matches a part of `config`, the name cannot be used, or `start` has a path that `config`
            does not select.
        ConfigError: a layer cannot have these start values.
        ShapeError: an A or a B of `start` does not fit its module and rank.
    """
    if config.task_type is None and isinstance(model, Llama):
        config = replace(config, task_type="CAUSAL_LM")
    modules = adapter.base_modules(model)
    paths = build.find_targets(modules, config, path_of(model, "get_output_embeddings"))
    start = start or {}
    if unknown := sorted(start.keys() - set(paths)):
        raise TargetError(f"start: {unknown[:5]} are not among the modules that get an adapter")
    generator = torch.Generator().manual_seed(seed)
    tensors = {path: build.low_rank_tensors(modules[path], path, config, generator, start.get(path)) for path in paths}
    layers = build.build_layers(modules, config, name, tensors, dtype, path_of(model, "get_input_embeddings"))
    inject_layers(modules, layers, config, name)


def inject_layers(
    modules: Mapping[str, nn.Module], layers: Mapping[str, AdapterWrapper], config: LoraConfig, name: str
) -> None:
    """Put the layers of a new adapter into the model of these modules, or raise a TargetError if one would not act."""
    model = modules[""]
    if "" in layers:
        raise TargetError("the model's own parameters, which are in none of its modules, cannot be adapted")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or "_orig_mod" in model._modules:
        raise TargetError(f"{type(model).__name__} renames the modules of the model in it: adapt it, then wrap it")
    for path, layer in layers.items():
        is_own = has_hooks(layer.base) or "forward" in layer.base.__dict__
        if is_own and isinstance(layer, build.LINEAR_WRAPPERS):
            raise TargetError(f"{path}: has hooks or a forward of its own, which an adapter would skip; exclude it")
    both = [*adapter.adapter_layers(model).items(), *layers.items()]
    full = {path for path, layer in both if isinstance(layer, ModulesToSave)}
    for path, _ in both:
        if outer := [where for where in full if path.startswith(f"{where}.")]:
            raise TargetError(
                f"{path}: is in {outer[0]}, which an adapter trains in full, so one of the two would have no effect"
            )
    adapter.inject_adapter(model, layers, name)
    for layer in layers.values():
        layer.adapters[name].lora_config = config  # see `files.config_of_adapter`


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove one adapter; modules that have no other adapter are put back.

    If it was the only active one, the first of the others by name becomes active in all modules that have it, and
    trainable if this one was. (In PEFT each module activates the first of its own.)

    Raises:
        TargetError: the model has no adapter of that name.
    """
    layers = adapter.layers_of(model, name).values()
    acted = any(name in layer.active for layer in layers)
    was_trained = any(p.requires_grad for layer in layers for p in adapter.own_parameters(layer, name))
    for layer in layers:
        del layer.adapters[name]
        layer.active = tuple(other for other in layer.active if other != name)
    adapter.replace_modules(model, ((layer, layer.base) for layer in layers if not layer.adapters))
    left = adapter.adapter_layers(model).values()
    if acted and left and not any(layer.active for layer in left):
        first = min(other for layer in left for other in layer.adapters)
        adapter.set_adapter(model, first, trainable=was_trained)


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights, W ← merged_weight(), and leave plain modules.

    A weight that two modules share stays shared if both results are equal. Otherwise `tie_word_embeddings` is set to
    False in the config of a model of transformers, so that loading it again does not tie them.

    Raises:
        TargetError: there is no adapter, none is active, or a wrapper has hooks; or a weight would no longer be shared
            in a model whose forward depends on that.
        TrainingError: a merged weight is not finite; the model is left as it was.
    """
    layers = {layer.path: layer for layer in _mergeable_layers(model)}
    sharing: dict[int, list[str]] = {}
    for path, base in adapter.base_modules(model).items():
        if (own := base._parameters.get("weight")) is not None:
            sharing.setdefault(id(own), []).append(path)
    untied = [paths[0] for paths in sharing.values() if unties(map(layers.get, paths))]
    config = getattr(model, "config", None)
    # Of the encoder-decoders without this setting some scale the input of the head if it is tied.
    if untied and getattr(config, "is_encoder_decoder", False) and not hasattr(config, "scale_decoder_outputs"):
        raise TargetError(f"{untied[0]}: a merge would untie its weight, which may change what the model computes")
    adapter.merge(model)
    for first, *others in sharing.values():
        weight: Any = model.get_submodule(first).weight
        module: Any
        for module in map(model.get_submodule, others):
            if torch.equal(module.weight, weight):
                module.weight = weight
            elif callable(getattr(model, "save_pretrained", None)):
                model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _mergeable_layers(model: nn.Module) -> list[AdapterWrapper]:
    """Return the wrappers; raise an error if one has hooks, which a merge would lose, or the base is divided."""
    layers = adapter.require_layers(model)
    if any(map(is_sharded, model.parameters())):
        raise ConfigError("the base is divided among ranks. Save the adapter, then merge it into an unsharded model")
    if hooked := [layer.path for layer in layers if has_hooks(layer)]:
        raise TargetError(f"{hooked[0]}: has hooks, which would be lost where it is merged; remove them")
    return layers


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Fold the active adapters into the weights inside the block.

    The model computes as fast as without adapters, and keeps the adapted weights twice. Afterwards it is bit for bit as
    it was: the bases were kept, and nothing is subtracted. Adapters that were attached inside the block are lost. No
    other thread may use the model meanwhile.

    Raises:
        TargetError: there is no adapter, or a wrapper has hooks.
        TrainingError: a merged weight is not finite.
    """
    layers = _mergeable_layers(model)  # inactive ones too, or they could be activated
    replaced = [(adapter.merged_module(layer), layer) for layer in layers]
    try:
        adapter.replace_modules(model, ((layer, module) for module, layer in replaced))
        yield
    finally:
        if adapter.adapter_layers(model):
            adapter.detach(model)
        adapter.replace_modules(model, replaced)


def find_target_modules(model: nn.Module) -> list[str]:
    """Return the shortest `target_modules` that match all linears in a model's layers, and nothing else.

    A layer has a number in its path, as "3" in "model.layers.3.mlp.up_proj". Modules outside layers, such as heads and
    poolers, are left out.

    Raises:
        TargetError: there are no such linears.
    """
    modules = adapter.base_modules(model)
    linears = [path for path, kind in build.adaptable(modules).items() if kind in build.LINEAR_WRAPPERS]
    chosen = [path for path in linears if any(part.isdecimal() for part in path.split(".")[:-1])]
    if not chosen:
        raise TargetError("the model has no linears in numbered layers; name the modules to adapt in target_modules")
    taken = {end for path in modules.keys() - set(chosen) for end in _ends(path)}
    return sorted({next((end for end in _ends(path) if end not in taken), path) for path in chosen})


def _ends(path: str) -> Iterator[str]:
    """Yield the endings of a path that start with a word, as "mlp.0" and "h.2.mlp.0" of "h.2.mlp.0"."""
    parts = path.split(".")
    return (".".join(parts[at:]) for at in reversed(range(len(parts))) if not parts[at].isdecimal())


def path_of(model: nn.Module, method: str) -> str | None:
    """Return the path of the module that a method gives, such as `get_input_embeddings`; None if there is none."""
    find = getattr(model, method, None)
    try:
        wanted = find() if callable(find) else None
    except NotImplementedError:  # transformers raises it for models without embeddings
        return None
    return next((path for path, module in adapter.walk(model) if module is wanted), None)


class ParameterCount(NamedTuple):
    """The number of trainable parameters, and of all."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and all parameters, a shared one once; a packed weight counts as the dense one it encodes."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    parts = {id(part) for linear in packed for part in linear.parts}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if id(p) not in parts]
    sizes += [(linear.out_features * linear.in_features, False) for linear in packed]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
