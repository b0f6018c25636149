"""The plain form of an adapter changes nothing and asks nothing of its reader; what has none is refused by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minilora as ml
from minilora.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_layers
from minilora.adapters.layout import base_quantization
from minilora.cli import main
from minilora.cli.export import export_adapter
from minilora.files import read_json
from minilora.testing.compare import assert_parity
from tests.files import edit, saved
from tests.models import WHOLE, examples, scales, seeds, tiny_model
from tests.runs import everything

MORE = [{}, {"use_rslora": True}, {"rank_pattern": {"o_proj": 5, "down_proj": 2}}, {"alpha_pattern": {"up_proj": 0.7}}]
TARGETS = ["all-linear", ("o_proj", "down_proj", "up_proj", "embed_tokens")]


def exported(directory, **config):
    """A model whose adapter is in `first` and its plain form in `plain`; the rank of that."""
    model = saved(directory / "first", **config)
    return model, export_adapter(directory / "first", directory / "plain")


def factors(directory):
    """A and B of each module, by the names in the file."""
    tensors = load_file(directory / WEIGHTS_FILE)
    return {
        name: (A, tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")])
        for name, A in tensors.items()
        if "lora_A" in name or "embedding_A" in name
    }


@examples(0.5)
@given(st.lists(st.sampled_from(MORE), max_size=4), st.sampled_from(TARGETS), scales, seeds)
def test_the_change_is_the_same_but_for_one_rounding_of_each_number_of_b(tmp_path_factory, more, targets, scale, seed):
    directory = tmp_path_factory.mktemp("adapters")
    config = {key: value for each in more for key, value in each.items()}
    model, rank = exported(directory, seed=seed, target_modules=targets, lora_alpha=3.1 * scale, **config)
    found, before = factors(directory / "plain"), factors(directory / "first")
    assert found.keys() == before.keys()
    for name, (A, B) in found.items():
        old_A, old_B = before[name]
        where = name.removeprefix("base_model.model.").partition(".lora_")[0]
        s = adapter_layers(model)[where].adapters["default"].scale
        r = len(old_A)
        assert (A.size(0), B.size(1)) == (rank, rank)
        assert torch.equal(A[:r], old_A)
        assert not A[r:].any()
        assert not B[:, r:].any()
        exact = s * old_B.double()
        bound = 2.0**-24 * abs(s) * (old_B.double().abs() @ old_A.double().abs())
        assert ((B[:, :r].double() - exact).abs() <= 2.0**-24 * exact.abs()).all()
        error = B.double() @ A.double() - exact @ old_A.double()
        assert (error.abs() <= 1.001 * bound).all()  # float64 rounds the sums too


@pytest.mark.parametrize("more", MORE)
def test_the_config_is_what_every_reader_takes_for_scale_one(tmp_path, more):
    saved(tmp_path / "first", lora_dropout=0.25, **more)
    edit(tmp_path / "first", base_model_name_or_path="some/base", invented_tomorrow=None, init_lora_weights="gaussian")
    rank = export_adapter(tmp_path / "first", tmp_path / "plain")
    changed = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    before = read_json(tmp_path / "first" / CONFIG_FILE)
    assert read_json(tmp_path / "plain" / CONFIG_FILE) == before | changed | {"init_lora_weights": True}
    assert rank == max(len(A) for A, _ in factors(tmp_path / "first").values())


def test_the_plain_form_of_a_plain_adapter_is_the_same_bytes(tmp_path):
    exported(tmp_path, use_rslora=True, rank_pattern={"o_proj": 5})
    assert base_quantization(tmp_path / "plain") == base_quantization(tmp_path / "first") == {"quantize": "none"}
    export_adapter(tmp_path / "plain", tmp_path / "again")
    assert everything(tmp_path / "plain") == everything(tmp_path / "again")


NOT_PLAIN = {  # and the end of a name in the file
    "use_dora": (True, "lora_magnitude_vector"),
    "bias": ("lora_only", r"base_layer\.bias"),
    "lora_bias": (True, r"lora_B\.bias"),
    "modules_to_save": (("lm_head",), r"lm_head\.weight"),
    "trainable_token_indices": ((3, 5), "trainable_tokens_delta"),
}


@pytest.mark.parametrize("field", NOT_PLAIN)
@pytest.mark.parametrize("is_said", [True, False])
def test_what_no_a_and_b_can_say_is_refused_by_name_with_the_way_out(tmp_path, field, is_said):
    """Also where the config keeps silent about what the tensors hold."""
    value, end = NOT_PLAIN[field]
    model = tiny_model(WHOLE, dtype=torch.float32)
    ml.attach(model, ml.LoraConfig(r=2, target_modules=("q_proj",), **{field: value}))
    ml.save_adapter(model, tmp_path / "first")
    if not is_said:
        edit(tmp_path / "first", **{field: None})
    with pytest.raises(ml.ConfigError, match=rf"no plain form; use `minilora merge`(.|\n)*{end}"):
        export_adapter(tmp_path / "first", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_start_that_lies_in_the_base_is_refused_unless_it_is_converted(tmp_path):
    model, _ = exported(tmp_path, init_lora_weights="pissa", target_modules=("q_proj",))
    again = tiny_model(dtype=torch.float32)
    ml.load_adapter(again, tmp_path / "plain")  # saving has made it plain
    ids = torch.arange(9)[None]
    assert_parity(again(ids), model(ids))
    edit(tmp_path / "first", init_lora_weights="pissa")
    with pytest.raises(ml.ConfigError, match="pissa"):
        export_adapter(tmp_path / "first", tmp_path / "other")


def test_the_command_writes_it_and_never_over_files(tmp_path, capsys):
    saved(tmp_path / "first", use_rslora=True)
    words = ["export", "--adapter", str(tmp_path / "first"), "--out", str(tmp_path / "plain")]
    assert main(words) == 0
    assert "rank 3" in capsys.readouterr().out
    assert main(words) == 1
    assert "holds files" in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("more", [*MORE, {"target_modules": ("q_proj", "embed_tokens"), "use_rslora": True}])
def test_peft_computes_the_same_with_the_plain_form(tmp_path, more):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ml.save_model(tiny_model(dtype=torch.float32), tmp_path / "base")
    ours, _ = exported(tmp_path, **more)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "plain")
    ids = torch.arange(9)[None]
    assert_parity(theirs(ids).logits, ours(ids))
