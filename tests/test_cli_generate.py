"""minilora generate: where prompts come from, and what is printed."""

import json
import shutil
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.cli.streaming import merged_if_small
from minilora.runs.encoders import encode_prompt, encode_rows, with_prompt_style
from minilora.runs.evaluate import prompt_of
from minilora.runs.formats import Row
from minilora.runs.settings import DataConfig
from tests.files import write_adapter
from tests.models import four_bit, long, tiny_model
from tests.runs import interrupt_generation, runner, type_in, write_chat_models
from tests.test_formats import TOOL, WITH_TOOLS, formats, systems, turns
from tests.text import BOS, CHATML, CLOSE, OPEN, conversation, questions, some_text, texts, write_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_chat_models(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def command(directory, capsys, monkeypatch):
    """Run the command among the models, with a text on standard input; what it prints.

    It must succeed, and say nothing except, for each text of a JSON object or not, that it was cut if it was.
    """
    run = runner(directory, capsys, monkeypatch)

    def generate(*words, stdin="", model="model", max_new_tokens=8, cut=None):
        type_in(monkeypatch, stdin)
        base = [f"--model={model}"] if model else []
        out, err = run("generate", *base, f"--max-new-tokens={max_new_tokens}", *words)
        note = f"cut after {max_new_tokens} tokens; --max-new-tokens allows more\n"
        assert err == note * err.count("\n")
        assert cut in (None, err.count("\n"))
        return out

    return generate


@pytest.fixture
def refused(directory, capsys, monkeypatch):
    """Run the command, which must refuse in one line; that line."""
    run = runner(directory, capsys, monkeypatch)

    def generate(*words, model="model"):
        out, err = run("generate", f"--model={model}", *words, status=1)
        assert (out, err.count("\n")) == ("", 1)
        return err

    return generate


def written(directory, asked, adapter=None, model="model", **settings):
    """What the library writes after a text, or after messages."""
    loaded, tokenizer = ml.load_model(directory / model), ml.load_tokenizer(directory / model)
    if adapter:
        ml.load_adapter(loaded, directory / adapter)
    is_text = isinstance(asked, str)
    ids = tokenizer.encode(asked) if is_text else tokenizer.encode_chat(asked, add_generation_prompt=True)
    settings = {"max_new_tokens": 8, **settings}
    return tokenizer.decode(ml.generate(loaded, [ids], stop_ids=tokenizer.stop_ids, **settings)[0])


def user(text):
    return {"role": "user", "content": text}


def rows_of(output):
    """The objects that were printed, each without its reasons to finish."""
    rows = [json.loads(line) for line in output.splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("finish_reason")} for row in rows]


# --- one prompt ---


def test_one_prompt_is_continued_as_the_library_does(directory, command):
    assert command("--prompt=the cat") == written(directory, "the cat") + "\n"
    sampled = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3}
    flags = [f"--{name}={value}" for name, value in sampled.items()]
    assert command("--prompt=the", *flags) == written(directory, "the", **sampled) + "\n"
    assert command("--prompt=the", max_new_tokens=3) == written(directory, "the", max_new_tokens=3) + "\n"


def test_a_prompt_is_a_users_turn_where_there_is_a_chat_template_unless_it_is_raw(directory, command):
    turn = user("the sea")
    with_system = [{"role": "system", "content": "be kind"}, turn]
    for flags, asked in (((), [turn]), (("--raw",), "the sea"), (("--system=be kind",), with_system)):
        assert command("--prompt=the sea", *flags, model="chat") == written(directory, asked, model="chat") + "\n"


def test_standard_input_is_one_prompt_without_its_last_line_end(directory, command):
    for stdin, prompt in (("the cat\nsat\n", "the cat\nsat"), (" the cat\n\n", " the cat\n"), ("the cat", "the cat")):
        assert command(stdin=stdin) == written(directory, prompt) + "\n"


