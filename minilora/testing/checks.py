"""Check anybody's LoRA, DoRA, NF4, loss or adapter files against laws and float64 oracles.

    from minilora.testing import check_lora_linear, parametrize_laws

    def test_my_layer():
        check_lora_linear(lambda W, b, A, B, alpha: MyLinear(W, b, A, B, alpha))

    @parametrize_laws("lora", "rslora")  # the same, as a pytest test a law
    def test_my_layer_law_by_law(law):
        law.check(lambda W, b, A, B, alpha, use_rslora=False: MyLinear(W, b, A, B, alpha, use_rslora))

A law takes cases of rising size from fixed seeds, compares an implementation with a float64 oracle within a bound that
is derived from the sums it does, and, where it fails, names the mistakes of `catalogue` that have the same result.
Implementations are plain callables on torch tensors; `on_numpy` adapts one on numpy arrays.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.testing.cases import AdaptedLinear
from minilora.testing.chat_laws import LAWS as CHAT_LAWS
from minilora.testing.data_laws import LAWS as DATA_LAWS
from minilora.testing.directory_laws import LAWS as DIRECTORY_LAWS
from minilora.testing.laws import CheckFailure, Law, NotApplicable, Report, in_order
from minilora.testing.lifecycle_laws import LAWS as LIFE_LAWS
from minilora.testing.lora_laws import LAWS as LORA_LAWS
from minilora.testing.merge_laws import LAWS as MERGE_LAWS
from minilora.testing.nf4_laws import LAWS as NF4_LAWS
from minilora.testing.sequence_laws import LAWS as SEQUENCE_LAWS
from minilora.testing.sequence_laws import Lengths
from minilora.testing.step_laws import LAWS as STEP_LAWS

__tracebackhide__ = True  # pytest shows the line that calls this module
FILES = (LORA_LAWS, MERGE_LAWS, NF4_LAWS, DATA_LAWS, CHAT_LAWS, SEQUENCE_LAWS, STEP_LAWS, LIFE_LAWS, DIRECTORY_LAWS)
LAWS = in_order(*FILES)


def laws(*kinds: str) -> dict[str, Law]:
    """Return the laws of these kinds: by name if there is one kind, by id if there are several, all if none is given.

    They are named like the checks: lora, rslora, dora, linear4bit, merge, merge_dora, adapter_sum, nf4, double_quant,
    loss_masking, accumulation, ranks, chat_mask, chat_tools, packing, generation, roundtrip, adapters, merge_cycle,
    resume, recompute, adapter_directory. `law.check` and `check` take what the check of a kind takes; several functions
    are a tuple in the same order, such as (attach, switch, disabled, delete), where the last two may be None.

    `law.check` returns a `Report` or raises CheckFailure, or NotApplicable; `law.check(…, case)` tries a single case.

    Raises:
        ValueError: an unknown kind.
    """
    known = list(dict.fromkeys(law.kind for law in LAWS))
    if unknown := sorted(set(kinds) - set(known)):
        raise ValueError(f"no laws of {unknown[0]!r}; there are laws of {', '.join(known)}")
    chosen = [law for law in LAWS if not kinds or law.kind in kinds]
    return {law.name if len(kinds) == 1 else law.id: law for law in chosen}


def parametrize_laws(*kinds: str, known: Mapping[str, str] | None = None) -> Any:
    """Parametrize a pytest function by the argument `law`, with an id for each law.

    Args:
        kinds: as for `laws`.
        known: deviations that must still be there: law id -> a cause, or a part of what was found.

    Raises:
        ValueError: an unknown kind, or an unknown law in `known`.
    """
    import pytest

    chosen, known = {law.id: law for law in laws(*kinds).values()}, dict(known or {})
    if unknown := sorted(set(known) - set(chosen)):
        raise ValueError(f"no law {unknown[0]!r}; there are {', '.join(chosen)}")
    tried = [replace(law, known=known.get(name, "")) for name, law in chosen.items()]
    return pytest.mark.parametrize("law", tried, ids=list(chosen))


def check(implementation: Any, *kinds: str, sizes: Sequence[tuple[int, ...]] = (), all: bool = False) -> list[Report]:
    """Check an implementation against all laws of these kinds, and return what each found.

    A law about what the implementation does not have, such as an option or a gradient, is not checked: its report has
    `checked` False, and says why. An implementation may raise NotApplicable by itself.

    Args:
        implementation: what the kinds take: see `laws`.
        kinds: one or more.
        sizes: what is to be tried as well: (in, out, r) of adapted layers, or lengths of documents or prompts.
        all: check all laws before a failure is raised, which then begins with a table of them.

    Raises:
        CheckFailure: the first law that is broken; likewise in every check below. With `all`, its message has all.
        ValueError: no kind, or an unknown one; `sizes` of what has none.
    """
    if not kinds:
        raise ValueError("name the kinds of laws to check, such as 'lora': see `laws`")
    reports, failures = list[Report](), list[CheckFailure]()
    for law in laws(*kinds).values():
        if sizes:
            largest = law.cases[-1]
            if isinstance(largest, Lengths):
                more: list[Any] = [Lengths(tuple(lengths)) for lengths in sizes]
            elif isinstance(largest, AdaptedLinear):
                more = [replace(largest, inner=inner, outer=outer, r=r) for inner, outer, r in sizes]
            else:
                raise ValueError(f"sizes: laws of {law.kind!r} have no sizes (in, out, r)")
            law = replace(law, cases=[*law.cases, *more])
        try:
            reports.append(law.check(implementation))
        except NotApplicable as reason:
            reports.append(Report(law.id, f"not checked: {reason}", 0.0, 0))
        except CheckFailure as failure:
            if not all:
                raise
            reports.append(Report(law.id, f"BROKEN: {law.statement}", math.inf, 1))
            failures.append(failure)
    if failures:
        first, table = failures[0], "\n".join(map(str, reports))
        message = "\n\n".join([f"{len(failures)} of {len(reports)} laws are broken\n{table}", *map(str, failures)])
        raise CheckFailure(message, first.law, first.case, first.causes) from first
    return reports


def check_lora_linear(
    make_layer: Callable[..., Any], use_rslora: bool = False, sizes: Sequence[tuple[int, int, int]] = ()
) -> list[Report]:
    """Check a LoRA linear layer: y = x Wᵀ + b + s·(x Aᵀ) Bᵀ, s = α/r, or α/√r for rsLoRA  [LoRA eq. 3].

    Every law tries the layer in training mode without dropout, in evaluation, under no_grad and inference_mode, in a
    third call, after eval() and train(), and with tensors that are not contiguous. Both are called twice in a row. A
    layer may merge in eval() until train(): then A and B change, and have gradients, in training mode only.

    Args:
        make_layer: (W, b, A, B, alpha) -> a layer, a callable of x (..., in). W and b are frozen; b may be None. If it
            takes `dropout` or `use_rslora` too, those are passed. It may contain A and B, or parameters equal to them,
            to their transposes, or to their rows in several parts; a module's `parameters()` has what is trained.
        use_rslora: check the scale of rsLoRA.
        sizes: (in, out, r) to try in addition to the usual ones, which have up to 600 features and rank 40.
    """
    return check(make_layer, "rslora" if use_rslora else "lora", sizes=sizes)


def check_dora_linear(make_layer: Callable[..., Any], sizes: Sequence[tuple[int, int, int]] = ()) -> list[Report]:
    """Check a DoRA linear layer: y = m ⊙ x (W + s·B A)ᵀ / ‖W + s·B A‖ + b  [DoRA eq. 5].

    Gradients are those with the norm held constant  [DoRA §4.3].

    Args:
        make_layer: as for `check_lora_linear`. `magnitude` (out) is passed if it takes one; otherwise it is ‖W‖.
        sizes: as for `check_lora_linear`.
    """
    return check(make_layer, "dora", sizes=sizes)


def check_merge(merge: Callable[..., Any], use_dora: bool = False) -> list[Report]:
    """Check a merged weight: merge(W, A, B, scale) = W + s·B A, or with DoRA's magnitude as a fifth argument.

    It has the dtype of W, in which all tensors are given. The scale may be negative, tensors may be views and require
    gradients, and none is changed.
    """
    return check(merge, "merge_dora" if use_dora else "merge")


def check_adapter_sum(add: Callable[..., Any]) -> list[Report]:
    """Check a sum of adapters: add([(A, B, scale), …], weights) -> Σ wᵢ·sᵢ·Bᵢ Aᵢ, or an (A, B, scale) that is equal."""
    return check(add, "adapter_sum")


def check_nf4(quantize: Callable[..., Any], dequantize: Callable[..., Any]) -> list[Report]:
    """Check NF4: codes of the 16 levels nearest to w / absmax, in blocks  [QLoRA §3].

    There are two codes in a byte, the first in the high half. A tie gets the lower level.

    Args:
        quantize: (W, block_size) -> packed uint8 (⌈n/2⌉), absmax float32 (⌈n/block_size⌉).
        dequantize: (packed, absmax, shape, block_size) -> W in float32.
    """
    return check((quantize, dequantize), "nf4")


def check_double_quant(quantize: Callable[..., Any], dequantize: Callable[..., Any]) -> list[Report]:
    """Check the quantization of absmaxes to eight bits: absmax ≈ level · scale + offset  [QLoRA §3].

    Args:
        quantize: (absmax) -> codes uint8 (b), scales (⌈b/256⌉), offset.
        dequantize: (codes, scales, offset) -> absmax (b).
    """
    return check((quantize, dequantize), "double_quant")


def check_linear4bit(make_layer: Callable[..., Any]) -> list[Report]:
    """Check a linear layer with a frozen 4-bit weight: y = x dequantize(quantize(W))ᵀ + b, dx = dy dequantize(…).

    In 16 bits only a whole sum is rounded: parts of dx that are rounded one by one, as of chunks of W, are less exact.

    Args:
        make_layer: (W, b) -> a layer, a callable of x (..., in), in blocks of 64; b may be None. If it takes
            `double_quant`, False and True are passed.
    """
    return check(make_layer, "linear4bit")


def check_loss_masking(loss_fn: Callable[..., Any]) -> list[Report]:
    """Check a loss: L = 1/N Σ -log p(label at t + 1 | logits at t) over the N labels that are not -100.

    Args:
        loss_fn: (logits (B, T, V), labels (B, T)) -> L. Views may be refused. The gradient of the logits is checked
            where L is a tensor, of a loss that is multiplied by -4, twice if its graph can be retained. A loss
            in float32 of 16-bit logits has to be as exact as float32.
    """
    return check(loss_fn, "loss_masking")


def check_accumulation(step_fn: Callable[..., Any]) -> list[Report]:
    """Check gradient accumulation: one step over micro-batches has the gradient of one batch.

    Args:
        step_fn: (W (V, D), [(x (B, T, D), labels (B, T)), …]) -> dW, the gradient of one optimizer step over all of the
            micro-batches, where the model's logits are x Wᵀ. If it takes `all_reduce`, it is also called on several
            ranks, each with its own micro-batches: `all_reduce(tensor)` gives the sum over the ranks. These are called
            one after another: where a sum is not known yet, a call ends with an exception, and is made again later.
            `rank` and `world_size` are passed if it takes them. Clipping is not part of it.
    """
    return check(step_fn, "accumulation", "ranks")


def check_chat_mask(render: Callable[..., Any], has_tools: bool = False) -> list[Report]:
    """Check what of a conversation is learned: each reply of the assistant, the end token after it, and nothing else.

    White space next to an end token, such as the newline after it, may be learned or not. White space in front of a
    reply is learned as the beginning of the reply's first token, and not as a token of its own.

    A template may refuse, with an error, a conversation that begins with the assistant or ends with the user, a system
    message in the middle, and other roles than system, user and assistant; if it takes them, it may leave out what is
    not learned. It may also refuse two replies or two questions in a row, calls without content, and several calls at
    once, and may drop reasoning, and a text next to a call, as Mistral's does.

    Args:
        render: messages, a list of {"role", "content"} -> (tokens, is_label): the texts of the tokens, which give the
            rendered text when they are joined, and whether each is learned. It is called with other words in place of
            the contents too, by which the contents are found. A template may strip white space around a content.
        has_tools: check calls of tools and their results as well: messages with "tool_calls", a list of {"id", "type":
            "function", "function": {"name", "arguments": {…}}}, and {"role": "tool", "tool_call_id", "name", "content"}
    """
    return check(render, "chat_mask", *(["chat_tools"] if has_tools else []))


def check_packing(
    run: Callable[[list[list[int]]], Any],
    vocabulary: int,
    parameters: Sequence[Tensor] = (),
    lengths: Sequence[tuple[int, ...]] = (),
) -> list[Report]:
    """Check that documents in one batch, end to end or padded, do not see each other, nor tokens what follows them.

    Args:
        run: documents, a list of token lists of unequal lengths -> for each document its logits (T, V) or its losses
            (T - 1), of one forward pass over all; or one number, the mean loss of all Σ (T - 1) predictions. Called
            with one document, it gives what the model gives for this document by itself. Dropout is off.
        vocabulary: tokens are drawn below it.
        parameters: tensors of PyTorch whose gradients are compared too; `run` must then record gradients.
        lengths: those of the documents of batches to be tried as well, such as [(2000, 3)]: pass some beyond your block
            sizes and windows. The usual ones have up to 420 tokens.
    """
    return check((run, vocabulary, tuple(parameters)), "packing", sizes=lengths)


def check_generation(
    generate: Callable[[list[list[int]], int], Any],
    logits: Callable[[list[int]], Any],
    vocabulary: int,
    lengths: Sequence[tuple[int, ...]] = (),
) -> list[Report]:
    """Check greedy decoding with a cache, of prompts of unequal lengths together, against recomputation.

    Args:
        generate: (prompts, a list of token lists, and a number) -> that many new tokens of each prompt, the likeliest
            at each step; no token ends an answer.
        logits: tokens -> the logits (T, V) of the same model, all computed anew.
        vocabulary: tokens are drawn below it.
        lengths: those of the prompts of batches to be tried as well, as for `check_packing`.
    """
    return check((generate, logits, vocabulary), "generation", sizes=lengths)


def check_roundtrip(
    attach: Callable[..., Any], save: Callable[[Any, Path], Any], load: Callable[[nn.Module, Path], Any]
) -> list[Report]:
    """Check that an adapter that is saved and loaded computes the same. To check merged models, merge in `save`.

    Args:
        attach: (model, **config) -> a small model of PyTorch with a new adapter: what then requires a gradient. The
            config has PEFT's names: r, lora_alpha, target_modules, and others if `attach` takes them. A function that
            returns None has changed the model; one that cannot do something may raise NotApplicable.
        save: (model, path) -> anything. The path does not exist yet.
        load: (a new base model, path) -> the model with the saved adapter. It may be another library's.
    """
    return check((attach, save, load), "roundtrip")


def check_adapters(
    attach: Callable[..., Any],
    switch: Callable[[Any, str], Any],
    disabled: Callable[[Any], AbstractContextManager[Any]] | None = None,
    delete: Callable[[Any, str], Any] | None = None,
) -> list[Report]:
    """Check which of several adapters acts, and that it is what is trained, after each is added, chosen or deleted.

    A new adapter may act at once or not. `.grad` of what no longer acts is not looked at.

    Args:
        attach: (model, name=…, **config) -> the model with one more adapter, as for `check_roundtrip`.
        switch: (model, name): from now on this adapter acts and is trained, and no other.
        disabled: (model) -> a context manager, in which the base acts.
        delete: (model, name). If this one acts, the base or any other one acts afterwards.
    """
    return check((attach, switch, disabled, delete), "adapters")


def check_merge_cycle(
    make_layer: Callable[..., Any], merge: Callable[[Any], Any], unmerge: Callable[[Any], Any]
) -> list[Report]:
    """Check that a merged layer applies W + s·B A, and unmerged W again, also after 100 cycles.

    Errors of subtracting s·B A may add up in float32, but not in 16 or 4 bits. A merged weight may be in 4 bits again.

    Args:
        make_layer: as for `check_lora_linear`. If it takes `quantize`, "nf4" is passed for a base in 4 bits, in blocks
            of 64 without double quantization. B of what it makes is changed between two cycles.
        merge: (layer) -> the merged layer, or None if the layer is changed.
        unmerge: (merged layer) -> the layer, or None.
    """
    return check((make_layer, merge, unmerge), "merge_cycle")


def check_resume(run: Callable[[Path, int, int], Any]) -> list[Report]:
    """Check that a run that is stopped and resumed ends in the bits of one that is not.

    Args:
        run: (directory, stop, total) -> the arrays that are trained, by name or as a list, at the step `stop` of a run
            of `total` steps. It goes on from what it finds in the directory, which is empty at first. PyTorch's random
            state is another one at each call.
    """
    return check(run, "resume")


def check_recompute(gradients: Callable[[bool, int], Any]) -> list[Report]:
    """Check that recomputation (gradient checkpointing) changes no gradient, with dropout too, and is at work.

    Args:
        gradients: (recompute, seed) -> the gradients of a step, by name or as a list. PyTorch's random state is set by
            the seed before each call.
    """
    return check(gradients, "recompute")


def check_adapter_directory(path: str | Path) -> list[Report]:
    """Check the files of an adapter in PEFT's layout: whether they are complete and agree with each other.

    Args:
        path: the directory of `adapter_config.json` and `adapter_model.safetensors`. A failure names file and key.
    """
    return check(path, "adapter_directory")


def on_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt a callable on numpy arrays, such as one in JAX or MLX, and the layer that it returns, to be checked here.

    Laws about gradients and bfloat16 do not apply to it, except accumulation, whose result is the gradient. Of a pair
    adapt each: (on_numpy(quantize), on_numpy(dequantize)).
    """
    if not callable(function):
        raise TypeError(f"on_numpy takes one callable, found {type(function).__name__}: adapt each of a pair")

    @functools.wraps(function, updated=())
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*map(_to_numpy, arguments), **{name: _to_numpy(option) for name, option in options.items()})
        return on_numpy(result) if callable(result) else result  # of a layer that was made

    vars(call)["is_numpy"] = True  # by which the laws know a layer without gradients
    return call


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            raise NotApplicable("numpy has no bfloat16")
        return value.detach().numpy()
    return type(value)(map(_to_numpy, value)) if isinstance(value, list | tuple) else value
