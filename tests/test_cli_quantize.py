"""The commands on a base of four bits: what they do, what they say, and what they write down."""

import json
import shutil

import pytest
import torch

import minilora as ml
from minilora import cli
from minilora.cli.load import find
from minilora.cli.merge import NOTABLE
from minilora.lora.files import BASE, base_quantization
from minilora.lora.find import linear_layers
from minilora.merging import merge_directory
from minilora.quant.linear import NF4Linear
from minilora.storage import TensorFile, read_json, write_json, write_tensors
from minilora.train.evaluate import held_out_loss
from tests.models import tiny_model
from tests.runs import write_rows
from tests.text import write_tokenizer

SINGLE = "nf4 without double quantization but for down_proj"
RECORDED = ml.QuantizeConfig("nf4", False, ("down_proj",))
SKIPPED = ml.QuantizeConfig("nf4", False, ("up_proj",))
NF4 = {"quantize": "nf4", "double_quant": True, "block_size": 64, "quantize_skip": []}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A dense model, the same in four bits, rows, and a run on each of several bases."""
    directory = tmp_path_factory.mktemp("quantize")
    tokenizer = write_tokenizer(directory / "model")
    ml.save_model(
        tiny_model("llama-bias-tied-wide-heads", dtype=torch.float32, vocab_size=400), directory / "model", tokenizer
    )
    write_rows(directory / "rows.jsonl", 12)
    assert cli.main(["quantize", f"--model={directory / 'model'}", f"--out={directory / 'nf4'}"]) == 0
    finetune(directory, "dense", "--model", "model")
    finetune(directory, "on-nf4", "--model", "nf4")
    finetune(directory, "quantized", "--model", "model", "--quantize", "nf4")
    finetune(
        directory,
        "single",
        "--model",
        "model",
        "--quantize",
        "nf4",
        "--no-double-quant",
        "--quantize-skip",
        "down_proj",
    )
    return directory


def finetune(directory, out, flag, model, *words):
    places = [flag, str(directory / model), "--data", str(directory / "rows.jsonl"), "--out", str(directory / out)]
    settings = ["--lora-r=2", "--max-steps=2", "--general-data=none", "--learning-rate=0.01"]
    assert cli.main(["finetune", *places, *settings, *words]) == 0


@pytest.fixture
def run(directory, capsys, monkeypatch):
    """Run a command among the models; what it prints and what it says."""
    monkeypatch.chdir(directory)

    def command(*words, status=0):
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == status
        return capsys.readouterr()

    return command


def numbers(out):
    return json.loads(out)["value"]


# --- what is written down ---


@pytest.mark.parametrize(
    ("adapter", "held"),
    [
        ("dense", {"quantize": "none"}),
        ("on-nf4", NF4),
        ("quantized", NF4),
        ("single", {**NF4, "double_quant": False, "quantize_skip": ["down_proj"]}),
    ],
)
def test_an_adapter_says_how_its_base_was_held(directory, adapter, held):
    assert base_quantization(directory / adapter) == held
    assert json.loads((directory / adapter / "run.json").read_text())["config"]["lora_r"] == 2


def test_an_adapter_that_does_not_say_it_says_nothing(directory, tmp_path, run):
    file = TensorFile(directory / "quantized" / "adapter_model.safetensors")
    write_tensors(tmp_path / "adapter_model.safetensors", {name: file.read(name) for name in file.shapes})
    (tmp_path / "adapter_config.json").write_text((directory / "quantized" / "adapter_config.json").read_text())
    assert base_quantization(tmp_path) is None
    assert run("generate", "--adapter", tmp_path, "--prompt=the cat").err == ""


@pytest.mark.parametrize(
    "text", ["{", "[]", '"nf4"', "{}", '{"quantize": "int8"}', '{"quantize": "nf4", "quantize_skip": [1]}']
)
def test_what_an_adapter_says_of_its_base_is_refused_if_it_is_not_understood(directory, tmp_path, run, text):
    file = TensorFile(directory / "quantized" / "adapter_model.safetensors")
    tensors = {name: file.read(name) for name in file.shapes}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {BASE: text})
    (tmp_path / "adapter_config.json").write_text((directory / "quantized" / "adapter_config.json").read_text())
    said = run("generate", "--adapter", tmp_path, "--prompt=the cat", status=1).err
    assert "adapter_model.safetensors" in said
    assert BASE in said


# --- the base is held as in training, and what is otherwise is said ---


def test_an_adapter_is_measured_on_the_base_that_it_was_trained_on(directory, run):
    for adapter in ("dense", "quantized", "single", "on-nf4"):
        measured = run("eval", "--adapter", adapter, "--data", "rows.jsonl", "--metric", "nll")
        model = ml.load_model(
            "nf4" if adapter == "on-nf4" else "model",
            quantize=ml.QuantizeConfig("nf4", adapter != "single", ["down_proj"] if adapter == "single" else [])
            if adapter in ("quantized", "single")
            else None,
        )
        ml.load_adapter(model, adapter)
        rows = ml.load_dataset("rows.jsonl", ml.load_tokenizer("model"))
        assert numbers(measured.out) == held_out_loss(model, rows)
        assert "was trained on" not in measured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter=dense"], []),
        (["--adapter=quantized"], ["the base model is nf4 with double quantization"]),
        (
            ["--adapter=quantized", "--quantize=none"],
            ["quantized: was trained on a base that is nf4 with double quantization; this one is not quantized"],
        ),
        (
            ["--adapter=dense", "--quantize=nf4"],
            [
                "the base model is nf4 with double quantization",
                "dense: was trained on a base that is not quantized; this one is nf4 with double quantization",
            ],
        ),
        (
            ["--adapter=single", "--model=nf4"],
            [
                "the base model is nf4 with double quantization",
                f"single: was trained on a base that is {SINGLE}; this one is nf4 with double quantization",
            ],
        ),
        (["--adapter=on-nf4", "--model=model"], ["the base model is nf4 with double quantization"]),
        (["--model=nf4"], ["the base model is nf4 with double quantization"]),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt=the cat"], ["eval", "--data=rows.jsonl"]])
def test_a_base_that_is_held_otherwise_than_in_training_is_spoken_of(run, command, words, said):
    assert run(*command, *words).err.splitlines() == said


@pytest.mark.parametrize(
    ("model", "adapters", "flags", "expected"),
    [
        ("model", ["single", "quantized"], {}, ml.QuantizeConfig("nf4", False, ("down_proj",))),
        ("model", ["quantized", "single"], {}, ml.QuantizeConfig("nf4")),
        ("model", ["dense", "single"], {}, ml.QuantizeConfig("none")),
        ("model", ["silent", "single"], {}, ml.QuantizeConfig("nf4", False, ("down_proj",))),
        ("model", ["silent"], {}, ml.QuantizeConfig("none")),
        ("model", ["fp4", "single"], {}, ml.QuantizeConfig("none")),
        ("model", ["single"], {"quantize": "none"}, ml.QuantizeConfig("none")),
        ("model", ["single"], {"double_quant": True}, ml.QuantizeConfig("nf4", True, ("down_proj",))),
        ("model", ["single"], {"quantize_skip": ("o_proj",)}, ml.QuantizeConfig("nf4", False, ("o_proj",))),
        ("model", ["fp4"], {"quantize": "nf4"}, ml.QuantizeConfig("nf4")),
        ("nf4", ["single"], {}, ml.QuantizeConfig("none")),
        ("nf4", ["single"], {"quantize": "nf4"}, ml.QuantizeConfig("nf4")),
    ],
)
def test_flags_decide_how_a_base_is_held_then_the_first_adapter_that_tells_and_never_against_what_lies_there(
    directory, tmp_path, monkeypatch, model, adapters, flags, expected
):
    monkeypatch.chdir(directory)
    file = TensorFile(directory / "single" / "adapter_model.safetensors")
    held = {"quantize": "fp4", "double_quant": False, "block_size": 64, "quantize_skip": ["o_proj"]}
    for name, metadata in (("silent", {}), ("fp4", {BASE: json.dumps(held)})):
        shutil.copytree(directory / "single", tmp_path / name)
        tensors = {name: file.read(name) for name in file.shapes}
        write_tensors(tmp_path / name / "adapter_model.safetensors", tensors, metadata)
    paths = [str((tmp_path if name in ("silent", "fp4") else directory) / name) for name in adapters]
    options = {"model": model, "adapter": paths, "quantize": None, "double_quant": None, "quantize_skip": None, **flags}
    assert find(options).quantize == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--quantize-skip=typo"], "--quantize-skip"),
        (["--quantize-skip=down_proj", "--adapter=dense"], "--quantize-skip"),
        (["--no-double-quant", "--quantize=none", "--adapter=quantized"], "--double-quant"),
        (["--model=nf4", "--quantize-skip=down_proj", "--double-quant"], "--double-quant, --quantize-skip"),
    ],
)
def test_how_to_quantize_is_not_said_where_nothing_is_quantized(run, tmp_path, words, named):
    for command in (["generate", "--prompt=a"], ["eval", "--data=rows.jsonl"]):
        said = run(*command, *words, status=1).err
        assert f"{named}: without effect; give --quantize nf4, too" in said
    assert run("generate", "--prompt=a", "--adapter=quantized", "--quantize=none").out


def test_how_a_base_is_to_be_held_is_compared_with_how_it_lies(run):
    said = run("generate", "--prompt=a", "--model=nf4", "--quantize=nf4", "--no-double-quant", status=1).err
    assert "nf4: is quantized already, and otherwise: double_quant True, asked for is False" in said
    assert run("generate", "--prompt=a", "--model=nf4", "--quantize=nf4").out


def test_a_base_whose_head_others_packed_is_spoken_of(directory, run, tmp_path):
    model = ml.load_model(directory / "model", quantize="nf4")
    model.lm_head = NF4Linear.quantize(model.lm_head.weight)
    ml.save_model(model, tmp_path / "head", ml.load_tokenizer(directory / "model"))
    said = run("generate", f"--model={tmp_path / 'head'}", "--adapter=quantized", "--prompt=a").err.splitlines()
    assert said == ["the base model is nf4 (the head too) with double quantization"]


def test_a_run_on_another_base_is_refused_and_the_same_one_goes_on(directory, run):
    settings = ["--lora-r=2", "--max-steps=2", "--general-data=none", "--learning-rate=0.01"]
    place = [f"--model={directory / 'model'}", f"--data={directory / 'rows.jsonl'}", *settings]
    out = str(directory / "quantized")
    (directory / "quantized" / "summary.json").rename(directory / "kept.json")
    try:
        said = run("finetune", *place, f"--out={out}", status=1).err
        assert "quantize was 'nf4' and is 'none'" in said
        assert run("finetune", *place, f"--out={out}", "--quantize=nf4").out
    finally:
        (directory / "kept.json").rename(directory / "quantized" / "summary.json")


# --- minilora quantize ---


def test_quantize_writes_what_loads_to_the_logits_of_the_model_quantized_while_loading(directory):
    ids = torch.arange(12).view(1, 12)
    loaded, quantized = ml.load_model(directory / "nf4"), ml.load_model(directory / "model", quantize="nf4")
    assert torch.equal(loaded(ids), quantized(ids))
    assert not torch.equal(loaded(ids), ml.load_model(directory / "model")(ids))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert ml.load_tokenizer(directory / "nf4").encode("the cat") == ml.load_tokenizer(directory / "model").encode(
        "the cat"
    )


@pytest.mark.parametrize("command", [["quantize"], ["merge", "--adapter=dense"]])
def test_what_is_dense_is_written_in_the_dtype_of_the_file_though_the_config_names_none(
    directory, run, tmp_path, command
):
    tokenizer = ml.load_tokenizer(directory / "model")
    ml.save_model(ml.load_model(directory / "model", "bfloat16"), tmp_path / "half", tokenizer)
    values = read_json(tmp_path / "half" / "config.json")
    del values["dtype"]
    write_json(tmp_path / "half" / "config.json", values)
    run(*command, f"--model={tmp_path / 'half'}", f"--out={tmp_path / 'out'}")
    embedding = TensorFile(tmp_path / "out" / "model.safetensors").entries["model.embed_tokens.weight"]
    assert embedding.dtype == "BF16"
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_quantize_counts_the_bits(directory, run, tmp_path):
    words = run("quantize", "--model=model", f"--out={tmp_path / 'plain'}", "--no-double-quant").out.split()
    model = ml.load_model(tmp_path / "plain")
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    bits = 8 * sum(linear.packed.nbytes + linear.absmax.nbytes for linear in packed)
    count = sum(linear.in_features * linear.out_features for linear in packed)
    assert float(words[0]) == round(bits / count, 3)
    assert f"{count:,}" in words
    assert f"{(tmp_path / 'plain' / 'model.safetensors').stat().st_size:,}" in words


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model=nf4", "--out=new"], "nf4: is quantized already"),
        (["--model=model", "--out=nf4"], "nf4: holds files"),
        (["--model=nowhere", "--out=new"], "nowhere"),
        (["--model=model", "--out=new", "--quantize-skip=proj"], "quantize_skip 'proj' names no linear module"),
        (["--model=model", "--out=new", "--quantize-skip=self_attn,mlp"], "leaves nothing to quantize"),
    ],
)
def test_quantize_refuses_what_it_cannot_do_and_writes_nothing(directory, run, words, named):
    assert named in run("quantize", *words, status=1).err
    assert not (directory / "new").exists()


def test_quantize_names_the_tensor_that_is_not_finite(directory, run, tmp_path):
    model = ml.load_model(directory / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    ml.save_model(model, tmp_path / "bad", ml.load_tokenizer(directory / "model"))
    said = run("quantize", f"--model={tmp_path / 'bad'}", f"--out={tmp_path / 'new'}", status=1).err
    assert "model.layers.1.mlp.up_proj.weight" in said
    assert "model.safetensors" in said
    assert not list((tmp_path / "new").glob("*"))


# --- minilora merge ---


@pytest.mark.parametrize(
    ("words", "target", "loaded"),
    [
        (["--adapter=dense"], "original", ("model", None)),
        (["--adapter=quantized"], "dequantized", ("model", ml.QuantizeConfig("nf4"))),
        (["--adapter=single"], "dequantized", ("model", ml.QuantizeConfig("nf4", False, ["down_proj"]))),
        (["--adapter=on-nf4"], "dequantized", ("nf4", None)),
        (["--adapter=dense", "--quantize=nf4"], "dequantized", ("model", ml.QuantizeConfig("nf4"))),
        (["--adapter=quantized", "--quantize=none"], "original", ("model", None)),
    ],
)
def test_merge_writes_what_was_trained_unless_a_target_is_named(directory, run, tmp_path, words, target, loaded):
    run("merge", *words, f"--out={tmp_path / 'default'}")
    run("merge", *words, f"--out={tmp_path / 'named'}", f"--target={target}")
    default, named = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("default", "named"))
    assert default == named
    assert default.keys() == {file.name for file in (directory / "model").iterdir()}
    merged = ml.load_model(tmp_path / "default")
    model = ml.load_model(loaded[0], quantize=loaded[1])
    ml.load_adapter(model, words[0].partition("=")[2])
    ml.merge(model)
    assert merged.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "original",
            ["quantized: was trained on a base that is nf4 with double quantization; this one is not quantized"],
        ),
        ("dequantized", ["the base model is nf4 with double quantization"]),
        ("requantized", ["the base model is nf4 with double quantization"]),
    ],
)
def test_merge_tells_how_far_the_result_is_from_what_was_trained_and_says_if_the_base_is_another(
    run, tmp_path, target, said
):
    expected = merge_directory("model", ["quantized"], tmp_path / "a", target, "nf4")
    printed = run("merge", "--adapter=quantized", f"--target={target}", f"--out={tmp_path / 'b'}")
    assert printed.err.splitlines() == said
    first, *advice, last = printed.out.splitlines()
    assert bool(advice) == (expected.overall > NOTABLE)
    assert not advice or ("--target dequantized" in advice[0]) == (target != "dequantized")
    assert first == (
        "error at the layers' outputs for inputs of all directions, relative to the adapter's effect: "
        f"{expected.overall:.2g}; worst {expected.worst:.2g} in {expected.layer}"
    )
    assert last == f"merged model written to {tmp_path / 'b'}"
    assert (expected.overall > 0.01) == (target != "dequantized")
    linears = [
        type(linear) for path, linear in linear_layers(ml.load_model(tmp_path / "b")).items() if path != "lm_head"
    ]
    assert set(linears) == {NF4Linear if target == "requantized" else torch.nn.Linear}


@pytest.mark.parametrize(
    ("words", "target", "quantize", "trained"),
    [
        (["--adapter=quantized", "--quantize=none"], "original", "nf4", "nf4"),
        (["--adapter=dense", "--quantize=nf4"], "dequantized", "nf4", "none"),
        (["--adapter=dense", "--quantize=nf4", "--target=requantized"], "requantized", "nf4", "none"),
        (["--adapter=single", "--quantize-skip=up_proj"], "dequantized", SKIPPED, RECORDED),
        (["--adapter=single", "--double-quant", "--target=original"], "original", RECORDED, RECORDED),
    ],
)
def test_the_error_of_a_merge_is_that_against_the_base_of_the_training_whatever_the_flags_say(
    run, tmp_path, words, target, quantize, trained
):
    printed = run("merge", *words, f"--out={tmp_path / 'a'}").out
    adapter = words[0].partition("=")[2]
    expected = merge_directory("model", [adapter], tmp_path / "b", target, quantize, trained=trained)
    assert printed.startswith(
        "error at the layers' outputs for inputs of all directions, relative to the adapter's effect: "
        f"{expected.overall:.2g}; worst {expected.worst:.2g} in {expected.layer}\n"
    )
    assert expected.overall > 0.01
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("model", "adapters", "quantize"),
    [("model", ["dense", "quantized"], "none"), ("model", ["dense", "quantized"], "nf4"), ("nf4", ["single"], "nf4")],
)
def test_an_error_that_cannot_be_that_against_the_base_of_the_training_says_so(
    run, tmp_path, model, adapters, quantize
):
    flags = [f"--model={model}", f"--quantize={quantize}", *(f"--adapter={name}" for name in adapters)]
    expected = merge_directory(model, adapters, tmp_path / "b", quantize=quantize)
    assert run("merge", *flags, f"--out={tmp_path / 'a'}").out.startswith(
        "error at the layers' outputs for inputs of all directions, on the base as held here, "
        f"relative to the adapter's effect: {expected.overall:.2g}; worst {expected.worst:.2g} in {expected.layer}\n"
    )


def test_merge_says_that_an_adapter_changes_nothing(directory, run, tmp_path):
    model = ml.load_model(directory / "model", device="meta")
    ml.attach(model, ml.LoraConfig())
    ml.save_adapter(model, tmp_path / "new")
    printed = run(
        "merge", f"--adapter={tmp_path / 'new'}", f"--model={directory / 'model'}", f"--out={tmp_path / 'out'}"
    )
    assert printed.out.splitlines()[0] == "the adapter changes nothing"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--adapter=on-nf4", "--target=original"], "nf4: is quantized as nf4; the target 'original' needs the 16-bit"),
        (["--adapter=dense", "--target=requantized"], "model: the target 'requantized' needs linears held as nf4"),
        (["--adapter="], "--model or --adapter is empty"),
        ([], "there is nothing to merge: give --adapter"),
    ],
)
def test_merge_refuses_what_it_cannot_do_and_writes_nothing(run, tmp_path, words, named):
    assert named in run("merge", *words, f"--out={tmp_path / 'out'}", status=1).err
    assert not (tmp_path / "out").exists()
