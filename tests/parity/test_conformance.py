"""The conformance kit in PEFT and transformers: its logits in float64, what they read of it, what they write."""

import json
import re

import numpy as np
import pytest
import torch

from conformance import run
from conformance.readers.exported import exported
from conformance.readers.numpy_reader import dense, read_case, read_tensors, text_name
from minilora.testing.compare import MATHS
from tests.parity.test_models import without_float32
from tests.test_conformance import CASES, DTYPES, LOGITS, column, every, readings

transformers = pytest.importorskip("transformers")
peft_reader = pytest.importorskip("conformance.readers.peft_reader")
pytestmark = pytest.mark.parity
WRAPPED = "wrapper"


def adapters_of(name):
    return [run.HERE / path for path in CASES[name]["adapters"]]


def base_in_float64(name):
    """transformers' model of a base, with dense weights, whose tables are in float64 as well."""
    case = read_case(run.HERE / CASES[name]["base"], [])
    config = transformers.AutoConfig.for_model(
        **{key: value for key, value in case.config.items() if key not in ("quantization_config", "dtype")}
    )
    model = without_float32(transformers.AutoModelForCausalLM.from_config, config).double()
    state = {key: torch.from_numpy(tensor.astype(np.float64)) for key, tensor in dense(case.tensors).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


def without_wrapper(adapter, directory):
    """The adapter with the names of the text model, in the tensors and in alpha_pattern."""
    from safetensors.numpy import save_file

    tensors = read_tensors(adapter / "adapter_model.safetensors")
    save_file(
        {f"base_model.model.{text_name(key)}": tensor for key, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
        {"format": "pt"},
    )
    values = (adapter / "adapter_config.json").read_bytes()
    (directory / "adapter_config.json").write_bytes(values.replace(b"language_model.", b""))
    return directory


@every
@torch.no_grad()
def test_expected_logits_are_those_of_peft_and_transformers_in_float64(name, tmp_path):
    adapters = [without_wrapper(*adapters_of(name), tmp_path)] if name == WRAPPED else adapters_of(name)
    model = peft_reader.adapt(base_in_float64(name), adapters)
    found = without_float32(model, input_ids=torch.tensor([CASES[name]["tokens"]])).logits[0].numpy()
    expected = LOGITS[name]  # rounded to multiples of 2⁻³⁰
    assert abs(found - expected).max() <= 2.0**-31 + MATHS * abs(expected).max()


@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_peft_reads_the_kit_as_the_page_says(name, dtype, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    found = peft_reader.logits(run.HERE / CASES[name]["base"], CASES[name]["tokens"], adapters_of(name), dtype)
    assert run.judge(found, readings(name), CASES[name]["tolerance"][dtype])[0] == column("PEFT")[name]


@every
def test_mlx_reads_what_is_exported_of_the_kit_as_the_page_says(name, tmp_path):
    mlx_reader = pytest.importorskip("conformance.readers.mlx_reader")
    base, tokens = run.HERE / CASES[name]["base"], CASES[name]["tokens"]
    try:
        adapters = exported(base, adapters_of(name), "mlx-lm", tmp_path / "adapter")
        found = mlx_reader.logits(base, tokens, adapters)
    except (SystemExit, ValueError):
        verdict = "refused"
    else:
        verdict = run.judge(found.astype(np.float64), readings(name), CASES[name]["tolerance"]["float32"])[0]
    page = (run.HERE.parent / "docs" / "readers.md").read_text(encoding="utf-8")
    refused = re.search(r"mlx-lm, exported, reads every case right except these,(.*?)\n\n", page, re.DOTALL)[1]
    assert verdict == ("refused" if f"`{name}`" in refused else "right")
    if CASES[name]["adapters"]:
        with pytest.raises((AttributeError, ValueError)):  # PEFT's layout, or a base in four bits
            mlx_reader.logits(base, tokens, adapters_of(name))


@pytest.mark.parametrize("name", [name for name in CASES if len(CASES[name]["adapters"]) == 1 and name != WRAPPED])
def test_the_tensors_of_an_adapter_are_those_that_peft_writes(name, tmp_path):
    (adapter,) = adapters_of(name)
    peft_reader.adapt(base_in_float64(name).float(), [adapter]).save_pretrained(tmp_path)
    (written,) = tmp_path.rglob("adapter_model.safetensors")
    theirs, ours = read_tensors(written), read_tensors(adapter / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[key], ours[key].astype(np.float32)) for key in ours)
    config = json.loads((written.parent / "adapter_config.json").read_bytes())
    values = json.loads((adapter / "adapter_config.json").read_bytes())
    different = {key for key in values if config[key] != values[key]}
    assert different <= {"target_modules"}  # a set, in any order
    assert sorted(config["target_modules"]) == sorted(values["target_modules"])
