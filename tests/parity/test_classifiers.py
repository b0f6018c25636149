"""Ours and transformers' classifiers: the same scores, the same files."""

import pytest
import torch

import minilora as ml
from minilora.adapters.layout import classes_of
from minilora.models.classifier import load_classifier
from minilora.testing.compare import assert_parity
from tests.models import FAMILIES, perturb_, tiny_model, token_ids
from tests.test_classifier import LABELS, padded, tiny_classifier

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
families = pytest.mark.parametrize("family", FAMILIES)
AUTO = {unit: getattr(transformers, f"AutoModelFor{unit.title()}Classification") for unit in ("sequence", "token")}
units = pytest.mark.parametrize("unit", AUTO)
TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
TOKENS = token_ids(0, 1, 20)


@families
@units
@torch.no_grad()
def test_files_go_to_theirs_and_back_with_the_same_scores_and_labels(unit, family, tmp_path):
    ours = tiny_classifier(unit, family, dtype=torch.float32)
    ml.save_model(ours, tmp_path / "ours")
    theirs, info = AUTO[unit].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert_parity(ours(TOKENS), theirs.eval()(input_ids=TOKENS).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_classifier(tmp_path / "theirs")
    assert (again.unit, again.labels) == (unit, tuple(LABELS))
    assert torch.equal(again(TOKENS), ours(TOKENS))


def test_two_labels_without_names_are_the_same_to_both(tmp_path):
    ours = tiny_classifier("sequence", dtype=torch.float32, labels=["LABEL_0", "LABEL_1"])
    ml.save_model(ours, tmp_path / "ours")
    AUTO["sequence"].from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert load_classifier(tmp_path / "theirs").labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_rows_that_are_padded_with_a_token_of_their_own_pool_the_same_token(family, tmp_path):
    """Theirs takes the last token that is not the pad token for a row's last one, ours what `lengths` says."""
    pad, lengths = 60, [9, 4, 1]
    tokens = token_ids(0, sum(lengths), high=pad)
    ours = tiny_classifier("sequence", family, dtype=torch.float32, pad_token_id=pad)
    ml.save_model(ours, tmp_path)
    rows = padded(tokens, lengths, extra=2)
    mask = torch.arange(11) < torch.tensor(lengths).unsqueeze(1)
    rows[~mask] = pad
    with torch.no_grad():
        theirs = AUTO["sequence"].from_pretrained(tmp_path)(input_ids=rows, attention_mask=mask.long()).logits
        assert_parity(ours(rows, lengths), theirs)


@units
def test_theirs_keeps_the_head_of_our_model_in_four_bits_dense(unit, tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    ml.save_model(tiny_classifier(unit, dtype=torch.float32, **sizes), tmp_path / "dense")
    ours = load_classifier(tmp_path / "dense", quantize="nf4")
    ml.save_model(ours, tmp_path / "packed")
    theirs = AUTO[unit].from_pretrained(tmp_path / "packed", dtype=torch.float32, device_map={"": "cpu"})
    assert type(theirs.score) is torch.nn.Linear
    theirs.train()  # while evaluating, some of their kernels round more
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        assert_parity(ours(TOKENS), theirs(input_ids=TOKENS).logits)


configs = pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("phi3", {"target_modules": ["qkv_proj"], "use_rslora": True}),
    ],
)


@configs
@units
def test_peft_puts_our_adapter_and_head_on_a_language_model_to_the_same_scores(unit, family, config, tmp_path):
    ml.save_model(tiny_model(family, dtype=torch.float32), tmp_path / "base")
    ours = load_classifier(tmp_path / "base", unit, LABELS)
    ml.attach(ours, ml.LoraConfig(r=3, lora_alpha=7, task_type=TASKS[unit], **config))
    perturb_(ours)
    ml.save_adapter(ours, tmp_path / "adapter")
    base = AUTO[unit].from_pretrained(tmp_path / "base", num_labels=len(LABELS))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert theirs.active_peft_config.task_type == TASKS[unit]
    with torch.no_grad():
        assert_parity(ours(TOKENS), theirs(input_ids=TOKENS).logits)
        ml.merge(ours)
        ml.save_model(ours, tmp_path / "merged")
        assert_parity(ours(TOKENS), AUTO[unit].from_pretrained(tmp_path / "merged")(input_ids=TOKENS).logits)


@configs
@units
def test_ours_puts_their_adapter_and_head_on_a_language_model_to_the_same_scores(unit, family, config, tmp_path):
    ml.save_model(tiny_model(family, dtype=torch.float32), tmp_path / "base")
    base = AUTO[unit].from_pretrained(tmp_path / "base", num_labels=3)
    skipped = ["score"]  # or "all-linear" of PEFT would take in the head of a token classifier, and fail
    config = peft.LoraConfig(r=3, lora_alpha=7, task_type=TASKS[unit], exclude_modules=skipped, **config)
    theirs = peft.get_peft_model(base, config).eval()
    perturb_(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    labels = ("LABEL_0", "LABEL_1", "LABEL_2")
    assert classes_of(tmp_path / "adapter") == (unit, labels)
    ours = load_classifier(tmp_path / "base", unit, labels)
    ml.load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        assert_parity(ours(TOKENS), theirs(input_ids=TOKENS).logits)
