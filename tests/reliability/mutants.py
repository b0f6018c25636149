"""Files that were right until something in them was changed: bytes, or the values of their JSON."""

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import minilora as ml
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.cli import main as command
from minilora.files import ASSETS, TensorFile
from minilora.models.prompts import read_prompt_files
from minilora.models.tokenizer import load_tokenizer
from minilora.tools.inspect import inspect_path
from tests.files import without_manifests
from tests.models import tiny_model
from tests.reliability.attacks import use_adapter, use_model
from tests.reliability.watch import Call

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, 1e308, -0.0)
VALUES = (
    *NUMBERS,
    *(None, True, False, "", "a", "\0", "\x1b[2J", "\ud800", "../a", "a" * 10_000, "(a+)+$", "{{ 1 }}"),
    *([], {}, [[]], [0] * 1000, {"": ""}, {"content": "<s>"}, [None], [-1], {"a": [1, {"b": None}]}),
    *(float("nan"), float("inf")),
)
X = "base_model.model.model.layers.0.x.lora_A.weight"
NAMES = ("", "a", "\0", "../x", "\x1b[31m", "é" * 300, "__metadata__", X)
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "F6_E2M3", "C64")
DTYPES = (*FLOATS, "I64", "I32", "U8", "BOOL", "f32")
SHAPES = ([], [0], [1] * 65, [2**31] * 3, [2**63 - 1, 2], [2**64], [0, 8], [8, 0], [0, 2**63])  # and places of data
METADATA = ({"labels": "[1]"}, {"base_quantization": "{}"})


