"""The whole family in files: PEFT computes our logits with what we saved, and we PEFT's with what PEFT saved."""

import copy
import functools
import json
import re
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.initialize import gaussian_factors
from minilora.adapters.layout import CONFIG_FILE, PEFT_DEFAULTS, READ_FIELDS, WEIGHTS_FILE
from minilora.data import collate
from minilora.lora import initial_factors, lora_delta
from minilora.models.prompts import PROMPTS_FILE, Prompts
from minilora.testing.compare import MATHS, PARITY, assert_parity, relative
from minilora.training import adamw, train_step
from tests.files import edit, save_file
from tests.models import WHOLE, examples, long, perturb_, seeds, tiny_model, token_ids
from tests.parity.theirs import theirs_loaded
from tests.runs import write_chat_models
from tests.text import CHATML

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = token_ids(3, 2, 7)
# In float32 ours is our decoder, whose roundings are others; in float64 it is theirs, which rounds to float32 inside.
ALLOWED = {torch.float32: PARITY, torch.float64: MATHS}
MOVED = ("pissa", "olora")  # PEFT takes a part off the weight, in float32
PATTERNS = (  # names and ends, overlapping, in both orders; sorted, as PEFT writes them, is only the second
    {},
    {"layers.1.self_attn.q_proj": 3, "q_proj": 1},
    {"q_proj": 1, "layers.1.self_attn.q_proj": 3},
    {"self_attn.q_proj": 2, "^model.layers.0.self_attn.q_proj": 4},
)
EXPRESSIONS = ({r"layers\.\d+\.self_attn\.q_proj": 2, "^model.layers.0.self_attn.q_proj": 4, "self_attn.q_proj": 1},)
NAMES = st.lists(st.sampled_from(["k_proj", "o_proj", "up_proj", "down_proj"]), max_size=2, unique=True)
ROWS = (None, [3, 1], {"embed_tokens": [7, 60, 2]})
ROWS_OF_HEAD = tuple({"embed_tokens": [3, 1], "lm_head": ids} for ids in ([3, 1], [1, 60, 2]))
SAVED = (None, None, ["gate_proj"], ["gate_proj", "model.norm"], ["lm_head", "gate_proj"], ["embed_tokens"])


BASES = (*[WHOLE] * 4, "olmo2", "gemma3", "olmo3", "ministral3", "qwen3.5")
QWEN35 = {"o_proj": "out_proj", "k_proj": "in_proj_qkv", "up_proj": "in_proj_a", "down_proj": "in_proj_z"}


