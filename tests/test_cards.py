"""How other programs ask a model as in its training: by its chat template, its card and Ollama's Modelfile."""

import json
import re

import pytest

import minilora as ml
from minilora.models.prompts import Prompts
from minilora.models.template import ChatTemplate
from minilora.runs.cards import modelfile
from tests.chat_templates import FAMILIES
from tests.runs import finetune, runner, write_chat_models
from tests.text import BOS, CHATML, CLOSE, DEFAULT_SYSTEM, conversation, write_tokenizer

HOUSE = 'You are "Ada",\nof {{ the }} {% house %} \\n: ü🙂'
GEMMA3 = (  # writes the system prompt into the first question
    "{{ bos_token }}{% set opening = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ opening if loop.first }}{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{{ '<start_of_turn>model\n' if add_generation_prompt }}"
)
TALKS = (conversation([("hi", "yes"), ("and", "no")]), conversation([("hi", "yes"), ("and", "")])[:-1])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma"}))
def test_a_template_with_a_system_prompt_gives_it_to_conversations_without_one_and_to_no_others(family):
    plain = ChatTemplate(FAMILIES[family], {"bos_token": BOS, "eos_token": CLOSE})
    house = ChatTemplate(plain.with_defaults(HOUSE, thinking=None), {"bos_token": BOS, "eos_token": CLOSE})
    for talk in TALKS:
        own = [{"role": "system", "content": "Be brief."}, *talk]
        asks = talk[-1]["role"] == "user"
        assert house.render(talk, asks) == plain.render([{"role": "system", "content": HOUSE}, *talk], asks)
        assert house.render(own, asks) == plain.render(own, asks)


@pytest.mark.parametrize("way", [True, False])
def test_a_template_asks_for_thoughts_as_in_the_training_unless_it_is_told(way):
    plain = ChatTemplate(FAMILIES["qwen3"], {})
    taught = ChatTemplate(plain.with_defaults(None, thinking=way), {})
    assert plain.with_defaults(None, None) == plain.source
    assert taught.render(TALKS[1], True) == plain.render(TALKS[1], True, enable_thinking=way)
    for told in (True, False):
        asked = [each.render(TALKS[1], True, enable_thinking=told) for each in (taught, plain)]
        assert asked[0] == asked[1]


@pytest.mark.parametrize("opening", ["\n ", "  x", "{#- c -#}\n"])
def test_a_template_with_a_line_before_it_still_writes_the_white_space_that_it_begins_with(opening):
    plain = ChatTemplate(opening + CHATML, {})
    house = ChatTemplate(plain.with_defaults(HOUSE, thinking=True), {})
    assert house.render(TALKS[1], True) == plain.render([{"role": "system", "content": HOUSE}, *TALKS[1]], True)


def test_only_the_line_that_a_run_adds_is_left_out_of_its_template(tmp_path):
    """Another program has saved the base's template with the line of an earlier run, and not the prompts."""
    earlier = ChatTemplate(CHATML, {}).with_defaults(HOUSE, thinking=None)
    base = write_tokenizer(tmp_path, template=earlier)
    for prompts in (Prompts(), Prompts(system="Be brief.")):
        base.with_prompts(prompts).save(tmp_path / "run")
        assert ml.load_tokenizer(tmp_path / "run").render(TALKS[1], True) == base.render(TALKS[1], True)


def written_by_ollama(text, talk):
    """What Ollama writes to ask the last question of a conversation: it fills in its template once a turn."""
    template, system = re.search('TEMPLATE """(.*?)"""\nSYSTEM """(.*?)"""\n', text, re.DOTALL).groups()
    written = ""
    for i in range(0, len(talk), 2):
        turn = re.sub("{{ if .System }}(.*?){{ end }}", r"\1" if system else "", template, flags=re.DOTALL)
        turn, response, end = turn.partition("{{ .Response }}")
        answer = "".join((talk[i + 1]["content"], end)) if talk[i + 1 :] else ""
        written += turn.replace("{{ .System }}", system).replace("{{ .Prompt }}", talk[i]["content"]) + answer
        assert response
        system = ""
    return written


TURNS = {name: FAMILIES[name] for name in ("llama3", "qwen3", "smollm2")}


@pytest.mark.parametrize("system", [None, "You are Ada,\nof the house."])
@pytest.mark.parametrize("template", [*TURNS.values(), CHATML, DEFAULT_SYSTEM, GEMMA3], ids=str)
def test_ollama_asks_by_the_modelfile_as_the_chat_template_does(tmp_path, template, system):
    tokenizer = write_tokenizer(tmp_path, template=template, eos=CLOSE, post="bos" if "bos" in template else "none")
    tokenizer = tokenizer.with_prompts(Prompts(system=system))
    text = modelfile(tokenizer)
    for talk in (TALKS[0][:1], TALKS[1]):
        opening = [{"role": "system", "content": system}] if system else []
        assert written_by_ollama(text, talk) == tokenizer.render([*opening, *talk], True).removeprefix(BOS)
    assert text.startswith("FROM .\n")
    assert f'PARAMETER stop "{CLOSE}"\n' in text


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - TURNS.keys()))
def test_there_is_no_modelfile_where_the_turns_of_a_template_are_not_alike(tmp_path, family):
    assert modelfile(write_tokenizer(tmp_path, template=FAMILIES[family], post="bos")) is None


