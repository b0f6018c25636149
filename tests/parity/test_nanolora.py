"""nanolora.py in PEFT and transformers: its files and its text. The rest is compared with minilora."""

import pytest
import torch

import minilora as ml
import nanolora
from minilora.testing.compare import GRADIENT_PARITY, assert_parity
from tests.files import pretrained
from tests.models import tiny_model
from tests.test_nanolora import IDS, logits, perturbed

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
smollm2 = pytest.param("smollm2", marks=pytest.mark.real)


@pytest.fixture(params=["tiny", smollm2])
def directory(request, tmp_path):
    """A model's directory: a tiny random one, or SmolLM2."""
    if request.param == "smollm2":
        return pretrained("smollm2")
    ml.save_model(tiny_model("llama-3.1", dtype=torch.float32), tmp_path / "base")
    return tmp_path / "base"


def adapted(directory):
    """A model with an adapter that changes what it computes; not by much, as 30 layers add up."""
    model = perturbed(nanolora.load_model(directory))
    for factor in model.adapter.values():
        factor.data *= 0.5
    return model


def theirs_of(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def theirs_logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_an_adapter_loads_in_peft_and_back_and_merges_to_the_same_model(directory, tmp_path):
    model = adapted(directory)
    nanolora.save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(theirs_of(directory), tmp_path / "adapter")
    expected = theirs_logits(theirs)
    assert (expected - theirs_logits(theirs_of(directory))).abs().max() > 0.1
    assert_parity(logits(model), expected)
    theirs.save_pretrained(tmp_path / "back")
    back = nanolora.load_adapter(model._replace(adapter={}), tmp_path / "back")
    assert torch.equal(logits(back), logits(model))
    nanolora.save(nanolora.merge(model), tmp_path / "merged")
    merged = theirs_of(tmp_path / "merged")
    assert_parity(theirs_logits(merged), theirs_logits(theirs.merge_and_unload()))
    assert_parity(theirs_logits(merged), logits(model), GRADIENT_PARITY)


@pytest.mark.real
def test_it_continues_as_transformers_does():
    directory = pretrained("smollm2")
    tokenizer, settings = nanolora.load_tokenizer(directory)
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    text = nanolora.render(messages, settings, ask=True)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert text == theirs_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    expected = theirs_of(directory).generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :]
    assert nanolora.generate(nanolora.load_model(directory), ids, settings["end"], limit=32) == expected.tolist()
