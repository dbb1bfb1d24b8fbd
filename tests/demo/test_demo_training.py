"""The corpus is consistent, and training can be repeated."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rayllm.demo import model_path
from rayllm.demo import train as training
from rayllm.demo.conversations import ConversationSource, Example, Message, vary_question
from rayllm.demo.corpus import Corpus, load_corpus, normalize_question
from rayllm.demo.tokenizer import encode_example, train_tokenizer
from rayllm.demo.train import batches, save_checkpoint, train


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return train_tokenizer(corpus)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Training sets process-wide switches of torch; other tests must not see them."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(False)


def test_a_question_has_one_answer(corpus: Corpus) -> None:
    answers: dict[str, str] = {}
    for entry in corpus.entries:
        for question in entry.questions:
            known = answers.setdefault(normalize_question(question), entry.answer)
            assert known == entry.answer, question
    for follow_up in corpus.follow_ups:
        for question in follow_up.questions:
            assert normalize_question(question) not in answers, question


def test_no_text_holds_a_special_token(corpus: Corpus) -> None:
    for entry in corpus.entries:
        assert "<|" not in "".join((entry.answer, entry.short_answer or "", *entry.questions))


def test_the_corpus_is_as_rich_as_it_claims(corpus: Corpus) -> None:
    asked = [entry for entry in corpus.entries if entry.source in ("rayllm", "serving", "models", "smalltalk")]
    stories = [entry for entry in corpus.entries if entry.source == "stories"]
    assert len(asked) >= 200
    assert all(len(entry.questions) >= 2 for entry in asked)
    assert all(len(entry.answer.split()) <= 100 for entry in asked)  # counting to one hundred is the longest
    assert len(stories) >= 20
    assert all(60 <= len(entry.answer.split()) <= 150 for entry in stories)


def test_only_answers_are_learned(tokenizer: Tokenizer) -> None:
    turns = (
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi!"),
        ("user", "Bye"),
        ("assistant", "Bye!"),
    )
    example = Example(messages=tuple(Message(role, content) for role, content in turns))
    ids, learned = encode_example(example, tokenizer)
    taught = [token for token, learn in zip(ids, learned, strict=True) if learn]
    assert tokenizer.decode(taught, skip_special_tokens=False) == "Hi!<|im_end|>Bye!<|im_end|>"


def test_training_reads_the_same_tokens_as_the_chat_template(corpus: Corpus, tokenizer: Tokenizer) -> None:
    served = AutoTokenizer.from_pretrained(model_path())
    source = ConversationSource(corpus, seed=3)
    chats = [example for example in (source.draw() for _ in range(100)) if example.messages]
    for example in chats:
        messages = [{"role": message.role, "content": message.content} for message in example.messages]
        text = served.apply_chat_template(messages, tokenize=False)
        assert served(text)["input_ids"] == encode_example(example, tokenizer)[0]


def test_questions_are_varied_in_case_and_closing_marks() -> None:
    draw = random.Random(0)
    varied = {vary_question("What is continuous batching?", draw) for _ in range(400)}
    assert {
        "what is continuous batching?",
        "What is continuous batching",
        "What is continuous batching?",
    } <= varied


def test_batches_repeat_from_their_seed(corpus: Corpus, tokenizer: Tokenizer) -> None:
    first, second, other = (batches(ConversationSource(corpus, seed), tokenizer, seed, 0.5) for seed in (0, 0, 1))
    for _ in range(3):
        expected = next(first)
        assert torch.equal(expected.tokens_BT, next(second).tokens_BT)
        assert not torch.equal(expected.tokens_BT, next(other).tokens_BT)


@pytest.mark.usefixtures("torch_settings")
def test_two_trainings_from_one_seed_give_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of every phase. Its batches are small: a CPU without bfloat16 takes seconds for 2048 tokens."""
    monkeypatch.setattr(training, "BATCH_TOKENS", 128)
    monkeypatch.setattr(training, "EXAMPLES_PER_ROUND", 64)
    monkeypatch.setattr(training, "MAX_EAGER_TOKENS", 40)  # so that both kinds of attention are taken
    files = []
    for name in ("first", "second"):
        model, tokenizer = train(num_steps=3, seed=0, num_threads=1)
        save_checkpoint(model, tokenizer, tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_importing_the_package_is_light() -> None:
    code = "import sys, rayllm.demo; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
