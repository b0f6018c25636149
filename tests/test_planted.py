"""The tests of the laws can fail: each is run against a copy of minilora with one mistake planted in it."""

from typing import NamedTuple

import pytest

from tests.planting import Copy


class Mistake(NamedTuple):
    file: str
    right: str
    wrong: str
    test: str  # the test that must notice, as pytest names it


MISTAKES = {
    "law 1: the branch is not scaled": Mistake(
        "adapters/functional.py",
        "cast_A).to(x.dtype)).mul_(scale)",
        "cast_A).to(x.dtype))",
        "test_bases.py::test_forward_is_the_merged_weight_applied[linear]",
    ),
    "law 1: no gradient reaches A": Mistake(
        "adapters/functional.py",
        "dA = (h.T @ x)",
        "dA = (0 * h.T @ x)",
        "test_bases.py::test_gradients_are_those_of_the_merged_weight_applied[linear]",
    ),
    "law 2: B does not start at 0": Mistake(
        "adapters/initialize.py",
        "torch.zeros(*shape_B) if kind else",
        "torch.full(shape_B, 1e-3) if kind else",
        "test_attach.py::test_a_new_adapter_leaves_the_logits_bit_equal",
    ),
    "law 3: the base is rounded on its way back": Mistake(
        "adapters/attach.py",
        "((layer, layer.base) for layer in reversed(_adapted",
        "((layer, layer.base.float().double()) for layer in reversed(_adapted",
        "test_attach.py::test_attach_then_detach_leaves_every_bit",
    ),
    "law 3: the base is trained too": Mistake(
        "adapters/attach.py",
        "parameter.requires_grad_(False)",
        "parameter.requires_grad_(parameter.dim() == 1)",
        "test_loop.py::test_training_leaves_every_bit_of_the_base_and_changes_every_tensor_of_the_adapter",
    ),
    "law 1: the bias is stretched, too": Mistake(
        "adapters/layers.py",
        "weight, None if is_late else bias, self.active",
        "weight, bias, self.active",
        "test_bases.py::test_forward_is_the_merged_weight_applied[linear]",
    ),
    "law 1: a length is computed in the dtype of the weight": Mistake(
        "adapters/functional.py",
        "torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)",
        "weight.dtype",
        "test_dora.py::test_the_norm_is_taken_in_float32_whatever_the_dtypes_are",
    ),
    "law 1: a length has a gradient": Mistake(
        "adapters/functional.py",
        "with torch.no_grad(), as_is:",
        "with torch.enable_grad(), as_is:",
        "test_dora.py::test_gradients_equal_the_loops_with_the_norm_held_fixed",
    ),
    "law 1: a convolution is not padded as its base is": Mistake(
        "adapters/bases.py",
        "mode=base.padding_mode), 0",
        'mode="replicate"), 0',
        "test_bases.py::test_forward_is_the_merged_weight_applied[conv1d]",
    ),
    "law 1: the experts are the slowest index of B": Mistake(
        "adapters/parameters.py",
        ".unflatten(1, (-1, experts)).permute(2, 0, 1)",
        ".unflatten(1, (experts, -1)).permute(1, 0, 2)",
        "test_parameters.py::test_forward_is_that_of_the_changed_parameters",
    ),
    "law 1: a tied head does not read the trained rows": Mistake(
        "adapters/parts.py",
        "for other in tied_modules(modules, modules[path])",
        "for other in ()",
        "test_tokens.py::test_a_tied_head_makes_its_logits_with_the_same_rows",
    ),
    "law 2: the start is added and not subtracted": Mistake(
        "adapters/layers.py",
        "-self.start_B",
        "self.start_B",
        "test_bases.py::test_a_new_adapter_changes_nothing_and_can_be_trained",
    ),
    "law 3: a module is trained in full in its own place": Mistake(
        "adapters/copies.py",
        "twin(innermost(self.base), tensors)",
        "twin(innermost(self.base), {})",
        "test_attach.py::test_training_leaves_every_bit_of_the_base_which_acts_where_no_adapter_does",
    ),
    "law 10: an adapter of twice the rank acts by half": Mistake(
        "adapters/files.py",
        '"lora_alpha": growth * config.lora_alpha',
        '"lora_alpha": config.lora_alpha',
        "test_files.py::test_all_that_a_config_can_ask_for_loads_equal_and_saves_the_same_bytes",
    ),
    "law 4: only the first adapter acts": Mistake(
        "adapters/layers.py",
        "for name in names:\n            adapter = ",
        "for name in names[:1]:\n            adapter = ",
        "test_layers.py::test_adapters_add_by_concatenating_ranks",
    ),
    "law 5: the gradient of A lacks the scale": Mistake(
        "adapters/functional.py",
        "h = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scale)",
        "h = dy @ lora_B.to(dy.dtype)",
        "test_layers.py::test_gradients_follow_from_that_of_the_weight_and_the_base_gets_none",
    ),
    "law 5: the gradient of x is that of the base alone": Mistake(
        "adapters/functional.py",
        "weight.to(dy.dtype)).addmm_(h, lora_A)",
        "weight.to(dy.dtype))",
        "test_functional.py::test_a_linear_with_its_branch_is_the_sum_of_both_whatever_is_trained",
    ),
    "law 5: the gradient of a trained W lacks the rows' last": Mistake(
        "adapters/functional.py",
        "dW = dy.T @ x if",
        "dW = dy[:-1].T @ x[:-1] if",
        "test_functional.py::test_gradients_are_those_of_small_differences",
    ),
    "law 5: the gradient passes a stretch unstretched": Mistake(
        "adapters/functional.py",
        "torch.mul(part, k, out=out)\n        return dy",
        "out.copy_(part)\n        return dy",
        "test_functional.py::test_gradients_are_those_of_small_differences",
    ),
    "law 5: the gradient of a magnitude is that of the last tile": Mistake(
        "adapters/functional.py",
        "torch.stack(sums).sum(0)",
        "sums[-1]",
        "test_functional.py::test_gradients_are_those_of_small_differences",
    ),
    "law 5: a stretch keeps what others may change": Mistake(
        "adapters/functional.py",
        "ctx.save_for_backward(*inputs)",
        "ctx.save_for_backward(output, inputs[1])",
        "test_functional.py::test_what_comes_next_may_change_a_result_in_place",
    ),
    "law 1: a stretch is rounded before it acts": Mistake(
        "adapters/functional.py",
        "torch.mul(part, k, out=out)\n        return z",
        "torch.mul(part, k.to(part.dtype), out=out)\n        return z",
        "test_functional.py::test_a_stretch_is_rounded_once_and_its_gradients_are_as_good_as_plain_pytorch_s",
    ),
    "law 1: a length is that of W + B A": Mistake(
        "adapters/functional.py",
        "b, lora_A, alpha=scale)",
        "b, lora_A)",
        "test_dora.py::test_the_norm_is_that_of_the_rows_and_has_no_gradient",
    ),
    "law 1: a start is forgotten where A and B were cast before": Mistake(
        "adapters/layers.py",
        "self.cast if self.start_A is None else None",
        "self.cast",
        "test_layers.py::test_what_was_cast_before_acts_as_what_is_cast_here",
    ),
    "the masters are kept beside what they were cast to": Mistake(
        "adapters/functional.py",
        "(lora_A, lora_B) if cast_A is None else (cast_A, cast_B)",
        "(lora_A.clone(), lora_B.clone())",
        "test_functional.py::test_of_a_linear_r_numbers_a_row_are_kept_besides_x_and_of_a_stretch_nothing",
    ),
    "law 5: the gradient passes through another W than x did": Mistake(
        "quant/linear.py",
        "ctx.remake(dy.dtype, *ctx.saved_tensors) if needs_dx",
        "ctx.remake(torch.bfloat16, *ctx.saved_tensors).to(dy.dtype) if needs_dx",
        "test_nf4_linear.py::test_one_weight_acts_both_ways_whatever_the_dtype_that_it_was_stored_in",
    ),
    "a weight that is kept lies where the next one is made": Mistake(
        "quant/linear.py",
        "return unpack(base.parts, base.layout, base.dtype)",
        "return passing_weight(base)",
        "test_nf4_linear.py::test_a_shared_scratch_changes_no_bit_and_is_one_for_all_linears",
    ),
    "law 6: of two levels as near the higher one": Mistake(
        "quant/nf4.py",
        "(x > own.index_select(0, cell))",
        "(x >= own.index_select(0, cell))",
        "test_nf4.py::test_a_quotient_between_two_levels_gets_the_lower_one",
    ),
    "law 6: the absmax of another block": Mistake(
        "quant/nf4.py",
        "mul_(largest.unsqueeze(1))",
        "mul_(largest.roll(1).unsqueeze(1))",
        "test_nf4.py::test_a_weight_is_a_level_times_the_absmax_of_its_block_in_float32_and_rounded_then",
    ),
    "law 7: absmaxes are rounded as on CUDA": Mistake(
        "quant/nf4.py",
        'absmax: Tensor, rounding: Rounding = "cpu"',
        'absmax: Tensor, rounding: Rounding = "cuda"',
        "test_quant_files.py::test_absmaxes_are_rounded_as_bitsandbytes_does_on_the_cpu",
    ),
    "law 7: the JSON of a packed weight says another dtype of its scales": Mistake(
        "models/bitsandbytes.py",
        '"nested_dtype": "float32"',
        '"nested_dtype": "bfloat16"',
        "test_quant_files.py::test_names_bytes_statistics_and_json_of_a_packed_weight_are_those_of_bitsandbytes",
    ),
    "law 7: a weight is rounded to the dtype of the computation before it is quantized": Mistake(
        "models/checkpoint.py",
        "NF4Linear.quantize(file.read(name).to(device), ",
        "NF4Linear.quantize(file.read(name).to(device, target), ",
        "test_quant_files.py::test_what_is_quantized_are_the_numbers_of_the_file_whatever_the_dtype_of_the_computation",
    ),
    "law 8: a mean of means": Mistake(
        "runs/loop.py",
        "total / known if known",
        "total / count / len(batches) if known",
        "test_loop.py::test_8_times_1_and_1_times_8_and_2_times_4_rows_give_the_gradient_of_the_mean_over_labelled_tokens",
    ),
    "law 8: a row's last token predicts the next row": Mistake(
        "runs/batch.py",
        "*[IGNORE_INDEX] * e.shift",
        "*examples[0].tokens[:1] * e.shift",
        "test_loop.py::test_rows_packed_by_any_budget_of_tokens_give_the_same_gradient",
    ),
    "law 9: documents see each other": Mistake(
        "models/llama.py",
        "causal_attention(q, k, v, layout.lengths, layout.lengths, self.window)",
        "causal_attention(q, k, v, [len(q)], [len(q)], self.window)",
        "test_llama.py::test_documents_beside_each_other_do_not_see_each_other",
    ),
    "law 9: the cache forgets where it was": Mistake(
        "models/llama.py",
        "range(first, first + new)",
        "range(new)",
        "test_llama.py::test_a_cache_changes_no_logits_however_the_documents_are_split",
    ),
    "law 9: in a step of many rows the short ones see what lies behind them": Mistake(
        "models/cache.py",
        "hidden = (position < first) | (position >= end)",
        "hidden = position < first",
        "test_cache.py::test_what_lies_beyond_a_document_is_not_looked_at",
    ),
    "law 9: rows that have ended are computed on": Mistake(
        "models/generate.py",
        "feed[row] = documents[row][held:]",
        "feed[row] = documents[row][held:]\n        feed = [a or b[-1:] for a, b in zip(feed, documents)]",
        "test_generate.py::test_a_row_that_has_ended_is_computed_no_more",
    ),
    "law 9: padding is counted": Mistake(
        "models/llama.py",
        "torch.cat([row[:n] for row, n",
        "torch.cat([row[-n:] for row, n",
        "test_llama.py::test_padding_changes_no_logits_and_has_none",
    ),
    "law 9: dropout draws anew when layers are computed again": Mistake(
        "adapters/functional.py",
        ".bernoulli_(1 - p, generator=generator)",
        ".bernoulli_(1 - p)",
        "test_loop.py::test_dropout_draws_the_same_masks_when_layers_are_computed_again",
    ),
    "law 9: the prompts of a batch draw from one generator": Mistake(
        "models/generate.py",
        "[torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]",
        "[torch.Generator().manual_seed(seed)] * len(prompts)",
        "test_generate.py::test_a_batch_is_its_prompts_one_by_one_each_with_the_next_seed",
    ),
    "attention: a query sees the token after it": Mistake(
        "models/attention.py",
        "hidden.triu(m - n + 1)",
        "hidden.triu(m - n + 2)",
        "test_attention.py::test_attention_equals_the_loops",
    ),
    "attention: a window is one token too wide": Mistake(
        "models/attention.py",
        "hidden.tril(m - n - window)",
        "hidden.tril(m - n - window - 1)",
        "test_attention.py::test_attention_equals_the_loops",
    ),
    "attention: a block's keys begin a token too late": Mistake(
        "models/attention.py",
        "max(0, past + first - window + 1)",
        "max(0, past + first - window + 2)",
        "test_attention.py::test_blocks_of_any_size_have_the_values_and_gradients_of_the_dense_mask",
    ),
    "attention: the gradient of keys forgets the earlier blocks": Mistake(
        "models/attention.py",
        "dk[:, seen] += ",
        "dk[:, seen] = ",
        "test_attention.py::test_attention_has_the_gradients_of_finite_differences",
    ),
    "attention: the gradient of queries lacks the scale": Mistake(
        "models/attention.py",
        "_scaled(dS, k[:, seen], scale)",
        "_scaled(dS, k[:, seen], 1.0)",
        "test_attention.py::test_attention_has_the_gradients_of_finite_differences",
    ),
    "attention: documents of one length are taken for one another": Mistake(
        "models/attention.py",
        ".transpose(1, 2).reshape(-1, heads, E)",
        ".transpose(1, 2).flip(0).reshape(-1, heads, E)",
        "test_attention.py::test_blocks_of_any_size_have_the_values_and_gradients_of_the_dense_mask",
    ),
    "attention: sums over blocks are rounded to 16 bits": Mistake(
        "models/attention.py",
        "wide = q.size(-1) ** -0.5, torch.promote_types(q.dtype, torch.float32)",
        "wide = q.size(-1) ** -0.5, q.dtype",
        "test_attention.py::test_the_gradient_of_a_key_that_many_blocks_see_is_summed_in_float32",
    ),
    "attention: the output is kept, too": Mistake(
        "models/attention.py",
        "ctx.save_for_backward(*qkv)",
        "ctx.save_for_backward(*qkv, output)",
        "test_attention.py::test_blocks_save_queries_keys_and_values_and_nothing_else",
    ),
    "the gradient of a norm passes along the row, too": Mistake(
        "models/ops.py",
        "dn.sub_(n.mul_((dn * n).mean(-1, keepdim=True))).mul_(inverse)",
        "dn.mul_(inverse)",
        "test_ops.py::test_rms_norm_and_swiglu_have_the_gradients_of_finite_differences",
    ),
    "the gradient of a rotation turns the same way": Mistake(
        "models/ops.py",
        "_rotated(dy, cos, -sin)",
        "_rotated(dy, cos, sin)",
        "test_ops.py::test_rotate_has_the_gradients_of_finite_differences",
    ),
    "the gradients of gate and up are exchanged": Mistake(
        "models/ops.py",
        "silu_backward(dy * up, gate), F.silu(gate).mul_(dy)",
        "silu_backward(dy * gate, up), F.silu(up).mul_(dy)",
        "test_ops.py::test_rms_norm_and_swiglu_have_the_gradients_of_finite_differences",
    ),
    "the gradient of the logits lacks the label": Mistake(
        "models/ops.py",
        "p.gather(-1, target) - 1",
        "p.gather(-1, target)",
        "test_ops.py::test_cross_entropy_has_the_gradient_of_finite_differences",
    ),
    "a label's probability is rounded to 16 bits before 1 is taken from it": Mistake(
        "models/ops.py",
        "dlogits[rows] = p.scatter_(-1, target, p.gather(-1, target) - 1)",
        "dlogits[rows] = p.to(z.dtype).scatter_(-1, target, p.to(z.dtype).gather(-1, target) - 1)",
        "test_ops.py::test_the_gradient_of_a_sure_label_is_what_is_left_to_it",
    ),
    "a few tokens' branch lacks its scale": Mistake(
        "adapters/functional.py",
        "lora_A.to(wide)).mul_(scale)",
        "lora_A.to(wide))",
        "test_functional.py::test_a_few_tokens_without_gradients_are_as_good_as_plain_pytorch",
    ),
    "a few tokens in float64 are rounded to the adapter's dtype": Mistake(
        "adapters/functional.py",
        "wide = torch.promote_types(x.dtype, lora_A.dtype)\n    return",
        "wide = lora_A.dtype\n    return",
        "test_functional.py::test_a_few_tokens_without_gradients_are_as_good_as_plain_pytorch",
    ),
    "after a run nothing is given back": Mistake(
        "runs/allocator.py",
        "        release_memory()\n\n",
        "        pass\n\n",
        "test_memory.py::test_after_a_run_its_memory_is_given_back",
    ),
    "a forecast forgets the gradients of what it did not trace": Mistake(
        "runs/memory.py",
        "account.most + untraced, account.live",
        "account.most, account.live",
        "test_memory.py::test_not_all_of_a_long_loss_is_traced",
    ),
    "law 11: a resumed run forgets the best adapter": Mistake(
        "runs/select.py",
        "        self.tensors = tensors",
        "        self.tensors = {}",
        "test_select.py::test_a_run_resumed_after_any_step_keeps_the_same_adapter",
    ),
    "control tokens of a row act": Mistake(
        "models/quote.py",
        "return found[0] + QUOTE if is_whole or is_begun else found[0]",
        "return found[0]",
        "test_quote.py::test_only_the_control_tokens_that_the_template_wrote_act",
    ),
    "the prompt is learned": Mistake(
        "runs/data.py",
        '[(0 if train_on == "all" else len(prompt), len(text))]',
        "[(0, len(text))]",
        "test_data.py::test_exactly_the_tokens_that_touch_the_completion_and_the_closing_one_are_labels",
    ),
    "what was trained on is merged into where the original is asked for": Mistake(
        "merging.py",
        "yield name, weight, known",
        "yield name, known, known",
        "test_merging.py::test_the_original_is_what_is_merged_into_if_that_is_asked_for",
    ),
    "a merge is compared with the weight that it was merged into": Mistake(
        "merging.py",
        "squared_norms(result, trained, layer)",
        "squared_norms(result, weight, layer)",
        "test_merging.py::test_merging_into_what_was_trained_errs_by_rounding_and_into_another_weight_by_its_difference",
    ),
    "the divergence is that of the base from the adapter": Mistake(
        "runs/evaluate.py",
        "(log_p.exp() * (log_p - log_q)).sum()",
        "(log_q.exp() * (log_q - log_p)).sum()",
        "test_evaluate.py::test_drift_is_the_loss_before_and_after_and_the_mean_divergence_over_labelled_tokens",
    ),
}

