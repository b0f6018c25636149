"""The commands on a base of four bits: what they do, what they say, and what they write down."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import minilora as ml
from minilora import cli
from minilora.adapter import linear_layers
from minilora.adapters.layout import BASE_METADATA, base_quantization
from minilora.cli.load import find_sources
from minilora.cli.merge import NOTABLE
from minilora.files import TensorFile, read_json, write_tensors
from minilora.models import checkpoint
from minilora.nf4 import NF4Linear
from minilora.runs.evaluate import held_out_loss
from minilora.tools.merging import Merge, merge_directory
from tests.files import change, same_state
from tests.models import WHOLE, allocated, long, tiny_model
from tests.runs import QUICK, everything, write_rows
from tests.text import write_tokenizer

DOUBLE = "nf4 with double quantization"
OTHER = f"a base that is nf4 without double quantization; this one is {DOUBLE}"
HELD_DOUBLE = f"the base model is {DOUBLE}"
PLAIN, NF4 = ml.QuantizeConfig("none"), ml.QuantizeConfig("nf4")
SINGLE = ml.QuantizeConfig("nf4", False)
HELD = {"dense": ("model", None), "on-nf4": ("nf4", None), "quantized": ("model", NF4), "single": ("model", SINGLE)}
IN_NF4 = {"quantize": "nf4", "double_quant": True, "block_size": 64}  # as an adapter says it
TRAINING = [*QUICK, "--lora-r=2", "--max-steps=2", "--learning-rate=0.01", "--samples=0"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A dense model, the same in four bits, rows, and a run on each of several bases."""
    directory = tmp_path_factory.mktemp("quantize")
    sizes = {"vocab_size": 400, "num_hidden_layers": 1}
    model = tiny_model(WHOLE, seed=1, dtype=torch.float32, **sizes)
    ml.save_model(model, directory / "model", write_tokenizer(directory / "model"))
    write_rows(directory / "rows.jsonl", 12)
    assert cli.main(["quantize", f"--model={directory / 'model'}", f"--out={directory / 'nf4'}"]) == 0
    for out, model, *flags in (
        ("dense", "model"),
        ("on-nf4", "nf4"),
        ("quantized", "model", "--quantize=nf4"),
        ("single", "model", "--quantize=nf4", "--no-double-quant"),
    ):
        places = [f"--{flag}={directory / name}" for flag, name in (("model", model), ("out", out))]
        assert cli.main(["finetune", *places, f"--data={directory / 'rows.jsonl'}", *TRAINING, *flags]) == 0
    return directory


def with_metadata(adapter, out, metadata):
    """Write an adapter again, its file with this metadata; its directory."""
    file = TensorFile(adapter / "adapter_model.safetensors")
    out.mkdir()
    write_tensors(out / "adapter_model.safetensors", {name: file.read(name) for name in file.shapes}, metadata)
    shutil.copy(adapter / "adapter_config.json", out)
    return out


# --- what is written down ---


def test_an_adapter_says_how_its_base_was_held_and_one_that_does_not_says_nothing(directory, tmp_path, run):
    single = {**IN_NF4, "double_quant": False}
    held = {"dense": {"quantize": "none"}, "on-nf4": IN_NF4, "quantized": IN_NF4, "single": single}
    assert {name: base_quantization(directory / name) for name in held} == held
    silent = with_metadata(directory / "quantized", tmp_path / "silent", {})
    assert base_quantization(silent) is None
    assert run("generate", "--adapter", silent, "--prompt=the cat", "--json").err == ""


# --- the base is held as in training, and what is otherwise is said ---


