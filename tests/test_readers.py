"""What `inspect --base` says of adapters, by the table of readers; tests/parity asks the readers."""

import json

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.cli import main
from minilora.testing.compare import assert_maths
from minilora.tools.readers import READERS, RULES, Base, reader_facts
from tests.files import ROOT, edit, save_file, write_adapter, write_base
from tests.readers import CASES, IN_WRAPPER, RIGHT, rename_tensors, write_case, write_wrapper
from tests.readers import READERS as ASKED


def verdicts(adapter, base):
    return {title: facts["verdict"] for title, facts in reader_facts(adapter, Base.read(base)).items()}


@pytest.mark.parametrize("name", CASES)
def test_each_reader_has_its_verdict(name, tmp_path):
    base, adapter = write_case(tmp_path, name)
    assert verdicts(adapter, base) == dict(zip(ASKED, CASES[name].verdicts, strict=True))


@pytest.mark.parametrize("name", IN_WRAPPER)
def test_in_a_wrapper_names_decide(name, tmp_path):
    base = write_wrapper(tmp_path)
    adapter = write_adapter(ml.load_model(base), tmp_path / "adapter", r=3)
    rename_tensors(adapter, *CASES[name].rename)
    assert verdicts(adapter, base) == dict(zip(READERS, IN_WRAPPER[name], strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].verdicts[0] != RIGHT or "A" in name])
def test_minilora_does_what_is_said_of_it(name, tmp_path):
    base, adapter = write_case(tmp_path, name)
    model, ids = ml.load_model(base), torch.tensor([[3, 1, 4, 1, 5]])
    before = model(ids)
    try:
        ml.load_adapter(model, adapter)
    except ml.MiniloraError:
        assert CASES[name].verdicts[0] == "refuses it"
    else:
        assert torch.equal(model(ids), before) == (name == "zero")
        facts = reader_facts(adapter, Base.read(base))["minilora"]
        scales = {path: layer.adapters["default"].scale for path, layer in adapter_layers(model).items()}
        assert all(facts["scales"][path] == (scale, scale) for path, scale in scales.items() if path in facts["scales"])


def test_the_scale_of_a_reader_that_ignores_a_setting_is_beside_that_of_the_training(tmp_path):
    config = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 1},
        "alpha_pattern": {"k_proj": 2},
    }
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    adapter = write_adapter(
        ml.load_model(base), tmp_path / "adapter", target_modules=["q_proj", "k_proj", "v_proj"], **config
    )
    expected = {"q_proj": (4, 4, 2), "k_proj": (1, 4, 2), "v_proj": (8, 4, 8)}  # trained, vLLM, llama.cpp
    facts = reader_facts(adapter, Base.read(base))
    for end, (trained, vllm, cpp) in expected.items():
        path = f"model.layers.0.self_attn.{end}"
        assert facts["peft"]["scales"][path] == (trained, trained)
        assert facts["vllm"]["scales"][path] == (trained, vllm)
        assert facts["llama.cpp"]["scales"][path] == (trained, cpp)


def test_a_rank_that_is_too_large_and_a_shape_that_does_not_fit_are_refused(tmp_path):
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    large = write_adapter(ml.load_model(base), tmp_path / "large", r=513, target_modules=["q_proj"])
    assert verdicts(large, base) == {title: "refuses it" if title == "vllm" else RIGHT for title in ASKED}
    other = write_base(tmp_path / "other", num_hidden_layers=1, hidden_size=16)
    facts = reader_facts(large, Base.read(other))
    assert {found["verdict"] for found in facts.values()} == {"refuses it"}


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"alora_invocation_tokens": [1, 2]}])
def test_a_setting_that_changes_what_is_computed_is_lost_where_it_is_not_read(changes, tmp_path):
    base, adapter = write_case(tmp_path, "plain")
    edit(adapter, **changes)
    own = RIGHT if "init_lora_weights" in changes else "refuses it"
    assert list(verdicts(adapter, base).values()) == [own, RIGHT, "loses a part", "refuses it", "loses a part"]


def test_the_status_is_that_of_the_reader_who_is_meant_and_the_page_names_what_is_lost(tmp_path, capsys):
    base, adapter = write_case(tmp_path, "rsLoRA")
    words = ["inspect", str(adapter), "--base", str(base)]
    assert main([*words, "--for", "vllm"]) == 0
    assert "acts as trained (untried)" in capsys.readouterr().out
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "7 for 12.12  takes another scale" in shown
    assert "by `minilora export --for mlx-lm`" in shown
    base, adapter = write_case(tmp_path / "renamed", "_orig_mod")
    assert main(["inspect", str(adapter), "--base", str(base), "--for", "peft"]) == 1
    shown = capsys.readouterr().out
    assert "nothing attaches" in shown
    why = "the model has no such module, but model.layers.*.mlp.down_proj (peft ignores)"
    assert f"2 x _orig_mod.model.layers.*.mlp.down_proj: {why}\n" in shown
    assert main(["inspect", str(adapter), "--norms"]) == 1
    assert "need --base" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_said_to_be_one(tmp_path, capsys):
    base, adapter = write_case(tmp_path, "plain")
    words = ["inspect", str(adapter), "--base", str(base), "--for", "peft"]
    edit(adapter, base_model_name_or_path=str(base))
    assert main(words) == 0
    assert capsys.readouterr().err == ""
    edit(adapter, base_model_name_or_path="org/other")
    assert main(words) == 0
    assert f"was trained on the model 'org/other'; this one is '{base}'" in capsys.readouterr().err


