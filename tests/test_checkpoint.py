"""A model directory in and out: bit for bit, every problem named, and no more memory than the model and one tensor."""

import copy
import math
import os
import re
import tracemalloc
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora import ConfigError, FormatError, LoraConfig
from minilora.files import INDEX, read_json, write_json
from minilora.models import checkpoint
from minilora.models.checkpoint import DTYPES, SHARD_BYTES, resolve_dtype
from minilora.testing.compare import assert_maths
from tests.files import SHARD, change, same_state, write_base
from tests.models import (
    FAMILIES,
    SIZES,
    allocated,
    families,
    layouts,
    long,
    randomize_adapters_,
    tiny_model,
    token_ids,
)
from tests.runs import everything

shards = pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, SHARD], ids=["single", "sharded"])


@pytest.fixture
def saved(tmp_path):
    """The directory of a llama."""
    return write_base(tmp_path)


@layouts
@shards
def test_what_was_saved_loads_bit_for_bit_and_is_saved_in_the_same_bytes(family, shard_bytes, tmp_path):
    model = tiny_model(family, dtype=torch.float32)
    ml.save_model(model, tmp_path / "a", shard_bytes=shard_bytes)
    loaded = ml.load_model(tmp_path / "a")
    same_state(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert loaded.name_or_path == str(tmp_path / "a")
    assert not loaded.training
    ml.save_model(loaded, tmp_path / "b", shard_bytes=shard_bytes)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@families
def test_a_config_is_kept_key_for_key(family, tmp_path):
    model = tiny_model(family, architectures=["X"], auto_map={"AutoModel": "code.py"}, torch_dtype="float16")
    ml.save_model(model, tmp_path)
    expected = {**SIZES, **FAMILIES[family], "architectures": ["X"]}  # and no code of the base's repository
    written = read_json(tmp_path / "config.json")
    assert written == expected | {"dtype": "float64", "tie_word_embeddings": model.config.tie_word_embeddings}


def test_no_shard_is_larger_than_asked_but_for_a_larger_tensor(tmp_path):
    model = tiny_model(dtype=torch.float32)
    ml.save_model(model, tmp_path, shard_bytes=SHARD)
    index = read_json(tmp_path / INDEX)
    contents = {file.name: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert {name: file for file, tensors in contents.items() for name in tensors} == index["weight_map"]
    sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors in contents.values()]
    assert sum(map(sum, sizes)) == index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert all(sum(shard) <= SHARD or len(shard) == 1 for shard in sizes)
    n = len(contents)
    assert sorted(contents) == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


@pytest.mark.parametrize(
    ("before", "after"),
    [(SHARD, SHARD), *long((SHARD, SHARD_BYTES)), (SHARD_BYTES, SHARD)],
    ids=["same", "one", "many"],
)
@pytest.mark.parametrize("allowed", [0, *long(1), 2, *long(3), math.inf])
def test_a_save_over_another_leaves_the_new_model_the_old_one_or_an_error(
    before, after, allowed, tmp_path, monkeypatch
):
    old, new = (tiny_model(seed=seed, dtype=torch.float32, num_hidden_layers=1) for seed in (1, 2))
    ml.save_model(old, tmp_path / "a", shard_bytes=before)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    rename, renamed = os.replace, []

    def interrupted(source, target):
        if Path(target).name.startswith("model"):
            renamed.append(target)
        if len(renamed) > allowed:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        ml.save_model(new, tmp_path / "a", shard_bytes=after)
    if allowed == math.inf:
        same_state(ml.load_model(tmp_path / "a"), new)
        ml.save_model(new, tmp_path / "b", shard_bytes=after)
        assert names_in(tmp_path / "a") == names_in(tmp_path / "b") | {"notes.txt"}
    with suppress(ml.FormatError):  # without its config a directory is refused
        loaded = ml.load_model(tmp_path / "a")
        same_state(loaded, new if torch.equal(loaded.lm_head.weight, new.lm_head.weight) else old)


def names_in(directory):
    return {path.name for path in directory.iterdir()}


def test_a_loaded_model_and_its_file_do_not_change_each_other(saved, tmp_path_factory):
    model, out = ml.load_model(saved), tmp_path_factory.mktemp("out")
    before, content = copy.deepcopy(model), (saved / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert (saved / "model.safetensors").read_bytes() == content
    same_state(ml.load_model(saved), before)
    ml.save_model(model, saved)
    assert not ml.load_model(saved).model.norm.weight.any()
    before.model.norm.weight = model.model.norm.weight
    same_state(model, before)
    ml.attach(model, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="merge or detach adapters before saving"):
        ml.save_model(model, out)
    assert list(out.iterdir()) == []
    ml.detach(model)
    ml.save_model(model, out)
    same_state(ml.load_model(out), model)


@pytest.mark.parametrize("stored", DTYPES)
def test_a_model_of_every_dtype_is_saved_and_loaded_in_the_one_that_is_asked_for(stored, tmp_path):
    model = tiny_model("qwen2", dtype=DTYPES[stored], num_hidden_layers=1)
    ml.save_model(model, tmp_path)
    assert read_json(tmp_path / "config.json")["dtype"] == stored
    for name, dtype in DTYPES.items():
        for asked in (name, dtype):
            same_state(ml.load_model(tmp_path, dtype=asked), copy.deepcopy(model).to(dtype))


def test_auto_is_the_stored_dtype_where_the_device_is_fast_in_it(monkeypatch):
    for stored, device, fast, expected in (
        ("float32", "cpu", False, torch.float32),
        ("bfloat16", "cpu", False, torch.float32),  # slower than float32
        ("bfloat16", "cpu", True, torch.bfloat16),
        ("float16", "cpu", True, torch.bfloat16),  # training in float16 needs a scaled loss
        ("float16", "cpu", False, torch.float32),
        ("bfloat16", "cuda", True, torch.bfloat16),
        ("bfloat16", "cuda", False, torch.float32),
        (None, "cuda", False, torch.float32),
    ):
        monkeypatch.setattr(checkpoint, "_has_fast_bfloat16", lambda _, fast=fast: fast)
        for key in ("dtype", "torch_dtype"):
            assert resolve_dtype("auto", {key: stored}, torch.device(device)) == expected


def test_the_builtin_model_knows_its_name_and_a_missing_device_is_refused():
    model = ml.load_model("minilora/builtin")
    assert model.name_or_path == "minilora/builtin"
    assert model(token_ids(0, 1, 3)).shape == (1, 3, model.config.vocab_size)
    for device in ("abacus", "cuda:99", torch.device("cuda:99"), 99):
        with pytest.raises(ConfigError, match=rf"^device '{device}' cannot be used here; need cpu, cuda, .*$"):
            ml.load_model("minilora/builtin", device=device)


@pytest.mark.parametrize(
    ("is_there", "best"), [((True, True), "cuda"), ((False, True), "mps"), ((False, False), "cpu")]
)
def test_auto_is_the_best_device_that_is_there(monkeypatch, is_there, best):
    for module, answer in zip((torch.cuda, torch.backends.mps), is_there, strict=True):
        monkeypatch.setattr(module, "is_available", lambda answer=answer: answer)
    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(device=device))
    assert checkpoint.usable_device("auto") == best


def test_all_tensors_that_do_not_fit_are_named_in_one_error(saved):
    changes = {
        "model.norm.weight": None,
        "model.layers.2.mlp.up_proj.weight": None,
        "model.layers.1.self_attn.q_proj.weight": torch.zeros(24, 25),
        "lm_head.weight": torch.zeros(24, 61),  # exchanged
        "model.layers.4.mlp.up_proj.weight": torch.zeros(40, 24),
        "lm_head.bias": torch.zeros(61),
    }
    change(saved, changes)
    with pytest.raises(FormatError) as error:
        ml.load_model(saved)
    head, *problems = str(error.value).split("\n  ")
    assert str(saved) in head
    assert sorted(problems) == [
        "missing: model.layers.2.mlp.up_proj.weight (40, 24)",
        "missing: model.norm.weight (24,)",
        "shape: lm_head.weight is (24, 61), the config asks for (61, 24)",
        "shape: model.layers.1.self_attn.q_proj.weight is (24, 25), the config asks for (24, 24)",
        "unexpected: lm_head.bias (61,)",
        "unexpected: model.layers.4.mlp.up_proj.weight (40, 24)",
    ]


def test_a_stored_tensor_that_follows_from_the_config_is_passed_over(tmp_path):
    for family, name in [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("qwen2", "lm_head.weight")]:
        before = ml.load_model(write_base(tmp_path / family, family))
        change(tmp_path / family, {name: before.model.embed_tokens.weight})
        same_state(ml.load_model(tmp_path / family), before)
    change(tmp_path / "qwen2", {"lm_head.weight": torch.zeros(61, 24)})  # which transformers does not tie
    with pytest.raises(FormatError, match="set tie_word_embeddings to false"):
        ml.load_model(tmp_path / "qwen2")


def test_a_dtype_that_is_not_supported_is_refused_of_weights_and_of_models(saved):
    for asked, stored in (("int8", None), (torch.int64, None), ("auto", "float8_e4m3fn"), ("Float32", None)):
        with pytest.raises(ConfigError, match=r"auto.*bfloat16.*float16.*float32.*float64"):
            resolve_dtype(asked, {"dtype": stored}, torch.device("cpu"))
    for dtype in [torch.int8, torch.bool, torch.float8_e4m3fn]:
        change(saved, {"model.norm.weight": torch.ones(24).to(dtype)})
        with pytest.raises(FormatError, match=rf"model.norm.weight is {dtype}; supported are .*float32"):
            ml.load_model(saved)


@pytest.mark.parametrize("pattern", ["config.json", "model.safetensors", "model-00002-of-*"])
def test_a_file_that_is_missing_is_named(pattern, tmp_path):
    ml.save_model(tiny_model(), tmp_path, shard_bytes=SHARD if "*" in pattern else SHARD_BYTES)
    (file,) = tmp_path.glob(pattern)
    file.unlink()
    with pytest.raises(FormatError, match=re.escape(file.name)):
        ml.load_model(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(saved):
    write_json(saved / INDEX, {"weight_map": {"model.norm.bias": "model.safetensors"}})
    with pytest.raises(FormatError, match=r"do not have: \['model.norm.bias'\]"):
        ml.load_model(saved)


@pytest.mark.parametrize(("family", "targets"), [("llama", "all-linear"), ("qwen2", ("lm_head",))])
def test_a_merged_model_computes_the_same_after_saving_and_loading(family, targets, tmp_path):
    """Also where the head was tied: it is written untied."""
    model, tokens = tiny_model(family), token_ids(0, 2, 7)
    ml.attach(model, LoraConfig(r=2, lora_alpha=7, target_modules=targets), dtype=torch.float64)
    randomize_adapters_(model)
    adapted = model(tokens)
    ml.merge(model)
    ml.save_model(model, tmp_path)
    loaded = ml.load_model(tmp_path, dtype="float64")
    same_state(loaded, model)
    assert_maths(loaded(tokens), adapted)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert not read_json(tmp_path / "config.json")["tie_word_embeddings"]


def test_loading_needs_the_memory_of_what_is_converted_and_of_one_tensor(tmp_path):
    """Of PyTorch's; Python reads the header alone. That nothing stays mapped is a law of test_safe_files.py."""
    model = tiny_model(dtype=torch.float32, hidden_size=240, intermediate_size=400)
    ml.save_model(model, tmp_path)
    mapped = (tmp_path / "model.safetensors").stat().st_size
    whole, largest = (kind(p.nbytes for p in model.parameters()) for kind in (sum, max))
    for dtype, size in (("float32", 0), ("bfloat16", whole / 2)):
        live, most, _ = allocated(lambda: ml.load_model(tmp_path, dtype), mapped)  # noqa: B023
        assert size <= live <= most <= size + 2 * largest < 1.5 * whole
    tracemalloc.start()
    ml.load_model(tmp_path)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < whole / 2
