"""What `inspect` tells: nothing is left out, every number is that of another algorithm, every verdict comes true."""

import contextlib
import json
import math
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import minilora as ml
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from minilora.adapters.find import adapter_layers, linear_layers
from minilora.cli import inspect
from minilora.cli.inspect import WIDTH
from minilora.models.shards import INDEX
from minilora.quant.linear import dense_weight
from minilora.storage import read_json, write_json
from minilora.tools.inspect import look
from minilora.tools.inspect_adapter import AdapterFacts, adapter_facts
from minilora.tools.inspect_change import delta_spectrum, effective_rank, frobenius_norm
from minilora.tools.inspect_fold import fold
from minilora.tools.inspect_model import model_facts
from minilora.tools.inspect_run import run_facts
from tests.files import edit, saved, write_base
from tests.models import examples, families, randn, seeds, sizes, tiny_model
from tests.text import CHATML, write_tokenizer
from tests.tolerance import assert_maths, assert_parity

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}
names = st.lists(st.sampled_from(["a", "b", "0", "1", "2", "10", "01", "9999999999"]), min_size=1, max_size=4).map(
    ".".join
)


@pytest.fixture
def page(capsys):
    """What the command prints for a path."""

    def run(path, model=None, **options):
        named = {"path": str(path), "model": model and str(model), "memory": False, "json": False}
        assert inspect.run({**named, **options}) == 0
        return capsys.readouterr().out

    return run


def assert_number(found, expected, check=assert_maths):
    check(torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64))


def numbers(tensors):
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def rows_of(text):
    """The words of each row of the table of a page."""
    return [line.split() for line in text.split("\n\n")[1].splitlines()]


@given(st.dictionaries(names, st.sampled_from("xy"), min_size=1, max_size=30))
def test_folding_loses_no_name_invents_none_and_mixes_no_kinds(kinds):
    folds = fold(kinds)
    assert sorted(name for _, names in folds for name in names) == sorted(kinds)
    assert all(len({kinds[name] for name in names}) == 1 for _, names in folds)


@given(st.dictionaries(names, st.sampled_from("xy"), min_size=1, max_size=30))
def test_a_label_reaches_from_the_least_to_the_greatest_number_of_each_place(kinds):
    for label, names in fold(kinds):
        places = list(zip(*(name.split(".") for name in names), strict=True))
        for shown, found in zip(label.split("."), places, strict=True):
            low, _, high = shown.strip("{}").partition("-")
            assert {low, high or low} <= {*found}
            assert len({*found}) == 1 or (int(low), int(high)) == (min(map(int, found)), max(map(int, found)))


