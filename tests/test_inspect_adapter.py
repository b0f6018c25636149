"""`inspect` of adapters: each number is that of another algorithm, problems and features are those that show."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from safetensors.torch import load_file

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.layout import WEIGHTS_FILE, read_adapter
from minilora.testing.compare import assert_maths, assert_parity
from minilora.tools.inspect import adapter_facts, update_norm
from tests.files import edit, save_file, saved
from tests.models import randn, scales, seeds, sizes


def assert_number(found, expected, check=assert_maths):
    check(torch.tensor(found, dtype=torch.float64), torch.tensor(float(expected), dtype=torch.float64))


# --- norms ---


@given(sizes, sizes, sizes, scales, seeds)
@example(1, 5, 9, 2.0, 0)
@example(9, 2, 3, -7.0, 0)
def test_the_norm_of_an_update_is_that_of_the_dense_product(r, n_in, n_out, scale, seed):
    lora_A, lora_B = randn(seed, r, n_in), randn(seed + 1, n_out, r)
    dense = np.linalg.norm(scale * lora_B.numpy() @ lora_A.numpy())
    assert_number(update_norm(lora_A, lora_B, scale), dense)


def test_an_update_that_nearly_cancels_keeps_its_digits():
    """B = [b, b + 1e-9·e] and A = [a; -a] give -1e-9·e aᵀ: the products of Gram matrices would give noise."""
    a, b, e = randn(0, 1, 50), randn(1, 40, 1), randn(2, 40, 1)
    exact = 1e-9 * np.linalg.norm(a.numpy()) * np.linalg.norm(e.numpy())
    found = update_norm(torch.cat([a, -a]), torch.cat([b, b + 1e-9 * e], 1), 1.0)
    assert_number(found, exact, assert_parity)


PATTERNS = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 7}, "use_rslora": True}
ENDS = {"target_modules": ("lm_head", "embed_tokens")}


@pytest.mark.parametrize("config", [PATTERNS, ENDS, {"use_dora": True}])
def test_each_module_has_its_rank_its_scale_and_the_norm_of_its_update(tmp_path, config):
    layers = adapter_layers(saved(tmp_path, **config))
    found = {each["module"]: each for each in adapter_facts(tmp_path)["modules"]}
    assert list(found) == sorted(layers)
    for module, facts in found.items():
        adapter = layers[module].adapters["default"]
        A, B = (each.detach().double().numpy() for each in (adapter.lora_A, adapter.lora_B))
        assert (facts["scale"], facts["rank"]) == (adapter.scale, len(A))
        assert_number(facts["norm"], np.linalg.norm(adapter.scale * B @ A))


# --- problems ---


def spoil(directory, change):
    """Save an adapter with something changed: its config, or its tensors."""
    saved(directory)
    if isinstance(change, dict):
        edit(directory, **change)
    else:
        save_file(change(load_file(directory / WEIGHTS_FILE)), directory / WEIGHTS_FILE)


def with_last(change):
    """A change of the last tensor: its name and itself to what stands in its place."""
    return lambda tensors: {**dict(sorted(tensors.items())[:-1]), **change(*max(tensors.items()))}


CHANGES = {  # and whether they can be seen without the base
    "nothing": ({}, False),
    "DoRA": ({"use_dora": True}, False),
    "another size": (with_last(lambda name, t: {name: t[:5]}), False),
    "a wild pattern": ({"alpha_pattern": {r"([a-z0-9_.]+)+!": 3}}, True),
    "target_parameters": ({"target_parameters": ["experts.w"]}, True),
    "use_qalora": ({"use_qalora": True}, True),
    "half a pair": (with_last(lambda name, t: {}), True),
    "not finite": (with_last(lambda name, t: {name: t * torch.nan}), True),
    "a convolution": (with_last(lambda name, t: {name: t[..., None, None]}), True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_problems_are_what_reading_says_and_then_no_norm_is_given(tmp_path, case):
    change, is_seen = CHANGES[case]
    spoil(tmp_path, change)
    facts, refusal = adapter_facts(tmp_path), ""
    assert list(facts["tensors"]) == sorted(load_file(tmp_path / WEIGHTS_FILE))
    try:
        read_adapter(tmp_path).config()
    except ml.MiniloraError as error:
        refusal = str(error)
    assert all(problem in refusal for problem in facts["problems"])
    assert is_seen == bool(refusal) == bool(facts["problems"]) == (not facts["modules"])
