"""The tests of the laws can fail: each is run against a copy of minilora with one mistake planted in it."""

import pytest

from tests.planting import Copy

FORWARD = "test_layers.py::test_forward_is_the_merged_weight_applied"
MISTAKES = {  # file, what it says, the mistake in its place, and the test that must notice
    "law 1: the update is not scaled": (
        "kernels/lora.py",
        "lora_A.to(x.dtype)).mul_(scale)",
        "lora_A.to(x.dtype))",
        f"{FORWARD}[linear-kernels]",
    ),
    "law 1: a norm is that of columns": (
        "lora.py",
        "(weight.to(wide) + delta).norm(dim=1)",
        "(weight.to(wide) + delta).norm(dim=0)",
        "test_lora.py::test_the_norm_is_that_of_the_rows_and_has_no_gradient",
    ),
    "law 2: B does not start at 0": (
        "lora.py",
        "B = torch.zeros(out, r, dtype=torch.float32)",
        "B = torch.full((out, r), 1e-3, dtype=torch.float32)",
        "test_attach.py::test_a_new_adapter_leaves_the_logits_bit_equal",
    ),
    "law 3: the base is trained too": (
        "adapter.py",
        "    model.requires_grad_(False)",
        "    [p.requires_grad_(p.dim() == 1) for p in model.parameters()]",
        "test_loop.py::test_training_leaves_every_bit_of_the_base_and_changes_every_tensor_of_the_adapter",
    ),
    "law 4: ranks of A are concatenated in another order than those of B": (
        "adapters/weighted.py",
        "torch.cat([part.lora_A.to(widest(part.lora_A)) for part in parts])",
        "torch.cat([part.lora_A.to(widest(part.lora_A)) for part in reversed(parts)])",
        "test_weighted.py::test_adapters_add_by_concatenating_ranks",
    ),
    "law 5: the gradient of A lacks the scale": (
        "kernels/lora.py",
        "h = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scale)",
        "h = dy @ lora_B.to(dy.dtype)",
        "test_layers.py::test_gradients_are_those_of_the_merged_weight_applied[linear-kernels]",
    ),
    "law 6: of two levels as near the higher one": (
        "kernels/nf4.py",
        "(x > within.gather",
        "(x >= within.gather",
        "test_nf4_laws.py::test_ours_keeps_the_laws_of_nf4[nf4-ties-kernels]",
    ),
    "law 7: the JSON of a packed weight says another dtype of its scales": (
        "models/bitsandbytes.py",
        '"nested_dtype": "float32"',
        '"nested_dtype": "bfloat16"',
        "test_quant_files.py::test_the_tensors_of_a_packed_weight_are_those_of_bitsandbytes",
    ),
    "law 8: a row's last token predicts the next row": (
        "data.py",
        "labels[1:], IGNORE_INDEX]",
        "labels[1:], examples[0].tokens[0]]",
        "test_loop.py::test_any_micro_batches_give_the_gradient_of_the_mean_over_labelled_tokens",
    ),
    "law 9: documents see each other": (
        "llama.py",
        "causal_attention(q, k, v, self.lengths, self.lengths, window)",
        "causal_attention(q, k, v, [len(q)], [len(q)], window)",
        "test_llama.py::test_documents_beside_each_other_do_not_see_each_other",
    ),
    "law 10: an adapter of twice the rank acts by half": (
        "adapters/files.py",
        '"lora_alpha": growth * config.lora_alpha',
        '"lora_alpha": config.lora_alpha',
        "test_files.py::test_all_that_a_config_can_ask_for_loads_equal_and_saves_the_same_bytes[PiSSA]",
    ),
    "law 11: a resumed run forgets the best adapter": (
        "runs/loop.py",
        "return state, best, damaged",
        "return state, {}, damaged",
        "test_select.py::test_a_run_resumed_after_any_step_keeps_the_same_adapter",
    ),
}


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    copy = Copy(tmp_path_factory.mktemp("planted"))
    yield copy
    copy.close()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_noticed(name, copy):
    file, right, wrong, test = MISTAKES[name]
    source = (copy.folder / "minilora" / file).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{file} does not say {right!r} once"
    assert copy.run(file, source.replace(right, wrong), [test]) == 1, copy.output  # 1: tests ran, and one failed


def test_without_a_mistake_the_same_test_passes(copy):
    file, _, _, test = MISTAKES["law 1: the update is not scaled"]
    source = (copy.folder / "minilora" / file).read_text(encoding="utf-8")
    assert copy.run(file, source, [test]) == 0, copy.output