def test_layers_and_experts_that_repeat_are_one_line_and_its_count_tells_of_gaps():
    kinds = {f"m.layers.{i}.experts.{j}.w": "x" for i in (0, 1, 2, 5) for j in range(12)} | {"m.norm": "x"}
    told = [(label, len(names)) for label, names in fold(kinds)]
    assert told == [("m.layers.{0-5}.experts.{0-11}.w", 48), ("m.norm", 1)]
    words = dict.fromkeys(("w1.a", "w2.a", f"{'9' * 5000}.a", f"{'8' * 5000}.a"), "x")  # no numbers, or too long ones
    assert [label for label, _ in fold(words)] == sorted(words)


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3))))
def test_every_tensor_is_told_once_and_the_totals_are_the_file_s_bytes(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    save_file({name: torch.zeros(shape).to(DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}, path)
    facts = look(str(path)).file
    assert {name: (t.dtype, list(t.shape)) for name, t in facts.tensors.items()} == tensors
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert 8 + header + sum(tensor.bytes for tensor in facts.tensors.values()) == path.stat().st_size == facts.bytes


def test_the_page_of_a_file_counts_every_tensor_and_byte(tmp_path, page):
    tensors = {f"layers.{i}.{name}": torch.zeros(3, size) for i in range(12) for name, size in (("q", 2), ("o", 5))}
    save_file({**tensors, "layers.12.q": torch.zeros(3, 2).half()}, tmp_path / "x.safetensors")
    assert rows_of(page(tmp_path / "x.safetensors")) == [
        ["count", "dtype", "shape", "bytes", "name"],
        ["12", "F32", "3x5", "720", "layers.{0-11}.o"],
        ["12", "F32", "3x2", "288", "layers.{0-11}.q"],
        ["1", "F16", "3x2", "12", "layers.12.q"],
    ]


def test_a_damaged_file_is_one_line_that_names_it(tmp_path):
    whole = save({"a.0.w": torch.ones(2, 3), "b": torch.ones(1)}, metadata={"format": "pt"})
    header = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
    path = tmp_path / "x.safetensors"
    for content in [*(whole[:n] for n in range(len(whole))), whole + b"0", len(header).to_bytes(8, "little") + header]:
        path.write_bytes(content)
        with pytest.raises(ml.FormatError, match=r"x\.safetensors") as error:
            look(str(path))
        assert "\n" not in str(error.value)


def test_orders_to_the_terminal_are_spelled_out(tmp_path, page):
    save_file({"a\x1b[2J\nb": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"k": "\x1b]0;t\x07"})
    text = page(tmp_path / "x.safetensors")
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"a\x1b[2J\nb" in text


@given(sizes, sizes, sizes, seeds)
@example(1, 5, 9, 0)
@example(9, 2, 3, 0)
def test_the_spectrum_is_that_of_the_dense_delta(r, n_in, n_out, seed):
    lora_A, lora_B = randn(seed, r, n_in), randn(seed + 1, n_out, r)
    dense = np.linalg.svd(lora_B.numpy() @ lora_A.numpy(), compute_uv=False)[: min(r, n_in, n_out)]
    assert_maths(delta_spectrum(lora_A, lora_B), dense)


def test_a_delta_that_nearly_cancels_keeps_its_digits():
    """B = [b, b + 1e-9·e] and A = [a; -a] give -1e-9·e aᵀ: the products of Gram matrices would give noise."""
    a, b, e = randn(0, 1, 50), randn(1, 40, 1), randn(2, 40, 1)
    exact = 1e-9 * np.linalg.norm(a.numpy()) * np.linalg.norm(e.numpy())
    found = delta_spectrum(torch.cat([a, -a]), torch.cat([b, b + 1e-9 * e], 1))
    assert_number(found[0].item(), exact, assert_parity)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_the_effective_rank_is_the_exponential_of_the_entropy_of_the_energies(values):
    values = sorted(values, reverse=True)
    total = math.fsum(value**2 for value in values)
    entropy = -math.fsum(value**2 / total * math.log(value**2 / total) for value in values)
    found = effective_rank(torch.tensor(values, dtype=torch.float64))
    assert_number(found, math.exp(entropy))


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_equally_strong_directions_are_counted(size):
    for k in (1, 3, 8):
        values = torch.tensor([size] * k + [0.0] * (8 - k), dtype=torch.float64)
        assert_number(effective_rank(values), float(k))
    assert effective_rank(torch.zeros(3)) == effective_rank(torch.zeros(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_norm_of_a_weight_is_summed_in_float64_whatever_the_parts(monkeypatch, dtype):
    weight = randn(3, 70, 11, dtype=dtype)
    monkeypatch.setattr("minilora.tools.inspect_change.CHUNK", 30)
    exact = math.sqrt(math.fsum(float(value) ** 2 for value in weight.flatten()))
    assert_number(frobenius_norm(weight), exact)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A function that returns the model directory of a family; each is made once."""
    return cache(lambda family="llama": write_base(tmp_path_factory.mktemp("base"), family))


@pytest.fixture
def copied(base, tmp_path):
    """A copy of a model's directory."""
    return shutil.copytree(base(), tmp_path / "model")


@families
@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_norm_is_that_of_the_dense_delta_and_of_the_base(tmp_path, base, family, use_rslora):
    model = saved(tmp_path, family, rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 7}, use_rslora=use_rslora)
    facts = adapter_facts(tmp_path, base(family))
    layers = adapter_layers(model)
    assert [module.module for module in facts.modules] == sorted(layers)
    for module in facts.modules:
        layer = layers[module.module]
        adapter = layer.adapters["default"]
        lora_A, lora_B = (factor.detach().double().numpy() for factor in adapter.factors())
        dense = adapter.scale * lora_B @ lora_A
        weight = layer.base.weight.detach().double().numpy()
        assert (module.scale, module.rank, module.shape) == (adapter.scale, len(lora_A), weight.shape)
        assert_number(module.delta_norm, np.linalg.norm(dense))
        assert_number(module.base_norm, np.linalg.norm(weight))
        assert_number(module.relative_norm, np.linalg.norm(dense) / np.linalg.norm(weight))
    assert numbers(facts.tensors) == sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS_FILE).values())


def test_a_tied_head_is_measured_against_the_embedding(tmp_path, base):
    model = saved(tmp_path, "qwen2", target_modules=("lm_head",))
    (head,) = adapter_facts(tmp_path, base("qwen2")).modules
    embedding = model.model.embed_tokens.weight.detach().double()
    assert_number(head.base_norm, np.linalg.norm(embedding.numpy()))


def test_a_base_of_four_bits_is_measured_as_it_acts(tmp_path, base):
    saved(tmp_path, "llama")
    model = ml.load_model(base("llama"), quantize=ml.QuantizeConfig("nf4", quantize_skip="o_proj"))
    ml.save_model(model, tmp_path / "nf4")
    linears = linear_layers(model)
    for module in adapter_facts(tmp_path, tmp_path / "nf4").modules:
        weight = dense_weight(linears[module.module]).detach().double().numpy()
        assert_number(module.base_norm, np.linalg.norm(weight))


def test_without_the_base_the_delta_s_own_norm_is_told(tmp_path, base, page):
    saved(tmp_path)
    alone, measured = adapter_facts(tmp_path), adapter_facts(tmp_path, base())
    assert [m.delta_norm for m in alone.modules] == [m.delta_norm for m in measured.modules]
    assert all(m.base_norm is None and m.relative_norm is None for m in alone.modules)
    assert "delta/base" in rows_of(page(tmp_path, base()))[0]
    assert "delta/base" not in rows_of(page(tmp_path))[0]


def test_the_base_is_the_one_that_the_config_names_where_it_is_here(tmp_path, base):
    saved(tmp_path)
    for name, found in ((str(base()), str(base())), ("somebody/something", None), (["a"], None), (None, None)):
        edit(tmp_path, base_model_name_or_path=name)
        assert look(str(tmp_path)).adapter.base == found
    with pytest.raises(ml.FormatError, match="nothing-here"):
        look(str(tmp_path), "nothing-here")


def test_the_page_of_an_adapter_names_every_module(tmp_path, page, base):
    model = saved(tmp_path, rank_pattern={"layers.2.self_attn.q_proj": 5})
    rows = rows_of(page(tmp_path, base()))[1:]
    told = {row[-1]: int(row[0]) for row in rows if row[-1].startswith("model.")}
    assert told["model.layers.{0-3}.self_attn.q_proj"] == 3
    assert told["model.layers.2.self_attn.q_proj"] == 1
    assert sum(told.values()) == len(adapter_layers(model))


def test_the_page_of_an_adapter_tells_its_ranks_and_scales(tmp_path, page):
    saved(tmp_path, rank_pattern={"q_proj": 6}, use_rslora=True)
    text = page(tmp_path)
    above = text.partition("\n\n")[0]
    told = {(row[1], row[3]) for row in rows_of(text) if row[-1].startswith("model.layers")}
    assert told == {("3", "12.12"), ("6", "8.573")}  # 21 / √3 and 21 / √6
    assert "lora_alpha 21, use_rslora True" in " ".join(above.split())
    assert "  base model  ?; it is not here: see --model\n" in above


def test_factors_that_are_not_finite_have_no_norm(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.lora_A.weight"))
    save_file({**tensors, name: tensors[name] * torch.inf}, tmp_path / WEIGHTS_FILE)
    facts = adapter_facts(tmp_path)
    assert [m.module for m in facts.modules if m.delta_norm is None] == ["model.layers.1.mlp.up_proj"]
    assert "model.layers.1.mlp.up_proj" in facts.problems["minilora"][0]


def spoilt(directory, change):
    """A saved adapter with something changed: its config, or its tensors."""
    saved(directory)
    if isinstance(change, dict):
        edit(directory, **change)
    else:
        save_file(change(load_file(directory / WEIGHTS_FILE)), directory / WEIGHTS_FILE)


def with_last(change):
    """A change of the last tensor: its name and itself to what stands in its place."""
    return lambda tensors: {**dict(sorted(tensors.items())[:-1]), **change(*max(tensors.items()))}


def copies(factor):
    """A base's weight as PEFT stores it beside the adapter of a head."""
    weight = tiny_model("llama", dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    return {"base_model.model.model.layers.0.mlp.up_proj.base_layer.weight": factor * weight.detach()}


CHANGES = {
    "nothing": {},
    "a key of tomorrow that says nothing": {"invented_tomorrow": None},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
    "IA3": {"peft_type": "IA3"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva"},
    "a wild pattern": {"alpha_pattern": {r"([a-z0-9_.]+)+!": 3}},
    "a pattern of names": {"alpha_pattern": {"q_proj": 3}},
    "no pattern": {"rank_pattern": ["q_proj"]},
    "ranks of other tensors": {"rank_pattern": {"q_proj": 7}},
    "r": {"r": "many"},
    "r 0": {"r": 0},
    "alpha": {"lora_alpha": -1},
    "alpha list": {"lora_alpha": [1]},
    "target_parameters": {"target_parameters": ["experts.w"]},
    "a magnitude": with_last(
        lambda name, t: {name: t, name.replace("lora_B.weight", "lora_magnitude_vector"): t[:, 0].clone()}
    ),
    "a whole head": with_last(lambda name, t: {name: t, "base_model.model.lm_head.weight": t.clone()}),
    "a bias": with_last(lambda name, t: {name: t, name.replace("weight", "bias"): t[:, 0].clone()}),
    "half a pair": with_last(lambda name, t: {}),
    "twice": with_last(lambda name, t: {name: t, name.replace(".weight", ".other.weight"): t + 1}),
    "no prefix": with_last(lambda name, t: {name.removeprefix("base_model."): t}),
    "no prefixes": lambda tensors: {name.removeprefix("base_model.model."): t for name, t in tensors.items()},
    "the adapter's name": lambda tensors: {k.replace(".weight", ".default.weight"): t for k, t in tensors.items()},
    "integers": with_last(lambda name, t: {name: t.long()}),
    "not finite": with_last(lambda name, t: {name: t * torch.nan}),
    "float8": with_last(lambda name, t: {name: t.to(torch.float8_e4m3fn)}),
    "bfloat16": lambda tensors: {name: t.bfloat16() for name, t in tensors.items()},
    "ranks that differ": with_last(lambda name, t: {name: t[:, :2].clone()}),
    "no matrix": with_last(lambda name, t: {name: t[None]}),
    "empty": lambda tensors: {name: t[:0] if "lora_A" in name else t[:, :0].clone() for name, t in tensors.items()},
    "another size": with_last(lambda name, t: {name: t[:5]}),
    "a copy of the base": lambda tensors: tensors | copies(1),
    "a copy of another base": lambda tensors: tensors | copies(2),
    "another layer": lambda tensors: {name.replace("layers.3", "layers.9"): t for name, t in tensors.items()},
}


NEED_BASE = (
    *("another size", "another layer", "ranks that differ", "no matrix", "a copy of another base"),
    *("a whole head", "target_parameters", "modules_to_save"),
    *("DoRA", "a magnitude", "lora_bias", "a bias"),  # which modules have to have one, the model says
)


@pytest.mark.parametrize("case", CHANGES)
def test_the_verdict_on_an_adapter_comes_true_and_without_the_base_it_is_on_the_adapter_alone(
    tmp_path, base, case, page
):
    spoilt(tmp_path, CHANGES[case])
    facts = adapter_facts(tmp_path, base())
    assert 2 * len(facts.modules) + len(facts.other_tensors) == len(load_file(tmp_path / WEIGHTS_FILE))
    refusal = ""
    try:
        ml.load_adapter(ml.load_model(base()), tmp_path)
    except ml.MiniloraError as error:
        refusal = str(error)
    assert all(problem in refusal for problem in facts.problems["minilora"])
    assert bool(facts.problems["minilora"]) == bool(refusal)
    assert f"minilora: {'no' if refusal else 'yes'}\n" in page(tmp_path, base())
    alone = adapter_facts(tmp_path).problems
    assert alone == facts.problems | ({"minilora": []} if case in NEED_BASE else {})


@pytest.mark.parametrize("case", ["PiSSA", "bias", "modules_to_save", "a magnitude", "a whole head", "lora_bias"])
def test_of_an_adapter_that_a_tool_refuses_the_deltas_are_told_and_the_reason(tmp_path, case):
    saved(tmp_path / "plain")
    spoilt(tmp_path / "foreign", CHANGES[case])
    plain, foreign = adapter_facts(tmp_path / "plain"), adapter_facts(tmp_path / "foreign")
    assert foreign.modules == plain.modules
    change = CHANGES[case]
    named = next(iter(change)) if isinstance(change, dict) else next(iter(foreign.other_tensors))
    assert any(named.removeprefix(PREFIX) in reason for reason in foreign.problems["vLLM"])


def test_a_delta_that_does_not_fit_the_base_is_not_measured_against_it(tmp_path, base):
    spoilt(tmp_path, CHANGES["another size"])
    facts = adapter_facts(tmp_path, base())
    (unfit,) = (module for module in facts.modules if module.relative_norm is None)
    assert unfit.module in facts.problems["minilora"][0]
    assert unfit.delta_norm > 0


@pytest.mark.parametrize("key", ["target_parameters", "use_qalora", "use_bdlora", "kasa_config"])
def test_where_the_product_is_not_the_change_no_norm_is_told(tmp_path, key):
    spoilt(tmp_path, {key: {"a": 1}})
    assert adapter_facts(tmp_path).modules == ()


def test_scales_that_only_a_foreign_pattern_tells_are_unknown(tmp_path):
    spoilt(tmp_path, {"alpha_pattern": {r"layers\.[01]\..*": 3}})
    assert all(m.scale is None and m.delta_norm is None for m in adapter_facts(tmp_path).modules)


def test_vllm_needs_one_scale(tmp_path):
    for config in ({}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 42}}):
        saved(tmp_path, **config)
        assert not adapter_facts(tmp_path).problems["vLLM"]
    for config in ({"alpha_pattern": {"q_proj": 5}}, {"rank_pattern": {"q_proj": 5}}):
        saved(tmp_path, **config)
        assert adapter_facts(tmp_path).problems["vLLM"]


def test_peft_needs_a_kind_and_the_ranks_that_the_config_says(tmp_path):
    for change in ({}, {"rank_pattern": {r".*q_proj": 7}}):  # a pattern is not tried, so nothing is said against it
        spoilt(tmp_path, change)
        assert not adapter_facts(tmp_path).problems["PEFT"]
    for change in ({"rank_pattern": {"q_proj": 7}}, {"r": 4}, {"peft_type": None}):
        spoilt(tmp_path, change)
        assert adapter_facts(tmp_path).problems["PEFT"]


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, "config.json", "model.safetensors"])
def test_damage_to_an_adapter_or_a_model_names_the_file(copied, tmp_path, name):
    saved(tmp_path)
    directory = tmp_path if "adapter" in name else copied
    for content in (b"", b"[]", b"\xff" * 50):
        (directory / name).write_bytes(content)
        with pytest.raises(ml.FormatError, match=name) as error:
            look(str(directory))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_of_an_adapter_is_named(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ml.FormatError, match=name):
        look(str(tmp_path))


