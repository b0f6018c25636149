"""The six pages are enough: a model is loaded, adapted, trained, merged and saved without the rest of the package."""

import json
import subprocess
import sys
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora import data
from minilora.testing.compare import assert_parity
from tests.test_structure import PAGES

ROOT = Path(__file__).parents[1]
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
lines = (assets / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:160]
examples = [data.encode_row(json.loads(line), tokenizer, eos_id=0) for line in lines]
ids = torch.tensor([examples[0].tokens])
logits = {{"base": model(ids)}}
adapter.attach_lora(model, ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], r=8)
logits["new"] = model(ids)
optimizer = training.adamw([parameter for parameter in model.parameters() if parameter.requires_grad])
losses = []
for step in range(20):
    optimizer.param_groups[0]["lr"] = training.learning_rate(step, 20, peak=2e-3, warmup=2)
    batch = data.collate(examples[8 * step : 8 * step + 8], torch.device("cpu"))
    losses.append(training.train_step(model, optimizer, [batch]).losses.sum().item())
model.eval()
logits["adapted"] = model(ids)
adapter.save_lora(model, out / "adapter")
adapter.merge(model)
logits["merged"] = model(ids)
loaded = llama.load_llama(assets / "model")
adapter.load_lora(loaded, out / "adapter")
logits["loaded"] = loaded(ids)
save_file({{"ids": ids, "losses": torch.tensor(losses), **logits}}, out / "found.safetensors")
"""


def test_the_six_pages_alone_train_merge_and_save_what_the_package_reads(tmp_path):
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    found = load_file(tmp_path / "found.safetensors")
    assert found["losses"][-5:].mean() < 0.5 * found["losses"][:5].mean()
    assert torch.equal(found["new"], found["base"])
    assert (found["adapted"] - found["base"]).abs().max() > 1
    assert_parity(found["merged"], found["adapted"])
    assert torch.equal(found["loaded"], found["adapted"])
    model = ml.load_model("minilora/builtin")
    ml.load_adapter(model, tmp_path / "adapter")
    assert_parity(model(found["ids"]), found["adapted"])


def test_the_page_of_data_reads_rows_as_the_package_does():
    path, tokenizer = ROOT / "minilora" / "assets" / "data" / "train.jsonl", ml.load_tokenizer("minilora/builtin")
    raw = tokenizers.Tokenizer.from_file(str(ROOT / "minilora" / "assets" / "model" / "tokenizer.json"))
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [data.encode_row(json.loads(line), raw, tokenizer.eos_id) for line in lines]
    expected = ml.load_dataset(path, tokenizer)
    assert [(row.tokens, row.labels) for row in found] == [(row.tokens, row.labels) for row in expected]
