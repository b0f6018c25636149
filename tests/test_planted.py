"""The tests of the laws can fail: each is run against a copy of minilora with one mistake planted in it."""

from typing import NamedTuple

import pytest

from tests.planting import Copy


class Mistake(NamedTuple):
    file: str
    right: str
    wrong: str
    test: str  # the test that must notice, as pytest names it


NORM = "test_lora.py::test_the_norm_is_that_of_the_rows_and_has_no_gradient"
NF4 = "test_nf4_laws.py::test_ours_keeps_the_laws_of_nf4"
EQUAL = "test_kernels.py::test_values_and_gradients_equal_the_definition_s_whatever_is_trained"
KEPT = "test_kernels.py::test_of_the_results_only_what_is_counted_is_kept_for_the_backward_pass"
FORWARD = "test_layers.py::test_forward_is_the_merged_weight_applied"
GRADIENTS = "test_layers.py::test_gradients_are_those_of_the_merged_weight_applied"
OF_DORA = "test_lora.py::test_gradients_of_dora_equal_the_loops_with_the_norm_held_fixed"
MISTAKES = {  # those named after a law run by default, the others in the long form
    "law 1: the update is not scaled": Mistake(
        "kernels/lora.py", "lora_A.to(x.dtype)).mul_(scale)", "lora_A.to(x.dtype))", f"{FORWARD}[linear-kernels]"
    ),
    "law 1: the update is not scaled, by definition": Mistake(
        "lora.py", "F.linear(scale * F.linear(x, A), B)", "F.linear(F.linear(x, A), B)", f"{FORWARD}[linear-plain]"
    ),
    "law 5: no gradient reaches A, by definition": Mistake(
        "lora.py", "A, B = lora_A.to(x.dtype)", "A, B = lora_A.detach().to(x.dtype)", f"{GRADIENTS}[linear-plain]"
    ),
    "law 1: a norm is that of columns": Mistake(
        "lora.py", "(weight.to(wide) + delta).norm(dim=1)", "(weight.to(wide) + delta).norm(dim=0)", NORM
    ),
    "law 1: a norm has a gradient": Mistake(
        "kernels/lora.py",
        "with torch.no_grad(), no_autocast",
        "with torch.enable_grad(), no_autocast",
        f"{OF_DORA}[kernels]",
    ),
    "law 2: B does not start at 0": Mistake(
        "lora.py",
        "B = torch.zeros(outer, r, dtype=torch.float32)",
        "B = torch.full((outer, r), 1e-3, dtype=torch.float32)",
        "test_attach.py::test_a_new_adapter_leaves_the_logits_bit_equal",
    ),
    "law 3: the base is trained too": Mistake(
        "adapter.py",
        "    model.requires_grad_(False)",
        "    [p.requires_grad_(p.dim() == 1) for p in model.parameters()]",
        "test_loop.py::test_training_leaves_every_bit_of_the_base_and_changes_every_tensor_of_the_adapter",
    ),
    "law 4: ranks of A are concatenated in another order than those of B": Mistake(
        "adapters/weighted.py",
        "torch.cat([part.lora_A.to(widest(part.lora_A)) for part in parts])",
        "torch.cat([part.lora_A.to(widest(part.lora_A)) for part in reversed(parts)])",
        "test_weighted.py::test_adapters_add_by_concatenating_ranks",
    ),
    "law 5: the gradient of A lacks the scale": Mistake(
        "kernels/lora.py",
        "h = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scale)",
        "h = dy @ lora_B.to(dy.dtype)",
        f"{GRADIENTS}[linear-kernels]",
    ),
    "a dense weight is kept for the backward pass": Mistake(
        "kernels/nf4.py",
        "ctx.save_for_backward(*parts)",
        "ctx.save_for_backward(*parts), ctx.save_for_backward(*parts, inputs[1])",
        f"{KEPT}[torch.float64-nf4_linear]",
    ),
    "law 6: of two levels as near the higher one": Mistake(
        "kernels/nf4.py",
        "(x > torch.index_select(within",
        "(x >= torch.index_select(within",
        f"{NF4}[nf4-ties-kernels]",
    ),
    "law 6: of two levels as near the higher one, by definition": Mistake(
        "nf4.py", "out_int32=True", "out_int32=True, right=True", f"{NF4}[nf4-ties-plain]"
    ),
    "law 7: the JSON of a packed weight says another dtype of its scales": Mistake(
        "models/bitsandbytes.py",
        '"nested_dtype": "float32"',
        '"nested_dtype": "bfloat16"',
        "test_quant_files.py::test_names_bytes_statistics_and_json_of_a_packed_weight_are_those_of_bitsandbytes",
    ),
    "law 8: a mean of means": Mistake(
        "training.py",
        "part, number = loss(model, batch)",
        "part, number = loss(model, batch)\n        part, number = part / number, 1",
        "test_loop.py::test_any_micro_batches_give_the_gradient_of_the_mean_over_labelled_tokens",
    ),
    "law 8: a row's last token predicts the next row": Mistake(
        "data.py",
        "labels[1:], IGNORE_INDEX]",
        "labels[1:], examples[0].tokens[0]]",
        "test_loop.py::test_any_micro_batches_give_the_gradient_of_the_mean_over_labelled_tokens",
    ),
    "law 9: documents see each other": Mistake(
        "llama.py",
        "causal_attention(q, k, v, self.lengths, self.lengths, window)",
        "causal_attention(q, k, v, [len(q)], [len(q)], window)",
        "test_llama.py::test_documents_beside_each_other_do_not_see_each_other",
    ),
    "law 9: the cache forgets where it was": Mistake(
        "models/generate.py",
        "spans = [range(before, before + new) for",
        "spans = [range(new) for",
        "test_llama.py::test_a_cache_changes_no_logits_however_the_documents_are_split",
    ),
    "law 10: an adapter of twice the rank acts by half": Mistake(
        "adapters/files.py",
        '"lora_alpha": growth * config.lora_alpha',
        '"lora_alpha": config.lora_alpha',
        "test_files.py::test_all_that_a_config_can_ask_for_loads_equal_and_saves_the_same_bytes[PiSSA]",
    ),
    "the gradient of the logits lacks the label": Mistake(
        "kernels/llama.py", "p.gather(-1, target) - 1", "p.gather(-1, target)", f"{EQUAL}[cross_entropy]"
    ),
    "levels are copied to the device in each call": Mistake(
        "definition.py",
        "return _copy(table, device) if has_numbers else",
        "return",
        "test_device.py::test_a_step_waits_once_and_copies_at_most_eight_tensors[QLoRA]",
    ),
    "the learning rate begins at 0": Mistake(
        "training.py",
        "peak * (step + 1) / warmup",
        "peak * step / warmup",
        "test_loop.py::test_the_learning_rate_rises_linearly_and_falls_as_its_scheduler_says",
    ),
    "law 11: a resumed run forgets the best adapter": Mistake(
        "runs/loop.py",
        "return state, best, damaged",
        "return state, {}, damaged",
        "test_select.py::test_a_run_resumed_after_any_step_keeps_the_same_adapter",
    ),
    "control tokens of a row act": Mistake(
        "models/control_tokens.py",
        "return found[0] + QUOTE if is_whole or is_begun else found[0]",
        "return found[0]",
        "test_quote.py::test_only_the_control_tokens_that_the_template_wrote_act",
    ),
    "the prompt is learned": Mistake(
        "runs/encoders.py",
        'begin = 0 if config.train_on == "all" else len(parsed.prompt)',
        "begin = 0",
        "test_data.py::test_exactly_the_tokens_that_touch_the_completion_and_the_closing_one_are_labels",
    ),
}


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    copy = Copy(tmp_path_factory.mktemp("planted"))
    yield copy
    copy.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("law") else pytest.mark.long) for name in MISTAKES]
)
def test_a_planted_mistake_is_noticed(name, copy):
    file, right, wrong, test = MISTAKES[name]
    source = (copy.folder / "minilora" / file).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{file} does not say {right!r} once"
    assert copy.run(file, source.replace(right, wrong), [test]) == 1, copy.output  # 1: tests ran, and one failed


def test_without_a_mistake_the_same_test_passes(copy):
    file, _, _, test = MISTAKES["law 1: the update is not scaled"]
    source = (copy.folder / "minilora" / file).read_text(encoding="utf-8")
    assert copy.run(file, source, [test]) == 0, copy.output
