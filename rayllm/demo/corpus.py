"""What the built-in model knows: questions and answers, read from the text files in `texts/`.

A file holds entries separated by blank lines; a line begins with a mark:

    #  comment
    Q: one way to ask
    T: a topic, asked about in every form of `TOPIC_FORMS`
    N: what a story is about, asked for in every form of `STORY_FORMS`
    A: the answer (lines without a mark continue it)
    S: the same answer, shorter
    R: values of a table row, split by "|", put in place of {0}, {1} in the Q and A lines
    >  "shorter" or "again": a second question whose answer depends on the first turn

Nothing here needs more than the standard library.
"""

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

TEXTS_PATH = Path(__file__).resolve().parent / "texts"
CHAT_FILES = ("rayllm", "serving", "models", "smalltalk", "facts", "stories", "unknown")

TOPIC_FORMS = (
    "What is {0}?",
    "What's {0}?",
    "Explain {0}.",
    "Can you explain {0}?",
    "Explain {0} to me.",
    "Tell me about {0}.",
    "What does {0} mean?",
    "Define {0}.",
    "What do you know about {0}?",
    "Describe {0}.",
    "Give me a short explanation of {0}.",
    "I want to understand {0}.",
    "{0}",
    "What exactly is {0}?",
    "What is meant by {0}?",
    "Can you explain what {0} is?",
    "Can you tell me about {0}?",
    "What is the idea of {0}?",
    "What is the purpose of {0}?",
    "What is {0} good for?",
    "What is {0} used for?",
    "Why is {0} useful?",
    "Why do we need {0}?",
    "How does {0} work?",
    "How does {0} help?",
    "Help me understand {0}.",
    "In simple words, what is {0}?",
    "Teach me about {0}.",
)
PLURAL_FORM = "What are {0}?"
STORY_FORMS = (
    "Tell me a story about {0}.",
    "Tell me a short story about {0}.",
    "Write a story about {0}.",
    "Write a short story about {0}.",
    "Can you tell me a story about {0}?",
    "I would like a story about {0}.",
    "Do you know a story about {0}?",
    "A story about {0} please",
)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SUM_FORMS = (
    "What is {0} {sign} {1}?",
    "What is {0} {word} {1}?",
    "How much is {0} {word} {1}?",
    "{0} {sign} {1}",
    "{0}{sign}{1}=?",
    "Calculate {0} {sign} {1}.",
    "What is {0}{sign}{1}?",
)
OPERATIONS = (("+", "plus"), ("-", "minus"), ("*", "times"))
TOO_HARD_SUM = "What is 345 plus 678?"
NUM_TOO_HARD_SUMS = 400


@dataclass(frozen=True)
class Entry:
    """Ways to ask one thing, and its answer. `source` is the file it came from, without the suffix.

    The first `num_written` questions were written for this answer; the others are forms filled in.
    """

    questions: tuple[str, ...]
    answer: str
    short_answer: str | None
    source: str
    num_written: int


@dataclass(frozen=True)
class FollowUp:
    """A second question. Its answer is taken from the first turn ("shorter", "again"), or else fixed."""

    questions: tuple[str, ...]
    answer: str | None
    refers_to: str | None


@dataclass(frozen=True)
class Corpus:
    """Everything that training draws from."""

    entries: tuple[Entry, ...]
    follow_ups: tuple[FollowUp, ...]
    system_prompts: tuple[str, ...]


def load_corpus() -> Corpus:
    """Read all text files. The order is fixed, so training is reproducible."""
    entries = [entry for name in CHAT_FILES for entry in _read_entries(name)]
    entries += sum_entries()
    return Corpus(
        entries=tuple(_merge_same_answers(entries)),
        follow_ups=tuple(_follow_up(block) for block in _blocks("followups")),
        system_prompts=tuple(_text("systems").splitlines()),
    )


def normalize_question(question: str) -> str:
    """The question without what the model should overlook: case, spaces and closing marks."""
    bare = re.sub(r"\s+", " ", question.lower()).strip()
    return bare.rstrip(" ?!.") or bare