@families
def test_each_parameter_of_a_model_is_told_once_and_every_tool_reads_it(base, family, page):
    facts = model_facts(base(family))
    expected = {name: tuple(p.shape) for name, p in ml.load_model(base(family)).named_parameters()}
    assert {name: tensor.shape for name, tensor in facts.tensors.items()} == expected
    assert facts.problems == {"minilora": [], "transformers": []}
    assert facts.tokenizer == {"problem": f"{base(family)}: there is no tokenizer.json"}
    assert sum(int(row[0]) for row in rows_of(page(base(family)))[1:]) == len(expected)


def test_a_packed_weight_is_one_tensor_of_its_own_shape_and_all_its_bytes(tmp_path, base):
    facts, dense = look(str(write_base(tmp_path, quantize="nf4"))).model, look(str(base())).model
    assert numbers(facts.tensors) == numbers(dense.tensors) == ml.count_parameters(ml.load_model(tmp_path)).total
    found, expected = ({name: entry.shape for name, entry in each.tensors.items()} for each in (facts, dense))
    assert found == expected
    assert {entry.dtype for entry in facts.tensors.values()} == {"NF4", "F32"}
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert 8 + header + sum(entry.bytes for entry in facts.tensors.values()) == sum(facts.files.values())


def test_a_packed_weight_that_is_not_understood_is_told_in_its_parts(tmp_path):
    tensors = load_file(write_base(tmp_path, quantize="nf4") / "model.safetensors")
    state = next(name for name in tensors if "quant_state" in name)
    tensors[state] = tensors[state][:-1]  # no JSON any more
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    facts = look(str(tmp_path)).model
    assert facts.tensors[state].dtype == "U8"
    assert facts.problems["minilora"]


