"""The tests of the laws can fail: each is run against a copy of minilora with one mistake planted in it."""

from typing import NamedTuple

import pytest

from tests.planting import Copy


class Mistake(NamedTuple):
    file: str
    right: str
    wrong: str
    test: str  # the test that must notice, as pytest names it; after `--plain` it runs without kernels


NORM = "test_lora.py::test_the_norm_is_that_of_the_rows_and_has_no_gradient"
NF4 = "test_nf4_laws.py::test_ours_keeps_the_laws_of_nf4"
DENSE = "test_nf4.py::test_a_weight_is_a_level_times_the_absmax_of_its_block_in_float32_and_rounded_then"
EQUAL = "test_kernels.py::test_values_and_gradients_equal_the_definition_s_whatever_is_trained"
PRECISE = "test_kernels.py::test_in_low_precision_values_and_gradients_are_as_good_as_the_definition_s"
KEPT = "test_kernels.py::test_of_the_results_only_what_is_counted_is_kept_for_the_backward_pass"
FORWARD = "test_layers.py::test_forward_is_the_merged_weight_applied"
GRADIENTS = "test_layers.py::test_gradients_are_those_of_the_merged_weight_applied"
OF_DORA = "test_lora.py::test_gradients_of_dora_equal_the_loops_with_the_norm_held_fixed"
MAGNITUDE = "test_lora.py::test_the_magnitude_begins_as_the_norm_of_the_rows_in_float32"
MISTAKES = {
    "law 1: the update is not scaled": Mistake(
        "kernel/lora.py", "lora_A.to(x.dtype)).mul_(scale)", "lora_A.to(x.dtype))", f"{FORWARD}[linear-kernels]"
    ),
    "law 1: the update is not scaled, by definition": Mistake(
        "lora.py", "F.linear(scale * F.linear(x, A), B)", "F.linear(F.linear(x, A), B)", f"{FORWARD}[linear-plain]"
    ),
    "law 1: no gradient reaches A": Mistake(
        "kernel/lora.py", "dA = (h.T @ x)", "dA = (0 * h.T @ x)", f"{GRADIENTS}[linear-kernels]"
    ),
    "law 1: no gradient reaches A, by definition": Mistake(
        "lora.py", "A, B = lora_A.to(x.dtype)", "A, B = lora_A.detach().to(x.dtype)", f"{GRADIENTS}[linear-plain]"
    ),
    "law 1: the bias is added twice": Mistake(
        "lora.py",
        "base_linear(x, base, bias) + lora_update",
        "base_linear(x, base, bias) + (0 if bias is None else bias) + lora_update",
        f"{FORWARD}[linear-plain]",
    ),
    "law 1: the bias is scaled by the magnitude, too": Mistake(
        "lora.py", "None if has_dora else bias, first", "bias, first", f"{FORWARD}[linear-kernels]"
    ),
    "law 1: a norm is that of W + B A": Mistake(
        "kernel/lora.py", "b, lora_A, alpha=scale)", "b, lora_A)", f"{EQUAL}[dora_norm]"
    ),
    "law 1: a norm is that of W + B A, by definition": Mistake(
        "lora.py",
        "lora_delta(lora_A.to(wide), lora_B.to(wide), scale)).norm(dim=1)",
        "lora_delta(lora_A.to(wide), lora_B.to(wide), 1)).norm(dim=1)",
        NORM,
    ),
    "law 1: a norm is that of columns": Mistake(
        "lora.py", "lora_B.to(wide), scale)).norm(dim=1)", "lora_B.to(wide), scale)).norm(dim=0)", NORM
    ),
    "law 1: a norm is computed in the dtype of the weight": Mistake(
        "kernel/lora.py",
        "torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)",
        "weight.dtype",
        f"{MAGNITUDE}[torch.bfloat16-linear]",
    ),
    "law 1: a norm is computed in the dtype of the weight, by definition": Mistake(
        "lora.py",
        "functools.reduce(torch.promote_types, (weight.dtype, lora_A.dtype, torch.float32))",
        "weight.dtype",
        f"--plain {MAGNITUDE}[torch.bfloat16-linear]",
    ),
    "law 1: a norm has a gradient": Mistake(
        "kernel/lora.py",
        "with torch.no_grad(), no_autocast",
        "with torch.enable_grad(), no_autocast",
        f"{OF_DORA}[kernels]",
    ),
    "law 1: a norm has a gradient, by definition": Mistake(
        "lora.py", "with torch.no_grad(), no_autocast", "with torch.enable_grad(), no_autocast", f"{OF_DORA}[plain]"
    ),
    "law 1: a ratio is rounded before it scales": Mistake(
        "lora.py",
        "self.base.weight)) * y)",
        "self.base.weight)).to(y.dtype) * y)",
        "test_lora.py::test_an_output_is_scaled_in_float32_and_rounded_once[torch.bfloat16]",
    ),
    "law 1: a convolution is not padded as its base is": Mistake(
        "adapters/layers.py", "mode=base.padding_mode), 0", 'mode="replicate"), 0', f"{FORWARD}[conv1d-kernels]"
    ),
    "law 1: the experts are the slowest index of B": Mistake(
        "adapters/layers.py",
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
    "law 2: B does not start at 0": Mistake(
        "adapters/initialize.py",
        "_zeros(shape_B) if kind else",
        "torch.full(shape_B, 1e-3) if kind else",
        "test_attach.py::test_a_new_adapter_leaves_the_logits_bit_equal",
    ),
    "law 2: on the page B does not start at 0": Mistake(
        "adapter.py", "torch.zeros(shape_B, dtype=torch.float32)", "torch.full(shape_B, 1e-3)", "test_six_pages.py"
    ),
    "law 2: the start is added and not subtracted": Mistake(
        "adapters/parts.py",
        "-self.start_B",
        "self.start_B",
        "test_layers.py::test_a_new_adapter_changes_nothing_and_can_be_trained",
    ),
    "law 3: the base is rounded on its way back": Mistake(
        "adapter.py",
        "((layer, layer.base) for layer in reversed(require_layers(model)))",
        "((layer, layer.base.float().double()) for layer in reversed(require_layers(model)))",
        "test_attach.py::test_attach_then_detach_leaves_every_bit",
    ),
    "law 3: the base is trained too": Mistake(
        "adapter.py",
        "    model.requires_grad_(False)",
        "    [p.requires_grad_(p.dim() == 1) for p in model.parameters()]",
        "test_loop.py::test_training_leaves_every_bit_of_the_base_and_changes_every_tensor_of_the_adapter",
    ),
    "law 3: a module is trained in full in its own place": Mistake(
        "adapters/parts.py",
        "shallow_copy(get_base_layer(layer), tensors)",
        "shallow_copy(get_base_layer(layer), {})",
        "test_attach.py::test_training_leaves_every_bit_of_the_base_which_acts_where_no_adapter_does",
    ),
    "law 4: only the first adapter acts": Mistake(
        "lora.py",
        "for adapter in others:",
        "for adapter in ():",
        f"{FORWARD}[linear-kernels]",
    ),
    "law 5: the gradient of A lacks the scale": Mistake(
        "kernel/lora.py",
        "h = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scale)",
        "h = dy @ lora_B.to(dy.dtype)",
        f"{GRADIENTS}[linear-kernels]",
    ),
    "law 5: the gradient of x is that of the base alone": Mistake(
        "kernel/lora.py", "(dy @ weight).addmm_(h, lora_A.to(dy.dtype))", "dy @ weight", f"{EQUAL}[lora_linear]"
    ),
    "law 5: the gradient of a trained W lacks the rows' last": Mistake(
        "kernel/lora.py", "dW = dy.T @ x if", "dW = dy[:-1].T @ x[:-1] if", f"{PRECISE}[torch.float32-lora_linear]"
    ),
    "law 5: no gradient reaches the magnitude": Mistake(
        "lora.py",
        "adapter.magnitude.flatten() / norm",
        "adapter.magnitude.detach().flatten() / norm",
        f"{OF_DORA}[plain]",
    ),
    "the masters are kept beside what they were cast to": Mistake(
        "kernel/lora.py",
        "ctx.save_for_backward(*kept, lora_A, lora_B,",
        "ctx.save_for_backward(*kept, lora_A.clone(), lora_B.clone(),",
        f"{KEPT}[torch.float64-lora_linear]",
    ),
    "a few tokens' update is not scaled": Mistake(
        "kernel/lora.py", "lora_A.to(wide)).mul_(scale)", "lora_A.to(wide))", f"{EQUAL}[lora_linear]"
    ),
    "law 5: the gradient passes through another W than x did": Mistake(
        "kernel/nf4.py",
        "ctx.layout, dy.dtype) if needs_dx",
        "ctx.layout, torch.bfloat16).to(dy.dtype) if needs_dx",
        f"{EQUAL}[nf4_linear]",
    ),
    "a dense weight is kept for the backward pass": Mistake(
        "kernel/nf4.py",
        "ctx.save_for_backward(*parts)",
        "ctx.save_for_backward(*parts), ctx.save_for_backward(*parts, inputs[1])",
        f"{KEPT}[torch.float64-nf4_linear]",
    ),
    "law 6: of two levels as near the higher one": Mistake(
        "kernel/nf4.py",
        "(x > own.index_select(0, cell))",
        "(x >= own.index_select(0, cell))",
        f"{NF4}[nf4-ties-kernels]",
    ),
    "law 6: of two levels as near the higher one, by definition": Mistake(
        "nf4.py", "out_int32=True", "out_int32=True, right=True", f"{NF4}[nf4-ties-plain]"
    ),
    "law 6: the absmax of another block": Mistake(
        "kernel/nf4.py", "mul_(largest.unsqueeze(1))", "mul_(largest.roll(1).unsqueeze(1))", DENSE
    ),
    "law 6: the absmax of another block, by definition": Mistake(
        "nf4.py",
        "absmax.repeat_interleave(block_size)",
        "absmax.roll(1).repeat_interleave(block_size)",
        f"--plain {DENSE}",
    ),
    "law 6: the halves of a byte are exchanged": Mistake(
        "nf4.py",
        "codes[0::2] << 4 | codes[1::2]",
        "codes[0::2] | codes[1::2] << 4",
        f"{NF4}[nf4-layout-plain]",
    ),
    "law 7: absmaxes are rounded as on CUDA": Mistake(
        "nf4.py",
        "x = index.float() * (2 / 65535) - 1",
        "x = x.nan_to_num(-1)",
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
        "training.py",
        "part, number = loss(model, batch)",
        "part, number = loss(model, batch)\n        part, number = part / number, 1",
        "test_loop.py::test_8_times_1_and_1_times_8_and_2_times_4_rows_give_the_gradient_of_the_mean_over_labelled_tokens",
    ),
    "law 8: a row's last token predicts the next row": Mistake(
        "data.py",
        "*[IGNORE_INDEX] * example.shift",
        "*examples[0].tokens[:1] * example.shift",
        "test_loop.py::test_rows_packed_by_any_budget_of_tokens_give_the_same_gradient",
    ),
    "law 8: the loss is a mean": Mistake("llama.py", 'labels, reduction="sum"', "labels", f"{EQUAL}[cross_entropy]"),
    "law 9: documents see each other": Mistake(
        "llama.py",
        "causal_attention(q, k, v, documents, documents, self.window)",
        "causal_attention(q, k, v, [len(q)], [len(q)], self.window)",
        "test_llama.py::test_documents_beside_each_other_do_not_see_each_other",
    ),
    "law 9: the cache forgets where it was": Mistake(
        "llama.py",
        "range(first, first + new)",
        "range(new)",
        "test_llama.py::test_a_cache_changes_no_logits_however_the_documents_are_split",
    ),
    "law 9: in a step of many rows the short ones see what lies behind them": Mistake(
        "models/generate.py",
        "hidden = (position < first) | (position >= total)",
        "hidden = position < first",
        "test_cache.py::test_what_lies_beyond_a_document_is_not_looked_at",
    ),
    "law 9: rows that have ended are computed on": Mistake(
        "models/generate.py",
        "[cache.reuse(row, len(documents[row])) :]",
        "[cache.reuse(row, len(documents[row])) :]\n            feed = [a or b[-1:] for a, b in zip(feed, documents)]",
        "test_generate.py::test_a_row_that_has_ended_is_computed_no_more",
    ),
    "law 9: padding is counted": Mistake(
        "llama.py",
        "torch.cat([row[:n] for row, n",
        "torch.cat([row[-n:] for row, n",
        "test_llama.py::test_padding_changes_no_logits_and_has_none",
    ),
    "law 9: a dropout mask follows from the global random state": Mistake(
        "runs/seeded.py",
        ".bernoulli_(1 - p, generator=generator)",
        ".bernoulli_(1 - p)",
        "test_lora.py::test_dropout_draws_from_the_random_state_of_pytorch_only_without_a_step",
    ),
    "law 9: the prompts of a batch draw from one generator": Mistake(
        "models/generate.py",
        "[torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]",
        "[torch.Generator().manual_seed(seed)] * len(prompts)",
        "test_generate.py::test_a_batch_is_its_prompts_one_by_one_each_with_the_next_seed",
    ),
    "law 10: an adapter of twice the rank acts by half": Mistake(
        "adapters/files.py",
        '"lora_alpha": growth * config.lora_alpha',
        '"lora_alpha": config.lora_alpha',
        "test_files.py::test_all_that_a_config_can_ask_for_loads_equal_and_saves_the_same_bytes[PiSSA]",
    ),
    "law 10: on the page the scale is saved as alpha": Mistake(
        "adapter.py", "adapter.scale * len(adapter.lora_A)", "adapter.scale", "test_six_pages.py"
    ),
    "attention: a query sees the token after it": Mistake(
        "kernel/attention.py", "hidden.triu(m - n + 1)", "hidden.triu(m - n + 2)", f"{EQUAL}[causal_attention]"
    ),
    "attention: a query sees the token after it, by definition": Mistake(
        "llama.py", ".tril(m - n)", ".tril(m - n + 1)", f"{EQUAL}[causal_attention]"
    ),
    "attention: a window is one token too wide": Mistake(
        "kernel/attention.py",
        "hidden.tril(m - n - window)",
        "hidden.tril(m - n - window - 1)",
        f"{EQUAL}[causal_attention]",
    ),
    "attention: a window is one token too wide, by definition": Mistake(
        "llama.py", "visible.triu(m - n - window + 1)", "visible.triu(m - n - window)", f"{EQUAL}[causal_attention]"
    ),
    "attention: a block's keys begin a token too late": Mistake(
        "kernel/attention.py",
        "max(0, past + first - window + 1)",
        "max(0, past + first - window + 2)",
        f"{EQUAL}[causal_attention]",
    ),
    "attention: the gradient of keys forgets the earlier blocks": Mistake(
        "kernel/attention.py", "dk[:, seen] += ", "dk[:, seen] = ", f"{PRECISE}[torch.float32-causal_attention]"
    ),
    "attention: the gradient of queries lacks the scale": Mistake(
        "kernel/attention.py",
        "_scaled_product(dS, k[:, seen], scale)",
        "_scaled_product(dS, k[:, seen], 1.0)",
        f"{PRECISE}[torch.float32-causal_attention]",
    ),
    "attention: documents of one length are taken for one another": Mistake(
        "kernel/attention.py",
        ".transpose(1, 2).reshape(-1, heads, E)",
        ".transpose(1, 2).flip(0).reshape(-1, heads, E)",
        f"{EQUAL}[causal_attention]",
    ),
    "attention: sums over blocks are rounded to 16 bits": Mistake(
        "kernel/attention.py",
        "scale, wide = q.size(-1) ** -0.5, torch.promote_types(q.dtype, torch.float32)",
        "scale, wide = q.size(-1) ** -0.5, q.dtype",
        "test_attention.py::test_the_gradient_of_a_key_that_many_blocks_see_is_summed_in_float32",
    ),
    "attention: the output is kept, too": Mistake(
        "kernel/attention.py",
        "ctx.save_for_backward(*qkv)",
        "ctx.save_for_backward(*qkv, output)",
        f"{KEPT}[torch.float64-causal_attention]",
    ),
    "the gradient of a norm passes along the row, too": Mistake(
        "kernel/llama.py",
        "dn.sub_(n.mul_((dn * n).mean(-1, keepdim=True))).mul_(inverse)",
        "dn.mul_(inverse)",
        f"{EQUAL}[rms_norm]",
    ),
    "a norm forgets eps, by definition": Mistake(
        "llama.py", "keepdim=True) + eps)", "keepdim=True))", f"{EQUAL}[rms_norm]"
    ),
    "a rotation turns the other way": Mistake(
        "llama.py",
        "(a * cos - b * sin, b * cos + a * sin, rest)",
        "(a * cos + b * sin, b * cos - a * sin, rest)",
        "test_llama.py::test_rotate_is_a_product_of_complex_numbers",
    ),
    "the gradients of gate and up are exchanged": Mistake(
        "kernel/llama.py",
        "silu_backward(dy * up, gate), F.silu(gate).mul_(dy)",
        "silu_backward(dy * gate, up), F.silu(up).mul_(dy)",
        f"{EQUAL}[swiglu]",
    ),
    "gate and up are exchanged, by definition": Mistake(
        "llama.py", "F.silu(gate) * up", "F.silu(up) * gate", f"{EQUAL}[swiglu]"
    ),
    "the gradient of the logits lacks the label": Mistake(
        "kernel/llama.py", "p.gather(-1, target) - 1", "p.gather(-1, target)", f"{EQUAL}[cross_entropy]"
    ),
    "a label's probability is rounded to 16 bits before 1 is taken from it": Mistake(
        "kernel/llama.py",
        "dlogits[rows] = p.scatter_(-1, target, p.gather(-1, target) - 1)",
        "dlogits[rows] = p.to(z.dtype).scatter_(-1, target, p.to(z.dtype).gather(-1, target) - 1)",
        "test_loss.py::test_the_gradient_of_a_sure_label_is_what_is_left_to_it",
    ),
    "the learning rate begins at 0": Mistake(
        "training.py",
        "peak * (step + 1) / warmup",
        "peak * step / warmup",
        "test_loop.py::test_the_learning_rate_rises_linearly_and_falls_as_its_scheduler_says",
    ),
    "after a run nothing is given back": Mistake(
        "runs/machine.py",
        "        release_memory()\n\n",
        "        pass\n\n",
        "test_memory.py::test_after_a_run_its_memory_is_given_back",
    ),
    "a forecast holds an MLP until the gradients of attention": Mistake(
        "runs/memory.py",
        "attention = again - mlp + d",
        "attention = again + d",
        "test_memory.py::test_the_forecast_of_tensors_is_within_5_percent_of_what_lives_at_the_peak_of_a_step",
    ),
    "law 11: a resumed run forgets the best adapter": Mistake(
        "runs/loop.py",
        "state, best = checkpoints.load_checkpoint(",
        "state, _ = checkpoints.load_checkpoint(",
        "test_select.py::test_a_run_resumed_after_any_step_keeps_the_same_adapter",
    ),
    "control tokens of a row act": Mistake(
        "models/tokenizer.py",
        "return found[0] + QUOTE if is_whole or is_begun else found[0]",
        "return found[0]",
        "test_quote.py::test_only_the_control_tokens_that_the_template_wrote_act",
    ),
    "the prompt is learned": Mistake(
        "runs/encoders.py",
        '[(0 if train_on == "all" else len(prompt), len(text))]',
        "[(0, len(text))]",
        "test_data.py::test_exactly_the_tokens_that_touch_the_completion_and_the_closing_one_are_labels",
    ),
    "on the page the prompt is learned": Mistake(
        "data.py", "learned = [(len(prompt), ", "learned = [(0, ", "test_six_pages.py"
    ),
    "what was trained on is merged into where the original is asked for": Mistake(
        "tools/merging.py",
        "yield name, weight, known",
        "yield name, known, known",
        "test_merging.py::test_the_original_is_what_is_merged_into_if_that_is_asked_for",
    ),
    "a merge is compared with the weight that it was merged into": Mistake(
        "tools/merging.py",
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
    "law 1: the update is not scaled",
    "law 1: the update is not scaled, by definition",
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
    assert copy.run(file, source.replace(right, wrong), test.split()) == 1, copy.output  # 1: tests ran, and one failed


def test_without_a_mistake_the_same_test_passes(copy):
    file, _, _, test = MISTAKES["law 1: the update is not scaled"]
    source = (copy.folder / "minilora" / file).read_text(encoding="utf-8")
    assert copy.run(file, source, test.split()) == 0, copy.output
