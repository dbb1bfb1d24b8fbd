"""Chat templates of families whose checkpoints have them in Python code only; written from the published formats."""

GLM4 = (
    "[gMASK]<sop>"
    "{%- if tools -%}"
    "<|system|>\n你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
    "{%- for tool in tools -%}{%- set function = tool.function or tool -%}"
    "{{ '\n\n## ' + function.name + '\n\n' + function | tojson(indent=4) }}"
    "{{ '\n在调用上述函数时，请使用 Json 格式表示调用的参数。' }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}{{ '<|observation|>\n' + message.content }}"
    "{%- else -%}"
    "{%- if message.content or not message.tool_calls -%}"
    "{{ '<|' + message.role + '|>' + (message.metadata or '') + '\n' + (message.content or '') }}"
    "{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}"
    "{%- set arguments = call.function.arguments -%}"
    "{{ '<|assistant|>' + call.function.name + '\n' }}"
    "{{ arguments if arguments is string else arguments | tojson }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
"""Tools as a system message in words; a call is the tool's name and, on the next line, its arguments."""

CHATGLM3 = (
    "[gMASK]sop"
    "{%- for message in messages -%}"
    "{{ '<|' + message.role + '|>' + (message.metadata or '') + '\n' }}"
    "{{ ' ' + message.content if message.content else '' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
"""The model's code encodes head and content of a message each alone. The space stands for the one that sentencepiece
puts before the content: no piece crosses a line end, so one text gives the ids of both."""

CHATGLM2 = (
    "[gMASK]sop"
    "{%- set count = namespace(rounds=0) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}"
    "{%- set count.rounds = count.rounds + 1 -%}"
    "{{ '[Round ' ~ count.rounds ~ ']\n\n问：' + message.content }}"
    "{{ '\n\n答：' if add_generation_prompt or not loop.last else '' }}"
    "{%- else -%}{{ message.content }}{%- endif -%}"
    "{%- if not loop.last and not (message.role == 'user' and loop.nextitem.role == 'assistant') -%}{{ '\n\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""Rounds are counted from 1. A system message, which the format does not know, stands before the first."""


def _baichuan(user: str, assistant: str, end: str) -> str:
    """A token before each message; a system message, which has none, stands in front."""
    return (
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}{{ '" + user + "' + message.content }}"
        "{%- elif message.role == 'assistant' -%}{{ '" + assistant + "' + message.content + '" + end + "' }}"
        "{%- else -%}{{ message.content }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}" + assistant + "{%- endif -%}"
    )


BAICHUAN_ROLES = ("<reserved_102>", "<reserved_103>")
BAICHUAN2_ROLES = ("<reserved_106>", "<reserved_107>")
"""Ids 195 and 196 in both: user and assistant."""
BAICHUAN = _baichuan(*BAICHUAN_ROLES, end="</s>")
BAICHUAN2 = _baichuan(*BAICHUAN2_ROLES, end="")
"""The second version ends no answer of the assistant."""
