"""Models of transformers that also see images: their text models, merged in their places."""

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.cli import main
from minilora.models.config import TEXT_SIZES as OMITTED
from minilora.models.config import parse_config
from minilora.testing.compare import assert_parity
from minilora.tools.merging import Merge, merge_directory
from tests.files import write_adapter
from tests.models import fill_, token_ids
from tests.parity.test_quant_files import theirs_logits
from tests.test_config_json import meaning

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
TEXT = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN = {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
QWEN |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 6}
WRAPPERS = {  # the class, the text model, the vision model, and the wrapper's own keys
    "Gemma3": ({"model_type": "gemma3_text"}, {"model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4}),
    "Mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 8}, {}),
    "Mistral3 of Ministral 3": ({"model_type": "ministral3"}, {"model_type": "pixtral", "head_dim": 8}, {}),
    "Qwen3_5": (QWEN, {"model_type": "qwen3_5", "out_hidden_size": 24, "num_heads": 2, "depth": 2}, {}),
    "Llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", "projection_dim": 16}, {}),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_logits_are_theirs_and_they_load_what_we_merge(name, tmp_path):
    text, vision, own = WRAPPERS[name]
    name = name.partition(" ")[0]
    config = getattr(transformers, f"{name}Config")(text_config=TEXT | text, vision_config=VISION | vision, **own)
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    theirs = kind(config).eval()
    fill_(theirs, 0)
    theirs.save_pretrained(tmp_path / "wrapper")
    ours, ids = ml.load_model(tmp_path / "wrapper", dtype="float32"), token_ids(0, 2, 20)
    with torch.no_grad():
        assert_parity(ours(ids), theirs(input_ids=ids).logits)
    write_adapter(ours, tmp_path / "adapter", r=3, lora_alpha=21)
    merge_directory(Merge(tmp_path / "wrapper", [tmp_path / "adapter"]), tmp_path / "merged")
    with torch.no_grad():
        assert_parity(ours(ids), kind.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("wrapper", "merged"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("language_model" in key and key.endswith("weight") for key in changed)


WIDE = {"hidden_size": 64, "intermediate_size": 128}  # their kernel needs rows that end where a block does
WIDE |= dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16)


@pytest.mark.parametrize("name", WRAPPERS)
def test_in_four_bits_logits_are_those_of_bitsandbytes(name, tmp_path):
    """Quantized by us while it is read or to a directory of the text model, and by them with all parts."""
    pytest.importorskip("bitsandbytes")
    text, vision, own = WRAPPERS[name]
    name = name.partition(" ")[0]
    vision = VISION | vision | ({"out_hidden_size": 64} if name == "Qwen3_5" else {})
    config = getattr(transformers, f"{name}Config")(text_config=TEXT | text | WIDE, vision_config=vision, **own)
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    dense, theirs_four, ours_four = (tmp_path / folder for folder in ("dense", "theirs", "ours"))
    fill_(model := kind(config), 0)
    model.save_pretrained(dense)
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = kind.from_pretrained(dense, quantization_config=options, device_map={"": "cpu"}).train()
    theirs.save_pretrained(theirs_four)
    assert main(["quantize", f"--model={dense}", f"--out={ours_four}"]) == 0
    ids = token_ids(0, 2, 20)
    expected = theirs_logits(theirs, ids)
    for directory, quantize in ((dense, "nf4"), (theirs_four, None), (ours_four, None)):
        with torch.no_grad():
            assert_parity(ml.load_model(directory, "float32", quantize=quantize)(ids), expected)
    in_text = transformers.AutoModelForCausalLM.from_pretrained(ours_four, device_map={"": "cpu"}).train()
    assert_parity(theirs_logits(in_text, ids), expected)


LINEAR = {"rope_type": "linear", "factor": 8.0}
PUBLISHED = [  # text_config of Gemma 3 12B and 4B, and as short as it can be
    {"model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "rope_scaling": LINEAR, "sliding_window": 1024},
    {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    | {"num_attention_heads": None, "rope_scaling": LINEAR, "sliding_window": 1024},
    *({"model_type": kind} for kind in OMITTED),
]


@pytest.mark.parametrize("text", PUBLISHED, ids=str)
def test_sizes_that_a_published_config_leaves_out_are_those_of_transformers(text):
    given = {key: value for key, value in text.items() if value is not None}
    theirs = transformers.AutoConfig.for_model(**given).to_dict()
    assert meaning(parse_config({"text_config": text})) == meaning(parse_config(theirs))
    with pytest.raises(ml.ConfigError, match="vocab_size: found None"):
        parse_config(text)
