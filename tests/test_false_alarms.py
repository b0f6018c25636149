"""The public checks raise no false alarm: thousands of drawn cases of right implementations.

    pytest -n 0 -m "long or parity" --examples 10000 tests/test_false_alarms.py -k "trl and packing"

Peers that are not installed are skipped.
"""

import string
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import peer_sequences
from benchmarks.peer_data import character_tokenizer, peft_directory
from benchmarks.peer_table import BUILT, JUDGED, MODULES, PEERS, Entry, in_float32
from benchmarks.peer_training import quiet
from benchmarks.peers_under_test import FINDINGS, _finding
from minilora.cli.selftest import implementations as ours
from minilora.testing import (
    AdapterSum,
    Chat,
    Lengths,
    MarkedWords,
    MaskedLogits,
    MicroBatches,
    NotApplicable,
    check_trains_everything,
    laws,
)
from minilora.testing.sequence_laws import Decoder, Packed
from minilora.testing.strategies import WEIGHT_KINDS, adapted_linears, conversations, nf4_weights, seeds
from tests.test_catalogue import CORRECT

DTYPES = ("float64", "float32", "bfloat16")
EXACT = ("ties", "layout", "kept", "idempotence", "powers")  # laws of codes; of denormal blocks any code is right
SINGLE = ("views", "16-bit")  # laws that draw their own weight


def layers(kind, **options):
    method = "dora" if "dora" in kind else "lora"
    drawn = adapted_linears(methods=(method,), dtypes=DTYPES, weights=WEIGHT_KINDS, **options)
    drawn = drawn.filter(lambda case: (case.method, case.weight) != ("dora", "tiny"))  # norms ≥ 1e-38 here
    return drawn.map(lambda case: replace(case, use_rslora=kind == "rslora"))


@st.composite
def rows(draw, length, count):
    width = draw(st.integers(*length))
    return tuple(draw(st.lists(st.text("x.", min_size=width, max_size=width), min_size=1, max_size=count)))


def masked_logits(dtypes):
    spreads, dtype = st.sampled_from((0.1, 3.0, 1e4)), st.sampled_from(dtypes)
    return st.builds(MaskedLogits, rows((2, 12), 4), st.integers(2, 17), spreads, seeds, dtype)


def micro_batches(dtypes):
    groups = st.lists(rows((2, 8), 2), min_size=1, max_size=4).map(lambda groups: (("xx",), *groups))
    return st.builds(MicroBatches, groups, st.integers(1, 5), st.integers(2, 9), seeds, st.sampled_from(dtypes))


def lengths(least):
    return st.builds(Lengths, st.lists(st.integers(1, 12), min_size=least, max_size=4).map(tuple), seeds)


@st.composite
def chats(draw):
    turns = [(each["role"], each["content"]) for each in draw(conversations())]
    return Chat((*turns, ("assistant", "No.")) if draw(st.booleans()) else tuple(turns))


@st.composite
def marked_words(draw, has_tools=True):
    """Draw rounds of a question, perhaps calls of tools, and a reply that perhaps begins with reasoning."""
    names = (f"Q{letter}" for letter in string.ascii_lowercase)
    messages, learned, read, optional = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        read.append(next(names))
        messages.append({"role": "user", "content": f"Is it {read[-1]}?"})
        if has_tools and draw(st.booleans()):
            words = [next(names) for _ in range(draw(st.integers(1, 2)))]
            learned += words
            calls = [{"function": {"name": "find", "arguments": {"city": word}}, "type": "function"} for word in words]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            for _ in words:
                read.append(next(names))
                messages.append({"role": "tool", "content": f"{read[-1]} degrees", "name": "find"})
        learned.append(next(names))
        reply = f"No, {learned[-1]}."
        if draw(st.booleans()):
            optional.append(next(names))
            reply = f"<think>\n{optional[-1]}\n</think>\n\n{reply}"
        messages.append({"role": "assistant", "content": reply})
    return MarkedWords(*map(tuple, (messages, learned, read, optional)))


