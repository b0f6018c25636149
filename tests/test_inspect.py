"""`inspect` of files, models and runs, and its pages: nothing is left out, and totals are those of the files."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE
from minilora.cli import inspect, main
from minilora.cli.inspect import fold
from minilora.files import MANIFEST, read_json, write_json
from minilora.tools.inspect import inspect_path, model_facts, run_facts
from tests.files import saved, write_base
from tests.models import families
from tests.text import CHATML, write_tokenizer

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "BOOL": torch.bool}
words = st.sampled_from(["a", "b", "0", "1", "2", "10", "01", "9999999999"])
names = st.lists(words, min_size=1, max_size=4).map(".".join)
UNSET = {"memory": False, "json": False, "base": None, "norms": False, "for": None}


@pytest.fixture
def page(capsys):
    """What the command prints for a path."""

    def run(path, **options):
        assert inspect.run({**UNSET, "path": str(path), **options}) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copied(base, tmp_path):
    """A copy of a model's directory."""
    return shutil.copytree(base, tmp_path / "model")


def rows_of(text, table=1):
    """The words of each row of a table of a page."""
    return [line.split() for line in text.split("\n\n")[table].splitlines()]


def header_bytes(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# --- names ---


@given(st.dictionaries(names, st.sampled_from("xy"), min_size=1, max_size=30))
def test_folding_keeps_each_name_once_with_its_kind(kinds):
    folds = fold(kinds)
    assert sorted(name for _, names in folds for name in names) == sorted(kinds)
    for label, names in folds:
        assert len({kinds[name] for name in names}) == 1
        for name in names if len(names) > 1 else ():
            assert label == ".".join("*" if part.isdecimal() else part for part in name.split("."))
    assert all(label == names[0] for label, names in folds if len(names) == 1)


# --- files ---


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3))))
def test_every_tensor_is_told_once_and_the_totals_are_the_file_s_bytes(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    save_file({name: torch.zeros(shape).to(DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}, path)
    facts = inspect_path(str(path))["file"]
    assert {name: (t.dtype, list(t.shape)) for name, t in facts["tensors"].items()} == tensors
    total = header_bytes(path) + sum(tensor.bytes for tensor in facts["tensors"].values())
    assert total == path.stat().st_size == facts["bytes"]


def test_the_page_of_a_file_counts_every_tensor_and_byte(tmp_path, page):
    tensors = {f"layers.{i}.{name}": torch.zeros(3, size) for i in range(12) for name, size in (("q", 2), ("o", 5))}
    save_file({**tensors, "layers.12.q": torch.zeros(3, 2).half()}, tmp_path / "x.safetensors")
    text = page(tmp_path / "x.safetensors")
    assert "25 tensors, 258 numbers, 1,020 bytes" in text
    assert rows_of(text) == [
        ["n", "dtype", "shape", "name"],
        ["12", "F32", "3x5", "layers.*.o"],
        ["12", "F32", "3x2", "layers.*.q"],
        ["1", "F16", "3x2", "layers.12.q"],
    ]


def test_orders_to_the_terminal_are_spelled_out(tmp_path, page):
    save_file({"a\x1b[2J\nb": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"k": "\x1b]0;t\x07"})
    text = page(tmp_path / "x.safetensors")
    assert not {"\x1b", "\x07"} & {*text}
    assert r"a\x1b[2J\nb" in text


def test_damage_to_an_adapter_or_a_model_and_what_is_not_there_is_named(copied, tmp_path):
    saved(tmp_path)
    for path in (tmp_path / CONFIG_FILE, tmp_path / WEIGHTS_FILE, copied / "config.json", copied / "model.safetensors"):
        before = path.read_bytes()
        path.write_bytes(b"[]")
        with pytest.raises(ml.FormatError, match=rf"^[^\n]*{path.name}[^\n]*\Z"):
            inspect_path(str(path.parent))
        path.write_bytes(before)
    for path in (tmp_path / "x", tmp_path.parent):
        with pytest.raises(ml.FormatError, match=str(path)):
            inspect_path(str(path))


# --- models ---


@families
def test_each_parameter_of_a_model_is_told_once(tmp_path, family, page):
    facts = model_facts(write_base(tmp_path, family))
    expected = {name: tuple(p.shape) for name, p in ml.load_model(tmp_path).named_parameters()}
    assert {name: tensor.shape for name, tensor in facts["tensors"].items()} == expected
    assert not facts["problems"]
    assert "tokenizer.json" in facts["tokenizer"]["problem"]
    assert sum(int(row[0]) for row in rows_of(page(tmp_path))[1:]) == len(expected)


def test_a_packed_weight_is_one_tensor_of_its_own_shape_and_all_its_bytes(tmp_path, base):
    facts, dense = model_facts(write_base(tmp_path, quantize="nf4")), model_facts(base)
    found, expected = ({name: entry.shape for name, entry in each["tensors"].items()} for each in (facts, dense))
    assert found == expected
    assert {entry.dtype for entry in facts["tensors"].values()} == {"NF4", "F32"}
    total = header_bytes(tmp_path / "model.safetensors") + sum(entry.bytes for entry in facts["tensors"].values())
    assert total == sum(facts["files"].values())
    tensors = load_file(tmp_path / "model.safetensors")
    state = next(name for name in tensors if "quant_state" in name)
    tensors[state] = tensors[state][:-1]  # no JSON any more: its weight is told in parts
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    facts = model_facts(tmp_path)
    assert facts["tensors"][state].dtype == "U8"
    assert facts["problems"]


def test_shards_hold_together_what_one_file_holds(tmp_path, base):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template=CHATML)
    ml.save_model(ml.load_model(base), tmp_path, tokenizer, shard_bytes=5000)
    facts = model_facts(tmp_path)
    assert len(facts["files"]) > 3
    assert facts["files"] == {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert facts["tensors"] == model_facts(base)["tensors"]
    assert facts["tokenizer"] == {"tokens": len(tokenizer), **tokenizer.special_tokens, "chat_template": True}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": ["gpt_neox"]},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"hidden_size": "wide", "architectures": 3, "tie_word_embeddings": {}},
    ],
)
def test_a_model_that_minilora_does_not_run_is_told_with_the_reason(copied, change, page):
    write_json(copied / "config.json", read_json(copied / "config.json") | change)
    (copied / MANIFEST).unlink()
    assert next(iter(change)) in " ".join(model_facts(copied)["problems"])
    with pytest.raises(ml.MiniloraError):
        ml.load_model(copied)
    assert "  problems  " in page(copied)
    assert "problems  none" not in " ".join(page(copied).split(" "))


