"""PEFT and the Trainer of transformers keep the laws of an adapter's life, except for what is named."""

import pytest
import torch
from torch import nn

from minilora.testing import (
    NotApplicable,
    check_recompute,
    check_resume,
    parametrize_laws,
)

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def attach(model, name="default", **config):
    config = peft.LoraConfig(**config)
    if not isinstance(model, peft.PeftModel):
        return peft.get_peft_model(model, config, name)
    if config.bias != "none":
        raise NotApplicable("PEFT trains the biases of one adapter only")
    model.add_adapter(name, config)
    return model


def save(model, path):
    model.save_pretrained(path)


@parametrize_laws("roundtrip")
def test_their_files(law):
    law.check((attach, save, peft.PeftModel.from_pretrained))


@parametrize_laws("adapters", known={"adapters-delete": "KeyError: 'ab'"})
def test_their_adapters(law):
    """It keeps the name of the one that acted if the first layer has no other one left, and then cannot be called."""
    law.check((attach, peft.PeftModel.set_adapter, peft.PeftModel.disable_adapter, peft.PeftModel.delete_adapter))


def make_layer(W, b, A, B, alpha, quantize=None):
    if quantize:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        base = bitsandbytes.nn.Linear4bit(*W.T.shape, bias=b is not None, compress_statistics=False, quant_type="nf4")
        base.support_avx512bf16_for_cpu = False  # whose layout takes no other sizes than multiples of 32 in eval()
        base.weight = bitsandbytes.nn.Params4bit(W, False, compress_statistics=False, quant_type="nf4").to("cpu")
    else:
        base = nn.Linear(*W.T.shape, bias=b is not None, dtype=W.dtype)
        base.weight.data.copy_(W)
    if b is not None:
        base.bias = nn.Parameter(b)
    config = peft.LoraConfig(r=len(A), lora_alpha=alpha, target_modules=["0"])
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = bool(quantize)  # by which PEFT knows
    layer = peft.inject_adapter_in_model(config, model)[0]
    for own, given in ((layer.lora_A, A), (layer.lora_B, B)):
        own["default"].weight = nn.Parameter(given.detach().clone())
    return layer


@parametrize_laws(
    "merge_cycle", known={"merge_cycle-16-bit": "after 100 cycles", "merge_cycle-4-bit": "after 100 cycles"}
)
def test_their_merging(law):
    """It subtracts from the weight, so that errors add up."""
    law.check((make_layer, lambda layer: layer.merge(), lambda layer: layer.unmerge()))


SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}


def llama():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **heads))


def test_their_trainer_resumes(tmp_path):
    pytest.importorskip("accelerate")
    rows = torch.randint(50, (16, 5), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in rows]

    class Stop(transformers.TrainerCallback):
        def __init__(self, stop):
            self.stop = stop

        def on_step_end(self, args, state, control, **_):
            if state.global_step == self.stop:
                control.should_save = control.should_training_stop = True

    def run(path, stop, total):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"]))
        arguments = transformers.TrainingArguments(
            str(path),
            max_steps=total,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Stop(stop)])
        trainer.train(resume_from_checkpoint=any(path.iterdir()))
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    check_resume(run)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_their_checkpointing(use_reentrant):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).train()
    ids = torch.arange(12).view(2, 6)

    def gradients(recompute, seed):
        model.gradient_checkpointing_disable()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    check_recompute(gradients)