@pytest.mark.parametrize("adapter", [*long("dense", "quantized"), "on-nf4", "single"])
def test_an_adapter_is_measured_on_the_base_that_it_was_trained_on(run, adapter):
    out, err = run("eval", "--adapter", adapter, "--data", "rows.jsonl", "--metric", "nll")
    base, quantize = HELD[adapter]
    model = ml.load_model(base, quantize=quantize)
    ml.load_adapter(model, adapter)
    assert json.loads(out)["value"] == held_out_loss(model, ml.load_dataset("rows.jsonl", ml.load_tokenizer(base)))
    assert "was trained on a base" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter=dense"], []),
        (["--adapter=quantized"], [HELD_DOUBLE]),
        (["--adapter=quantized", "--quantize=none"], [f"a base that is {DOUBLE}; this one is not quantized"]),
        (["--adapter=dense", "--quantize=nf4"], [HELD_DOUBLE, f"a base that is not quantized; this one is {DOUBLE}"]),
        (["--adapter=single", "--model=nf4"], [HELD_DOUBLE, "the model 'DIRECTORY/model'; this one is 'nf4'", OTHER]),
        (["--adapter=on-nf4", "--model=model"], [HELD_DOUBLE, "the model 'DIRECTORY/nf4'; this one is 'model'"]),
        (["--model=nf4"], [HELD_DOUBLE]),
    ],
)
def test_a_base_that_is_held_otherwise_than_in_training_is_spoken_of(directory, run, words, said):
    adapter = words[0].partition("=")[2]
    found = (
        run("generate", "--prompt=a", "--json", "--max-new-tokens=1", *words)
        .err.replace(str(directory), "DIRECTORY")
        .splitlines()
    )
    assert [line.removeprefix(f"{adapter}: was trained on ") for line in found] == said


@pytest.mark.parametrize(
    ("model", "adapters", "flags", "expected"),
    [
        ("model", ["single", "quantized"], {}, SINGLE),
        ("model", ["quantized", "single"], {}, NF4),
        ("model", ["dense", "single"], {}, PLAIN),
        ("model", ["silent", "single"], {}, SINGLE),
        ("model", ["silent"], {}, PLAIN),
        ("model", ["fp4", "single"], {}, PLAIN),
        ("model", ["single"], {"quantize": "none"}, PLAIN),
        ("model", ["single"], {"double_quant": True}, NF4),
        ("model", ["fp4"], {"quantize": "nf4"}, NF4),
        ("nf4", ["single"], {}, PLAIN),
        ("nf4", ["single"], {"quantize": "nf4"}, NF4),
    ],
)
def test_quantization_precedence_flags_then_adapter(directory, tmp_path, monkeypatch, model, adapters, flags, expected):
    monkeypatch.chdir(directory)
    fp4 = {"quantize": "fp4", "double_quant": False, "block_size": 64}
    made = {
        "silent": with_metadata(directory / "single", tmp_path / "silent", {}),
        "fp4": with_metadata(directory / "single", tmp_path / "fp4", {BASE_METADATA: json.dumps(fp4)}),
    }
    places = {"model": model, "adapter": [str(made.get(name, name)) for name in adapters]}
    options = {"quantize": None, "double_quant": None, **flags}
    assert find_sources({**places, **options}).quantize == expected


# --- minilora quantize ---


def test_quantize_writes_the_model_that_quantizing_while_loading_gives(directory, run, tmp_path):
    ids = torch.arange(12).view(1, 12)
    loaded, quantized = ml.load_model(directory / "nf4"), ml.load_model(directory / "model", quantize="nf4")
    assert torch.equal(loaded(ids), quantized(ids))
    assert not torch.equal(loaded(ids), ml.load_model(directory / "model")(ids))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    one, other = (ml.load_tokenizer(directory / name).encode("the cat") for name in ("nf4", "model"))
    assert one == other
    run("quantize", "--model=model", f"--out={tmp_path / 'plain'}", "--no-double-quant")
    packed = [module for module in ml.load_model(tmp_path / "plain").modules() if isinstance(module, NF4Linear)]
    assert {linear.scales for linear in packed} == {None}


def test_quantize_holds_the_work_on_one_weight_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "prefetch", lambda items: items)  # the profiler sees one thread
    model = tiny_model(dtype=torch.float32, num_hidden_layers=9, hidden_size=64, intermediate_size=64)
    ml.save_model(model, tmp_path / "model", shard_bytes=1)  # a file that is mapped counts as a whole
    words = ["quantize", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'nf4'}"]
    _, peak, code = allocated(lambda: cli.main(words))
    sizes = [p.nbytes for p in model.parameters()]
    assert code == 0
    assert peak <= 10 * max(sizes) < sum(sizes) / 4


