"""What is said of PEFT is so in PEFT, also of what is exported to it; of mlx-lm, see test_conformance.py."""

import warnings

import pytest
import torch

import minilora as ml
from minilora.tools.exporting import export_adapter
from minilora.tools.readers import Base, reader_facts
from tests.files import write_adapter
from tests.models import perturb_, token_ids
from tests.parity.test_directory_laws import EXPERTS, mixtral
from tests.parity.test_wrappers import TEXT, VISION, WRAPPERS
from tests.parity.theirs import theirs_loaded
from tests.readers import CASES, READERS, RIGHT, config_of, spoil, write_base_of

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
