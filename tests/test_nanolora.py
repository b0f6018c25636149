"""nanolora.py, all of it in one file, is what minilora is: the same logits, losses, bytes, tokens and files."""

import ast
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import minilora as ml
import nanolora
from minilora.data import collate
from minilora.nf4 import NF4Linear
from minilora.testing import check_adapter_directory
from minilora.testing.compare import GRADIENT_PARITY, assert_parity
from minilora.training import adamw, train_step
from tests.files import ROOT, SHARD, edit, same_state, save_file, write_adapter
from tests.models import LLAMA3, randn, tiny_model, token_ids
from tests.runs import write_inputs
from tests.text import CHATML, CLOSE, EOS, conversation, encoded, write_tokenizer

IDS = token_ids(1, 3, 20)
ROPE = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}
LLAMAS = {
    "grouped heads": {},
    "a key for each query": {"num_key_value_heads": 4},
    "tied, with wide heads and biases": {"tie_word_embeddings": True, "head_dim": 10, "attention_bias": True},
    "Llama 3.2": {"tie_word_embeddings": True, "mlp_bias": True, **ROPE},
    "an older config.json": {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
}
llamas = pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
CHAT = f"{json.dumps({'messages': conversation([('a', 'b')])})}\n" * 2
SOURCE = (ROOT / "nanolora.py").read_text(encoding="utf-8")


@pytest.fixture
def base(tmp_path):
    """A function that writes a model in shards, and another file; it returns minilora's and the directory."""

    def make(**changes):
        model = tiny_model(dtype=torch.float32, **changes)
        ml.save_model(model, tmp_path / "base", shard_bytes=SHARD)
        safetensors.torch.save_file({"model.norm.weight": torch.zeros(24)}, tmp_path / "base/model_old.safetensors")
        return ml.load_model(tmp_path / "base", torch.float32), tmp_path / "base"

    return make


def logits(model, ids=IDS):
    with torch.no_grad():
        return nanolora.linear(model, "lm_head", nanolora.decode(model, ids))


def perturbed(model):
    """The model with an adapter that changes what it computes."""
    model = nanolora.attach(model, 3, lora_alpha=21, use_rslora=True)
    for i, factor in enumerate(model.adapter.values()):
        factor.data = 0.1 * randn(i, *factor.shape, dtype=torch.float32)
    return model


def examples(count=4):
    """Prompts and answers of unequal lengths."""
    rows = [token_ids(i, 5 + 3 * i).tolist() for i in range(count)]
    return [(row[: 2 + i], row[2 + i :]) for i, row in enumerate(rows)]


def as_minilora(rows):
    return [ml.Example(prompt + answer, [-100] * len(prompt) + answer) for prompt, answer in rows]


# --- the file ---


def test_it_is_one_file_of_400_lines_with_ten_flags_at_most_and_few_imports():
    assert len(SOURCE.splitlines()) <= 400
    assert max(map(len, SOURCE.splitlines())) <= 100
    assert SOURCE.count("    flag(") <= 10
    nodes = list(ast.walk(ast.parse(SOURCE)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"torch", "safetensors", "tokenizers", "jinja2"}
    needed = re.search(r"# dependencies = (\[.*\])", SOURCE)[1]
    assert others <= {re.split(r"\W", name)[0] for name in json.loads(needed)}


# --- the model ---


@llamas
@pytest.mark.parametrize("nf4", [False, True])
def test_logits_equal_those_of_minilora(base, changes, nf4):
    ours, directory = base(**changes)
    if nf4:
        ours = ml.load_model(directory, torch.float32, quantize="nf4")
    with torch.no_grad():
        assert_parity(logits(nanolora.load_model(directory, nf4)), ours(IDS))


def weights():
    """Weights of several shapes, one with a block of zeros and an outlier, one of numbers midway between levels."""
    midway = (nanolora.NF4[1:] + nanolora.NF4[:-1])[token_ids(0, 64, 64, high=15)] / 2
    midway[:, 0] = 1
    shapes = ((40, 24), (48, 40), (13, 15), (64, 576))
    drawn = [randn(0, *shape, dtype=torch.float32) for shape in shapes]
    drawn[0][:3], drawn[0][3, 3] = 0, 1e4
    return [*drawn, midway * randn(1, 64, 1, dtype=torch.float32).abs()]


def test_four_bits_are_those_of_minilora_to_the_byte():
    for weight in weights():
        packed, codes, scales, mean, _ = found = nanolora.pack(weight)
        layer = NF4Linear.quantize(weight)
        for one, other in zip((packed, codes, scales, mean.view(1)), layer.parts, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(nanolora.dense(found), layer.weight)


def test_a_4_bit_layer_keeps_nothing_for_the_backward_pass_but_what_is_packed():
    kept = []
    x, weight = randn(0, 5, 64, dtype=torch.float32).requires_grad_(), nanolora.pack(torch.randn(32, 64))
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        y = nanolora.FourBitLinear.apply(x, weight, None)
    assert not kept
    y.sum().backward()
    assert_parity(x.grad, nanolora.dense(weight).sum(0).expand(5, -1))


# --- training ---


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_three_losses_and_gradients_equal_those_of_minilora(base, tmp_path, monkeypatch, nf4, recompute):
    monkeypatch.setattr(nanolora, "RECOMPUTE", recompute)
    _, directory = base()
    model = perturbed(nanolora.load_model(directory, nf4))
    nanolora.save(model, tmp_path / "adapter")
    ours = ml.load_model(directory, torch.float32, quantize="nf4" if nf4 else None)
    ml.load_adapter(ours, tmp_path / "adapter", trainable=True)
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(model.adapter.values(), lr=1e-3, weight_decay=0.0)
    ours_optimizer = adamw(trained.values())
    ours_optimizer.param_groups[0]["lr"] = 1e-3
    batches = [nanolora.collate(part) for part in nanolora.chunks(examples(), 3)]
    ours_batches = [collate(as_minilora(examples()), torch.device("cpu"))]  # together: what is split adds up
    for _ in range(3):
        loss = nanolora.train_step(model, optimizer, batches)
        assert_parity(loss, train_step(ours, ours_optimizer, ours_batches).loss)
        theirs = [parameter.grad for parameter in trained.values()]
        assert len(theirs) == len(model.adapter)
        for factor, gradient in zip(model.adapter.values(), theirs, strict=True):
            assert_parity(factor.grad, gradient, GRADIENT_PARITY)


def test_the_learning_rate_rises_in_the_warm_up_and_falls_as_half_a_cosine(monkeypatch):
    rates = []

    def train_step(model, optimizer, batches):
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0

    monkeypatch.setattr(nanolora, "BATCH", 1)
    monkeypatch.setattr(nanolora, "train_step", train_step)
    model = nanolora.Model({}, {}, {}, {"A": torch.zeros(1, requires_grad=True)})
    nanolora.train(model, examples(4), epochs=25, peak=2.0)
    assert rates[:4] == pytest.approx([2 / 3, 4 / 3, 2, 2])
    assert rates[3:] == pytest.approx([1 + math.cos(math.pi * step / 97) for step in range(97)])


def test_a_new_adapter_starts_as_in_minilora(base):
    ours, directory = base()
    ml.attach(ours, ml.LoraConfig(r=3, target_modules=nanolora.TARGETS))
    model = nanolora.attach(nanolora.load_model(directory), 3)
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    for factor, other in zip(model.adapter.values(), trained, strict=True):
        assert torch.equal(factor, other)
    assert torch.equal(logits(model), logits(model._replace(adapter={})))


@pytest.mark.long
def test_on_the_built_in_task_it_is_as_accurate_as_minilora(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanolora.py", "--adapter", str(tmp_path / "adapter")])
    nanolora.main()
    loss, accuracy = map(float, re.findall(r"\d\.\d{4}", capsys.readouterr().out.splitlines()[-1]))
    assert abs(accuracy - 0.8263) <= 0.02  # the README's
    assert loss < 0.36


@llamas
def test_it_writes_what_minilora_writes(base, changes):
    ours, directory = base(**changes)
    prompts, model = token_ids(0, 3, 7).tolist(), nanolora.load_model(directory)
    written = [nanolora.generate(model, prompt, end=-1, limit=9) for prompt in prompts]
    assert written == ml.generate(ours, prompts, 9)
    end = written[0].index(written[0][4])
    assert nanolora.generate(model, prompts[0], end=written[0][end]) == written[0][: end + 1]


# --- the files ---


@llamas
def test_adapters_load_in_minilora_and_back_and_merge_to_the_same_model(base, tmp_path, changes):
    ours, directory = base(**changes)
    model = perturbed(nanolora.load_model(directory))
    nanolora.save(model, tmp_path / "adapter")
    check_adapter_directory(tmp_path / "adapter")
    ml.load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        assert_parity(logits(model), ours(IDS))
    ml.save_adapter(ours, tmp_path / "back")
    back = nanolora.load_adapter(nanolora.load_model(directory), tmp_path / "back")
    assert torch.equal(logits(back), logits(model))

    write_tokenizer(directory)
    nanolora.save(nanolora.merge(model), tmp_path / "merged")
    assert ml.load_tokenizer(tmp_path / "merged").encode("the cat")
    merged = ml.load_model(tmp_path / "merged")
    ml.merge(ours)
    assert replace(merged.config, source={}) == replace(ours.config, source={})
    same_state(merged, ours)
    assert_parity(logits(nanolora.load_model(tmp_path / "merged")), logits(model))


def test_an_adapter_of_other_targets_and_another_dtype_is_read(base, tmp_path):
    ours, directory = base()
    config = {"target_modules": ["self_attn.q_proj", "down_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}
    file = write_adapter(ours, tmp_path / "adapter", r=3, lora_alpha=6, **config) / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    model = nanolora.load_adapter(nanolora.load_model(directory), tmp_path / "adapter")
    assert {factor.dtype for factor in model.adapter.values()} == {torch.float32}
    ours = ml.load_model(directory, torch.float32)
    ml.load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        assert_parity(logits(model), ours(IDS))


@pytest.mark.parametrize(
    ("config", "edited"),
    [
        ({"use_dora": True}, {}),
        ({"rank_pattern": {"q_proj": 2}}, {}),
        ({"alpha_pattern": {"q_proj": 2}}, {}),
        ({"modules_to_save": ("norm",)}, {}),
        ({}, {"target_modules": ["q_proj"]}),
        ({}, {"alora_invocation_tokens": [1]}),
        ({}, {"init_lora_weights": "pissa"}),  # as PEFT writes it; the base would have to change as well
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(base, tmp_path, config, edited):
    ours, directory = base()
    edit(write_adapter(ours, tmp_path / "adapter", r=3, lora_alpha=6, **config), **edited)
    with pytest.raises(ValueError, match="this is not plain LoRA for this model"):
        nanolora.load_adapter(nanolora.load_model(directory), tmp_path / "adapter")


# --- the data ---


@pytest.mark.parametrize("post", ["none", "bos", "trimming"])
@pytest.mark.parametrize("use_regex", [True, False])  # without it a token may begin in the prompt and end in the answer
def test_tokens_and_labels_are_those_of_minilora(tmp_path, post, use_regex):
    ours = write_tokenizer(tmp_path, post, use_regex)
    pairs = [
        ("the cat ", "sat on the mat"),
        ("naïve 🙂?", " café 漢字🙂"),
        ("a  ", "é \n  b \n"),
        ("the", " cat<|end|>"),
    ]
    for prompt, completion in pairs:
        row = {"prompt": prompt, "completion": completion}
        expected = encoded(row, ours, allow_special=True)
        assert as_minilora([nanolora.encode(row, *nanolora.load_tokenizer(tmp_path))])[0].labels == expected.labels


def test_a_conversation_is_written_and_labelled_as_in_minilora(tmp_path):
    """An end token is added where the template has none, and no BOS besides the template's."""
    ours = write_tokenizer(tmp_path / "ours", template=CHATML, eos=CLOSE)
    row = {"messages": conversation([("what is it?", "the cat"), ("and?", "the mat")], "be brief")}
    expected = encoded(row, ours)
    for eos, added in ((CLOSE, []), (EOS, [ours.encode(EOS)[0]])):
        write_tokenizer(tmp_path / "model", "bos", template=CHATML, eos=eos)
        text = nanolora.load_tokenizer(tmp_path / "model")
        (found,) = as_minilora([nanolora.encode({**row, "prompt": "beside"}, *text)])
        assert (found.tokens, found.labels) == (expected.tokens + added, expected.labels + added)


def test_a_tokenizer_neither_pads_nor_truncates_and_its_end_token_may_be_an_object(tmp_path):
    write_tokenizer(tmp_path)
    row = {"prompt": "the cat ", "completion": "sat on the mat"}
    expected = nanolora.encode(row, *nanolora.load_tokenizer(tmp_path))
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": {"content": EOS, "lstrip": False}}))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert nanolora.encode(row, *nanolora.load_tokenizer(tmp_path)) == expected


def test_rows_of_like_length_share_a_batch_whatever_part_is_long(monkeypatch):
    rows = [([1] * a, [2] * b) for a, b in ((1, 1), (1, 9), (9, 1), (1, 19)) for _ in range(nanolora.BATCH)]
    found = []
    monkeypatch.setattr(nanolora, "train_step", lambda model, optimizer, batches: found.extend(batches) or 0.0)
    model = nanolora.Model({}, {}, {}, {"A": torch.zeros(1, requires_grad=True)})
    nanolora.train(model, rows[::2] + rows[1::2], 1, 1e-3)
    assert sorted(tokens.size(1) for tokens, _ in found) == [2, 10, 10, 20]
    assert all((tokens > 0).all() for tokens, _ in found)  # there is no padding


# --- the command ---


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """A function that runs the command on a tiny model and 23 rows; it returns the lines that are printed."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*words, model="model", data="rows.jsonl"):
        monkeypatch.setattr(sys, "argv", ["nanolora.py", "--model", model, "--data", data, *words])
        nanolora.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_it_trains_then_answers_with_what_it_trained_and_writes_a_merged_model(command, tmp_path):
    *_, before, after = command("--adapter", "a", "--lora-r", "3", "--learning-rate", "0.02", "--epochs", "20")
    losses = [float(re.search(r"loss (\S+)", line)[1]) for line in (before, after)]
    assert losses[1] < 0.5 * losses[0]
    told, answer = command("--adapter", "a", "--prompt", "the cat?", "--merged", "merged")
    assert told == "loaded a, nothing trained"
    assert answer in (" yes", " no")
    model, tokenizer = ml.load_model(tmp_path / "merged"), ml.load_tokenizer(tmp_path / "merged")
    tokens = ml.generate(model, [tokenizer.encode("the cat?")], max_new_tokens=9, stop_ids=tokenizer.stop_ids)
    assert tokenizer.decode(tokens[0]) == answer


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        (["--model", "no"], {}, "no file no\nGive a Llama"),
        (["--lora-r", "0"], {}, "--lora-r and --epochs must be at least 1"),
        ([], {"rows.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n'}, "rows.jsonl:2: JSONDecodeError"),
        (
            [],
            {"rows.jsonl": '{"prompt": "a", "completion": "b"}\n{"text": "a"}\n'},
            "rows.jsonl:2: .*a row needs",
        ),
        ([], {"rows.jsonl": '{"prompt": "a", "completion": "b"}\n'}, "rows.jsonl: need at least two rows"),
        ([], {"rows.jsonl": '{"prompt": "the cat", "completion": "s"}\n' * 2}, "no answer after a prompt in 2 tokens"),
        ([], {"model/config.json": '{"model_type": "gpt2"}'}, "gpt2.*need llama"),
        (
            [],
            {"rows.jsonl": CHAT, "model/chat_template.jinja": "{{ messages[-1].content }}"},
            "no answer after a prompt",
        ),
        ([], {"model/config.json": (ROOT / "minilora/assets/model/config.json").read_text()}, "not 7 projections"),
        (
            [],
            {"model/config.json": '{"model_type": "llama", "hidden_act": "gelu"}'},
            "gelu.*, need llama, silu",
        ),
    ],
)
def test_a_bad_input_is_one_clear_line(command, tmp_path, monkeypatch, words, change, message):
    monkeypatch.setattr(nanolora, "MAX_LENGTH", 2 if " in 2 " in message else 1024)
    for name, text in change.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, OSError), match=message):
        command(*words)