def changed_bytes(content: bytes, draw: random.Random, most: int = 2**62) -> bytes:
    """Flip, insert, delete, repeat or cut bytes, mostly near the beginning, where the header is."""
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(min(len(out), most) + 1) if draw.random() < 0.8 else draw.randrange(len(out) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
        elif kind == 2:
            del out[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == 3 and at < len(out):
            out[at] = draw.choice(b'\x00\xff{}[]",:0-9e')
        elif kind == 4:
            out[at:at] = out[at : at + draw.choice((1, 16, 300))]
        elif draw.random() < 0.2:
            del out[at:]
    return bytes(out)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def changed_json(value: Any, draw: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """Replace, remove, rename, repeat or nest some values in a JSON object."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 4))):
        path = draw.choice([*places(value)][1:] or [()])
        if not path:
            return value
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        key, kind = path[-1], draw.randrange(8)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[draw.choice(NAMES)] = owner.pop(key)
        elif kind == 2:
            owner[key] = [owner[key]]
        elif kind == 3:
            owner[key] = {"a": owner[key]}
        elif kind == 4 and isinstance(owner[key], int | float):
            owner[key] = owner[key] * draw.choice((-1, 2, 10, 10**6, 0.5)) + draw.choice((0, 1))
        elif kind == 5 and isinstance(owner[key], str):
            owner[key] = draw.choice((owner[key] * 2, owner[key][1:], owner[key].upper(), f"{owner[key]}\0"))
        else:
            owner[key] = copy.deepcopy(draw.choice(values))
    return value


def changed_header(header: dict[str, Any], data: bytes, draw: random.Random) -> bytes:
    """Change what a safetensors file states of its tensors, or how long its parts are."""
    text = json.dumps(changed_json(header, draw, (*VALUES, *DTYPES, *SHAPES, *METADATA))).encode()
    text += b" " * draw.choice((0, 1, 7))
    size = len(text) if draw.random() < 0.9 else draw.choice((0, 1, len(text) - 1, len(text) + 8, 2**31, 2**63))
    return struct.pack("<Q", size) + text + (data if draw.random() < 0.9 else data[: draw.randrange(len(data) + 1)])


def write_all(root: Path) -> None:
    """Write a model in shards, one in four bits, an adapter with rows of tokens, a run and a tokenizer."""
    model = tiny_model(dtype=torch.float32)
    ml.attach(model, ml.LoraConfig(r=3, lora_alpha=9, target_modules=("q_proj",), trainable_token_indices=(7, 60)))
    ml.save_adapter(model, root / "adapter")
    ml.save_model(tiny_model(dtype=torch.float32, num_hidden_layers=1), root / "sharded", shard_bytes=9_000)
    model = tiny_model(dtype=torch.float32)
    ml.save_model(model, root / "base")
    ml.save_model(ml.load_model(root / "base", quantize="nf4"), root / "packed")
    shutil.copytree(ASSETS / "model", root / "tokenizer")
    (root / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [0, 1], "bos_token_id": 0}')
    (root / "tokenizer" / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    (root / "run").mkdir()
    run = {"config": {"system": None, "lora_r": 3}, "starts": [{"time": "2026-01-01T00:00:00", "step": 0}]}
    (root / "run" / "run.json").write_text(json.dumps({**run, "data_sha256": {"a": "b"}, "versions": {}}))
    (root / "run" / "summary.json").write_text('{"before": {"loss": 1.5}, "after": {"loss": 1.0}, "steps": 3}')
    (root / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "eval_loss": 1.5}\n')
    without_manifests(root)


def use_tokenizer(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    tokenizer.decode(tokenizer.encode("The heron waits; 12 <|endoftext|> \u00e9"))
    if tokenizer.template:
        tokenizer.encode_chat([{"role": "user", "content": "a <|endoftext|>"}])


def use_run(directory: Path) -> None:
    inspect_path(str(directory))
    read_prompt_files(directory)


def use_tensors(path: Path) -> None:
    file = TensorFile(path)
    for name in file.shapes:
        file.read(name)


TENSORS = ("adapter/" + WEIGHTS_FILE, "base/model.safetensors", "packed/model.safetensors")
JSONS: dict[str, Callable[[Path], object]] = {
    "base/config.json": lambda root: use_model(root / "base"),
    "packed/config.json": lambda root: use_model(root / "packed"),
    "sharded/model.safetensors.index.json": lambda root: use_model(root / "sharded"),
    "adapter/adapter_config.json": use_adapter,
    "tokenizer/tokenizer.json": lambda root: use_tokenizer(root / "tokenizer"),
    "tokenizer/tokenizer_config.json": lambda root: use_tokenizer(root / "tokenizer"),
    "tokenizer/generation_config.json": lambda root: use_tokenizer(root / "tokenizer"),
    "tokenizer/special_tokens_map.json": lambda root: use_tokenizer(root / "tokenizer"),
    "run/run.json": lambda root: use_run(root / "run"),
    "run/summary.json": lambda root: use_run(root / "run"),
    "run/metrics.jsonl": lambda root: use_run(root / "run"),
}
ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
    {"instruction": "a", "input": "b", "output": "c"},
    {"prompt": "a", "completion": " b"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"text": "a"},
)


def _mutate(path: Path, whole: bytes, changed: bytes, use: Callable[[], object]) -> None:
    path.write_bytes(changed)
    try:
        use()
    finally:
        path.write_bytes(whole)


def tensor_mutants(root: Path, seeds: range, *, is_aware: bool) -> Iterator[Call]:
    wholes = {name: (root / name).read_bytes() for name in TENSORS}
    for seed in seeds:
        draw = random.Random(f"{is_aware} {seed}")
        name = draw.choice(TENSORS)
        whole = wholes[name]
        size = 8 + int.from_bytes(whole[:8], "little")
        data = whole[size:]
        changed = (
            changed_header(json.loads(whole[8:size]), data, draw) if is_aware else changed_bytes(whole, draw, size)
        )
        uses = [partial(use_tensors, root / name)]
        if seed % 8 == 0:  # the rest of the way takes longer
            uses.append(partial(use_adapter, root) if "adapter" in name else partial(use_model, (root / name).parent))
        for use in uses:
            label = f"{name}, {'structure' if is_aware else 'bytes'} {seed}"
            yield label, partial(_mutate, root / name, whole, changed, use)


def json_mutants(root: Path, seeds: range) -> Iterator[Call]:
    for seed in seeds:
        draw, name = random.Random(f"json {seed}"), [*JSONS][seed % len(JSONS)]
        whole = (root / name).read_bytes()
        if draw.random() < 0.2 or name.endswith(("jsonl", "tokenizer.json")):  # the package allocates what that states
            changed = changed_bytes(whole, draw)
        else:
            changed = json.dumps(changed_json(json.loads(whole), draw)).encode()
        yield f"{name}, {seed}", partial(_mutate, root / name, whole, changed, partial(JSONS[name], root))
        show = partial(command, ["inspect", str((root / name).parent)])
        yield f"{name}, {seed}: inspect", partial(_mutate, root / name, whole, changed, show)


def data_mutants(root: Path, seeds: range) -> Iterator[Call]:
    tokenizer = load_tokenizer(ASSETS / "model")
    for seed in seeds:
        draw = random.Random(f"data {seed}")
        rows = [changed_json(row, draw) if draw.random() < 0.3 else row for row in draw.choices(ROWS, k=4)]
        ending = draw.choice((".jsonl", ".json"))
        text = json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows))
        content = text.encode()
        content = changed_bytes(content, draw) if draw.random() < 0.5 else content
        config = ml.DataConfig(skip_bad_rows=draw.random() < 0.7, prompt_style="alpaca")

        def load(path: Path = root / f"rows{ending}", content: bytes = content, config: Any = config) -> None:
            path.write_bytes(content)
            ml.load_dataset(path, tokenizer, config)

        yield f"data {seed}", load


KINDS = {
    "structure": partial(tensor_mutants, is_aware=True),
    "bytes": partial(tensor_mutants, is_aware=False),
    "json": json_mutants,
    "data": data_mutants,
}


def calls(where: str, *counts: str) -> Iterator[Call]:
    """Yield so many calls of each kind, "KIND=COUNT"."""
    write_all(Path(where))
    for kind, count in (each.split("=") for each in counts):
        yield from KINDS[kind](Path(where), range(int(count)))