def test_shards_hold_together_what_one_file_holds(tmp_path, base):
    model, whole = ml.load_model(base()), model_facts(base())
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template=CHATML)
    ml.save_model(model, tmp_path, tokenizer, shard_bytes=5000)
    facts = model_facts(tmp_path)
    assert len(facts.files) > 3
    assert facts.files == {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert facts.tensors == whole.tensors
    assert facts.tokenizer == {"tokens": len(tokenizer), **tokenizer.special_tokens, "chat_template": "yes"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "unexpected: model.layers.3"),
        ({"rope_scaling": 5}, "rope_scaling"),
        ({"hidden_size": "wide", "architectures": 3, "tie_word_embeddings": {}}, "hidden_size"),
    ],
)
def test_a_model_that_minilora_does_not_run_is_told_with_the_reason(copied, change, reason, page):
    write_json(copied / "config.json", read_json(copied / "config.json") | change)
    assert reason in " ".join(model_facts(copied).problems["minilora"])
    with pytest.raises(ml.MiniloraError):
        ml.load_model(copied)
    text = page(copied)
    assert ("quant_method bitsandbytes" in text) == ("quantization_config" in change)
    assert "minilora: no\n" in text


def test_transformers_needs_a_model_type_and_the_format_of_each_file(copied):
    file, config = copied / "model.safetensors", copied / "config.json"
    whole = file.read_bytes()
    save_file(load_file(file), file)
    assert "format" in model_facts(copied).problems["transformers"][0]
    file.write_bytes(whole)
    write_json(config, read_json(config) | {"model_type": None})
    assert model_facts(copied).problems["transformers"] == ["config.json has no model_type"]


