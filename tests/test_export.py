"""`export`: what a reader computes from the files that are written for it is what was trained."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE, base_model_of
from minilora.cli import main
from minilora.testing.compare import assert_parity
from minilora.tools.exporting import export_adapter
from minilora.tools.readers import READERS, Base, reader_facts
from tests.files import save_file, write_adapter, write_base
from tests.models import perturb_, token_ids
from tests.readers import CASES, RIGHT, rename_tensors, write_case, write_wrapper

MEANT = {  # from the name in the files of a reader to the path in the text model
    "peft-wrapper": lambda name: name.replace("model.language_model.", "model."),
    "vllm": lambda name: name.replace("model.language_model.", "model."),
    "mlx-lm": lambda name: name.removeprefix("language_model."),
}


def updates(directory, title):
    """s·B A of each module, in float64, by loops over the files, with the scale that this reader takes."""
    config = json.loads((directory / CONFIG_FILE).read_text())
    found, meant = {}, MEANT.get(title, lambda name: name)
    if title == "mlx-lm":
        tensors, parameters = load_file(directory / "adapters.safetensors"), config["lora_parameters"]
        for name in parameters["keys"]:
            a, b = (tensors[f"{name}.{end}"].double() for end in ("lora_a", "lora_b"))
            assert a.shape[1] == b.shape[0] == parameters["rank"]
            found[meant(name)] = parameters["scale"] * (a @ b).T
        return found
    tensors = load_file(directory / WEIGHTS_FILE)
    for name, A in tensors.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            B = tensors[name.replace("_A", "_B")]
            path = name.removeprefix("base_model.model.").partition(".lora_")[0]
            assert title not in ("llama.cpp", "vllm") or not (config["use_rslora"] or config["alpha_pattern"])
            rank = config["r"] if title == "vllm" else len(A)
            alpha = config["alpha_pattern"].get(f"^{path}", config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            found[meant(path)] = scale * B.double() @ A.double()
    return found


def trained(base, adapter):
    """s·B A of each module as minilora loads it."""
    model = ml.load_model(base)
    ml.load_adapter(model, adapter)
    layers = {path: layer.adapters["default"] for path, layer in ml.adapter.adapter_layers(model).items()}
    return {path: own.scale * (own.lora_B.double() @ own.lora_A.double()).detach() for path, own in layers.items()}


def assert_same_updates(found, expected):
    assert found.keys() == expected.keys()
    for path, update in expected.items():
        assert_parity(found[path], update)


SCALES = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}


@pytest.mark.parametrize("title", READERS)
@pytest.mark.parametrize("config", [{}, SCALES, {"target_modules": ("embed_tokens", "lm_head", "q_proj"), **SCALES}])
def test_each_reader_computes_what_was_trained(title, config, tmp_path):
    base = write_base(tmp_path / "base", num_hidden_layers=2)
    if "embed_tokens" in config.get("target_modules", ()):
        config = {**config, "alpha_pattern": {"embed_tokens": 5}}
    adapter = write_adapter(ml.load_model(base), tmp_path / "adapter", **{"r": 3, "lora_alpha": 7, **config})
    export_adapter(adapter, base, title, tmp_path / "out")
    assert_same_updates(updates(tmp_path / "out", title), trained(base, adapter))
    if title != "mlx-lm":
        assert reader_facts(tmp_path / "out", Base.read(base), title)[title]["verdict"] == RIGHT
        assert_same_updates(trained(base, tmp_path / "out"), trained(base, adapter))


@pytest.mark.parametrize("title", READERS)
@pytest.mark.parametrize("name", ["plain", "wrapper's names", "_orig_mod", "base_layer"])
def test_names_become_those_of_the_reader(title, name, tmp_path):
    base = write_wrapper(tmp_path)
    adapter = write_adapter(ml.load_model(base), tmp_path / "adapter", r=3)
    expected = trained(base, adapter)
    rename_tensors(adapter, *CASES[name].rename)
    export_adapter(adapter, base, title, tmp_path / "out")
    assert_same_updates(updates(tmp_path / "out", title), expected)
    names = load_file(next((tmp_path / "out").glob("*.safetensors")))
    start = {"peft-wrapper": "base_model.model.model.language_model.", "vllm": "base_model.model.model.language_model."}
    start |= {"mlx-lm": "language_model.model."}
    assert all(key.startswith(start.get(title, "base_model.model.model.layers.")) for key in names)


@pytest.mark.parametrize("title", ["minilora", "peft"])
@pytest.mark.parametrize("name", ["DoRA", "module in full", "tied embedding", "token rows", "bias of B"])
def test_what_is_more_than_an_update_goes_to_those_who_read_it(title, name, tmp_path):
    base, adapter = write_case(tmp_path, name)
    export_adapter(adapter, base, title, tmp_path / "out")
    ids, logits = token_ids(0, 2, 9), []
    for directory in (adapter, tmp_path / "out"):
        model = ml.load_model(base)
        ml.load_adapter(model, directory)
        logits.append(model(ids))
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("title", "name"), [("vllm", "DoRA"), ("llama.cpp", "module in full"), ("mlx-lm", "tied embedding")]
)
def test_what_a_reader_cannot_take_is_named_and_nothing_is_written(title, name, tmp_path, capsys):
    base, adapter = write_case(tmp_path, name)
    words = ["export", f"--adapter={adapter}", f"--model={base}", f"--for={title}", f"--out={tmp_path / 'out'}"]
    assert main(words) == 1
    assert f"{READERS[title].column} cannot take it:\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_adapters_are_refused_and_none_is_dropped(tmp_path, capsys):
    base, adapter = write_case(tmp_path, "rsLoRA")
    words = [
        "export",
        f"--adapter={adapter}",
        "--adapter=b",
        f"--model={base}",
        "--for=peft",
        f"--out={tmp_path / 'out'}",
    ]
    assert main(words) == 1
    assert "export takes one --adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dora_becomes_that_of_mlx(tmp_path):
    base, adapter = write_case(tmp_path, "DoRA")
    export_adapter(adapter, base, "mlx-lm", tmp_path / "out")
    stored, own = load_file(tmp_path / "out" / "adapters.safetensors"), load_file(adapter / WEIGHTS_FILE)
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["fine_tune_type"] == "dora"
    for name, tensor in stored.items():
        if name.endswith(".m"):
            assert torch.equal(tensor, own[f"base_model.model.{name.removesuffix('m')}lora_magnitude_vector"])


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ("model.norm",)},
        {"trainable_token_indices": {"model.embed_tokens": (3, 5)}},
        {
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"0.self_attn.q_proj": 5},
        },
    ],
)
def test_what_goes_into_a_wrapper_comes_back_the_same(config, tmp_path):
    base = write_wrapper(tmp_path)
    model, ids = ml.load_model(base), token_ids(0, 2, 9)
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], **config)
    perturb_(model)
    ml.save_adapter(model, adapter)
    export_adapter(adapter, base, "peft-wrapper", tmp_path / "there")
    assert all(".language_model." in name or "lm_head" in name for name in load_file(tmp_path / "there" / WEIGHTS_FILE))
    export_adapter(tmp_path / "there", base, "minilora", tmp_path / "back")
    for directory in ("there", "back"):
        again = ml.load_model(base)
        ml.load_adapter(again, tmp_path / directory)
        assert torch.equal(again(ids), model(ids))


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fuse(parts, whole):
    """Copy a base, with one matrix where a Llama has three or two, as Phi-3 has them."""
    shutil.copytree(parts, whole)
    tensors = load_file(whole / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "gate_proj.weight"))]:
        parent, _, end = name.removesuffix(".weight").rpartition(".")
        fused, ends = next(item for item in FUSED.items() if item[1][0] == end)
        tensors[f"{parent}.{fused}.weight"] = torch.cat([tensors.pop(f"{parent}.{part}.weight") for part in ends])
    save_file(tensors, whole / "model.safetensors")
    return whole


@pytest.mark.parametrize("left_out", [(), ("k_proj",), ("q_proj", "gate_proj"), ("k_proj", "v_proj", "up_proj")])
def test_updates_of_parts_become_one_of_the_whole_matrix_and_back(left_out, tmp_path):
    parts = write_base(tmp_path / "parts", num_hidden_layers=2)
    whole = fuse(parts, tmp_path / "whole")
    ends = [end for group in FUSED.values() for end in group if end not in left_out]
    config = {"r": 3, "lora_alpha": 7, "target_modules": [*ends, "o_proj"], "alpha_pattern": {ends[0]: 5}}
    adapter = write_adapter(ml.load_model(parts), tmp_path / "adapter", **config)
    expected = trained(parts, adapter)
    export_adapter(adapter, whole, "vllm", tmp_path / "there")
    export_adapter(tmp_path / "there", parts, "minilora", tmp_path / "back")
    found = updates(tmp_path / "there", "vllm")
    assert {path.rpartition(".")[2] for path in found} == {"o_proj", *FUSED}
    for path, update in found.items():
        parent, _, end = path.rpartition(".")
        if end in FUSED:
            sizes = [ml.load_model(parts).get_submodule(f"{parent}.{part}").out_features for part in FUSED[end]]
            for part, rows in zip(FUSED[end], update.split(sizes), strict=True):
                assert_parity(rows, expected.get(f"{parent}.{part}", torch.zeros_like(rows)))
    again = trained(parts, tmp_path / "back")
    assert again.keys() >= expected.keys()
    for path, update in again.items():
        assert_parity(update, expected.get(path, torch.zeros_like(update)))


def test_parts_of_other_sizes_are_refused(tmp_path):
    base = fuse(write_base(tmp_path / "parts", num_hidden_layers=1), tmp_path / "whole")
    other = write_base(tmp_path / "other", num_hidden_layers=1, num_key_value_heads=4)
    adapter = write_adapter(ml.load_model(other), tmp_path / "adapter", target_modules=["k_proj"])
    with pytest.raises(ml.TargetError, match="the model has no such module"):
        export_adapter(adapter, base, "peft", tmp_path / "out")


@pytest.mark.parametrize("heads", ["8", -1, [1], 0.5])
def test_matrices_and_heads_that_no_model_has_are_refused(heads, tmp_path):
    parts = write_base(tmp_path / "parts", num_hidden_layers=1)
    whole = fuse(parts, tmp_path / "whole")
    adapter = write_adapter(ml.load_model(parts), tmp_path / "adapter", target_modules=["k_proj"])
    config = json.loads((whole / "config.json").read_text())
    changed = {"num_attention_heads": heads, "num_key_value_heads": heads}
    (whole / "config.json").write_text(json.dumps(config | changed))
    tensors = load_file(whole / "model.safetensors")
    flat = {name: torch.ones(()) if "qkv" in name else tensor for name, tensor in tensors.items()}
    for held in (tensors, flat):
        save_file(held, whole / "model.safetensors")
        with pytest.raises(ml.TargetError, match="the model has no such module"):
            export_adapter(adapter, whole, "peft", tmp_path / "out")


def test_two_names_of_one_module_are_refused(tmp_path):
    base, adapter = write_case(tmp_path, "plain")
    tensors = load_file(adapter / WEIGHTS_FILE)
    twice = {
        name.replace("base_model.model.", "base_model.model._orig_mod."): tensor.clone()
        for name, tensor in tensors.items()
    }
    save_file({**tensors, **twice}, adapter / WEIGHTS_FILE)
    with pytest.raises(ml.FormatError, match="has more than one lora_A"):
        export_adapter(adapter, base, "peft", tmp_path / "out")


def test_what_is_exported_to_minilora_or_peft_keeps_its_bits(tmp_path):
    base, adapter = write_case(tmp_path, "rsLoRA")
    export_adapter(adapter, base, "peft", tmp_path / "out")
    before, after = (load_file(directory / WEIGHTS_FILE) for directory in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert base_model_of(tmp_path / "out") == base_model_of(adapter)