@functools.cache
def originals(is_tied, dtype, name):
    """The same random model, ours and transformers'."""
    kinds = {"num_hidden_layers": 2, "layer_types": None}
    if name == "qwen3.5":
        kinds = {"num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "linear_attention"]}
    ours = tiny_model(name, dtype=dtype, tie_word_embeddings=is_tied, **kinds)
    with tempfile.TemporaryDirectory() as directory:
        ml.save_model(ours, directory)
        theirs = theirs_loaded(directory, dtype)
    theirs.name_or_path = theirs.config._name_or_path = ""  # the directory is gone
    return ours if dtype == torch.float32 else theirs, theirs


def ours_of(is_tied=False, dtype=torch.float32, name=WHOLE):
    return copy.deepcopy(originals(is_tied, dtype, name)[0])


def theirs_of(is_tied=False, dtype=torch.float32, name=WHOLE):
    return copy.deepcopy(originals(is_tied, dtype, name)[1])


def loaded(directory, base=None):
    model = ours_of() if base is None else base
    ml.load_adapter(model, directory)
    return model


def theirs_loading(directory, base=None, **options):
    return peft.PeftModel.from_pretrained(theirs_of() if base is None else base, directory, **options)


def theirs_attached(base=None, name="default", **fields):
    """PEFT's fresh adapter, not yet moved."""
    return peft.get_peft_model(theirs_of() if base is None else base, peft.LoraConfig(**fields), adapter_name=name)


def logits(model):
    found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


@st.composite
def families(draw, patterns, inits, bases):
    """Fields of a config that go together, and of a base: is it tied, its dtype and family."""

    def some(*values):
        return draw(st.sampled_from(values))

    base = some(*bases)
    kind = some("lora", "dora", "lora_bias")
    init = True if kind == "lora_bias" else some(True, "gaussian", *inits)
    others = [] if init in MOVED else ["lm_head"]
    if init is True and kind != "lora_bias":
        others += ["embed_tokens"]
    others = draw(st.lists(st.sampled_from(others), unique=True, max_size=2)) if others else []
    saved = [name for name in some(*SAVED) or () if name not in others]
    has_rows = not {*others, *saved} & {"embed_tokens", "lm_head"}
    fields = {
        "r": some(1, 2, 3),
        "lora_alpha": some(0.5, 3, 7),
        "target_modules": ["q_proj", *draw(NAMES), *others],
        "rank_pattern": some(*patterns),
        "alpha_pattern": some(*patterns),
        "use_rslora": draw(st.booleans()),
        "use_dora": kind == "dora",
        "init_lora_weights": init,
        "bias": some("none", "all", "lora_only"),
        "lora_bias": kind == "lora_bias",
        "modules_to_save": saved or None,
        "trainable_token_indices": some(*ROWS, *ROWS_OF_HEAD) if has_rows else None,
    }
    renamed = QWEN35 if base == "qwen3.5" else {}
    fields["target_modules"] = [renamed.get(each, each) for each in fields["target_modules"]]
    fields["modules_to_save"] = [renamed.get(each, each) for each in saved] or None
    is_exact = init not in MOVED and base != "gemma3"  # whose embedding is a class of its own in transformers
    return fields, (draw(st.booleans()), some(torch.float32, torch.float64) if is_exact else torch.float32, base)


def merges_there(fields, is_tied, _, name):
    """Does PEFT's merge give what its layers computed? It changes a weight that is shared for both, and
    has no place for B's bias where the base has none.
    """
    touched = {*fields["target_modules"], *(fields["modules_to_save"] or ())} & {"embed_tokens", "lm_head"}
    if fields["trainable_token_indices"] == ROWS_OF_HEAD[1]:
        touched.add("embed_tokens")
    lacks_bias = name != WHOLE or "lm_head" in touched
    return not (is_tied and touched) and not (fields["lora_bias"] and lacks_bias)


each_base = pytest.mark.parametrize("bases", [BASES, *long(*(((name,),) for name in BASES[4:]))], ids=str)


@each_base
@examples(4)
@given(st.data(), seeds)
def test_what_we_save_peft_computes_with(tmp_path_factory, bases, data, seed):
    fields, base = data.draw(families(PATTERNS + EXPRESSIONS, ["pissa"], bases))
    directory = tmp_path_factory.mktemp("ours")
    dtype = base[1]
    ours = ours_of(*base)
    ml.attach(ours, ml.LoraConfig(**fields), seed=seed, dtype=dtype)
    perturb_(ours, seed)
    ml.save_adapter(ours, directory)
    expected = logits(ours)
    theirs = theirs_loading(directory, theirs_of(*base))
    assert_parity(expected, logits(theirs), ALLOWED[dtype])
    ml.merge(ours)
    assert_parity(logits(ours), expected, ALLOWED[dtype])
    if merges_there(fields, *base):
        assert_parity(expected, logits(theirs.merge_and_unload()), ALLOWED[dtype])


@each_base
@examples(4)
@given(st.data(), seeds)
def test_what_peft_saves_we_compute_with(tmp_path_factory, bases, data, seed):
    """A raw PiSSA or OLoRA among it: there the decomposition is repeated."""
    patterns = tuple(dict(sorted(pattern.items())) for pattern in PATTERNS)
    fields, base = data.draw(families(patterns, [False, *MOVED], bases))
    directory = tmp_path_factory.mktemp("theirs")
    dtype = base[1]
    theirs = theirs_attached(theirs_of(*base), **fields).eval()
    perturb_(theirs, seed)
    theirs.save_pretrained(directory)
    assert json.loads((directory / CONFIG_FILE).read_text())["init_lora_weights"] == fields["init_lora_weights"]
    ours = loaded(directory, ours_of(*base))
    assert_parity(logits(ours), logits(theirs), ALLOWED[dtype])
    again = tmp_path_factory.mktemp("again")
    ml.save_adapter(ours, again)
    ml.merge(ours)
    assert_parity(logits(ours), logits(theirs), ALLOWED[dtype])
    assert_parity(logits(theirs_loading(again, theirs_of(*base))), logits(theirs), ALLOWED[dtype])


@pytest.mark.parametrize(
    ("is_tied", "fields"),
    [
        (True, {"target_modules": ["q_proj", "embed_tokens"]}),
        (True, {"target_modules": ["q_proj", "lm_head"]}),
        (True, {"target_modules": ["q_proj"]}),
        *(
            (True, {"target_modules": ["q_proj"], "modules_to_save": names})
            for names in (["embed_tokens"], ["lm_head"])
        ),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (False, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    ],
)
def test_what_peft_has_tied_or_not_loads_as_adapters_of_their_own(is_tied, fields, tmp_path):
    theirs = theirs_attached(theirs_of(is_tied), ensure_weight_tying=True, r=3, lora_alpha=21, **fields).eval()
    perturb_(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ours_of(is_tied)
    ml.load_adapter(ours, tmp_path / "theirs", trainable=True)
    assert_parity(logits(ours), logits(theirs))
    perturb_(ours)
    ml.save_adapter(ours, tmp_path / "ours")
    assert_parity(logits(theirs_loading(tmp_path / "ours", theirs_of(is_tied))), logits(ours))


def bart():
    """A small model of transformers that scales its embeddings."""
    sizes = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 1}
    ends = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 9, "decoder_ffn_dim": 9}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "scale_embedding": True, "d_model": 24}
    config = transformers.BartConfig(**sizes, **ends, **heads, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [bart, functools.partial(theirs_of, name="gemma3")], ids=["bart", "gemma3"])