@pytest.mark.parametrize("shard", ["../model.safetensors", "gone.safetensors"])
def test_a_shard_that_is_not_there_is_named(copied, shard):
    write_json(copied / INDEX, {"weight_map": {"model.norm.weight": shard}})
    with pytest.raises(ml.FormatError, match=shard):
        look(str(copied))


def test_a_directory_that_holds_nothing_known_is_refused(tmp_path):
    with pytest.raises(ml.FormatError, match=r"config\.json \(a model\)"):
        look(str(tmp_path))
    with pytest.raises(ml.FormatError, match="no such file"):
        look(str(tmp_path / "x"))


@pytest.fixture
def run(tmp_path):
    """The directory of a run that was stopped after step 3."""
    directory = tmp_path / "run"
    saved(directory / "checkpoints" / "step-000002")
    write_json(directory / "checkpoints" / "step-000002" / "state.json", {"step": 2, "tokens": 99})
    defaults = {"lora_r": LoraConfig().r, "seed": 0, "learning_rate": 0.5, "invented_tomorrow": 1}
    record = {"config": defaults, "versions": {}, "data_sha256": {"train.jsonl": "0" * 64}, "starts": [{"step": 0}]}
    write_json(directory / "run.json", record)
    lines = [{"step": i, "loss": i / 2} for i in (1, 2, 3)]
    lines.insert(2, {"step": 2, "eval_loss": 7.0})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_a_run_tells_its_settings_and_how_far_it_is(run, page):
    facts = run_facts(run)
    assert facts["settings"] == {"learning_rate": 0.5, "invented_tomorrow": 1}
    assert (facts["last_step"], facts["evaluation"]) == ({"step": 3, "loss": 1.5}, {"step": 2, "eval_loss": 7.0})
    assert facts["checkpoint"] == "step-000002"
    assert "goes on from step-000002" in page(run)