@pytest.mark.parametrize(
    ("dtype", "stored", "command"),
    [("bfloat16", "BF16", ["quantize"]), ("float16", "F16", ["merge", "--adapter=dense"])],
)
def test_what_is_dense_is_written_in_the_dtype_of_the_config_though_slow(
    directory, run, tmp_path, dtype, stored, command
):
    tokenizer = ml.load_tokenizer(directory / "model")
    ml.save_model(ml.load_model(directory / "model", dtype), tmp_path / "half", tokenizer)
    run(*command, f"--model={tmp_path / 'half'}", f"--out={tmp_path / 'out'}")
    embedding = TensorFile(tmp_path / "out" / "model.safetensors").entries["model.embed_tokens.weight"]
    assert embedding.dtype == stored
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == dtype


def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_left(directory, run, tmp_path):
    shutil.copytree(directory / "model", tmp_path / "bad")
    change(tmp_path / "bad", {"model.layers.0.mlp.up_proj.weight": torch.full((40, 24), torch.nan)})
    assert "not finite" in run("quantize", f"--model={tmp_path / 'bad'}", f"--out={tmp_path / 'out'}", status=1).err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_refused_and_nothing_is_written(run, tmp_path):
    for words, named in (
        ("quantize --model=nf4", "nf4: the model is quantized already; fine-tune or load it"),
        ("merge --adapter=on-nf4 --target=original", "is quantized as nf4; the target 'original' needs the 16-bit"),
        ("merge", "give the adapter to merge: --adapter"),
        ("quantize --model=model --out=nf4", "nf4: holds files"),
    ):
        out = [] if "--out" in words else [f"--out={tmp_path / 'out'}"]
        assert named in run(*words.split(), *out, status=1).err
        assert not (tmp_path / "out").exists()


# --- minilora merge ---


@pytest.mark.parametrize(
    ("words", "held"),
    [
        (["--adapter=single"], "single"),
        (["--adapter=on-nf4"], "on-nf4"),
        (["--adapter=quantized", "--quantize=none"], "dense"),
        *long((["--adapter=dense"], "dense"), (["--adapter=dense", "--quantize=nf4"], "quantized")),
    ],
)
def test_merge_writes_what_was_trained_with_all_files_of_a_model(directory, run, tmp_path, words, held):
    run("merge", *words, f"--out={tmp_path}")
    how_to_ask = map(Path, ("minilora-prompts.json", "README.md", "generation_config.json"))
    assert everything(tmp_path).keys() == {*everything(directory / "model"), *how_to_ask}
    base, quantize = HELD[held]
    model = ml.load_model(base, quantize=quantize)
    ml.load_adapter(model, words[0].partition("=")[2])
    ml.merge(model)
    same_state(ml.load_model(tmp_path), model)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("original", f"quantized: was trained on a base that is {DOUBLE}; this one is not quantized\n"),
        ("dequantized", f"{HELD_DOUBLE}\n"),
        ("requantized", f"{HELD_DOUBLE}\n"),
    ],
)
def test_merge_prints_how_far_the_result_is_from_what_was_trained(run, tmp_path, target, said):
    what = Merge(Path("model"), [Path("quantized")], target, ml.QuantizeConfig("nf4"))
    expected, _ = merge_directory(what, tmp_path / "a")
    out, err = run("merge", "--adapter=quantized", f"--target={target}", f"--out={tmp_path / 'b'}")
    assert err == said
    first, *more, last = out.splitlines()
    assert bool(more) == (expected > NOTABLE) == (target != "dequantized")
    assert first == f"the layers' outputs differ from the trained ones by {expected:.1%} of the adapter's effect"
    assert last == f"merged model written to {tmp_path / 'b'}"
    assert (expected > 0.01) == (target != "dequantized")
    kinds = {path: type(linear) for path, linear in linear_layers(ml.load_model(tmp_path / "b")).items()}
    del kinds["lm_head"]
    assert set(kinds.values()) == {NF4Linear if target == "requantized" else torch.nn.Linear}


def test_merge_says_that_no_update_has_an_error(directory, run, tmp_path):
    model = ml.load_model(directory / "model", device="meta")
    ml.attach(model, ml.LoraConfig())
    ml.save_adapter(model, tmp_path / "new")
    printed = run("merge", f"--adapter={tmp_path / 'new'}", "--model=model", f"--out={tmp_path / 'out'}").out
    assert printed.startswith("no update of low rank changes a weight")
