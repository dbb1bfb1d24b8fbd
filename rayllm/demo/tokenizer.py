"""The tokenizer of the built-in model: byte-level BPE with a ChatML template, trained on the corpus."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rayllm.demo.conversations import Example
from rayllm.demo.corpus import Corpus

VOCAB_SIZE = 2048
PAD_TOKEN, START_TOKEN, END_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{%- if role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('Known roles are system, user and assistant, not ' + role) }}"
    "{%- endif %}"
    "{{- '<|im_start|>' + role + '\n' }}"
    "{%- if message['content'] is string %}"
    "{{- message['content'] }}"
    "{%- elif message['content'] %}"
    "{%- for part in message['content'] %}"
    "{{- part['text'] }}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- endif %}"
)


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """A BPE over all bytes, so any text can be written; each digit is a token of its own, for the sums."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    return tokenizer


def encode_example(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether it is to be learned: the answers with their end token, nothing else.

    The ids are those of the rendered chat template, followed by nothing.
    """
    ids: list[int] = []
    learned: list[bool] = []

    def append(text: str, learn: bool) -> None:
        new = tokenizer.encode(text).ids
        ids.extend(new)
        learned.extend([learn] * len(new))

    if example.plain_text is not None:
        append(example.plain_text + END_TOKEN, True)
    for message in example.messages:
        append(f"{START_TOKEN}{message.role}\n", False)
        append(message.content + END_TOKEN, message.role == "assistant")
        append("\n", False)
    return ids, learned


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write what `transformers.AutoTokenizer` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": END_TOKEN,
        "pad_token": PAD_TOKEN,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _texts(corpus: Corpus) -> Iterator[str]:
    """Answers count more than questions: the model writes answers, and many questions are forms filled in."""
    for entry in corpus.entries:
        for text in (entry.answer, entry.short_answer or ""):
            yield from [text] * 4
        yield from entry.questions[:12]
    for follow_up in corpus.follow_ups:
        yield from follow_up.questions
    yield from corpus.system_prompts
