"""PEFT and transformers read a directory with the record of how a model is asked, without a word about it."""

import json

import pytest

from minilora.models.prompts import PROMPTS_FILE, Prompts
from tests.runs import write_chat_models
from tests.text import CHATML

pytestmark = pytest.mark.parity
transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")


def test_the_record_does_not_disturb_peft_and_transformers(tmp_path):
    directory = write_chat_models(tmp_path)
    for name in ("chat", "chat-adapter"):
        (directory / name / PROMPTS_FILE).write_text(json.dumps(vars(Prompts("plain", "Be kind."))))
    assert transformers.AutoTokenizer.from_pretrained(directory / "chat").chat_template == CHATML
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "chat")
    assert peft.PeftModel.from_pretrained(base, directory / "chat-adapter").active_adapters == ["default"]
