"""A random model that stands in for those which vLLM's tests name: it knows nothing, and ends by itself.

Its tokenizer is trained on a text that holds the tests' own words, so that English is not spelt byte by byte. Each
token is liked by a constant (the end, closing quotes and brackets more than others), plus what the random weights make
of the text so far: greedy answers are senseless texts of some tens of tokens that depend on the prompt, JSON is soon
closed, and draws differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import make_config, make_model

VOCAB_SIZE = 8192
_END, _START = "<|im_end|>", "<|im_start|>"
_SPECIAL = ("<|endoftext|>", _START, _END, "<tool_call>", "</tool_call>", "<think>", "</think>")
_TEMPLATE = """
{%- if tools %}
{{- '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools\\n\\nYou may call one or more functions. Function signatures are within <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
{{- '\\n</tools>\\n\\nFor each call, return a JSON object with name and arguments within <tool_call></tool_call>:\\n' }}
{{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- else %}{{- 'THINK' }}{% endif %}
{%- endif %}
""".strip()
_SPREAD = 3.0
"""Standard deviation of what the weights add to a token's liking, in nats."""
_CLOSING_SIGNS = ("}", "]", ",")
"""They end numbers, lists and objects of JSON."""
_SEEDS = {False: 2, True: 4}
"""By whether it thinks: with these the greedy answers to the tests' own prompts have some tens of tokens."""
_NEVER = ("<|endoftext|>", _START, "<tool_call>", "</tool_call>", "<think>")


def make_stand_in(folder: Path, corpus: Path, *, thinks: bool = False) -> Path:
    """Writes the checkpoint and returns its folder. `corpus`: a folder of texts to train the tokenizer on. `thinks`: a
    chat's answer begins with reasoning, unless `enable_thinking` is false."""
    tokenizer = _make_tokenizer(folder, corpus, thinks)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in _SPECIAL}
    config = make_config(
        "qwen3",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=32768,
        eos_token_id=ids[_END],
        bos_token_id=None,
        pad_token_id=ids["<|endoftext|>"],
    )
    make_model(config, seed=_SEEDS[thinks]).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 20.0  # the same in every hidden state, whatever the text
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    hidden_NH = _hidden_states(folder, weights)
    head = weights["lm_head.weight"]
    head[:, 0] = 0
    mean_H = hidden_NH.mean(0)
    head *= _SPREAD / float(((hidden_NH - mean_H) @ head.T).std())  # what differs from one text to another
    likings_V = torch.tensor([_liking(tokenizer, token_id, thinks) for token_id in range(VOCAB_SIZE)])
    head[:, 0] = (likings_V - head @ mean_H) / mean_H[0]
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def _hidden_states(folder: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the head reads, over some random text: float32 [tokens, width]."""
    from transformers import AutoModelForCausalLM

    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(VOCAB_SIZE, (1, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.model(tokens).last_hidden_state[0]


def _liking(tokenizer: Any, token_id: int, thinks: bool) -> float:
    """In nats, against a best of all other tokens of about 11: answers have some tens of tokens, and JSON is soon
    closed."""
    text = tokenizer.convert_ids_to_tokens(token_id)
    if text in _NEVER:
        return -40.0
    if text == "</think>":
        return 9.0 if thinks else -40.0
    if text in _CLOSING_SIGNS:
        return 6.0 if thinks else 8.0
    return {_END: 7.5, '"': 8.0}.get(text, 0.0)


def _make_tokenizer(folder: Path, corpus: Path, thinks: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in sorted(corpus.rglob("*.py"))], trainer)
    tokenizer.add_special_tokens(list(_SPECIAL))  # behind all others: the tests' own small ids are text
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token="<|endoftext|>",
        chat_template=_TEMPLATE.replace("THINK", "<think>\\n" if thinks else ""),
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.save_pretrained(folder)
    return fast
