"""Chat templates of model families, shortened to how they write and ask for answers."""

BOS = "{{ bos_token }}"
LLAMA3 = (  # prints `content | trim`
    "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # v0.3: the system prompt is put into the last message if that is the user's; tools before the last user's
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}"
    "{%- for m in rest %}"
    "{%- if m.role == 'user' %}"
    "{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools and m == asked[-1] }}"
    "{{- '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] ' + m.tool_calls | tojson + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}"
    "{%- else %}{{- '[TOOL_RESULTS] ' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' }}{%- endif %}"
    "{%- endfor %}"
)
R1 = (  # of the distillations: asks with `<think>`, and drops thoughts, tools and what tools return
    "{{ bos_token }}{{ messages[0].content if messages[0].role == 'system' }}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% endif %}{% endfor %}{{ '<｜Assistant｜><think>\n' if add_generation_prompt }}"
)
NEMOTRON = (  # asks for thoughts, and writes that there are none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n' if m.reasoning_content else '<think></think>' }}"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
)
QWEN3 = (  # writes the thoughts of answers after the last question, also where there are none
    "{{ '<|im_start|>system\n# Tools\n' + tools | tojson + '<|im_end|>\n' if tools }}"
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = (m.content or '').split('</think>')[-1].lstrip('\n') %}"
    "{% set thoughts = m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if m.reasoning_content or '</think>' in (m.content or '') else '' %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' if loop.index0 > ns.last and (loop.last or thoughts) }}{{ said }}"
    "{% for call in m.tool_calls or () %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"
)
QWEN35 = QWEN3.replace("(loop.last or thoughts)", "true").replace("else '' }}{% endif", "else '<think>\n' }}{% endif")
QWEN3_TRAINING = (  # writes thoughts in every turn, and marks what the assistant says
    QWEN3.replace("loop.index0 > ns.last and (loop.last or thoughts)", "true")
    .replace("assistant\n{{ '<think>\n' +", "assistant\n{% generation %}{{ '<think>\n' +")
    .replace("{% endfor %}<|im_end|>\n", "{% endfor %}<|im_end|>\n{% endgeneration %}")
)
GEMMA = (
    "{{ bos_token }}{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' if add_generation_prompt }}"
)
PHI3 = (  # closes the whole text
    "{% for m in messages %}{% if m.role in ('system', 'user') %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    "{% elif m.role == 'assistant' %}<|assistant|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are SmolLM.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
GLM4 = (  # writes the thoughts of the last answer, and takes parts too
    "[gMASK]<sop>{{ '<|system|>\n# Tools\n' + tools | tojson if tools }}"
    "{% for m in messages %}"
    "{% set text = m.content if m.content is string else m.content | map(attribute='text') | join %}"
    "{% if m.role == 'assistant' %}<|assistant|>\n"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>\n' }}{{ text.split('</think>')[-1].strip() }}"
    "{% elif m.role == 'tool' %}<|observation|>\n{{ text }}{% else %}<|{{ m.role }}|>\n{{ text }}{% endif %}"
    "{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
)
FAMILIES = {
    name.lower(): source for name, source in vars().copy().items() if name.isupper() and name not in ("BOS", "FAMILIES")
}
