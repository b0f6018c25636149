"""The six pages are enough: a model is loaded, adapted, trained, merged and saved without the rest of the package."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minilora as ml
from minilora import adapter, data, llama, training
from minilora.adapters.layout import CONFIG_FILE
from minilora.models.checkpoint import SHARD_BYTES
from minilora.testing.compare import assert_parity
from scripts.structure import trace_pages, unentered
from tests.files import SHARD, change, same_state
from tests.models import (
    bases,
    examples,
    matrix,
    scales,
    seeds,
    tiny_model,
    token_ids,
)
from tests.test_structure import PAGES

ROOT = Path(__file__).parents[1]
IDS = token_ids(3, 2, 7)
Q_PROJ = "model.layers.0.self_attn.q_proj"
ALLOWED = ["minilora", *(f"minilora.{name}" for name in (*PAGES, "definition", "errors"))]
ALONE = f"""
import json, sys
from pathlib import Path

class OthersAreBlocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "minilora" and name not in {ALLOWED}:
            raise ImportError(f"{{name}} is none of the six pages")

sys.meta_path.insert(0, OthersAreBlocked())

import tokenizers, torch
from safetensors.torch import save_file
from minilora import adapter, data, llama, training

torch.set_num_threads(1)
out, assets = Path(sys.argv[1]), Path("minilora/assets")
model = llama.load_llama(assets / "model")
tokenizer = tokenizers.Tokenizer.from_file(str(assets / "model" / "tokenizer.json"))
lines = (assets / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
examples = [data.encode_row(json.loads(line), tokenizer, eos_id=0) for line in lines]
ids = torch.tensor([examples[0].tokens])
logits = {{"base": model(ids)}}
adapter.attach_lora(model, ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], r=8)
logits["new"] = model(ids)
optimizer = training.adamw([parameter for parameter in model.parameters() if parameter.requires_grad])
losses = []
for step in range(10):
    optimizer.param_groups[0]["lr"] = training.learning_rate(step, 10, peak=4e-3, warmup=1)
    batch = data.collate(examples[4 * step : 4 * step + 4], torch.device("cpu"))
    losses.append(training.train_step(model, optimizer, [batch]).loss)