@st.composite
def lora_configs(draw, *names):
    """Draw options of PEFT's LoraConfig."""
    targets = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    rest = [name for name in names if name not in targets]
    patterns = st.dictionaries(st.sampled_from(targets), st.integers(1, 8))
    options = {
        "r": draw(st.integers(1, 8)),
        "lora_alpha": draw(st.integers(1, 32)),
        "target_modules": draw(st.sampled_from((targets, f".*({'|'.join(targets)})"))),
        "modules_to_save": draw(st.lists(st.sampled_from(rest), unique=True)) if rest else None,
        "bias": draw(st.sampled_from(("none", "all", "lora_only"))),
        "rank_pattern": draw(patterns),
        "alpha_pattern": draw(patterns),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
    }
    may_have_bias = options["bias"] == "none" and not options["use_dora"] and "embed_tokens" not in targets
    return options | {"lora_bias": may_have_bias and draw(st.booleans())}


def cases(entry):
    """Return a strategy of cases of the kind of an entry."""
    sizes = st.integers(1, 9)
    match entry.kind:
        case "lora" | "rslora" | "dora" | "merge" | "merge_dora":
            method = "dora" if "dora" in entry.kind else "lora"
            drawn = adapted_linears(methods=(method,), dtypes=DTYPES, weights=WEIGHT_KINDS)
            drawn = drawn.filter(lambda each: (each.method, each.weight) != ("dora", "tiny"))  # norms ≥ 1e-38 here
            if entry.what == "DoRA":  # PEFT's makes (1, out) of x (in): another convention
                drawn = drawn.filter(lambda each: each.lead)
            return drawn.map(lambda each: replace(each, use_rslora=entry.kind == "rslora"))
        case "adapter_sum":
            return st.builds(AdapterSum, sizes, sizes, st.lists(sizes, min_size=1, max_size=4).map(tuple), seeds)
        case "nf4":
            return nf4_weights()
        case "loss_masking":
            return masked_logits(("float32",) if entry.only is in_float32 else DTYPES)
        case "accumulation":
            return micro_batches(("float32",) if entry.only is in_float32 else DTYPES[:2])
        case "packing" | "generation":
            return lengths(2 if entry.kind == "packing" else 1)
        case "chat_mask":
            return chats()
        case "chat_tools":
            return marked_words()


# --- what benchmarks.peer_table has not ---