def test_a_finished_run_is_an_adapter_too(run, page):
    saved(run)
    write_json(run / "summary.json", {"before": {"loss": 4.0}, "after": {"loss": 2.5}, "steps": 3})
    facts = look(str(run))
    assert isinstance(facts.adapter, AdapterFacts)
    assert facts.run["summary"]["after"] == {"loss": 2.5}
    text = page(run)
    assert "goes on" not in text
    assert "loss 2.5" in text


def test_a_checkpoint_is_an_adapter_that_tells_its_step(run, page):
    assert look(str(run / "checkpoints" / "step-000002")).adapter.step == 2
    assert "of step 2\n" in page(run / "checkpoints" / "step-000002")


def test_a_line_of_metrics_that_a_crash_cut_off_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert run_facts(run)["last_step"]["step"] == 3


def test_damage_to_a_run_names_file_and_place(run):
    lines = (run / "metrics.jsonl").read_text()
    for content in ("nonsense\n" + lines, "[1]\n" + lines):
        (run / "metrics.jsonl").write_text(content)
        with pytest.raises(ml.FormatError, match=r"metrics\.jsonl, line 1: "):
            run_facts(run)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
HOLDS = {
    CONFIG_FILE: "peft_type r lora_alpha rank_pattern alpha_pattern bias use_rslora lora_dropout init_lora_weights "
    "target_modules base_model_name_or_path modules_to_save use_dora peft_version target_parameters lora_bias "
    "trainable_token_indices fan_in_fan_out use_qalora",
    "config.json": "model_type architectures hidden_size tie_word_embeddings rope_scaling rope_parameters auto_map "
    "quantization_config head_dim max_position_embeddings layer_types vocab_size",
    "run.json": "config versions data_sha256 starts",
    "summary.json": "before after steps",
    "state.json": "step tokens",
}