@pytest.mark.parametrize("fields", [{"trainable_token_indices": IDS[0, :3].tolist()}, {}])
def test_scaled_embeddings_of_transformers_compute_what_peft_computes(make, fields, tmp_path):
    base, targets = make(), ["q_proj"] if fields else ["embed_tokens", "q_proj"]
    theirs = theirs_attached(copy.deepcopy(base), r=3, lora_alpha=21, target_modules=targets, **fields).eval()
    perturb_(theirs)
    theirs.save_pretrained(tmp_path)
    ml.load_adapter(base, tmp_path)
    assert_parity(logits(base), logits(theirs))


TIED = SHARED, ENCODER, HEAD = "shared", "encoder.embed_tokens", "lm_head"  # and "decoder.embed_tokens"
ROWS_OF_TIED = [[3, 1], *({name: [3, 1]} for name in TIED), {"embed_tokens": [3, 1]}]
ROWS_OF_TIED += [{SHARED: [3, 1], other: ids} for other in (ENCODER, HEAD) for ids in ([3, 1], [5])]


@pytest.mark.parametrize("rows", ROWS_OF_TIED, ids=str)
def test_tied_modules_share_the_rows_of_the_input_embedding(rows, tmp_path):
    base, fields = bart(), {"target_modules": ["q_proj"], "trainable_token_indices": rows}
    theirs = theirs_attached(copy.deepcopy(base), **fields).eval()
    perturb_(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_parity(logits(loaded(tmp_path / "theirs", copy.deepcopy(base))), logits(theirs))
    ours = copy.deepcopy(base)
    ml.attach(ours, ml.LoraConfig(**fields))
    perturb_(ours)
    ml.save_adapter(ours, tmp_path / "ours")
    assert_parity(logits(theirs_loading(tmp_path / "ours", base)), logits(ours))


@pytest.mark.parametrize("name", BASES[3:])
def test_a_fine_tune_falls_step_by_step_as_with_peft(name, tmp_path):
    theirs = theirs_attached(theirs_of(name=name), r=3, lora_alpha=21, target_modules="all-linear")
    perturb_(theirs)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(name=name)
    ml.load_adapter(ours, tmp_path, trainable=True)
    losses, rows = [], [ml.Example(row.tolist(), row.tolist()) for row in IDS]
    optimizer = adamw([p for p in ours.parameters() if p.requires_grad])
    theirs_optimizer = adamw([p for p in theirs.parameters() if p.requires_grad])
    for group in (*optimizer.param_groups, *theirs_optimizer.param_groups):
        group["lr"] = 0.01
    for _ in range(10):  # later AdamW divides one rounding by another
        theirs_optimizer.zero_grad()
        loss = theirs(input_ids=IDS, labels=IDS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        theirs_optimizer.step()
        step = train_step(ours, optimizer, [collate(rows, torch.device("cpu"))])
        losses.append((step.loss, loss.item()))
    ours_fall, theirs_fall = torch.tensor(losses).unbind(1)
    assert_parity(ours_fall, theirs_fall)
    assert ours_fall[-1] < 0.7 * ours_fall[0]


def saved_by_peft(directory, name="default", **fields):
    """Their model, whose adapter is in the directory."""
    fields = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 21, **fields}
    theirs = theirs_attached(name=name, **fields).eval()
    perturb_(theirs, 0)
    theirs.save_pretrained(directory)
    return theirs


SAVED_TOO = {"bias": "all", "modules_to_save": ["lm_head", "post_attention_layernorm"]}
EVERYTHING = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, **SAVED_TOO}
ADAPTERS = ["second", "my-adapter", "lora_A", "lora_B", "7", "model"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        *((fields, name) for fields in ({"lora_bias": True}, EVERYTHING) for name in ADAPTERS),
        *(({"trainable_token_indices": [3, 1]}, name) for name in (*ADAPTERS, "weight", "bias")),
    ],
)
def test_an_adapter_of_any_name_is_read_from_its_directory(name, fields, tmp_path):
    theirs = saved_by_peft(tmp_path, name, **fields)
    assert_parity(logits(loaded(tmp_path / name)), logits(theirs))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_where_peft_takes_the_adapter_s_name_for_a_part_of_another_it_is_refused(name, tmp_path):
    """It writes `lm_head` for `lm_head.weight`, and does not find it again."""
    saved_by_peft(tmp_path, name, **EVERYTHING)
    with pytest.raises(ml.FormatError, match=r"weights lacks|safetensors lacks"):
        loaded(tmp_path / name)


