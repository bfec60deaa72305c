"""Tokenizers with chat templates of model families, written after their documented behaviour, for tests of formats.

The tokenizers are byte-level BPE of a small vocabulary, with the control tokens of the families.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    'The tool returns a result. {"name": "search", "arguments": {"query": "capital of France"}} <answer>Paris</answer>',
    "You may call functions. <tool_call> <function=name> <parameter=query> </parameter> </function> <|im_end|>",
    "system user assistant tool ipython model: what is the population of the country? 12 + 30 = 42.</result>\n\n",
]


@functools.cache
def _base() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS * 4, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return bpe.to_str()


def tokenizer(
    template: str | None,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    *,
    eos: str | None = None,
    bos: str | None = None,
    name: str = "toy",
) -> PreTrainedTokenizerFast:
    """special, added: control tokens, special ones and others."""
    inner = Tokenizer.from_str(_base())
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, bos_token=bos, clean_up_tokenization_spaces=False, name_or_path=name
    )
    made.chat_template = template
    return made


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HERMES_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

_TOOLS_IN_SYSTEM = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nWrite <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
"""
_HERMES_CALLS = """\
        {%- for call in message.tool_calls or [] %}
            {%- if loop.index0 or content %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
"""
_RESULTS_AS_USER = """\
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
"""

# Qwen 2.5: calls as JSON, several results in one user turn.
QWEN = (
    _TOOLS_IN_SYSTEM
    + """\
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {{- '<|im_start|>assistant\\n' + content }}
"""
    + _HERMES_CALLS
    + """\
        {{- '<|im_end|>\\n' }}
"""
    + _RESULTS_AS_USER
    + """\
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)

# Qwen 3: thinking stays in the turns after the last question of the user, and is dropped before it. With
# enable_thinking=false a turn begins behind empty thinking.
QWEN3 = (
    _TOOLS_IN_SYSTEM
    + """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = (message.content or '').split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and '</think>' in (message.content or '') %}
            {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
"""
    + _HERMES_CALLS
    + """\
        {{- '<|im_end|>\\n' }}
"""
    + _RESULTS_AS_USER
    + """\
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
)

# QwQ and the distilled R1: a turn begins inside <think>, and thinking of earlier turns is dropped.
DROPS_THINKING = QWEN3.replace("loop.index0 > ns.last and", "false and").replace(
    "</think>\\n\\n' }}{%- endif %}\n{%- endif %}",
    "</think>\\n\\n' }}{%- else %}{{- '<think>\\n' }}{%- endif %}\n{%- endif %}",
)

# DeepSeek V3.1: only what answers the user begins inside <think>, what follows the results of tools does not.
THINKS_FIRST = DROPS_THINKING.replace("{%- else %}{{- '<think>", "{%- elif messages[-1].role == 'user' %}{{- '<think>")

# Qwen3-Coder: calls as XML.
QWEN3_CODER = (
    _TOOLS_IN_SYSTEM
    + """\
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if loop.index0 or message.content else '' }}
            {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for key, value in call.function.arguments | items %}
                {%- set nested = value is mapping or (value is sequence and value is not string) %}
                {%- set shown = value | tojson if nested else value | string %}
                {{- '<parameter=' + key + '>\\n' + shown + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
    + _RESULTS_AS_USER
    + """\
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)

# GLM 4.5: names of arguments and values in tags; a role ends the turn before it; enable_thinking=false.
GLM = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {{- '<|system|>\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|user|>\\n' + message.content }}
        {%- if enable_thinking is defined and not enable_thinking %}{{- '/nothink' }}{%- endif %}
    {%- elif message.role == 'system' %}{{- '<|system|>\\n' + message.content }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {{- '<|assistant|>' }}
        {%- if '</think>' in content %}{{- '\\n' + content.split('</think>')[0] | trim + '</think>' }}
        {%- else %}{{- '\\n<think></think>' }}{%- endif %}
        {%- set content = content.split('</think>')[-1] | trim %}
        {%- if content %}{{- '\\n' + content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function.name }}
            {%- for key, value in call.function.arguments | items %}
                {{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
                {{- (value if value is string else value | tojson) + '</arg_value>' }}
            {%- endfor %}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '\\n<think></think>' }}{%- endif %}
{%- endif %}
"""
GLM_ROLES = ("<|user|>", "<|observation|>", "<|assistant|>", "<|system|>")

# Llama 3.1: a date, tools in the first message of the user, one call per turn, results as JSON texts of "ipython".
LLAMA3 = """\
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a call as {"name": .., "parameters": ..}.\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
    {{- messages[0].content | trim + '<|eot_id|>' }}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# Gemma: no system role, roles must alternate, no tools.
GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('alternate') }}{%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

# Mistral: calls as a list behind a control token, ids of nine letters and digits, no header before the model's turn.
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.first %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids of nine characters') }}{%- endif %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
            {{- ', "id": "' + call.id + '"}' + (', ' if not loop.last else '') }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}{{- message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception('only user, assistant and tool') }}{%- endif %}
{%- endfor %}
"""
MISTRAL_NAMES = ("INST", "TOOL_CALLS", "AVAILABLE_TOOLS", "TOOL_RESULTS")


def family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of the families below."""
    return FAMILIES[name]()


FAMILIES = {
    "qwen": lambda: tokenizer(QWEN, CHATML, HERMES_TAGS, eos="<|im_end|>", name="qwen"),
    "qwen3": lambda: tokenizer(QWEN3, CHATML, HERMES_TAGS, eos="<|im_end|>", name="qwen3"),
    "drops_thinking": lambda: tokenizer(DROPS_THINKING, CHATML, HERMES_TAGS, eos="<|im_end|>", name="drops_thinking"),
    "thinks_first": lambda: tokenizer(THINKS_FIRST, CHATML, HERMES_TAGS, eos="<|im_end|>", name="thinks_first"),
    "qwen3_coder": lambda: tokenizer(QWEN3_CODER, CHATML, HERMES_TAGS, eos="<|im_end|>", name="qwen3_coder"),
    "llama3": lambda: tokenizer(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        name="llama3",
    ),
    "glm": lambda: tokenizer(
        GLM,
        ("[gMASK]", "<sop>", "<|endoftext|>", *GLM_ROLES),
        (*HERMES_TAGS, *(f"<{slash}arg_{part}>" for part in ("key", "value") for slash in ("", "/"))),
        eos="<|endoftext|>",
        name="glm",
    ),
    "gemma": lambda: tokenizer(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", name="gemma"
    ),
    "mistral": lambda: tokenizer(
        MISTRAL,
        ("<s>", "</s>", *(f"[{slash}{name}]" for name in MISTRAL_NAMES for slash in ("", "/"))),
        bos="<s>",
        eos="</s>",
        name="mistral",
    ),
}
