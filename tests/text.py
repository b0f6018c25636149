"""Small tokenizers, chat templates and texts, as tests draw them."""

import json
from functools import cache
from itertools import pairwise

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.runs.encoders import encode_rows
from minilora.runs.formats import Row

BOS, EOS, OPEN, CLOSE = "<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [BOS, EOS, OPEN, CLOSE]
CORPUS = [
    "what is the capital of the land? it is the town by the sea.",
    "the cat sat on the mat; the dog ate the food.\n\nanswer: the cat",
    "naïve café — 漢字 漢字 🙂🙂 e\u0301 the end",
    "    indented   text \n  and more ",
] * 3
GENERATION_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + GENERATION_PROMPT
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{{ '\n' }}{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}" + GENERATION_PROMPT
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>{{ '\n' }}{% endif %}" + CHATML
)
STRIPPING = (  # as qwen3: what the assistant thought before the last question is left out
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.index0 > ns.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
) + GENERATION_PROMPT
POST_PROCESSORS = {
    "none": None,
    "bos": f"{BOS} $A",
    "bos and eos": f"{BOS} $A {EOS}",
    "eos": f"$A {EOS}",
    "trimming": "of offsets",
}


@cache
def trained_bpe(use_regex: bool) -> str:
    """A byte-level BPE as JSON; without the regex its tokens also span words and spaces."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def write_tokenizer(directory, post="none", use_regex=True, template=None, eos=EOS, **config):
    """Write a small tokenizer as a model directory has it; its vocabulary has 400 tokens."""
    backend = tokenizers.Tokenizer.from_str(trained_bpe(use_regex))
    if post == "trimming":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    elif POST_PROCESSORS[post]:
        pairs = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
        backend.post_processor = processors.TemplateProcessing(single=POST_PROCESSORS[post], special_tokens=pairs)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    texts = {"bos_token": BOS, "eos_token": eos, "pad_token": eos, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(texts))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return ml.load_tokenizer(directory)


texts = st.text(st.sampled_from("thecats  \n.?é漢🙂\u0301\u2028")) | st.text(
    st.characters(exclude_categories=["Cs", "Cn"])
)
some_text = texts.filter(bool)
questions = texts.filter(str.strip)
tokenizer_options = st.fixed_dictionaries(
    {"post": st.sampled_from(sorted(POST_PROCESSORS)), "use_regex": st.booleans()}
)


def conversation(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def encoded(fields, tokenizer, train_on="completion", source="", **options):
    """The example of a row with these fields."""
    return encode_rows([Row(fields, source)], tokenizer, ml.DataConfig(train_on=train_on, **options))[0]


def learned(example):
    """Which tokens are labels; each label is its own token."""
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(example.tokens, example.labels, strict=True))
    return [label != IGNORE_INDEX for label in example.labels]


def touching(tokenizer, tokens, pieces, added=()):
    """Which tokens share a byte with a learned piece of the text; a piece is a text and whether it is learned.

    A byte-level token has a character for each byte; a token that is not from the text has none.
    """
    begins = [0]
    for text, _ in pieces:
        begins.append(begins[-1] + len(text.encode()))
    widths = [0 if token in added else len(tokenizer._backend.id_to_token(token)) for token in tokens]
    assert sum(widths) == begins[-1]
    result, end = [], 0
    for width in widths:
        begin, end = end, end + width
        spans = [span for span, (_, is_learned) in zip(pairwise(begins), pieces, strict=True) if is_learned]
        result.append(width > 0 and any(begin < last and end > first for first, last in spans))
    return result


def assert_learned(example, tokenizer, pieces):
    """The example is the text of the pieces, and its labels are the tokens that touch a learned piece."""
    assert tokenizer.decode(example.tokens, skip_special_tokens=False) == "".join(text for text, _ in pieces)
    assert learned(example) == touching(tokenizer, example.tokens, pieces)
