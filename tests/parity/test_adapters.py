"""Ours and PEFT's: the same targets, the same files, the same logits, losses and gradients."""

import pytest
import torch

import minilora as ml
from minilora.lora.find import adapter_layers
from tests.models import randomize_adapters_, tiny_model, token_ids
from tests.tolerance import assert_parity

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = token_ids(3, 2, 7)
CONFIGS = {
    "all-linear": {},
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*layers\.[13]\..*(up|o)_proj"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.2.self_attn.v_proj"]},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"]},
    "rslora": {"use_rslora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.[13]\.self_attn\.q_proj": 5, "v_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 4, "q_proj": 9},
    },
}


@pytest.fixture
def base(tmp_path):
    """A directory that both can load."""
    ml.save_model(tiny_model(dtype=torch.float32), tmp_path / "base")
    return tmp_path / "base"


def their_model(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.mark.parametrize("case", CONFIGS)
def test_what_we_save_peft_loads(base, tmp_path, case):
    ours = ml.load_model(base)
    ml.attach(ours, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **CONFIGS[case]}))
    randomize_adapters_(ours)
    ml.save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(their_model(base), tmp_path / "adapter")
    assert_parity(ours(IDS), theirs(IDS).logits)


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_what_peft_saves_we_load(base, tmp_path, case):
    config = peft.LoraConfig(**{"target_modules": "all-linear", "r": 3, "lora_alpha": 21, **CONFIGS[case]})
    theirs = peft.get_peft_model(their_model(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ml.load_model(base)
    ml.load_adapter(ours, tmp_path / "adapter")
    assert_parity(ours(IDS), theirs(IDS).logits)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_same_modules_are_chosen_with_the_same_counts(base, case):
    ours = ml.load_model(base)
    ml.attach(ours, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **CONFIGS[case]}))
    config = peft.LoraConfig(**{"target_modules": "all-linear", "r": 3, "lora_alpha": 21, **CONFIGS[case]})
    theirs = peft.get_peft_model(their_model(base), config)
    chosen = {name.split(".lora_A")[0] for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert {f"base_model.model.{path}" for path in adapter_layers(ours)} == chosen
    assert tuple(ml.count_parameters(ours)) == theirs.get_nb_trainable_parameters()


def test_attach_works_on_a_model_of_transformers(base):
    ours, theirs = ml.load_model(base), their_model(base)
    for model in (ours, theirs):
        ml.attach(model, ml.LoraConfig(r=3, lora_alpha=21))
        randomize_adapters_(model)
    assert adapter_layers(ours).keys() == adapter_layers(theirs).keys()
    assert_parity(ours(IDS), theirs(IDS).logits)