QUICK = {  # one a law; the others belong to the long form
    "law 1: the branch is not scaled",
    "law 2: B does not start at 0",
    "law 3: the base is trained too",
    "law 4: only the first adapter acts",
    "law 5: the gradient of A lacks the scale",
    "law 6: of two levels as near the higher one",
    "law 7: the JSON of a packed weight says another dtype of its scales",
    "law 8: a mean of means",
    "law 9: documents see each other",
    "law 10: an adapter of twice the rank acts by half",
    "law 11: a resumed run forgets the best adapter",
    "the prompt is learned",
}


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    copy = Copy(tmp_path_factory.mktemp("planted"))
    yield copy
    copy.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in MISTAKES]
)
def test_a_planted_mistake_is_noticed(name, copy):
    file, right, wrong, test = MISTAKES[name]
    source = (copy.folder / "minilora" / file).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{file} does not say {right!r} once"
    assert copy.run(file, source.replace(right, wrong), [test]) == 1, copy.output  # 1: tests ran, and one failed


def test_without_a_mistake_the_same_test_passes(copy):
    file, _, _, test = MISTAKES["law 1: the branch is not scaled"]
    source = (copy.folder / "minilora" / file).read_text(encoding="utf-8")
    assert copy.run(file, source, [test]) == 0, copy.output