model.eval()
logits["adapted"] = model(ids)
tensors = adapter.adapter_tensors(adapter.layers_of(model, "default"), "default")
save_file(tensors, out / "adapter_model.safetensors")
adapter.merge(model)
logits["merged"] = model(ids)
save_file({{"ids": ids, "losses": torch.tensor(losses), **logits}}, out / "found.safetensors")
"""


def test_the_six_pages_alone_train_merge_and_save_what_the_package_reads(tmp_path):
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    found = load_file(tmp_path / "found.safetensors")
    assert found["losses"][-3:].mean() < 0.5 * found["losses"][:3].mean()
    assert torch.equal(found["new"], found["base"])
    assert (found["adapted"] - found["base"]).abs().max() > 1
    assert_parity(found["merged"], found["adapted"])
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 32}')
    model = ml.load_model("minilora/builtin")
    ml.load_adapter(model, tmp_path)
    assert_parity(model(found["ids"]), found["adapted"])


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_page_of_data_reads_rows_as_the_package_does(trim_offsets, tmp_path):
    tokenizer, assets = ml.load_tokenizer("minilora/builtin"), ROOT / "minilora" / "assets"
    raw = tokenizers.Tokenizer.from_file(str(assets / "model" / "tokenizer.json"))
    raw.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim_offsets)
    lines = (assets / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[::20]
    rows = [{"prompt": "a  ", "completion": "é \n  b \n"}, *map(json.loads, lines)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    found = [data.encode_row(row, raw, tokenizer.eos_id) for row in rows]
    expected = ml.load_dataset(tmp_path / "rows.json", tokenizer)
    assert [(row.tokens, row.labels) for row in found] == [(row.tokens, row.labels) for row in expected]


@examples(0.5)
@given(seeds, st.integers(1, 5), scales, st.tuples(st.booleans(), st.booleans()), bases)
def test_what_the_page_attaches_the_package_does(seed, r, s, uses, base):
    numbers = {"r": r, "lora_alpha": s * r, "use_rslora": uses[0], "use_dora": uses[1], "lora_dropout": 0.3}
    ours, theirs = (base(tiny_model(dtype=torch.float32, num_hidden_layers=1)) for _ in range(2))
    adapter.attach_lora(ours, ["q_proj", "up_proj"], **numbers, seed=seed)
    ml.attach(theirs, ml.LoraConfig(target_modules=["q_proj", "up_proj"], **numbers), seed=seed)
    same_state(ours, theirs)


DEFAULTS = {adapter.attach_lora: ml.LoraConfig, training.train_step: ml.TrainConfig}


@pytest.mark.parametrize(("function", "config"), DEFAULTS.items())
def test_what_the_pages_take_by_default_is_what_the_package_does(function, config):
    config = config()
    parameters = inspect.signature(function).parameters
    found = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    shared = found.keys() & vars(config).keys()
    assert shared
    assert {name: found[name] for name in shared} == {name: getattr(config, name) for name in shared}


@pytest.mark.parametrize(
    ("targets", "options", "error"),
    [
        ([], {}, ml.TargetError),
        (["q_proj", "no_proj"], {}, ml.TargetError),
        (["v_proj", "k_proj"], {"name": "there"}, ml.TargetError),
        (["q_proj"], {"name": "a.b"}, ml.TargetError),
        (["q_proj"], {"name": "keys"}, ml.TargetError),
        (["q_proj"], {"lora_dropout": 2.0}, ValueError),
    ],
)
def test_what_the_page_of_adapters_cannot_attach_is_refused_and_changes_nothing(targets, options, error):
    model = tiny_model(dtype=torch.float32)
    adapter.attach_lora(model, ["k_proj"], r=1, name="there")
    before = list(model.state_dict())
    with pytest.raises(error):
        adapter.attach_lora(model, targets, **options)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_the_page_of_adapters_refuses_a_layer_whose_hooks_it_would_skip(register):
    model = tiny_model(dtype=torch.float32)
    getattr(model.get_submodule(Q_PROJ), register)(lambda *_: None)
    with pytest.raises(ml.TargetError, match=rf"{Q_PROJ}: has hooks"):
        adapter.attach_lora(model, ["q_proj"])
    assert not adapter.adapter_layers(model)


@matrix(3, shard_bytes=(SHARD, SHARD_BYTES), tied=(False, True), dtype=(torch.float32, torch.bfloat16))
def test_the_page_of_the_decoder_reads_a_llama_as_the_package_does(dtype, tied, shard_bytes, tmp_path):
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=tied, rms_norm_eps=1e-6)
    ml.save_model(model, tmp_path, shard_bytes=shard_bytes)
    ours, theirs = llama.load_llama(tmp_path, dtype), ml.load_model(tmp_path, dtype)
    same_state(ours, theirs)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert torch.equal(ours(ids := token_ids(0, 2, 5)), theirs(ids))
    names = dict.fromkeys(("windows", "rope", "source", "qkv_bias", "o_bias"), 1)  # those of fields
    assert llama.LlamaConfig.from_dict({**ours.config.source, **names}).windows == ours.config.windows
    assert not ours.training
    ml.save_model(ours, tmp_path / "again")
    same_state(ml.load_model(tmp_path / "again", dtype), theirs)


def test_the_page_of_the_decoder_refuses_other_models_and_other_tensors(tmp_path):
    ml.save_model(tiny_model(dtype=torch.float32, rms_norm_eps=1e-6), tmp_path)
    for changes, message in (
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"hidden_act": "gelu"}, "need a Llama with silu"),
        ({"model_type": "mistral"}, "need a Llama with silu"),
        ({"hidden_size": None}, r"wrong.config\.json: found {'hidden_size': None}, need whole numbers above 0"),
        ({"num_attention_heads": "4", "vocab_size": 0}, "found {'vocab_size': 0, 'num_attention_heads': '4'}, need"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"found {.*8\.0}, need numbers for .*'low_freq_"),
    ):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "wrong").mkdir(exist_ok=True)
        (tmp_path / "wrong" / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ml.ConfigError, match=message):
            llama.load_llama(tmp_path / "wrong")
    name = "model.layers.1.mlp.up_proj.weight"
    for changes in ({name: None}, {"another": torch.ones(1)}):
        change(tmp_path, changes)
        with pytest.raises(ml.FormatError, match=name if changes.get(name, 0) is None else "another"):
            llama.load_llama(tmp_path)


COMPOSITIONS = {"load_llama", "attach_lora", "encode_row", "train_step"}
ENTERED_ELSEWHERE = {"dynamic_map": "when the page is imported", "llama3_frequencies": "where a Llama 3 is loaded"}


@pytest.mark.long
def test_what_no_run_enters_of_a_page_is_a_short_composition():
    found = {name.partition(".")[2]: lines for name, lines in unentered(trace_pages()).items()}
    assert found.keys() <= COMPOSITIONS | ENTERED_ELSEWHERE.keys()
    assert max(found.values()) <= 12