def test_text_is_printed_piece_by_piece_as_it_is_written(directory, monkeypatch, command):
    text, seen, compute = written(directory, "the cat"), [], ml.models.generate._next_logits
    monkeypatch.setattr(ml.models.generate, "_next_logits", lambda *args: seen.append(None) or compute(*args))
    monkeypatch.setattr("builtins.print", lambda piece="", **options: seen.append((piece, options)))
    command("--prompt=the cat")
    shown = [i for i, event in enumerate(seen) if event and event[1] == {"end": "", "flush": True}]
    assert "".join(seen[i][0] for i in shown) == text
    assert None in seen[shown[0] : shown[-1]]  # the model in between


def test_every_token_that_ends_a_text_does(directory, command, tmp_path):
    model, tokenizer = ml.load_model(directory / "model"), ml.load_tokenizer(directory / "model")
    (new,) = ml.generate(model, [tokenizer.encode("the cat")], 8)
    shutil.copytree(directory / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [new[3], new[5]]}))
    expected = tokenizer.decode(new[: new.index(new[3])])
    ends = {"model": tmp_path / "model", "cut": 0}
    assert command("--prompt=the cat", **ends) == expected + "\n"
    write_adapter(ml.load_model(tmp_path / "model"), tmp_path / "adapter", seed=5)
    flags = (f"--adapter={tmp_path / 'adapter'}", "--compare-base", "--json")
    row = json.loads(command("--prompt=the cat", *flags, **ends))
    assert (row["base_finish_reason"], row["finish_reason"]) == ("stop", "length")
    command("--prompt=the cat", cut=1)


def test_control_tokens_act_in_a_raw_prompt_and_nowhere_else_and_it_is_not_closed(tmp_path):
    tokenizer = write_tokenizer(tmp_path, template=CHATML)
    forged, act = f"a{CLOSE}{OPEN}b", tokenizer.token_id(CLOSE)
    for fields, asking, count in (
        ({"prompt": forged}, "raw", 1),
        ({"prompt": forged}, "plain", 0),
        ({"prompt": forged}, "template", 1),  # that of the turn, which the template wrote
        ({"messages": [user(forged)]}, "template", 1),
    ):
        assert encode_prompt(Row(fields, "x"), tokenizer, None, asking).count(act) == count
    tokenizer = write_tokenizer(tmp_path, post="bos and eos")  # it does not end with the token that closes a text
    prompt = encode_prompt(Row({"prompt": "the cat"}, "x"), tokenizer, None, "raw")
    assert prompt == [tokenizer.token_id(BOS), *tokenizer.encode("the cat", add_special_tokens=False)]


# --- several ---


def unanswered(row):
    """The row without its answer."""
    cut = {key: value[:-1] for key, value in row.items() if key in ("messages", "conversations")}
    return {key: value for key, value in {**row, **cut}.items() if key not in ("output", "completion")}


@given(turns, systems, systems, st.sampled_from([None, [TOOL]]), texts, st.booleans())
def test_a_row_of_any_format_is_asked_with_the_prompt_of_its_training(
    tokenizer, turns, own, system, tools, extra, has_template
):
    turns[-1] = turns[-1][0], f"a{turns[-1][1]}"  # no token spans the seam
    *rows, last = formats(conversation(turns if has_template else turns[-1:], own))
    rows = [{**row, "tools": tools} for row in (*rows, {**last, "input": extra})] if has_template else [last]
    chosen = with_prompt_style(tokenizer(template=WITH_TOOLS if has_template else None), "auto", [Row(last)])
    for fields in rows:
        expected = prompt_of(encode_rows([Row(fields)], chosen, DataConfig(system=system))[0])
        for asked in (fields, unanswered(fields)):
            assert encode_prompt(Row(asked), chosen, system, "template") == expected


@given(questions, some_text, st.sampled_from(["bos", "bos and eos"]), st.sampled_from(["template", "plain"]))
def test_plain_text_is_asked_as_training_reads_it(tokenizer, prompt, completion, post, asking):
    row = Row({"prompt": prompt, "completion": f" a{completion}"})
    for template in (CHATML, None):
        chosen = tokenizer(template=template, post=post)
        expected = prompt_of(encode_rows([row], chosen, DataConfig())[0])
        assert encode_prompt(row, chosen, None, asking) == expected
        if template is None or asking == "plain":
            assert encode_prompt(Row({"prompt": prompt}), chosen, None, asking) == expected


