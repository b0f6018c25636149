"""Files and arguments that are made to hurt, each a call that has to be refused, or to be harmless."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import minilora as ml
from minilora.cli import main as command
from minilora.files import ASSETS, TensorFile, read_json
from minilora.models.template import ChatTemplate
from minilora.models.tokenizer import load_tokenizer
from minilora.runs.formats import Row
from minilora.runs.rows import stream_rows
from minilora.tools.inspect import inspect_path
from minilora.tools.merging import Merge, merge_directory
from tests.files import saved, without_manifests
from tests.models import tiny_model
from tests.reliability.watch import Call
from tests.test_sandbox import ESCAPES, TOO_MUCH

MODEL = ASSETS / "model"
TEXT = "The heron waits " + "a" * 40 + "! 12345 " + "b" * 200


def read_rows(path: Path) -> list[Row]:
    return list(stream_rows(path))


def edit(path: Path, **changes: Any) -> Path:
    """Change keys of a JSON file, or of an object in it (`a.b`), and return its directory."""
    value = json.loads(path.read_text())
    for key, change in changes.items():
        *inner, last = key.split("__")
        owner = value
        for name in inner:
            owner = owner[name]
        owner[last] = change
    path.write_text(json.dumps(value))
    return path.parent


def written(root: Path) -> Path:
    """Write a model and an adapter of it, and return their directory."""
    saved(root / "adapter", target_modules=("q_proj",))
    ml.save_model(_model(), root / "base")
    without_manifests(root)
    return root


def _model() -> Any:
    return tiny_model(dtype=torch.float32)


RAMP = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
# What config.json states, one key at a time.
CONFIGS: dict[str, dict[str, Any]] = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "160 layers": {"num_hidden_layers": 160},
    "a width of 10^18": {"hidden_size": 10**18},
    "a width of 2^17": {"hidden_size": 2**17},
    "a vocabulary of 2^62": {"vocab_size": 2**62},
    "an MLP of 2^40": {"intermediate_size": 2**40},
    "heads of 2^40": {"head_dim": 2**40},
    "2^31 heads": {"num_attention_heads": 2**31, "num_key_value_heads": 1},
    "400 digits in a size": {"hidden_size": 10**400},
    "400 digits in theta": {"rope_theta": 10**400},
    "theta beyond float32": {"rope_theta": 1e300},
    "400 digits in a window": {"max_window_layers": 10**400, "sliding_window": 10**400},
    "400 digits as the end of text": {"eos_token_id": 10**400},
    "a factor of 10^400": {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
    "equal ends of a ramp": {"rope_scaling": RAMP},
    "many windows": {"layer_types": ["sliding_attention"] * 10**5, "model_type": "qwen2", "use_sliding_window": True},
    "code to run": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_attn_implementation_internal": "evil/kernel"},
}


def use_model(directory: Path) -> None:
    model = ml.load_model(directory)
    ml.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=2)


def config_calls(root: Path) -> Iterator[Call]:
    for i, (name, changes) in enumerate(CONFIGS.items()):
        directory = edit(written(root / str(i)) / "base" / "config.json", **changes)
        yield f"config.json: {name}: load", partial(use_model, directory)
        if changes.keys() & {"num_hidden_layers", "vocab_size", "hidden_size"}:
            yield f"config.json: {name}: inspect", partial(inspect_path, str(directory))
    path = root / "text"
    for name, text in {
        "16 MB of lists": '{"a": [' + "[]," * 5_000_000 + "[]]}",
        "20 MB of text": '{"a": "' + "x" * 20_000_000 + '"}',
        "deep": '{"a":' * 100_000,
        "digits": '{"a": ' + "9" * 10**6 + "}",
    }.items():
        path.write_text(text)
        yield f"JSON: {name}", partial(read_json, path)


ADAPTERS: dict[str, dict[str, Any]] = {
    "a token of 6,000,000": {"trainable_token_indices": [6_000_000]},
    "200,000 keys of alpha_pattern": {"alpha_pattern": {f"layers.{i}.q_proj": 3 for i in range(200_000)}},
    "9,999 keys of alpha_pattern": {"alpha_pattern": {f"layers.{i}.q_proj": 3 for i in range(9_999)}},
    "200,000 unknown keys": {f"key{i}": 1 for i in range(200_000)},
    "a rank of 2^30": {"r": 2**30},
    "alpha of 10^400": {"lora_alpha": 10**400},
    "alpha of 10^300": {"lora_alpha": 1e300},
    "200,000 modules in full": {"modules_to_save": [f"m{i}" for i in range(200_000)]},
    "200,000 parameters": {"target_parameters": [f"m{i}.weight" for i in range(200_000)]},
    "code": {"auto_mapping": {"base_model_class": "evil", "parent_library": "os"}},
    "the raw form of PiSSA": {"init_lora_weights": "pissa"},
}


def use_adapter(directory: Path, quantize: Any = None) -> None:
    model = ml.load_model(directory / "base", quantize=quantize)
    ml.load_adapter(model, directory / "adapter")


def adapter_calls(root: Path) -> Iterator[Call]:
    for i, (name, changes) in enumerate(ADAPTERS.items()):
        directory = written(root / f"adapter{i}")
        edit(directory / "adapter" / "adapter_config.json", **changes)
        yield f"adapter_config.json: {name}: load", partial(use_adapter, directory)
        yield (
            f"adapter_config.json: {name}: merge",
            partial(merge_directory, Merge(directory / "base", [directory / "adapter"]), directory / "merged"),
        )
        yield f"adapter_config.json: {name}: inspect", partial(inspect_path, str(directory / "adapter"))
        if changes.get("init_lora_weights"):
            yield f"adapter_config.json: {name} on four bits", partial(use_adapter, directory, "nf4")


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def _one(shape: list[int], size: int) -> bytes:
    return header(a={"dtype": "U8", "shape": shape, "data_offsets": [0, size]}) + bytes(size)


def tensor_calls(root: Path) -> Iterator[Call]:
    many = {f"t{i}": {"dtype": "U8", "shape": [], "data_offsets": [i, i + 1]} for i in range(150_000)}
    for name, content in {
        "65 dimensions": _one([1] * 65, 1),
        "200,000 dimensions": _one([1] * 200_000, 1),
        "an empty tensor of 2^63": _one([0, 2**63 - 1], 0),
        "an empty tensor of 2^94": _one([0, 2**47, 2**47], 0),
        "a shape beyond 64 bits": _one([2**63, 2**63], 0),
        "a header of 2^63": struct.pack("<Q", 2**63) + b"{}",
        "a header of 99 MB": struct.pack("<Q", 99_000_000) + b"{" + b" " * 98_999_998 + b"}",
        "150,000 tensors": header(**many) + bytes(150_000),
        "lists in the header": struct.pack("<Q", 15_000_010) + b'{"a":[' + b"[]," * 5_000_000 + b"1]}",
    }.items():
        path = root / "file.safetensors"

        def read(path: Path = path, content: bytes = content) -> None:
            path.write_bytes(content)
            file = TensorFile(path)
            for each in list(file.shapes)[:5]:
                file.read(each)
            command(["inspect", str(path)])

        yield f"safetensors: {name}", read


def data_calls(root: Path) -> Iterator[Call]:
    def write_and_read(text: bytes, skips: bool = False, name: str = "rows.jsonl") -> None:
        (root / name).write_bytes(text)
        ml.load_dataset(root / name, load_tokenizer(MODEL), ml.DataConfig(skip_bad_rows=skips))

    yield "data: a line of 9 MB", partial(write_and_read, b'{"text": "' + b"a" * 9_000_000 + b'"}')
    yield "data: bad rows", partial(write_and_read, b"[]\n" * 400_000, True)
    yield "data: bad rows in an array", partial(write_and_read, b"[" + b"1," * 400_000 + b"1]", True)
    yield "data: a row of lists", partial(write_and_read, b'{"a":[' + b"[]," * 2_500_000 + b"1]}")
    yield "data: texts that are empty", partial(write_and_read, b'{"text":""}\n' * 100_000, True)
    for name, text in {
        "cells without end": b"prompt,completion\n" + b'"\n",' * 20_000_000,
        "a row of 2,000,000 cells": b"prompt,completion\n" + b"," * 2_000_000 + b"a",
        "2,000,000 columns": b"," * 2_000_000 + b"prompt,completion\na,b\n",
        "400,000 bad rows": b"prompt,completion\n" + b"a\n" * 400_000,
    }.items():
        yield f"data: CSV: {name}", partial(write_and_read, text, True, "rows.csv")
    yield "data: a document of 9 MB", partial(write_and_read, b"a" * 9_000_000, False, "book.txt")
    yield "data: deep", partial(write_and_read, b'{"a":' * 100_000)
    yield "data: digits", partial(write_and_read, b'{"a": ' + b"9" * 10**6 + b"}")


def odd_calls(root: Path) -> Iterator[Call]:
    """Directories in which a file is a FIFO, a device, a socket, a directory, or a link out of it."""
    secret = root / "secret"
    secret.write_text(json.dumps({"text": "secret"}) + "\n")
    readers: dict[str, Callable[[Path], object]] = {
        "config.json": ml.load_model,
        "model.safetensors": ml.load_model,
        "tokenizer.json": ml.load_tokenizer,
        "tokenizer_config.json": ml.load_tokenizer,
        "adapter_config.json": lambda path: ml.load_adapter(_model(), path),
        "adapter_model.safetensors": lambda path: ml.load_adapter(_model(), path),
        "train.jsonl": lambda path: ml.load_dataset(str(path), load_tokenizer(MODEL)),
        "run.json": lambda path: inspect_path(str(path)),
        "metrics.jsonl": lambda path: inspect_path(str(path)),
        "chat_template.jinja": ml.load_tokenizer,
    }
    kinds: dict[str, Callable[[Path], object]] = {
        "a FIFO": os.mkfifo,
        "a socket": lambda path: _bind(path),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link outside": lambda path: path.symlink_to(os.path.relpath(secret, path.parent)),
        "a link to itself": lambda path: path.symlink_to(path.name),
    }
    for file, read in readers.items():
        for i, (kind, make) in enumerate(kinds.items()):
            directory = root / f"{file}{i}"
            shutil.copytree(MODEL, directory)
            (directory / "run.json").write_text("{}") if file in ("run.json", "metrics.jsonl") else None
            if file.startswith("adapter"):
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    (directory / name).write_text("{}")
            (directory / file).unlink(missing_ok=True)
            make(directory / file)
            yield f"{kind} as {file}", partial(read, directory)
    for name in ("/dev/zero", "/dev/stdin", "/proc/self/mem", str(root)):
        yield f"a path of data: {name}", partial(read_rows, Path(name))


def _bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _tokenizer(root: Path, changes: dict[str, Any]) -> None:
    directory = root / "tokenizer"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(MODEL, directory)
    tokenizer = load_tokenizer(edit(directory / "tokenizer.json", **changes))
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer.encode(tokenizer.quote(TEXT + "<|endoftext|>"))


PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "an id below 0": {"model__vocab__zzz": -1},
    "an empty pattern": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "abc"}},
    "a text padded to 2^40": {"padding": {**PADDING, "strategy": {"Fixed": 2**40}}},
    "a stride beyond the length": {
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
    },
    "no model": {"model": None},
}


def tokenizer_calls(root: Path) -> Iterator[Call]:
    for name, changes in TOKENIZERS.items():
        yield f"tokenizer.json: {name}", partial(_tokenizer, root, changes)


PARENTHESES = "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}"


def template_calls(root: Path) -> Iterator[Call]:
    for source in [*ESCAPES, *TOO_MUCH, PARENTHESES]:
        yield f"chat template: {source:.60}", partial(_render, source)


def _render(source: str) -> None:
    ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "user", "content": "hi"}])


def calls(where: str) -> Iterator[Call]:
    """Yield the calls of all kinds, each kind in a directory of its own."""
    kinds = (config_calls, adapter_calls, tensor_calls, data_calls, odd_calls, tokenizer_calls, template_calls)
    for kind in kinds:
        root = Path(where) / kind.__name__
        root.mkdir()
        yield from kind(root)
