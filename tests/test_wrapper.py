"""A text model in a wrapper is read as the model, and merged in its place; other parts keep their bytes."""

import json

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.adapter import PREFIX
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.cli import main
from minilora.files import INDEX
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


def test_a_merge_changes_the_weights_of_adapted_layers_and_no_other_byte(wrapper, tmp_path):
    write_adapter(
        tiny_model("gemma3", dtype=torch.float32, vocab_size=400), tmp_path / "adapter", target_modules=["q_proj"]
    )
    (tmp_path / "adapter" / "chat_template.jinja").write_text("the adapter's")
    write_tokenizer(wrapper)
    (wrapper / "modeling.py").touch()
    out = tmp_path / "merged"
    assert main(["merge", "--model", str(wrapper), "--adapter", str(tmp_path / "adapter"), "--out", str(out)]) == 0
    expected = ml.load_model(wrapper)
    ml.load_adapter(expected, tmp_path / "adapter")
    ml.merge(expected)
    same_state(ml.load_model(out), expected)
    before = load_file(wrapper / "a.safetensors") | OTHERS
    after = load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "q_proj" in name}
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert (out / "preprocessor_config.json").read_bytes() == (wrapper / "preprocessor_config.json").read_bytes()
    assert not (out / "modeling.py").exists()
    assert (out / "chat_template.jinja").read_text() == "the adapter's"
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config
    assert {key: config[key] for key in ("model_type", "vision_config")} == {
        "model_type": "seeing",
        "vision_config": {"image_size": 3},
    }


def test_only_adapted_layers_are_read_and_keep_their_dtype_unless_another_is_asked_for(wrapper, tmp_path, monkeypatch):
    """Also where config.json names no dtype, so that they are computed in float32."""
    config, before = json.loads((wrapper / "config.json").read_text()), load_file(wrapper / "a.safetensors")
    (wrapper / "config.json").write_text(json.dumps({**config, "dtype": None}))
    adapted = {text_name(name): name for name in before if "q_proj" in name}
    before |= {name: before[name].bfloat16() for name in adapted.values()}
    save_file(before, wrapper / "a.safetensors")
    write_adapter(ml.load_model(wrapper), tmp_path / "adapter", target_modules=["q_proj"])
    exact, read, weights = ml.load_model(wrapper), [], Merge.weights
    ml.load_adapter(exact, tmp_path / "adapter")
    ml.merge(exact)

    def recorded(self, *args):
        for name, weight in weights(self, *args):
            read.append(name)
            yield name, weight

    monkeypatch.setattr(Merge, "weights", recorded)
    for dtype in ("auto", "float32"):
        error = merge_directory(Merge(wrapper, [tmp_path / "adapter"], dtype=dtype), tmp_path / dtype)
        after = load_file(tmp_path / dtype / "model.safetensors")
        kept = torch.bfloat16 if dtype == "auto" else torch.float32
        changed = {stored: exact.state_dict()[name].to(kept) for name, stored in adapted.items()}
        for name, tensor in {**before, **OTHERS, **changed}.items():
            assert after.pop(name).equal(tensor), name
        assert not after
        assert (error.value > 1e-3) == (dtype == "auto")  # it counts the rounding of what is written
    assert read == [*adapted] * 2


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


def test_a_wrapper_is_quantized_and_one_in_four_bits_is_read_but_not_merged(request, wrapper, tmp_path, capsys):
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
        (["merge", f"--adapter={adapter}"], "is inside a wrapper: merging needs the target original"),
        (["merge", f"--adapter={adapter}", "--target=original"], "needs the 16-bit model that it was made from"),
    ):
        assert main([*words, f"--model={wrapper}", f"--out={tmp_path / 'out'}"]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "adapter"),
    [(["--quantize=nf4"], {}), (["--target=dequantized"], {}), ([], {"modules_to_save": ["lm_head"]})],
)
def test_a_merge_that_changes_more_than_weights_is_refused(wrapper, tmp_path, capsys, flags, adapter):
    write_adapter(tiny_model("gemma3", dtype=torch.float32, vocab_size=400), tmp_path / "adapter", **adapter)
    words = ["merge", "--model", str(wrapper), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main([*words, *flags]) == 1
    assert "is inside a wrapper: merging needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
