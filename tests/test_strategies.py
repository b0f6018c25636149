"""What the strategies draw is what they say: right implementations take it, and readers of files are not confused."""

from hypothesis import given

from minilora.testing import Chat, laws, strategies
from minilora.testing.implementations import nf4_dequantize, nf4_quantize, render_chat


@given(strategies.conversations())
def test_the_mask_of_a_conversation_of_any_text_is_right(messages):
    case = Chat(tuple((message["role"], message["content"]) for message in messages))
    laws("chat_mask")["turns"].check(render_chat, case)


@given(strategies.nf4_weights())
def test_a_drawn_weight_keeps_the_laws_of_nf4(case):
    for name in ("nearest", "absmax", "error"):
        laws("nf4")[name].check((nf4_quantize, nf4_dequantize), case)
