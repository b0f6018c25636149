"""What is said of PEFT and of mlx-lm is so in PEFT and in mlx-lm, also of what is exported to them."""

import warnings

import numpy as np
import pytest
import torch

import minilora as ml
from minilora.testing.compare import assert_parity
from minilora.tools.exporting import export_adapter
from minilora.tools.readers import Base, reader_facts
from tests.files import write_adapter, write_base
from tests.models import perturb_, token_ids
from tests.parity.test_directory_laws import EXPERTS, mixtral
from tests.parity.test_wrappers import TEXT, VISION, WRAPPERS
from tests.parity.theirs import theirs_loaded
from tests.readers import CASES, READERS, RIGHT, config_of, spoil, write_base_of, write_case

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
IDS = token_ids(3, 2, 7, high=50)
MADE = [name for name in CASES if name != "experts"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def effect(base, adapter, trained):
    """What PEFT makes of an adapter on its model, whose trained logits are known: as a verdict, whatever is lost."""
    before = logits(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys
            after = logits(peft.PeftModel.from_pretrained(base, adapter))
    except (RuntimeError, ValueError, KeyError):
        return "refuses it"
    if torch.equal(before, after):
        return "nothing"
    return RIGHT if torch.allclose(after, trained, rtol=1e-4, atol=1e-5) else "something else"


def saved_by_peft(model, directory, **config):
    """Save an adapter of random numbers; the logits of the model with it."""
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **listed)).eval()
    perturb_(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies of the embedding
        theirs.save_pretrained(directory)
    return logits(theirs)


@pytest.mark.parametrize("name", MADE)
def test_each_reader_has_its_verdict_of_what_peft_saves_and_peft_does_so(name, tmp_path):
    base, adapter = write_base_of(tmp_path, name), tmp_path / "adapter"
    trained = saved_by_peft(theirs_loaded(base), adapter, **config_of(name))
    spoil(adapter, name)
    facts = reader_facts(adapter, Base.read(base))
    assert {title: found["verdict"] for title, found in facts.items()} == dict(
        zip(READERS, CASES[name].verdicts, strict=True)
    )
    verdict = facts["peft"]["verdict"]
    expected = {
        "nothing attaches": "nothing",
        "does nothing: B A is zero": "nothing",
        "loses a part": "something else",
    }
    assert effect(theirs_loaded(base), adapter, trained) == expected.get(verdict, verdict)


def test_stacked_experts_attach_in_peft_alone(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    trained = saved_by_peft(model, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=EXPERTS, r=2)
    facts = reader_facts(tmp_path / "adapter", Base.read(tmp_path / "base"))
    assert [facts[title]["verdict"] for title in READERS] == [*CASES["experts"].verdicts]
    assert effect(theirs_loaded(tmp_path / "base"), tmp_path / "adapter", trained) == RIGHT


@pytest.mark.parametrize("name", ["Gemma3", "Qwen3_5"])
def test_in_a_wrapper_only_its_own_names_act_and_export_gives_them(name, tmp_path):
    text, vision, own = WRAPPERS[name]
    config = getattr(transformers, f"{name}Config")(text_config=TEXT | text, vision_config=VISION | vision, **own)
    kinds = {"peft-wrapper": getattr(transformers, f"{name}ForConditionalGeneration")}
    if name == "Qwen3_5":  # transformers reads no text model from Gemma 3's wrapper
        kinds["peft"] = transformers.Qwen3_5ForCausalLM
    directory = tmp_path / "base"
    kinds["peft-wrapper"](config).eval().save_pretrained(directory)
    model = ml.load_model(directory, dtype="float32")
    trained = {"peft": (write_adapter(model, tmp_path / "peft", r=3), model(IDS).detach())}
    theirs, fields = kinds["peft-wrapper"].from_pretrained(directory).eval(), {"target_modules": ["q_proj", "v_proj"]}
    trained["peft-wrapper"] = (tmp_path / "wrapper", saved_by_peft(theirs, tmp_path / "wrapper", **fields))
    for made, (adapter, wanted) in trained.items():
        for title, kind in kinds.items():
            found = effect(kind.from_pretrained(directory).eval(), adapter, wanted)
            verdict = reader_facts(adapter, Base.read(directory), title)[title]["verdict"]
            is_own = title == made
            assert (found, verdict) == ((RIGHT, RIGHT) if is_own else ("nothing", "nothing attaches"))
            export_adapter(adapter, directory, title, tmp_path / f"{made} for {title}")
            assert effect(kind.from_pretrained(directory).eval(), tmp_path / f"{made} for {title}", wanted) == RIGHT


@pytest.mark.parametrize("title", ["vllm", "llama.cpp"])
def test_what_is_made_plain_for_others_is_the_same_in_peft(title, tmp_path):
    base = write_base(tmp_path / "base", num_hidden_layers=2)
    scales = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    trained = saved_by_peft(theirs_loaded(base), tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **scales)
    export_adapter(tmp_path / "adapter", base, title, tmp_path / "out")
    assert_parity(logits(peft.PeftModel.from_pretrained(theirs_loaded(base), tmp_path / "out")), trained)


MLX = {
    "plain": ("llama", {}),
    "scales": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
    "embedding and head": ("llama", {"target_modules": ("embed_tokens", "lm_head", "q_proj")}),
    "DoRA": ("llama", {"use_dora": True, "use_rslora": True}),
    "Qwen 3": ("qwen3", {"rank_pattern": {"q_proj": 2}}),
}


@pytest.mark.parametrize("name", MLX)
def test_what_is_exported_to_mlx_acts_there(name, tmp_path):
    mx, theirs = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    family, config = MLX[name]
    more = {"rms_norm_eps": 1e-6, "head_dim": 6, "rope_theta": 10_000.0}
    base = write_base(tmp_path / "base", family, num_hidden_layers=2, **more)
    model = ml.load_model(base)
    adapter = write_adapter(model, tmp_path / "adapter", r=3, lora_alpha=7, **config)
    with pytest.raises(AttributeError):  # PEFT's layout
        theirs.load_adapters(theirs.load_model(base)[0], str(adapter))
    export_adapter(adapter, base, "mlx-lm", tmp_path / "out")
    found = theirs.load_adapters(theirs.load_model(base)[0], str(tmp_path / "out")).eval()(mx.array(IDS.numpy()))
    assert_parity(torch.from_numpy(np.array(found)), model(IDS).detach())


def test_mlx_gives_an_adapter_of_a_tied_embedding_to_the_head_too(tmp_path):
    """So it is refused, as is said."""
    pytest.importorskip("mlx.core")
    base, adapter = write_case(tmp_path, "tied embedding")
    with pytest.raises(ml.TargetError, match="which are tied"):
        export_adapter(adapter, base, "mlx-lm", tmp_path / "out")
