"""The built-in model answers as it should, in plain transformers and float32, without our engine."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayllm.demo import DEMO_MODEL_NAME, model_path
from rayllm.demo.corpus import Entry, load_corpus, normalize_question

MAX_NUM_BYTES = 8_000_000
MAX_NEW_TOKENS = 200
END_ID = 2
QUESTIONS = json.loads((model_path().parent / "questions.json").read_text(encoding="utf-8"))
# Of the questions in words that the model never saw; it is tiny, so not all can be right.
MIN_HELD_OUT_RIGHT = 0.75

Chat = list[dict[str, str]]


class DemoModel:
    """Greedy answers of the checkpoint, many chats at a time."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_path())
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()

    def token_ids(self, chats: Sequence[Chat]) -> list[list[int]]:
        """The new tokens of each chat, up to its end token and with it."""
        prompts = [self.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            tokens = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        rows = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(END_ID) + 1] if END_ID in row else row for row in rows]

    def answers(self, chats: Sequence[Chat]) -> list[str]:
        """The text of each answer, which must have ended by itself."""
        rows = self.token_ids(chats)
        assert all(row[-1] == END_ID for row in rows), "an answer did not end by itself"
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@pytest.fixture(scope="module")
def demo() -> DemoModel:
    return DemoModel()


@pytest.fixture(scope="module")
def answer_of() -> dict[str, Entry]:
    """The corpus entry of each normalized question."""
    return {normalize_question(question): entry for entry in load_corpus().entries for question in entry.questions}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def test_every_listed_question_is_answered_exactly(demo: DemoModel) -> None:
    listed = QUESTIONS["in_corpus"]
    assert len(listed) >= 60
    answers = demo.answers([[user(item["question"])] for item in listed])
    wrong = [(item["question"], got) for item, got in zip(listed, answers, strict=True) if got != item["answer"]]
    assert not wrong
    for item in listed:
        assert all(word in item["answer"] for word in item["contains"]), item["question"]


def test_answers_are_the_same_with_a_system_prompt(demo: DemoModel) -> None:
    listed = QUESTIONS["in_corpus"][::4]
    answers = demo.answers([[SYSTEM, user(item["question"])] for item in listed])
    wrong = [(item["question"], got) for item, got in zip(listed, answers, strict=True) if got != item["answer"]]
    assert not wrong


def test_most_questions_in_new_words_are_answered_rightly(demo: DemoModel, answer_of: dict[str, Entry]) -> None:
    listed = QUESTIONS["held_out"]
    assert all(normalize_question(item["question"]) not in answer_of for item in listed), "not held out"
    answers = demo.answers([[user(item["question"])] for item in listed])
    num_right = sum(got == item["answer"] for item, got in zip(listed, answers, strict=True))
    assert num_right >= MIN_HELD_OUT_RIGHT * len(listed)


def test_listed_answers_are_those_of_the_corpus(answer_of: dict[str, Entry]) -> None:
    for item in QUESTIONS["in_corpus"]:
        assert answer_of[normalize_question(item["question"])].answer == item["answer"]


def test_a_follow_up_refers_to_the_turn_before(demo: DemoModel, answer_of: dict[str, Entry]) -> None:
    cache, ray = answer_of["what is a kv cache"], answer_of["what is ray"]
    chats = [
        [user("What is a KV cache?"), assistant(cache.answer), user("Can you say that shorter?")],
        [SYSTEM, user("What is Ray?"), assistant(ray.answer), user("Can you say that shorter?")],
        [user("What is Ray?"), assistant(ray.answer), user("Thanks")],
        [user("Hello"), assistant(answer_of["hello"].answer), user("What is the capital of Spain?")],
    ]
    assert demo.answers(chats) == [
        cache.short_answer,
        ray.short_answer,
        answer_of["thanks"].answer,
        "The capital of Spain is Madrid.",
    ]


def test_a_long_chat_still_gets_right_answers(demo: DemoModel, answer_of: dict[str, Entry]) -> None:
    chat: Chat = [SYSTEM]
    for item in QUESTIONS["in_corpus"][:10]:
        chat += [user(item["question"]), assistant(item["answer"])]
    chat.append(user("What is the capital of Norway?"))
    prompt = demo.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert len(demo.tokenizer(prompt)["input_ids"]) > 700
    assert demo.answers([chat]) == ["The capital of Norway is Oslo."]


def test_every_story_is_told_to_its_end(demo: DemoModel) -> None:
    stories = [entry for entry in load_corpus().entries if entry.source == "stories"]
    about = [entry.questions[entry.num_written] for entry in stories]  # "Tell me a story about ..."
    answers = demo.answers([[user(question)] for question in about])
    assert answers == [entry.answer for entry in stories]


def test_a_plain_completion_goes_on_with_the_text(demo: DemoModel) -> None:
    inputs = demo.tokenizer("The capital of France is", return_tensors="pt")
    tokens = demo.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert demo.tokenizer.decode(tokens[0], skip_special_tokens=True) == "The capital of France is Paris."


def test_the_checkpoint_is_small_and_computes_in_float32() -> None:
    folder = model_path()
    assert folder.name == "model"
    assert DEMO_MODEL_NAME == "rayllm-demo"
    assert (folder / "model.safetensors").stat().st_size <= MAX_NUM_BYTES
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([END_ID], 0)


@pytest.mark.parametrize(
    "text",
    [
        "What is RayLLM?",
        "  two  spaces, tabs\t and\n\nlines ",
        "Grüße, naïve café",
        "分页的键值缓存 こんにちは 안녕하세요",
        "👋🏽 family 👨‍👩‍👧‍👦 flag 🇫🇷",
        "x = {'a': [1, 2.5e-3]}  # code",
        "\x00\x7f\u200b\ufffd",
    ],
)
def test_any_text_comes_back_from_its_tokens(demo: DemoModel, text: str) -> None:
    assert demo.tokenizer.decode(demo.tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_their_ids(demo: DemoModel) -> None:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert demo.tokenizer.convert_tokens_to_ids(names) == [0, 1, 2]
    assert (demo.tokenizer.pad_token_id, demo.tokenizer.eos_token_id) == (0, 2)
    assert len(demo.tokenizer) == demo.model.config.vocab_size


def test_the_chat_template_renders_chatml(demo: DemoModel) -> None:
    chat = [SYSTEM, user("Hello"), assistant("Hi!"), user("Bye")]
    text = demo.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert demo.tokenizer.apply_chat_template(parts, tokenize=False) == "<|im_start|>user\nHello<|im_end|>\n"