@pytest.mark.parametrize("name", ["default", "weight", "my-adapter"])
@pytest.mark.parametrize("fields", [{"use_dora": True, "bias": "lora_only"}, {"lora_bias": True}])
def test_names_that_contain_the_adapter_s_own_are_read_as_in_peft(name, fields, tmp_path):
    """As of a whole state dict, which some have saved."""
    theirs = saved_by_peft(tmp_path, **fields)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    for key in [key for key in tensors if ".lora_" in key]:
        head, tail = key.split(".lora_")
        first, *rest = tail.split(".")
        tensors[".".join((head, f"lora_{first}", name, *rest))] = tensors.pop(key)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    assert_parity(logits(loaded(tmp_path)), logits(theirs))


OF_OTHER_KINDS = {
    "alora_invocation_tokens": [1, 2],
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
    "peft_type": "ADALORA",
    "qalora_group_size": 8,
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 8},
}


@pytest.mark.parametrize(
    ("path", "kind", "draw"),
    [
        ("linear", True, lambda generator: initial_factors(4, 12, 20, generator).values()),
        ("linear", "gaussian", lambda generator: gaussian_factors((4, 12), (20, 4), generator)),
        ("lookup", True, lambda generator: gaussian_factors((4, 10), (6, 4), generator, is_embedding=True)),
    ],
)
def test_the_same_start_values_are_drawn(path, kind, draw):
    base = nn.ModuleDict({"linear": nn.Linear(12, 20), "lookup": nn.Embedding(10, 6)})
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["linear", "lookup"]))
    torch.manual_seed(7)
    layer = theirs.base_model.model[path]
    layer.reset_lora_parameters("default", kind)
    factors = {name: tensor for name, tensor in layer.named_parameters() if ".lora_" in f".{name}"}
    for ours, (_, drawn) in zip(draw(torch.Generator().manual_seed(7)), sorted(factors.items()), strict=True):
        assert_parity(ours, drawn)