@pytest.fixture(scope="module")
def all_in_one(base, tmp_path_factory):
    """A directory that is a model, an adapter and a run."""
    directory = shutil.copytree(base(), tmp_path_factory.mktemp("any") / "all")
    saved(directory)
    write_json(directory / "run.json", {})
    return directory


@pytest.mark.parametrize("file", HOLDS)
@examples(0.5)
@given(st.data())
def test_whatever_a_json_file_holds_it_is_told_or_refused(all_in_one, file, data):
    path = all_in_one / file
    before = path.read_text() if path.exists() else None
    values = data.draw(st.dictionaries(st.sampled_from(HOLDS[file].split()), anything, max_size=4))
    path.write_text(json.dumps(json.loads(before or "{}") | values))
    for as_json in (False, True):
        with contextlib.suppress(ml.MiniloraError):
            assert inspect.run({"path": str(all_in_one), "model": None, "memory": False, "json": as_json}) == 0
    path.unlink() if before is None else path.write_text(before)


def test_json_that_is_nested_deeply_is_told_or_refused(run, page):
    for depth in (300, 800, 100_000):
        (run / "summary.json").write_text('{"before": ' + "[" * depth + "]" * depth + "}")
        with contextlib.suppress(ml.FormatError):
            page(run)
            page(run, json=True)


