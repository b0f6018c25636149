"""What PEFT saves passes the laws; its sorted patterns do not."""

import functools

import pytest
from safetensors.torch import load_file
from torch import nn

from minilora.testing import CheckFailure, check_adapter_directory
from minilora.testing.directory_laws import LAWS
from tests.files import edit
from tests.models import perturb_

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(kind="CausalLM"):
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    return getattr(transformers, f"LlamaFor{kind}")(config)


def resized():
    model = llama()
    model.resize_token_embeddings(60, mean_resizing=False)
    return model


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def gpt2():
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def many_kinds():
    modules = {
        "one": nn.Conv1d(4, 6, 3),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "embedding": nn.Embedding(5, 4),
        "attention": nn.MultiheadAttention(8, 2),
    }
    return nn.Sequential(nn.ModuleDict(modules))


PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}, "alpha_pattern": {"v_proj": 3}}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SAVED = {  # the model, and PEFT's settings; adapted are q_proj and v_proj if nothing else is said
    "LoRA": (llama, {}),
    "all linears": (llama, {"target_modules": "all-linear"}),
    "expression": (llama, {"target_modules": r".*\.(q|v)_proj"}),
    "some layers": (llama, {"layers_to_transform": [1]}),
    "one layer by its list": (llama, {"layers_to_transform": 0, "layers_pattern": "layers"}),
    "a layer and a whole path": (
        llama,
        {"layers_to_transform": [1, 7], "target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"]},
    ),
    "without a name": (llama, {"target_modules": "all-linear", "exclude_modules": ["v_proj", "lm_head"]}),
    "without an expression": (llama, {"exclude_modules": r".*\.0\..*v_proj"}),
    "names that match nothing": (
        llama,
        {"target_modules": ["q_proj", "query"], "exclude_modules": ["key"], "alpha_pattern": {"k_proj": 2}},
    ),
    "DoRA": (llama, {"use_dora": True}),
    "rsLoRA with patterns": (llama, {"use_rslora": True, **PATTERNS}),
    "a bias of B": (llama, {"lora_bias": True}),
    "all biases": (llama, {"bias": "all"}),
    "biases of adapted layers": (llama, {"bias": "lora_only"}),
    "PiSSA": (llama, {"init_lora_weights": "pissa"}),
    "head and embedding in full": (llama, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "a block in full": (llama, {"target_modules": ["up_proj"], "modules_to_save": ["self_attn", "norm"]}),
    "head and embedding adapted": (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embedding by DoRA": (llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "rows": (llama, {"trainable_token_indices": [1, 5, 6]}),
    "rows by name": (llama, {"trainable_token_indices": {"embed_tokens": [1, 5]}}),
    "a larger vocabulary": (resized, {}),
    "parameters": (llama, {"target_parameters": ["up_proj.weight", "gate_proj.weight"]}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "classes of texts": (functools.partial(llama, "SequenceClassification"), {"task_type": "SEQ_CLS"}),
    "classes of words": (functools.partial(llama, "TokenClassification"), {"task_type": "TOKEN_CLS"}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn"]}),
    "many kinds": (many_kinds, {"target_modules": ["one", "grouped", "embedding", "attention"]}),
    "many kinds by DoRA": (many_kinds, {"target_modules": ["one", "embedding"], "use_dora": True}),
}


def saved(directory, make_model, **fields):
    """Save an adapter as if it was trained."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], **fields})
    model = peft.get_peft_model(make_model(), config)
    perturb_(model)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", SAVED)
def test_what_peft_saves_passes(case, tmp_path):
    make_model, fields = SAVED[case]
    assert len(check_adapter_directory(saved(tmp_path, make_model, **fields))) == len(LAWS)


def test_what_peft_saves_wrongly_is_found(tmp_path):
    """The model has rank 8, and PEFT itself cannot load what it saved."""
    saved(tmp_path, llama, rank_pattern={"self_attn.q_proj": 8, "q_proj": 2})
    with pytest.raises(CheckFailure, match=", the first key that matches, is"):
        check_adapter_directory(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


def test_what_peft_saves_before_training_passes(tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    check_adapter_directory(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0, 1], "layers_pattern": "h"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*\.1\..*"},
    ],
    ids=str,
)
def test_where_modules_are_left_out_peft_loses_tensors(fields, tmp_path):
    saved(tmp_path, llama)
    edit(tmp_path, **fields)
    with pytest.raises(CheckFailure, match="adapter_directory-layers"):
        check_adapter_directory(tmp_path)
    count = len(load_file(tmp_path / "adapter_model.safetensors"))
    try:
        model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    except ValueError:  # nothing is left to adapt
        return
    assert len(peft.get_peft_model_state_dict(model)) < count