def test_a_modelfile_asks_for_thoughts_as_in_the_training_or_there_is_none(tmp_path):
    """Qwen3 asks for an answer without thoughts by empty ones, which it leaves out of earlier turns."""
    tokenizer = write_tokenizer(tmp_path, template=FAMILIES["qwen3"], eos=CLOSE)
    assert modelfile(tokenizer.with_prompts(Prompts(thinking=False))) is None
    text = modelfile(tokenizer.with_prompts(Prompts(thinking=True)))
    assert written_by_ollama(text, TALKS[1]) == tokenizer.render(TALKS[1], True, enable_thinking=True)


@pytest.mark.parametrize("prompts", [Prompts("plain"), Prompts(system='a """ b'), Prompts(system="no\u00a0break")])
def test_there_is_no_modelfile_for_what_it_cannot_express(tmp_path, prompts):
    assert modelfile(write_tokenizer(tmp_path, template=CHATML).with_prompts(prompts)) is None
    assert modelfile(write_tokenizer(tmp_path, template="{{ '{{' }}" + CHATML)) is None
    assert modelfile(write_tokenizer(tmp_path / "bare")) is None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a system prompt, `run`, and what other programs get of it."""
    directory = write_chat_models(tmp_path_factory.mktemp("cards"))
    rows = [{"messages": conversation([(f"the sea {i}", "yes")], HOUSE)} for i in range(4)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert finetune(directory, directory / "run", model=directory / "chat", max_steps=1) == 0
    return directory


@pytest.fixture
def command(made, capsys, monkeypatch):
    return runner(made, capsys, monkeypatch)


def test_a_run_and_a_merged_model_have_a_card_and_a_template_with_their_system_prompt(made, command, tmp_path):
    command("merge", "--adapter=run", "--out", tmp_path / "merged")
    question = [{"role": "user", "content": "the sea"}]
    told = [{"role": "system", "content": HOUSE}, *question]
    for path, loader in ((made / "run", "AutoPeftModelForCausalLM"), (tmp_path / "merged", "AutoModelForCausalLM")):
        card = (path / "README.md").read_text()
        assert f'{loader}.from_pretrained(".")' in card
        assert json.dumps(told[0], ensure_ascii=False) in card
        assert str(made) not in card
        assert ("Modelfile" in card) == (path / "Modelfile").exists() == (path.name == "merged")
        ours, theirs = ml.load_tokenizer(path), ChatTemplate((path / "chat_template.jinja").read_text(), {})
        assert theirs.render(question, True) == ours.render(told, True) != ours.render(question, True)
    assert modelfile(ours) == (tmp_path / "merged" / "Modelfile").read_text()
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [ours.token_id(CLOSE)]
    assert f"eos_token_id={ends})" in card


def test_a_model_trained_on_without_the_system_prompt_no_longer_gives_it(made, command, tmp_path):
    command("merge", "--adapter=run", "--out", tmp_path / "merged")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": conversation([("the sea", "yes")])}) + "\n")
    rows = {"data": tmp_path / "rows.jsonl", "eval_split": 0, "max_steps": 1, "system": ""}
    assert finetune(made, tmp_path / "next", model=tmp_path / "merged", **rows) == 0
    assert (tmp_path / "next" / "chat_template.jinja").read_text() == CHATML
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() != CHATML


def test_a_saved_tokenizer_has_one_template(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "old", chat_template=CHATML)  # in its config, as older models have it
    tokenizer.with_prompts(Prompts(system=HOUSE)).save(tmp_path / "new")
    assert "chat_template" not in json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert ml.load_tokenizer(tmp_path / "new").template.source == CHATML
    tokenizer.save(tmp_path / "same")
    assert {path.name for path in (tmp_path / "same").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_a_changed_card_is_no_reason_for_a_note(made, command, tmp_path):
    command("merge", "--adapter=run", "--out", tmp_path / "merged")
    (tmp_path / "merged" / "README.md").write_text("mine")
    assert (
        "changed" not in command("generate", "--model", tmp_path / "merged", "--prompt=the", "--max-new-tokens=1").err
    )


@pytest.mark.parity
def test_transformers_asks_with_the_system_prompt_by_itself(made):
    transformers = pytest.importorskip("transformers")
    question = [{"role": "user", "content": "the sea"}]
    theirs = transformers.AutoTokenizer.from_pretrained(made / "run")
    asked = theirs.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ours = ml.load_tokenizer(made / "run")
    assert asked == ours.render([{"role": "system", "content": HOUSE}, *question], True)
