"""On pretrained models, SmolLM2-135M-Instruct and Gemma 3 270M, against transformers and PEFT.

They are made once by `scripts/pretrained.py` and kept in `.cache/`; their weights were quantized before.
"""

import copy
import json
import statistics
import subprocess
import sys
from random import Random

import pytest
import tokenizers
import torch

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.cli import main
from minilora.data import collate
from minilora.files import BUILTIN
from minilora.runs.encoders import encode_rows
from minilora.runs.evaluate import held_out_loss
from minilora.runs.formats import Row
from minilora.runs.inputs import find_splits
from minilora.testing.compare import GRADIENT_PARITY, assert_parity, relative
from minilora.tools.merging import Merge, merge_directory
from minilora.training import token_loss, train_step
from tests import files
from tests.models import randomize_adapters_
from tests.runs import SETTINGS, words, write_rows
from tests.test_memory import planned

pytestmark = pytest.mark.real
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

QUESTIONS = ["What is the capital of France?", "Write a haiku about rain.", "Why is the sky blue?"]
COMMAND = ["--data", BUILTIN, "--batch-size", "16", "--learning-rate", "1e-3", "--epochs", "1", "--warmup-steps", "10"]
SCRIPTS = {
    "Latin": "the quick brown fox don't JUMPS over été naïve it's we'LL",
    "Cyrillic": "съешь же ещё этих мягких французских булок да выпей чаю",
    "Greek": "ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "Chinese": "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往",
    "Japanese": "いろはにほへと散りぬるをカタカナ",
    "Korean": "키스의 고유조건은 입술끼리 만나야 하고",
    "Arabic": "صِف خَلقَ خَودٍ كَمِثلِ الشَمسِ",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "signs": "🚀😶\u200d🌫️ ✅ x² ½ <b>1945</b> {}[]()==!=-> 3.45 \r\n",
}


@pytest.fixture(autouse=True)
def _all_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session", params=["smollm2", "gemma3-270m"])
def directory(request):
    return files.pretrained(request.param)


@pytest.fixture(scope="session")
def tokenizer(directory):
    return ml.load_tokenizer(directory)


@pytest.fixture
def ours(directory):
    return ml.load_model(directory, dtype="float32")


@pytest.fixture
def theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def question_ids(tokenizer, question):
    if tokenizer.template is None:
        return tokenizer.encode(question)
    return tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True)


def drawn_texts(count):
    """Pieces of words of one script, with spaces, digits and line breaks between them."""
    random = Random(0)
    for i in range(count):
        words = [*SCRIPTS.values()][i % len(SCRIPTS)]
        starts = [random.randrange(len(words)) for _ in range(random.randrange(1, 12))]
        pieces = [words[start : start + random.randrange(1, 15)] for start in starts]
        yield "".join(piece + random.choice(["", " ", "  ", "\n", "\n\n", " 12 ", ", ", "\t"]) for piece in pieces)


def rows():
    """Rows of unequal answers: prompt and completion, as they are in the built-in data, and longer ones."""
    answers = ["animal", "a plant, which grows", "food", "it is said to be a place " * 3]
    texts = [{"prompt": f"Question {i}:", "completion": f" {answer}"} for i, answer in enumerate(answers)]
    return [Row(text, f"row {i}") for i, text in enumerate(texts)]