# --- runs ---


@pytest.fixture
def run(tmp_path):
    """The directory of a run that was stopped after step 3."""
    directory = tmp_path / "run"
    saved(directory / "checkpoints" / "step-000002")
    write_json(directory / "checkpoints" / "step-000002" / "state.json", {"step": 2, "tokens": 99})
    config = {"lora_r": ml.LoraConfig().r, "seed": 0, "learning_rate": 0.5, "invented_tomorrow": 1}
    record = {"config": config, "versions": {}, "data_sha256": {"train.jsonl": "0" * 64}, "starts": [{"step": 0}]}
    write_json(directory / "run.json", record)
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 7.0}, {"step": 3, "loss": 1.5}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_a_run_tells_its_settings_and_its_progress_and_damage_is_named(run, page):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a crash
    facts = run_facts(run)
    assert facts["settings"] == {"learning_rate": 0.5, "invented_tomorrow": 1}
    assert (facts["last_step"], facts["evaluation"]) == ({"step": 3, "loss": 1.5}, {"step": 2, "eval_loss": 7.0})
    assert re.search("^  checkpoint +step-000002$", page(run), re.MULTILINE)
    checkpoint = run / "checkpoints" / "step-000002"
    assert inspect_path(str(checkpoint))["adapter"]["step"] == 2
    assert re.search("^  step +2$", page(checkpoint), re.MULTILINE)
    for content in ("nonsense\n", "[1]\n"):
        (run / "metrics.jsonl").write_text(content)
        with pytest.raises(ml.FormatError, match=r"metrics\.jsonl, line 1: "):
            run_facts(run)


def test_files_are_compared_with_their_manifests_also_those_of_checkpoints(run, page, capsys):
    saved(run)
    assert re.search("^  problems +none$", page(run), re.MULTILINE)
    checkpoint = run / "checkpoints" / "step-000002"
    for path in (checkpoint / WEIGHTS_FILE, checkpoint / CONFIG_FILE, run / CONFIG_FILE):
        before = path.read_bytes()
        path.write_bytes(before.replace(b"lora", b"LORA"))
        assert main(["inspect", str(run)]) == 1
        assert f"{path}: changed since minilora wrote it\n" in capsys.readouterr().out
        path.write_bytes(before)
    (checkpoint / WEIGHTS_FILE).unlink()
    assert main(["inspect", str(run)]) == 1


# --- pages and JSON ---


def test_json_has_what_the_files_of_a_run_an_adapter_and_a_model_have(run, base, page):
    shutil.copytree(base, run, dirs_exist_ok=True)
    model = saved(run, rank_pattern={"o_proj": 2})
    write_json(run / "summary.json", {"after": {"loss": 2.5}})
    assert re.search(r"^  summary\.after\.loss +2\.5$", page(run), re.MULTILINE)
    told = json.loads(page(run, json=True))
    assert list(told) == ["run", "adapter", "model", "manifest"]
    for kind, file in (("adapter", WEIGHTS_FILE), ("model", "model.safetensors")):
        held = {name: [list(t.shape), t.nbytes] for name, t in load_file(run / file).items()}
        assert {name: [t["shape"], t["bytes"]] for name, t in told[kind]["tensors"].items()} == held
    assert told["adapter"]["config"] == read_json(run / CONFIG_FILE)
    assert told["model"]["config"] == read_json(run / "config.json")
    assert told["model"]["files"] == {"model.safetensors": (run / "model.safetensors").stat().st_size}
    assert (told["run"]["starts"], told["run"]["summary"]) == ([{"step": 0}], {"after": {"loss": 2.5}})
    assert [module["module"] for module in told["adapter"]["modules"]] == sorted(adapter_layers(model))


def test_the_page_of_an_adapter_has_every_module_and_its_features(tmp_path, page):
    saved(tmp_path, rank_pattern={"layers.2.self_attn.q_proj": 6}, use_rslora=True)
    text = page(tmp_path)
    title, *rows = rows_of(text)
    assert title == ["n", "rank", "scale", "norm", "module"]
    assert sum(int(row[0]) for row in rows) == 28
    shown = {row[-1]: row[:3] for row in rows}
    assert shown["model.layers.*.self_attn.q_proj"] == ["3", "3", "12.12"]
    assert shown["model.layers.2.self_attn.q_proj"] == ["1", "6", "8.573"]
    assert sum(int(row[0]) for row in rows_of(text, 2)[1:]) == 56
    for pattern in ("config.use_rslora +true", "config.rank_pattern", "problems +none"):
        assert re.search(f"^  {pattern}", text, re.MULTILINE)