def test_a_field_of_a_later_version_is_accepted_only_if_it_is_empty(tmp_path):
    """PEFT drops it with a warning, and computes without it."""
    theirs = saved_by_peft(tmp_path)
    for value in (None, False, 0, 0.0, "", [], {}):
        edit(tmp_path, peft_version="0.99.0", use_something=value)
        assert_parity(logits(loaded(tmp_path)), logits(theirs))
    for value in (True, 1, 0.5, "linear", ["q_proj"], {"rate": 0}):
        edit(tmp_path, use_something=value)
        with pytest.raises(ml.FormatError, match=f"use_something: found {re.escape(repr(value))}"):
            loaded(tmp_path)
    with pytest.warns(UserWarning, match="use_something"):
        theirs_loading(tmp_path)
    for key, value in OF_OTHER_KINDS.items():  # what changes what an adapter computes
        saved_by_peft(tmp_path)
        edit(tmp_path, **{key: value})
        with pytest.raises(ml.FormatError, match=f"{key}: found"):
            loaded(tmp_path)


def test_every_field_that_peft_writes_is_known_and_written_alike(tmp_path):
    saved_by_peft(tmp_path, task_type="CAUSAL_LM")
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert written.keys() - {"base_model_name_or_path"} == (PEFT_DEFAULTS.keys() | READ_FIELDS | {"target_modules"})
    for key, value in PEFT_DEFAULTS.items():
        assert key in READ_FIELDS or written[key] == value
    ours = loaded(tmp_path)
    ml.save_adapter(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG_FILE).read_text()) == {
        **written,
        "target_modules": sorted(written["target_modules"]),
    }


@pytest.mark.parametrize(
    ("fields", "weights"),
    [({}, [0.7, 0.3]), ({"rank_pattern": {"1": 4}}, [2.0, -0.5]), ({"use_rslora": True}, [0.7, 0.3])],
)
def test_a_sum_is_what_peft_makes_unless_it_is_scaled_twice_there(tmp_path, fields, weights):
    """PEFT keeps `use_rslora` for the sum, whose scale then is √r."""
    base = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 9))
    configs = [{"target_modules": ["0", "1"], "lora_alpha": 7}, {"target_modules": ["1"], "lora_alpha": 2}]
    first, second = (peft.LoraConfig(r=3, **fields, **config) for config in configs)
    theirs = peft.get_peft_model(copy.deepcopy(base), first, "A")
    theirs.add_adapter("B", second)
    theirs.base_model.set_adapter(["A", "B"])
    perturb_(theirs)
    theirs.save_pretrained(tmp_path)
    for name in "AB":
        ml.load_adapter(base, tmp_path / name, name)
    ml.combine_adapters(base, dict(zip("AB", weights, strict=True)), "sum")
    theirs.add_weighted_adapter(["A", "B"], weights, "sum", "cat")
    for path, layer in adapter_layers(base).items():
        found, their = layer.adapters["sum"], theirs.base_model.model.get_submodule(path)
        names = [name for name in "AB" if name in their.lora_A]
        expected = sum(weights["AB".index(name)] * their.get_delta_weight(name) for name in names)
        assert_parity(lora_delta(found.lora_A, found.lora_B, found.scale), expected)
        assert (relative(their.get_delta_weight("sum"), expected, PARITY) < 1) == ("use_rslora" not in fields)


def test_the_record_of_prompts_does_not_disturb_peft_and_transformers(tmp_path):
    directory = write_chat_models(tmp_path)
    for name in ("chat", "chat-adapter"):
        (directory / name / PROMPTS_FILE).write_text(json.dumps(vars(Prompts("plain", "Be kind."))))
    assert transformers.AutoTokenizer.from_pretrained(directory / "chat").chat_template == CHATML
    assert theirs_loading(directory / "chat-adapter", theirs_loaded(directory / "chat")).active_adapters == ["default"]
