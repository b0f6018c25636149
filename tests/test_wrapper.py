"""A text model in a wrapper is read, quantized and merged as the model; other parts are named and left out."""

import json

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.adapter import PREFIX
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.cli import main
from minilora.files import INDEX
from minilora.models.bitsandbytes import describe_quantization
from minilora.models.config import describe_other_parts, text_name
from minilora.testing.compare import assert_parity
from minilora.tools.merging import Merge, merge_directory
from tests.files import edit, same_state, save_file, write_adapter
from tests.models import tiny_model
from tests.runs import write_rows
from tests.text import write_tokenizer

OTHERS = {"vision_tower.proj.weight": torch.arange(12.0).view(3, 4).half(), "mtp.fc.weight": torch.ones(5, 3).double()}
NAMES = {  # of the model's tensors in the wrapper
    "model.language_model.": lambda name: name.replace("model.", "model.language_model.", 1),
    "language_model.model.": lambda name: f"language_model.{name}",
}


@pytest.fixture(params=NAMES)
def wrapper(request, tmp_path):
    """A random Gemma 3 in a wrapper of two shards, with another part and a file of it."""
    ml.save_model(tiny_model("gemma3", dtype=torch.float32, vocab_size=400), tmp_path / "text")
    directory = tmp_path / "wrapper"
    directory.mkdir()
    tensors = {
        NAMES[request.param](name): tensor for name, tensor in load_file(tmp_path / "text/model.safetensors").items()
    }
    save_file(tensors, directory / "a.safetensors")
    save_file(OTHERS, directory / "b.safetensors")
    shards = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(OTHERS, "b.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": shards}))
    text = json.loads((tmp_path / "text/config.json").read_text())
    config = {"model_type": "seeing", "text_config": {**text, "dtype": None}, "vision_config": {"image_size": 3}}
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float32", "auto_map": {"AutoModel": "x.Y"}}))
    (directory / "preprocessor_config.json").write_text('{"size":   3}')
    return directory


def test_the_text_model_is_read_and_what_is_left_out_is_named(wrapper, tmp_path):
    same_state(ml.load_model(wrapper), ml.load_model(tmp_path / "text"))
    assert describe_other_parts(wrapper) == "mtp (1 tensors), vision_tower (1 tensors)"
    assert describe_other_parts(tmp_path / "text") == ""


def test_a_merge_writes_the_text_model_alone_and_names_what_is_left_out(wrapper, tmp_path, capsys):
    write_adapter(ml.load_model(wrapper), tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "adapter" / "chat_template.jinja").write_text("the adapter's")
    write_tokenizer(wrapper)
    out = tmp_path / "merged"
    assert main(["merge", "--model", str(wrapper), "--adapter", str(tmp_path / "adapter"), "--out", str(out)]) == 0
    assert "only the text model is written, not mtp (1 tensors), vision_tower (1 tensors)" in capsys.readouterr().err
    expected = ml.load_model(wrapper)
    ml.load_adapter(expected, tmp_path / "adapter")
    ml.merge(expected)
    ml.save_model(expected, tmp_path / "saved")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "saved/model.safetensors").read_bytes()
    same_state(ml.load_model(out), expected)
    assert not (out / "preprocessor_config.json").exists()
    assert (out / "chat_template.jinja").read_text() == "the adapter's"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert not config.keys() & {"auto_map", "text_config", "vision_config"}