def sum_entries() -> list[Entry]:
    """Sums, differences and products of the numbers up to ten, and refusals of larger ones."""
    entries = []
    for sign, word in OPERATIONS:
        for a in range(11):
            for b in range(a + 1 if sign == "-" else 11):
                entries.append(_sum_entry(a, b, sign, word))
    hard = next(e for e in _read_entries("unknown") if TOO_HARD_SUM in e.questions)
    entries.append(replace(hard, questions=_too_hard_sums(), num_written=0))
    return entries


def _sum_entry(a: int, b: int, sign: str, word: str) -> Entry:
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    questions = [form.format(a, b, sign=sign, word=word) for form in SUM_FORMS]
    questions.append(f"What is {NUMBER_WORDS[a]} {word} {NUMBER_WORDS[b]}?")
    return Entry(tuple(questions), f"{a} {word} {b} is {result}.", None, "sums", len(questions))


def _too_hard_sums() -> tuple[str, ...]:
    draw = random.Random(0)
    questions = []
    for _ in range(NUM_TOO_HARD_SUMS):
        a, b = (draw.randint(11, 10 ** draw.randint(2, 4)) for _ in range(2))
        sign, word = draw.choice((*OPERATIONS, ("/", "divided by")))
        questions.append(draw.choice(SUM_FORMS).format(a, b, sign=sign, word=word))
    return tuple(questions)


def _text(name: str) -> str:
    return (TEXTS_PATH / f"{name}.txt").read_text(encoding="utf-8")


def _blocks(name: str) -> list[list[tuple[str, str]]]:
    """The entries of a file, each a list of (mark, text)."""
    lines = [line for line in _text(name).splitlines() if not line.startswith("#")]
    blocks = []
    for chunk in re.split(r"\n\s*\n", "\n".join(lines).strip()):
        block: list[tuple[str, str]] = []
        for line in chunk.splitlines():
            match = re.match(r"([QTNASR]:|>|Table:) ?(.*)", line)
            if match:
                block.append((match[1].rstrip(":"), match[2]))
            elif block:
                mark, text = block[-1]
                block[-1] = (mark, f"{text}\n{line}")
            else:
                raise ValueError(f"{name}.txt: a line without a mark begins an entry: {line!r}")
        blocks.append(block)
    return blocks


def _values(block: list[tuple[str, str]], mark: str) -> list[str]:
    return [text for found, text in block if found == mark]


def _read_entries(name: str) -> list[Entry]:
    return [entry for block in _blocks(name) for entry in _block_entries(block, name)]


def _block_entries(block: list[tuple[str, str]], name: str) -> list[Entry]:
    questions = _values(block, "Q")
    num_written = len(questions)
    for topic in _values(block, "T"):
        questions += _topic_questions(topic)
    for noun in _values(block, "N"):
        questions += [form.format(noun) for form in STORY_FORMS]
    (answer,) = _values(block, "A")
    short_answers = _values(block, "S")
    rows = [[value.strip() for value in row.split("|")] for row in _values(block, "R")]
    if rows:
        return [
            Entry(tuple(q.format(*row) for q in questions), answer.format(*row), None, name, num_written)
            for row in rows
        ]
    short_answer = short_answers[0] if short_answers else None
    return [Entry(tuple(questions), answer, short_answer, name, num_written)]


def _topic_questions(topic: str) -> list[str]:
    """Every form of asking about the topic, also without its article, as hurried people type."""
    forms = (*TOPIC_FORMS, PLURAL_FORM) if topic.endswith("s") else TOPIC_FORMS
    bare = re.sub(r"^(an?|the) ", "", topic)
    return [form.format(name) for name in dict.fromkeys((topic, bare)) for form in forms]


def _merge_same_answers(entries: list[Entry]) -> list[Entry]:
    """One entry for each answer, with each question once."""
    merged: dict[str, Entry] = {}
    for entry in entries:
        known = merged.get(entry.answer)
        questions = entry.questions if known is None else known.questions + entry.questions
        merged[entry.answer] = replace(known or entry, questions=tuple(dict.fromkeys(questions)))
    return list(merged.values())


def _follow_up(block: list[tuple[str, str]]) -> FollowUp:
    answers, references = _values(block, "A"), _values(block, ">")
    return FollowUp(
        questions=tuple(_values(block, "Q")),
        answer=answers[0] if answers else None,
        refers_to=references[0] if references else None,
    )
