"""Directories of models and adapters: what lies in them, and the same with something changed."""

import json
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock
from safetensors.torch import load_file

import minilora as ml
import scripts.pretrained
from minilora.adapters.layout import CONFIG_FILE
from minilora.files import MANIFEST
from tests.models import randomize_adapters_, tiny_model

ROOT = Path(__file__).parents[1]


def pretrained(name):
    """The directory of a pretrained model, made once: processes that ask for it at once wait for each other."""
    directory = ROOT / ".cache" / "pretrained" / name
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        file = directory.with_suffix(".gguf")
        if not file.exists():
            scripts.pretrained.download(name, file)
        if not directory.exists():
            scripts.pretrained.convert(file, directory)
    return directory


def saved(directory, family="llama", seed=0, **config):
    """A model with a random adapter, saved in `directory`."""
    model = tiny_model(family, dtype=torch.float32)
    write_adapter(model, directory, seed, **{"r": 3, "lora_alpha": 21, **config})
    return model


def write_adapter(model, directory, seed=0, **config):
    """Give a model an adapter of random numbers, and save it."""
    ml.attach(model, ml.LoraConfig(**config), seed=seed)
    randomize_adapters_(model, seed)
    ml.save_adapter(model, directory)
    return directory


def save_file(tensors, path, metadata=None):
    """Write tensors as another tool does, so that no manifest speaks of them."""
    (path.parent / MANIFEST).unlink(missing_ok=True)
    safetensors.torch.save_file(tensors, path, metadata)


def without_manifests(root):
    """Remove the manifests of what minilora wrote: a file from elsewhere has none."""
    for manifest in root.rglob(MANIFEST):
        manifest.unlink()


def edit(directory, **changes):
    path = directory / CONFIG_FILE
    (directory / MANIFEST).unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SHARD = 9_000  # bytes: several shards for a tiny model


def write_base(directory, family="llama", dtype=torch.float32, quantize=None, **changes):
    """Write a random model, in four bits if `quantize` says so; the directory."""
    ml.save_model(tiny_model(family, dtype=dtype, **changes), directory)
    if quantize is not None:
        ml.save_model(ml.load_model(directory, dtype, quantize=quantize), directory)
    return directory


def same_state(one, other):
    """Equal names, dtypes and bits."""
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == other.state_dict()[name].dtype
        assert torch.equal(tensor, other.state_dict()[name]), name


def change(directory, changes):
    """Write the tensors of a directory again, some of them changed; None takes one away."""
    tensors = load_file(directory / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")
