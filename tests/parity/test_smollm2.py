"""On a real model: SmolLM2-135M-Instruct, against transformers and PEFT.

The model is made once by `scripts/smollm2.py` and kept in `.cache/`; its weights were 4-bit before.
"""

import copy
import json
import statistics
from pathlib import Path

import pytest
import torch

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.cli import main
from minilora.data import collate
from minilora.files import BUILTIN
from minilora.runs.encoders import encode_rows
from minilora.runs.evaluate import held_out_loss
from minilora.runs.formats import Row
from minilora.runs.inputs import find_splits
from minilora.testing.compare import GRADIENT_PARITY, assert_parity, relative
from minilora.training import token_loss
from tests import files
from tests.models import randomize_adapters_

pytestmark = pytest.mark.real
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
PROMPTS = ["What is the capital of France?", "Write a haiku about rain.", "Why is the sky blue?"]
SETTINGS = ["--data", BUILTIN, "--batch-size", "16", "--learning-rate", "1e-3", "--epochs", "1", "--warmup-steps", "10"]


@pytest.fixture(autouse=True)
def _all_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def smollm2():
    return files.smollm2()


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return ml.load_tokenizer(smollm2)


@pytest.fixture
def ours(smollm2):
    return ml.load_model(smollm2, dtype="float32")


@pytest.fixture
def theirs(smollm2):
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def chat_ids(tokenizer, prompt):
    text = tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def rows():
    """Rows of unequal answers: prompt and completion, as they are in the built-in data, and longer ones."""
    answers = ["animal", "a plant, which grows", "food", "it is said to be a place " * 3]
    texts = [{"prompt": f"Question {i}:", "completion": f" {answer}"} for i, answer in enumerate(answers)]
    return [Row(text, f"row {i}") for i, text in enumerate(texts)]


def theirs_loss(model, batch):
    """The sum over labelled tokens, each row run by itself."""
    total, targets = 0.0, torch.full_like(batch.tokens, -100).index_put((batch.label_positions,), batch.labels)
    for tokens, wanted in zip(batch.tokens.split(batch.lengths), targets.split(batch.lengths), strict=True):
        logits = model(tokens[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return total


def test_logits_equal_transformers(ours, theirs, tokenizer):
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([chat_ids(tokenizer, prompt)])
            assert_parity(ours(ids), theirs(ids).logits)


def test_64_greedy_tokens_equal_transformers(ours, theirs, tokenizer):
    ids = chat_ids(tokenizer, PROMPTS[2])
    written = ml.generate(ours, [ids], max_new_tokens=64)[0]
    expected = theirs.generate(
        torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=2
    )
    assert tokenizer.stop_ids.isdisjoint(written)  # nothing was stopped, so nothing of the 64 was suppressed
    assert written == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("use_rslora", [False, pytest.param(True, marks=pytest.mark.long)])
def test_loss_and_gradients_equal_peft_with_a_random_adapter(ours, theirs, tokenizer, tmp_path, use_rslora):
    ml.attach(ours, ml.LoraConfig(r=4, lora_alpha=28, use_rslora=use_rslora))
    randomize_adapters_(ours)
    with torch.no_grad():
        for layer in adapter_layers(ours).values():
            layer.adapters["default"].lora_B.mul_(0.05)
    ml.save_adapter(ours, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    batch = collate(encode_rows(rows(), tokenizer, ml.DataConfig()), torch.device("cpu"))
    exact = copy.deepcopy(wrapped).double()
    ours_loss, peft_loss = token_loss(ours, batch)[0], theirs_loss(wrapped, batch)
    assert_parity(ours_loss, peft_loss, GRADIENT_PARITY)
    for loss in (ours_loss, peft_loss, theirs_loss(exact, batch)):
        loss.backward()
    ours_gradients = {}
    for path, layer in adapter_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            name = f"base_model.model.{path}.{factor}.default.weight"
            ours_gradients[name] = getattr(layer.adapters["default"], factor).grad
    exact_gradients, theirs_gradients = (
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (exact, wrapped)
    )
    assert ours_gradients.keys() == theirs_gradients.keys()
    assert len(ours_gradients) == 2 * 7 * 30
    ours_errors, theirs_errors = (
        [relative(gradients[name], exact_gradients[name], GRADIENT_PARITY) for name in exact_gradients]
        for gradients in (ours_gradients, theirs_gradients)
    )
    for middle_or_worst in (statistics.median, max):
        assert middle_or_worst(ours_errors) <= 2 * middle_or_worst(theirs_errors)
    assert max(theirs_errors) < 10  # or twice their error would say little


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fine_tuned_on_definitions_it_learns_and_peft_and_transformers_agree(
    smollm2, tmp_path, tokenizer, theirs, seed
):
    out, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["finetune", "--model", str(smollm2), "--out", str(out), "--seed", str(seed), *SETTINGS]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["accuracy"] < 0.6
    assert summary["after"]["accuracy"] > 0.9

    assert main(["merge", "--adapter", str(out), "--out", str(merged), "--dtype", "float32"]) == 0
    test_rows = ml.load_dataset(find_splits(BUILTIN)["test"][0], tokenizer)[:200]
    ours = ml.load_model(smollm2, dtype="float32")
    ml.load_adapter(ours, out)
    ours_loss = torch.tensor(held_out_loss(ours, test_rows))
    with torch.no_grad():
        batch = collate(test_rows, torch.device("cpu"))
        in_peft = theirs_loss(peft.PeftModel.from_pretrained(theirs, out).eval(), batch) / len(batch.labels)
        in_transformers = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        assert_parity(ours_loss, in_peft)
        assert_parity(ours_loss, theirs_loss(in_transformers, batch) / len(batch.labels))