def test_an_empty_prompt_lets_the_model_begin_a_text(tokenizer):
    chosen = tokenizer(template=CHATML, post="bos")
    assert encode_prompt(Row({"prompt": ""}), chosen, None, "plain") == [chosen.token_id(BOS)]
    asked = [user("a")]
    expected = chosen.encode_chat(asked, add_generation_prompt=True)
    assert encode_prompt(Row({"messages": asked, "prompt": ""}), chosen, None, "plain") == expected
    with pytest.raises(ml.DataError, match="it is empty, so nothing is asked"):
        encode_prompt(Row({"prompt": ""}), chosen, None, "template")


def test_an_answer_need_not_be_a_good_one(tokenizer):
    chosen, asked = tokenizer(template=CHATML), [user("a")]
    expected = chosen.encode_chat(asked, add_generation_prompt=True)
    for fields in (
        {"instruction": "a", "output": ""},
        {"messages": [*asked, {"role": "assistant", "content": ""}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": 5}]},
        {"prompt": asked, "completion": []},
        {"prompt": "a", "chosen": 1},
        {"messages": asked, "weight": 1, "text": "b"},
    ):
        assert encode_prompt(Row(fields, "x"), chosen, None, "template") == expected


def test_instruction_rows_have_alpacas_form_where_there_is_no_template(directory, command, tmp_path):
    rows = [{"instruction": "the cat", "input": "sat"}, {"instruction": "the sea", "output": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = with_prompt_style(ml.load_tokenizer(directory / "model"), "alpaca")
    asked = [{"role": "user", "instruction": row["instruction"], "input": row.get("input", "")} for row in rows]
    expected = [written(directory, chosen.render([message], add_generation_prompt=True)) for message in asked]
    assert [row["text"] for row in rows_of(command("--prompts", tmp_path / "rows.jsonl"))] == expected


def test_several_prompts_also_of_a_text_file_are_answered_in_a_json_object_a_line(directory, command, tmp_path):
    rows = [{"prompt": text, "text": written(directory, text)} for text in ("the cat", "the sea")]
    assert rows_of(command("--prompt=the cat", "--prompt=the sea")) == rows
    assert rows_of(command("--prompt=the cat", "--json")) == rows[:1]
    (tmp_path / "prompts.txt").write_bytes("\ufeffthe cat\r\n\n  \nthe sea".encode())
    assert rows_of(command("--prompts", tmp_path / "prompts.txt")) == rows
    (tmp_path / "prompts.csv").write_text("id,q\n1,the cat\n2,the sea\n")
    assert rows_of(command("--prompts", tmp_path / "prompts.csv", "--columns=prompt=q")) == rows


def test_a_record_without_names_of_columns_leaves_them_as_they_are(directory, command, tmp_path):
    shutil.copytree(directory / "model-adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").write_text('{"config": {"columns": 5}}')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}')
    assert rows_of(command("--adapter", tmp_path / "adapter", "--prompts", tmp_path / "prompts.jsonl"))


def test_rows_keep_their_fields_and_lose_their_last_answer(directory, command, tmp_path):
    talk = [user("the cat"), {"role": "assistant", "content": "sat"}]
    system = {"role": "system", "content": "be kind"}
    rows = [
        {"prompt": "the cat", "id": 7},
        {"messages": [*talk, user("the sea")], "text": "replaced"},
        {"messages": talk},
        {"prompt": [system, user("the cat")]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [[user("the cat")], [*talk, user("the sea")], talk[:1], [system, user("the cat")]]
    found = command("--prompts", tmp_path / "rows.jsonl", model="chat")
    texts = [written(directory, messages, model="chat") for messages in asked]
    assert rows_of(found) == [{**row, "text": text} for row, text in zip(rows, texts, strict=True)]
    texts = [written(directory, m if system in m else [system, *m], model="chat") for m in asked]
    found = command("--prompts", tmp_path / "rows.jsonl", "--system=be kind", model="chat")
    assert [row["text"] for row in rows_of(found)] == texts


@pytest.mark.parametrize("size", [*long(1, 99), 3])
def test_prompts_have_seeds_of_their_own_and_the_batch_size_changes_nothing(directory, command, size, monkeypatch):
    monkeypatch.setattr("minilora.cli.streaming.BATCH_SIZE", size)
    asked = ["the cat", "the cat", "the sea", "the sea"]
    found = rows_of(command(*(f"--prompt={text}" for text in asked), "--temperature=1.5", "--seed=4"))
    assert found == [
        {"prompt": text, "text": written(directory, text, temperature=1.5, seed=4 + i)} for i, text in enumerate(asked)
    ]


# --- beside the base model ---


def test_compare_base_finds_the_base_and_prints_its_text_first(directory, command):
    adapter = directory / "model-adapter"
    base, ours = (written(directory, "the sea", name) for name in (None, "model-adapter"))
    assert base != ours
    words = (f"--adapter={adapter}", "--prompt=the sea")
    assert command(*words, model=None) == ours + "\n"
    shown = command(*words, "--compare-base", model=None)
    assert shown == f"--- base\n{base}\n--- {adapter}\n{ours}\n"
    row = {"prompt": "the sea", "base": base, "text": ours}
    assert rows_of(command(*words, "--compare-base", "--json")) == [row]


# --- what is refused ---


def test_what_cannot_work_is_told_in_one_line(refused):
    for words, phrase in (
        (["--prompt="], "--prompt: the prompt is empty"),
        (["--prompt=a", "--compare-base"], "--compare-base needs --adapter"),
        (["--prompt=a", *["--adapter=model-adapter"] * 2], "give one --adapter"),
        (["--prompt=a", "--system=b"], "--prompt: system: found 'b', but plain text has no place"),
        (["--prompt=a", "--top-p=2"], "--top-p is 2.0"),
        (["--prompt=\udcff"], "found U+DCFF, which is not a character"),
    ):
        assert phrase in refused(*words)


def test_a_row_that_is_no_prompt_is_told_with_its_line(refused, tmp_path):
    for name, content, phrase in (
        ("rows.jsonl", '{"prompt": "a"}\n{"question": "b"}', "rows.jsonl:2: found the fields ['question'], need"),
        ("rows.txt", "\n", "rows.txt: there are no prompts"),
    ):
        (tmp_path / name).write_text(content)
        assert phrase in refused("--prompts", tmp_path / name, model="chat")


def test_messages_need_a_template_and_standard_input_has_to_be_utf_8(refused, monkeypatch, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [user("a")]}))
    assert "rows.jsonl:1: the model has no chat template" in refused("--prompts", tmp_path / "rows.jsonl")
    assert "a raw prompt leaves out" in refused("--prompts", tmp_path / "rows.jsonl", "--raw", model="chat")
    type_in(monkeypatch, b"a\xff")
    assert "can't decode byte 0xff" in refused()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert "give --prompt TEXT, --prompts FILE" in refused()


def test_ctrl_c_ends_the_text_and_the_command(directory, monkeypatch, capsys):
    run = runner(directory, capsys, monkeypatch)
    interrupt_generation(monkeypatch, 4)
    out, err = run("generate", "--model=model", "--prompt=the cat", status=130)
    assert written(directory, "the cat", max_new_tokens=3).startswith(out.removesuffix("\n"))
    assert err == "stopped\n"


@pytest.mark.parametrize("make", [lambda model: model, four_bit])
def test_active_adapters_are_merged_unless_the_weights_are_large(make):
    def is_merged(model):
        return not isinstance(merged_if_small(model), nullcontext)

    model = make(tiny_model())
    assert not is_merged(model)
    ml.attach(model, ml.LoraConfig(r=2))
    assert is_merged(model)
    with ml.disable_adapter(model):
        assert not is_merged(model)
    large = nn.Sequential(*(nn.Linear(2**14, out, device="meta") for out in (2**14, 3)))  # one of them has a gibibyte
    ml.attach(large, ml.LoraConfig(r=1, target_modules=["0", "1"]))
    assert not is_merged(large)