def trl_step(config):
    """SFTTrainer's loss and optimizer of an adapter, on a batch of its own data loader."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": list(range(i, i + 9))} for i in range(4)])
    with tempfile.TemporaryDirectory() as folder, quiet():
        options = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 4}
        settings = SFTConfig(folder, **options, learning_rate=1e-2, gradient_checkpointing=False)
        own = {"train_dataset": rows, "processing_class": character_tokenizer("", [])}
        adapter = LoraConfig(**config, task_type="CAUSAL_LM")
        trainer = SFTTrainer(peer_sequences.causal_lm("llama"), settings, **own, peft_config=adapter)
        batch, optimizer = next(iter(trainer.get_train_dataloader())), trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set

    def step():
        trainer.training_step(trainer.model, batch)
        optimizer.step()
        optimizer.zero_grad()

    return trainer.model, step


def transformers_step(case):
    family, is_tied, seed = case
    model = peer_sequences.causal_lm(family, tie_word_embeddings=is_tied, num_key_value_heads=2)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return peer_sequences.step_of(model, lambda ids: model(input_ids=ids).logits)


def litgpt_model(**options):
    from litgpt import lora

    names = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": False}
    sizes = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 16, "intermediate_size": 24, "block_size": 64}
    return lora.GPT(lora.Config(padded_vocab_size=32, rotary_percentage=1.0, bias=False, **sizes, **names, **options))


def litgpt_generation():
    from litgpt.generate.base import generate

    model = peer_sequences.wide(litgpt_model())

    def answer(prompt, count):
        model.set_kv_cache(batch_size=1)
        found = generate(model, torch.tensor(prompt), len(prompt) + count, top_k=1, include_prompt=False)
        model.clear_kv_cache()
        return found.tolist()

    def answers(prompts, count):
        return [answer(prompt, count) for prompt in prompts]

    return answers, lambda tokens: model(torch.tensor([tokens]))[0].detach(), 32


def litgpt_step(options):
    from litgpt import lora

    model = litgpt_model(lora_dropout=0.0, **options)
    model.apply(model._init_weights)
    lora.mark_only_lora_as_trainable(model)
    return peer_sequences.step_of(model, model)


# --- the tests ---


def check(entry, case, implementation):
    """Check the laws that hold for a case, each way of comparing once."""
    left_out = ("views", "16-bit", "rslora", "shapes", "dropout", "no_labels")
    if entry.kind == "nf4" and case.kind == "tiny":
        left_out += EXACT
    found = {name: law for name, law in laws(entry.kind).items() if name not in left_out}
    if entry.kind == "loss_masking" and not case.is_predicted.any():
        found = {"no_labels": laws("loss_masking")["no_labels"]}
    for law in {law.compare: law for law in found.values() if type(law.cases[0]) is type(case)}.values():
        with suppress(NotApplicable):
            law.check(implementation, case)


OURS = [Entry("minilora", kind, each, "ours") for kind, each in ours(torch.device("cpu")).items()]
OURS += [Entry("minilora", kind, each, "plain") for kind, each in CORRECT.items()]
OURS = [entry for entry in OURS if entry.kind not in ("double_quant", "linear4bit")]
BROKEN = [what for file in FINDINGS.glob("*.md") for what, _ in _finding(file)] + [*JUDGED.keys() - {"peft DoRA"}]
THEIRS = [entry for entry in PEERS if f"{entry.peer} {entry.what}" not in BROKEN]
THEIRS = [entry for entry in THEIRS if entry.kind not in ("step", "adapter_directory")]
THEIRS.append(Entry("litgpt", "generation", litgpt_generation, "`generate`"))


def named(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: f"{entry.peer}: {entry.what} ({entry.kind})")


@named(OURS)
@given(data=st.data())
def test_of_right_implementations(entry, data):
    check(entry, data.draw(cases(entry)), entry.implementation)


@pytest.mark.long
@pytest.mark.parity
@named(THEIRS)
@given(data=st.data())
def test_of_a_peer(entry, data):
    pytest.importorskip(MODULES[entry.peer], exc_type=ImportError)
    check(entry, data.draw(cases(entry)), built(entry))


@cache
def built(entry):
    """Return what the laws of a kind take; a model is made once."""
    if entry.kind not in BUILT:
        return entry.implementation
    return (Packed if entry.kind == "packing" else Decoder)(*entry.implementation())


@pytest.mark.long
@pytest.mark.parity
@given(lora_configs("q_proj", "v_proj"))
def test_of_directories_of_peft(config):
    pytest.importorskip("peft")
    with tempfile.TemporaryDirectory() as folder:
        peft_directory(folder, **config)
        for law in laws("adapter_directory").values():
            law.check(folder)


CONFIGS = lora_configs("q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head")
FAMILIES = st.sampled_from(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2"))
LITGPT = st.fixed_dictionaries(
    {"lora_r": st.integers(1, 8), "lora_alpha": st.integers(1, 32), "lora_query": st.just(True)}
    | {f"lora_{name}": st.booleans() for name in ("key", "value", "projection", "mlp", "head")}
)
STEPS = {
    "peft": (lambda config: peer_sequences.peft_step(**config), CONFIGS),
    "trl": (trl_step, lora_configs("q_proj", "down_proj", "embed_tokens")),  # it refuses an adapter of the head
    "transformers": (transformers_step, st.tuples(FAMILIES, st.booleans(), seeds)),
    "litgpt": (litgpt_step, LITGPT),
}


@pytest.mark.long
@pytest.mark.parity
@pytest.mark.parametrize("peer", STEPS)
@given(data=st.data())
def test_of_a_training_step(peer, data):
    pytest.importorskip(MODULES[peer], exc_type=ImportError)
    make, drawn = STEPS[peer]
    check_trains_everything(*make(data.draw(drawn)))