@pytest.mark.parametrize("name", ["model", "adapter", "run", "checkpoint", "file"])
def test_a_page_fits_the_terminal(name, run, base, page):
    saved(run)
    paths = {"model": base("llama-3.1"), "adapter": run, "run": run, "file": base() / "model.safetensors"}
    text = page(paths.get(name, run / "checkpoints" / "step-000002"), base())
    too_long = [line for line in text.splitlines() if len(line) > WIDTH]
    assert all(len(line.split()[-1]) > WIDTH // 2 for line in too_long)  # names and paths are not broken


def test_json_tells_what_the_files_hold(run, base, page):
    """Of a directory that is a run, an adapter and a model: all that other readers find in its files."""
    shutil.copytree(base(), run, dirs_exist_ok=True)
    model = saved(run, rank_pattern={"o_proj": 2})
    write_json(run / "summary.json", {"steps": 3})
    told = json.loads(page(run, base(), json=True))
    assert set(told) == {"run", "adapter", "model"}
    for kind, file in (("adapter", WEIGHTS_FILE), ("model", "model.safetensors")):
        held = {name: [list(t.shape), t.nbytes] for name, t in load_file(run / file).items()}
        assert {name: [t["shape"], t["bytes"]] for name, t in told[kind]["tensors"].items()} == held
    assert told["adapter"]["config"] == json.loads((run / CONFIG_FILE).read_text())
    assert told["model"]["config"] == json.loads((run / "config.json").read_text())
    assert told["model"]["files"] == {"model.safetensors": (run / "model.safetensors").stat().st_size}
    assert told["run"]["starts"] == [{"step": 0}]
    assert told["run"]["summary"] == {"steps": 3}
    layers = adapter_layers(model)
    ranks = {name: layer.adapters["default"].lora_A.size(0) for name, layer in layers.items()}
    assert {module["module"]: module["rank"] for module in told["adapter"]["modules"]} == ranks
    assert [*told["adapter"]["problems"]] == ["minilora", "PEFT", "vLLM", "llama.cpp", "mlx-lm"]


def test_json_of_a_file_has_each_tensor(tmp_path, page):
    save_file({"a": torch.ones(2, 3), "b.0": torch.ones(1).half()}, tmp_path / "x.safetensors", metadata={"k": "v"})
    told = json.loads(page(tmp_path / "x.safetensors", json=True))["file"]
    assert told["metadata"] == {"k": "v"}
    assert told["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    entries = {"a": {"dtype": "F32", "shape": [2, 3], "bytes": 24}, "b.0": {"dtype": "F16", "shape": [1], "bytes": 2}}
    assert told["tensors"] == entries


THEIRS = {
    "plain": {},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 4}},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", THEIRS)
def test_an_adapter_that_peft_wrote_has_the_deltas_that_peft_computes(tmp_path, base, case, page):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 21, **THEIRS[case]})
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base()), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(tmp_path)
    facts = adapter_facts(tmp_path, base())
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {module.module for module in facts.modules} == set(layers)
    for module in facts.modules:
        layer = layers[module.module]
        assert module.scale == layer.scaling["default"]
        before = layer.base_layer.weight.detach().clone()
        layer.merge()
        change = layer.base_layer.weight.detach() - before
        assert_number(module.delta_norm, change.norm().item(), assert_parity)
        assert_number(module.base_norm, before.norm().item(), assert_parity)
    assert not facts.problems["minilora"]
    assert not facts.problems["PEFT"]
    assert "PEFT: yes\n" in page(tmp_path, base())