def test_an_adapter_that_was_trained_in_the_wrapper_acts_in_its_text_model(request, wrapper, tmp_path, capsys):
    """With the wrapper's names, also in a scale of its own; it is continued, by a run that says so, and merged."""
    model, ids, adapter = ml.load_model(wrapper), torch.tensor([[3, 1, 4, 1, 5]]), tmp_path / "adapter"
    rows = {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": {"model.embed_tokens": [3]}}
    write_adapter(model, adapter, r=2, **rows)
    path, inner = "model.layers.0.self_attn.q_proj", NAMES[request.node.callspec.params["wrapper"]]
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({f"{PREFIX}{inner(name.removeprefix(PREFIX))}": t for name, t in tensors.items()}, adapter / WEIGHTS_FILE)
    rows = {"trainable_token_indices": {inner("model.embed_tokens"): [3]}}
    edit(adapter, alpha_pattern={inner(path).removeprefix("model."): 5}, **rows)
    model.get_submodule(path).adapters["default"].scale = 5 / 2
    again = ml.load_model(wrapper)
    ml.load_adapter(again, adapter)
    assert torch.equal(again(ids), model(ids))
    words = [f"--model={wrapper}", f"--adapter={adapter}"]
    assert main(["merge", *words, f"--out={tmp_path / 'merged'}"]) == 0
    assert_parity(ml.load_model(tmp_path / "merged")(ids), model(ids))
    write_tokenizer(wrapper)
    write_rows(tmp_path / "rows.jsonl", 4)
    words += [f"--data={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'run'}", "--max-steps=1", "--general-data=none"]
    assert main(["finetune", *words, "--learning-rate=1e-12"]) == 0
    assert "not mtp (1 tensors), vision_tower (1 tensors)" in capsys.readouterr().err
    ml.load_adapter(again := ml.load_model(wrapper), tmp_path / "run")
    assert_parity(again(ids), model(ids))


def test_a_wrapper_is_quantized_and_one_in_four_bits_is_read_and_merged(request, wrapper, tmp_path, capsys):
    four_bits, adapter = tmp_path / "nf4", tmp_path / "adapter"
    assert main(["quantize", f"--model={wrapper}", f"--out={four_bits}"]) == 0
    assert "only the text model is written, not mtp (1 tensors), vision_tower (1 t" in capsys.readouterr().err
    model = ml.load_model(wrapper, quantize="nf4")
    same_state(ml.load_model(four_bits), model)
    inner, index = NAMES[request.node.callspec.params["wrapper"]], json.loads((wrapper / INDEX).read_text())
    tensors = {inner(name): tensor for name, tensor in load_file(four_bits / "model.safetensors").items()}
    save_file(tensors, wrapper / "a.safetensors")
    index["weight_map"] |= dict.fromkeys(tensors, "a.safetensors")
    (wrapper / INDEX).write_text(json.dumps(index))
    config, text = (json.loads((directory / "config.json").read_text()) for directory in (wrapper, four_bits))
    (wrapper / "config.json").write_text(json.dumps(config | {"quantization_config": text["quantization_config"]}))
    same_state(ml.load_model(wrapper), model)
    write_adapter(model, adapter, target_modules=["q_proj"])
    for words, message in (
        (["quantize"], "the model is quantized already"),
        (["merge", f"--adapter={adapter}", "--target=original"], "needs the 16-bit model that it was made from"),
    ):
        assert main([*words, f"--model={wrapper}", f"--out={tmp_path / 'out'}"]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    for target in ("dequantized", "requantized"):
        words = ["merge", f"--adapter={adapter}", f"--model={wrapper}", f"--target={target}"]
        assert main([*words, f"--out={tmp_path / target}"]) == 0
    ml.merge(model)
    same_state(ml.load_model(tmp_path / "dequantized"), model)
    assert describe_quantization(ml.load_model(tmp_path / "requantized"))["quantize"] == "nf4"


def test_a_text_model_that_is_no_family_is_refused_by_its_own_name(wrapper):
    config = json.loads((wrapper / "config.json").read_text())
    config["text_config"]["model_type"] = "mamba"
    (wrapper / "config.json").write_text(json.dumps(config))
    with pytest.raises(ml.ConfigError, match="model_type 'mamba'"):
        ml.load_model(wrapper)
    assert text_name("model.visual.blocks.0.attn.qkv.weight") is None


def test_a_stored_copy_of_the_embedding_goes_when_the_embedding_changes(wrapper, tmp_path):
    tensors = load_file(wrapper / "a.safetensors")
    (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": tensors[embedding].clone()}, wrapper / "a.safetensors")
    index = json.loads((wrapper / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "a.safetensors"
    (wrapper / INDEX).write_text(json.dumps(index))
    write_adapter(ml.load_model(wrapper), tmp_path / "adapter", trainable_token_indices=[3], target_modules=[])
    merge_directory(Merge(wrapper, [tmp_path / "adapter"]), tmp_path / "out")
    assert ml.load_model(tmp_path / "out")(torch.tensor([[3, 4]])).isfinite().all()
