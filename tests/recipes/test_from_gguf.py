"""Files that llama.cpp's converter wrote (`tests/golden/make_gguf.py`) become the models that they were made of."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import minilora as ml
from tests.golden.make_gguf import DIRECTORY, MODELS, model_of
from tests.models import token_ids

pytestmark = pytest.mark.parity  # the package gguf
gguf = pytest.importorskip("gguf")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def convert(monkeypatch, tmp_path):
    def run(file):
        monkeypatch.setattr(sys, "argv", ["from_gguf.py", str(file), str(tmp_path / "model")])
        monkeypatch.syspath_prepend(RECIPES)
        runpy.run_path(str(RECIPES / "from_gguf.py"), run_name="__main__")
        return tmp_path / "model"

    return run


def rewritten(path, keys=(), tensors=(), architecture="qwen3"):
    """The file of Qwen 3 with other keys and more tensors."""
    reader = gguf.GGUFReader(DIRECTORY / "qwen3.gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *dict(keys)):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, text in dict(keys).items():
        writer.add_string(name, text)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in dict(tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_file_becomes_the_model_that_it_was_made_of(convert, name):
    model = model_of(name)
    directory = convert(DIRECTORY / f"{name}.gguf")
    back = ml.load_model(directory, dtype=torch.bfloat16)
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.state_dict().items())
    saved = directory.parent / "saved"
    ml.save_model(model, saved)
    found, expected = (json.loads((path / "config.json").read_text()) for path in (directory, saved))
    assert found["architectures"] == expected["architectures"]
    assert found["eos_token_id"] == ml.load_tokenizer(directory).eos_id is not None
    ids = token_ids(0, 2, 30)
    with torch.no_grad():
        assert torch.equal(back(ids), model(ids))


def test_what_is_not_known_is_refused_by_name_and_nothing_is_written(convert, tmp_path):
    file = tmp_path / "model.gguf"
    for named, changes in {
        "'mamba'": {"architecture": "mamba"},
        "rope.scaling.type": {"keys": {"qwen3.rope.scaling.type": "yarn"}},
        "blk.0.ssm_a.weight": {"tensors": {"blk.0.ssm_a.weight": np.ones(24, np.float32)}},
        "rope_freqs": {"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 4, 5], np.float32)}},
    }.items():
        with pytest.raises(ml.FormatError, match=named):
            convert(rewritten(file, **changes))
        assert not (tmp_path / "model").exists()
    with pytest.raises(ml.FormatError, match=r"pre 'falcon'.*qwen2"):
        convert(rewritten(file, {"tokenizer.ggml.pre": "falcon"}))
