"""nanolora.py against transformers, PEFT and bitsandbytes: the same logits, losses, gradients, bytes and files."""

import copy

import pytest
import torch

import minilora as ml
import nanolora
from minilora.testing.compare import GRADIENT_PARITY, assert_parity
from tests.files import pretrained
from tests.models import randn, tiny_model
from tests.test_nanolora import IDS, examples, llamas, logits, perturbed, weights

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


@llamas
def test_logits_equal_those_of_transformers(tmp_path, changes):
    ml.save_model(tiny_model(dtype=torch.float32, **changes), tmp_path)
    assert_parity(logits(nanolora.load_model(tmp_path)), theirs_logits(theirs_of(tmp_path)))


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


def test_three_losses_and_gradients_equal_those_of_peft(directory, tmp_path):
    """Their loss is a mean over the labels of a padded batch with a mask, ours of two micro-batches."""
    model = adapted(directory)
    nanolora.save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(theirs_of(directory), tmp_path / "adapter", is_trainable=True).train()
    parameters = dict(theirs.named_parameters())
    trained = [parameters[name.replace(".weight", ".default.weight")] for name in model.adapter]
    rates = {"lr": 5e-5, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model.adapter.values(), **rates)
    theirs_optimizer = torch.optim.AdamW(trained, **rates)
    tokens, labels = nanolora.collate(examples())
    mask = torch.arange(tokens.size(1)) < torch.tensor([[len(prompt + answer)] for prompt, answer in examples()])
    batches = [nanolora.collate(part) for part in nanolora.chunks(examples(), 3)]
    for _ in range(3):
        theirs_optimizer.zero_grad()
        loss = theirs(input_ids=tokens, labels=labels, attention_mask=mask.long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        theirs_optimizer.step()
        assert_parity(nanolora.train_step(model, optimizer, batches), loss)
        for factor, parameter in zip(model.adapter.values(), trained, strict=True):
            assert_parity(factor.grad, parameter.grad, 5 * GRADIENT_PARITY)  # through 30 layers, of either


@pytest.mark.parametrize("weight", [weights()[-1], randn(0, 40, 576), randn(1, 576, 1536).bfloat16()])
def test_four_bits_are_those_of_bitsandbytes_to_the_byte(weight):
    functional = pytest.importorskip("bitsandbytes").functional
    theirs, state = functional.quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=True)
    packed, codes, scales, mean, _ = found = nanolora.pack(weight)
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(codes, state.absmax)
    assert torch.equal(scales, state.state2.absmax)
    assert torch.equal(mean, state.offset)
    state.dtype = torch.float32
    assert torch.equal(nanolora.dense(found), functional.dequantize_4bit(theirs, copy.deepcopy(state)))


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