def test_tensors_of_odd_shapes_are_refused_everywhere(tmp_path):
    base, adapter = write_case(tmp_path, "plain")
    tensors = load_file(adapter / WEIGHTS_FILE)
    for shape in ((), (3,), (3, 4, 5), (0, 24)):
        save_file({**tensors, max(tensors): torch.ones(shape)}, adapter / WEIGHTS_FILE)
        assert set(verdicts(adapter, base).values()) == {"refuses it"}


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_norms_are_those_of_the_update_and_of_the_weights(quantize, tmp_path, capsys):
    base = write_base(tmp_path / "base", num_hidden_layers=2, quantize=quantize)
    adapter = write_adapter(ml.load_model(base), tmp_path / "adapter", r=3, target_modules=["q_proj", "up_proj"])
    words = ["inspect", str(adapter), "--base", str(base), "--norms", "--for", "peft"]
    assert main([*words, "--json"]) == 0
    norms = json.loads(capsys.readouterr().out)["norms"]
    model = ml.load_model(base)
    weights = {path: model.get_submodule(path).weight.detach().double() for path in norms}
    ml.load_adapter(model, adapter)
    for path, layer in adapter_layers(model).items():
        own = layer.adapters["default"]
        update = (own.scale * own.lora_B.double() @ own.lora_A.double()).norm()
        assert_maths(torch.tensor(norms[path]["update"], dtype=torch.float64), update.detach())
        assert norms[path]["weight"] == pytest.approx(weights[path].norm().item())
    assert main(words) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        *("layer", "model.layers.0", "model.layers.1")
    ]


def test_a_tied_head_has_the_norm_of_the_embedding(tmp_path, capsys):
    base = write_base(tmp_path / "base", num_hidden_layers=1, tie_word_embeddings=True)
    adapter = write_adapter(ml.load_model(base), tmp_path / "adapter", target_modules=["lm_head"])
    main(["inspect", str(adapter), "--base", str(base), "--norms", "--json"])
    norms = json.loads(capsys.readouterr().out)["norms"]
    assert norms["lm_head"]["weight"] == pytest.approx(ml.load_model(base).model.embed_tokens.weight.norm().item())


def test_no_weight_of_the_base_is_read_without_norms(tmp_path, monkeypatch):
    base, adapter = write_case(tmp_path, "plain")
    file = base / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as opened:  # numbers that would be seen
        opened.seek(8 + header)
        opened.write(b"\xff" * (file.stat().st_size - 8 - header))
    assert set(verdicts(adapter, base).values()) == {RIGHT}


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for row, cells in RULES.items():
        assert f"| {row} | {' | '.join(cells)} |\n" in page
    for reader in READERS.values():
        assert reader.source in page


def test_a_reader_of_wrappers_is_asked_about_any_model_if_it_is_named(tmp_path):
    base, adapter = write_case(tmp_path, "plain")
    assert [*reader_facts(adapter, Base.read(base), "peft-wrapper")] == ["peft-wrapper"]
    options = ["--adapter", str(adapter), "--model", str(base), "--for", "peft-wrapper"]
    assert main(["export", *options, "--out", str(tmp_path / "out")]) == 0


def test_half_of_an_update_and_factors_of_two_ranks_do_not_act_as_trained(tmp_path):
    base, adapter = write_case(tmp_path, "plain")
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({name: t for name, t in tensors.items() if "lora_A" in name}, adapter / WEIGHTS_FILE)
    assert set(verdicts(adapter, base).values()) == {"refuses it", "does nothing: B A is zero"}
    save_file({name: t[:2] if "lora_A" in name else t for name, t in tensors.items()}, adapter / WEIGHTS_FILE)
    assert set(verdicts(adapter, base).values()) == {"refuses it"}
    with pytest.raises(ml.FormatError, match=rf"{WEIGHTS_FILE}: model.layers.0.mlp.down_proj has .* of two ranks"):
        ml.load_adapter(ml.load_model(base), adapter)
    assert main(["inspect", str(adapter), "--base", str(base), "--norms"]) == 1
    assert main(["inspect", str(adapter)]) == 0
    assert main(["inspect", str(adapter), "--base", ""]) == 1