def theirs_loss(model, batch):
    """The sum over labelled tokens, each row run by itself."""
    total, targets = 0.0, torch.full_like(batch.tokens, -100).index_put((batch.label_positions,), batch.labels)
    for tokens, wanted in zip(batch.tokens.split(batch.lengths), targets.split(batch.lengths), strict=True):
        logits = model(tokens[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return total


def test_logits_equal_transformers(ours, theirs, tokenizer):
    with torch.no_grad():
        for question in QUESTIONS:
            ids = torch.tensor([question_ids(tokenizer, question)])
            assert_parity(ours(ids), theirs(ids).logits)


def test_transformers_reads_what_is_merged(directory, tokenizer, tmp_path):
    ours, ids = ml.load_model(directory, dtype="float32"), torch.tensor([question_ids(tokenizer, QUESTIONS[0])])
    files.write_adapter(ours, tmp_path / "adapter", r=4, lora_alpha=1)
    merge_directory(Merge(directory, [tmp_path / "adapter"], dtype="float32"), tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert_parity(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forecast_is_within_10_percent_of_the_peak_of_a_run(dtype, directory, tmp_path):
    (tmp_path / "model").symlink_to(directory)
    write_rows(tmp_path / "rows.jsonl", 24, ["the town by the sea " * 6])
    training = {"batch_size": 8, "max_steps": 2, "gradient_checkpointing": "none"}
    defaults = dict.fromkeys(SETTINGS) | {"general_data": "none", "samples": 0, "dtype": dtype, "device": "cpu"}
    command = words(tmp_path, tmp_path / "run", **defaults | training)
    subprocess.run([sys.executable, "-m", "minilora", *command], check=True, capture_output=True)
    _, forecasts = planned(tmp_path, tmp_path / "run", dtype, **training)
    taken = json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_bytes"]
    assert taken == pytest.approx(forecasts["none"].peak, rel=0.1)


def test_64_greedy_tokens_equal_transformers(ours, theirs, tokenizer):
    ids = question_ids(tokenizer, QUESTIONS[2])
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert ml.generate(ours, [ids], max_new_tokens=64)[0] == expected[0, len(ids) :].tolist()


def test_token_ids_of_500_texts_equal_those_of_transformers(directory, tokenizer):
    """They convert the GGUF file themselves, but forget that SmolLM2 splits text before and after each digit."""
    theirs = transformers.AutoTokenizer.from_pretrained(directory.parent, gguf_file=f"{directory.name}.gguf")
    backend = theirs.backend_tokenizer
    if directory.name == "smollm2":
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    for text in drawn_texts(500):
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text).ids
        assert tokenizer.decode(ids) == text


def test_a_chat_template_renders_as_theirs(directory, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.template is None) == (theirs.chat_template is None) == ("gemma" in directory.name)
    for system in ([], [{"role": "system", "content": "Be brief."}]) if tokenizer.template else []:
        turns = [*system, {"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": " Hello."}]
        for messages, asks in ((turns, False), (turns[:-1], True)):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
            assert tokenizer.render(messages, add_generation_prompt=asks) == expected


@pytest.mark.parametrize(
    ("quantize", "use_dora"),
    [
        (None, False),
        pytest.param("nf4", False, marks=pytest.mark.long),
        pytest.param(None, True, marks=pytest.mark.long),
    ],
    ids=["LoRA", "QLoRA", "DoRA"],
)
def test_ten_steps_have_the_losses_of_peft(directory, tokenizer, tmp_path, quantize, use_dora):
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": four_bits} if quantize else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    ours = ml.load_model(directory, dtype="float32", quantize=quantize)
    ml.attach(ours, ml.LoraConfig(r=4, lora_alpha=28, use_dora=use_dora))
    ml.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).train()
    batch = collate(encode_rows(rows()[:2], tokenizer, ml.DataConfig()), torch.device("cpu"))
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.0)
        for model in (ours, theirs)
    ]
    losses = []
    for _ in range(10):
        step = train_step(ours, optimizers[0], [batch])
        loss = theirs_loss(theirs, batch) / len(batch.labels)
        optimizers[1].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizers[1].step()
        losses.append((step.loss, loss.detach()))
    assert losses[-1][0] < 0.9 * losses[0][0]  # it learns, so a step that was not made would show
    for ours_loss, theirs_loss_ in losses:
        assert_parity(ours_loss, theirs_loss_, GRADIENT_PARITY)


@pytest.mark.parametrize("use_rslora", [False, pytest.param(True, marks=pytest.mark.long)])
def test_loss_and_gradients_equal_peft_with_a_random_adapter(ours, theirs, tokenizer, tmp_path, use_rslora):
    ml.attach(ours, ml.LoraConfig(r=4, lora_alpha=28, use_rslora=use_rslora))
    randomize_adapters_(ours)
    with torch.no_grad():
        for layer in adapter_layers(ours).values():
            layer.adapters["default"].lora_B.mul_(0.05)
    ml.save_adapter(ours, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    batch = collate(encode_rows(rows(), tokenizer, ml.DataConfig()), torch.device("cpu"))
    exact = copy.deepcopy(wrapped).double()
    ours_loss, peft_loss = token_loss(ours, batch)[0], theirs_loss(wrapped, batch)
    assert_parity(ours_loss, peft_loss, GRADIENT_PARITY)
    for loss in (ours_loss, peft_loss, theirs_loss(exact, batch)):
        loss.backward()
    ours_gradients = {}
    for path, layer in adapter_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            name = f"base_model.model.{path}.{factor}.default.weight"
            ours_gradients[name] = getattr(layer.adapters["default"], factor).grad
    exact_gradients, theirs_gradients = (
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (exact, wrapped)
    )
    assert ours_gradients.keys() == theirs_gradients.keys()
    assert len(ours_gradients) == 2 * 7 * ours.config.num_hidden_layers
    ours_errors, theirs_errors = (
        [relative(gradients[name], exact_gradients[name], GRADIENT_PARITY) for name in exact_gradients]
        for gradients in (ours_gradients, theirs_gradients)
    )
    for middle_or_worst in (statistics.median, max):
        assert middle_or_worst(ours_errors) <= 2 * middle_or_worst(theirs_errors)
    assert max(theirs_errors) < 30  # else twice their error would say little; 13 on AMX


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fine_tuned_on_definitions_it_learns_and_peft_and_transformers_agree(
    directory, tmp_path, tokenizer, theirs, seed
):
    out, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["finetune", "--model", str(directory), "--out", str(out), "--seed", str(seed), *COMMAND]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["accuracy"] < 0.6
    assert summary["after"]["accuracy"] > 0.9

    assert main(["merge", "--adapter", str(out), "--out", str(merged), "--dtype", "float32"]) == 0
    test_rows = ml.load_dataset(find_splits(BUILTIN)["test"][0], tokenizer)[:200]
    ours = ml.load_model(directory, dtype="float32")
    ml.load_adapter(ours, out)
    ours_loss = torch.tensor(held_out_loss(ours, test_rows))
    with torch.no_grad():
        batch = collate(test_rows, torch.device("cpu"))
        in_peft = theirs_loss(peft.PeftModel.from_pretrained(theirs, out).eval(), batch) / len(batch.labels)
        in_transformers = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        assert_parity(ours_loss, in_peft)
        assert_parity(ours_loss, theirs_loss(in_transformers, batch) / len(batch.labels))
