"""Conversations drawn from the corpus: what one training example says.

The corpus has each question in a few forms. People type more carelessly, so questions are varied here: case,
closing marks, polite words, contractions, slips of the keyboard. Answers are never varied.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rayllm.demo.corpus import Corpus, Entry, FollowUp

SYSTEM_PROMPT_SHARE = 0.3
PLAIN_TEXT_SHARE = 0.04
LONG_CHAT_SHARE = 0.006  # so that positions far into the context are trained too
MAX_NUM_TURNS_LONG = 24


@dataclass(frozen=True)
class Mix:
    """How often each kind of example is drawn. The shares of the sources (the files) add up to one."""

    source_shares: Mapping[str, float]
    multi_turn_share: float = 0.12
    max_num_turns: int = 5
    follow_up_share: float = 0.45  # of the turns that come after an answered question
    reference_weight: int = 1  # of follow-ups that refer to the turn before, against one of the others
    small_talk_weight: int = 0  # of SECOND_TURN_SMALL_TALK among the follow-ups
    in_short_share: float = 0.0  # of single questions, asked for their short answer
    written_share: float = 0.0  # of questions drawn from the written ones alone, which forms outnumber


# The stories are long and few; the sums are many and short.
FIRST_MIX = Mix(
    source_shares={
        "rayllm": 0.16,
        "serving": 0.18,
        "models": 0.12,
        "smalltalk": 0.13,
        "facts": 0.15,
        "sums": 0.08,
        "stories": 0.05,
        "unknown": 0.13,
    }
)
# Later: less of what is known by then, more of the sums.
SECOND_MIX = Mix(
    source_shares={
        "rayllm": 0.15,
        "serving": 0.14,
        "models": 0.09,
        "smalltalk": 0.15,
        "facts": 0.12,
        "sums": 0.20,
        "stories": 0.03,
        "unknown": 0.12,
    }
)
# In the end: more second questions.
THIRD_MIX = replace(
    SECOND_MIX,
    multi_turn_share=0.25,
    max_num_turns=3,
    follow_up_share=0.7,
    reference_weight=4,
    in_short_share=0.15,
)
# Then: the questions in their own words, wherever forms outnumber them.
FOURTH_MIX = replace(
    THIRD_MIX,
    written_share=0.5,
    source_shares={
        "rayllm": 0.17,
        "serving": 0.20,
        "models": 0.11,
        "smalltalk": 0.16,
        "facts": 0.10,
        "sums": 0.12,
        "stories": 0.03,
        "unknown": 0.11,
    },
)
# Then: thanks and the like as second turns.
FIFTH_MIX = replace(FOURTH_MIX, small_talk_weight=2)
# Last: what people type first, such as a bare "hi".
SIXTH_MIX = replace(
    FIFTH_MIX,
    written_share=0.7,
    source_shares={
        "rayllm": 0.18,
        "serving": 0.16,
        "models": 0.08,
        "smalltalk": 0.30,
        "facts": 0.08,
        "sums": 0.08,
        "stories": 0.03,
        "unknown": 0.09,
    },
)

# The first questions of the small talk that mostly follows an answer.
SECOND_TURN_SMALL_TALK = ("Thanks", "Great", "Yes", "No", "Bye", "Why?", "You are wrong")
IN_SHORT = ("In short: ", "Briefly: ", "In one sentence: ", "Short answer please: ")
OPENINGS = ("Please ", "Hi, ", "Hello, ", "Hello! ", "Hey, ", "So, ", "Ok, ", "Now, ", "And ", "Well, ")
ASKING = (
    "Can you tell me ",
    "Could you tell me ",
    "Please tell me ",
    "Tell me, ",
    "I want to know ",
    "I have a question: ",
    "Quick question: ",
    "Do you know ",
)
WISHING = (
    "Can you ",
    "Could you ",
    "Please ",
    "Can you please ",
    "Would you please ",
    "I would like you to ",
)
QUESTION_WORDS = ("What", "How", "Why", "Which", "Who", "When", "Where")
WISH_WORDS = (
    "Tell",
    "Write",
    "Name",
    "List",
    "Count",
    "Give",
    "Say",
    "Explain",
    "Describe",
    "Define",
    "Summarize",
)
CLOSINGS = (" please", ", please", " please?", " thanks", " Thanks!")
SPELLINGS = (
    ("colour", "color"),
    ("What is", "What's"),
    ("I am", "I'm"),
    ("do not", "don't"),
    ("You are", "You're"),
)


@dataclass(frozen=True)
class Message:
    """One message of a chat. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What the model reads in training: a chat, or (for plain completions) a text alone."""

    messages: tuple[Message, ...] = ()
    plain_text: str | None = None


class ConversationSource:
    """Draws training examples. The same corpus and seed give the same examples in the same order."""

    def __init__(self, corpus: Corpus, seed: int, mix: Mix = FIRST_MIX) -> None:
        self._random = random.Random(seed)
        self._mix = mix
        self._system_prompts = corpus.system_prompts
        self._follow_ups: list[FollowUp] = []
        for follow_up in corpus.follow_ups:
            self._follow_ups += [follow_up] * (mix.reference_weight if follow_up.refers_to else 1)
        for entry in corpus.entries:
            if entry.questions[0] in SECOND_TURN_SMALL_TALK:
                small_talk = FollowUp(entry.questions, entry.answer, None)
                self._follow_ups += [small_talk] * mix.small_talk_weight
        self._sources = tuple(mix.source_shares)
        self._shares = tuple(mix.source_shares.values())
        self._entries: dict[str, list[Entry]] = {source: [] for source in self._sources}
        for entry in corpus.entries:
            self._entries[entry.source].append(entry)
        self._weights = {
            source: [len(entry.questions) ** 0.5 if source == "unknown" else 1.0 for entry in entries]
            for source, entries in self._entries.items()
        }

    def draw(self) -> Example:
        """The next example."""
        chance = self._random.random()
        if chance < PLAIN_TEXT_SHARE:
            return Example(plain_text=self._draw_entry().answer)
        messages = []
        if self._random.random() < SYSTEM_PROMPT_SHARE:
            messages.append(Message("system", self._random.choice(self._system_prompts)))
        if chance < PLAIN_TEXT_SHARE + self._mix.in_short_share:
            return Example(messages=(*messages, *self._turn_in_short()))
        last: Entry | None = None
        for _ in range(self._num_turns(chance)):
            answered = self._draw_follow_up(last)
            if answered is None:
                last = self._draw_entry()
                messages += self._turn(self._questions(last), last.answer)
            else:
                last = None
                messages += self._turn(*answered)
        return Example(messages=tuple(messages))

    def _num_turns(self, chance: float) -> int:
        if chance > 1 - LONG_CHAT_SHARE:
            return self._random.randint(self._mix.max_num_turns, MAX_NUM_TURNS_LONG)
        if chance > 1 - self._mix.multi_turn_share:
            return self._random.randint(2, self._mix.max_num_turns)
        return 1

    def _turn_in_short(self) -> list[Message]:
        entry = self._draw_entry()
        while entry.short_answer is None:
            entry = self._draw_entry()
        question, answer = self._turn(self._questions(entry), entry.short_answer)
        return [replace(question, content=self._random.choice(IN_SHORT) + question.content), answer]

    def _draw_follow_up(self, last: Entry | None) -> tuple[Sequence[str], str] | None:
        """Questions that follow `last`, with their answer; None when the next turn shall be a new topic."""
        if last is None or self._random.random() > self._mix.follow_up_share:
            return None
        follow_up = self._random.choice(self._follow_ups)
        answer = _answer_to(follow_up, last)
        return None if answer is None else (follow_up.questions, answer)

    def _draw_entry(self) -> Entry:
        (source,) = self._random.choices(self._sources, self._shares)
        (entry,) = self._random.choices(self._entries[source], self._weights[source])
        return entry

    def _questions(self, entry: Entry) -> Sequence[str]:
        written_share = self._mix.written_share
        if written_share and entry.num_written and self._random.random() < written_share:
            return entry.questions[: entry.num_written]
        return entry.questions

    def _turn(self, questions: Sequence[str], answer: str) -> list[Message]:
        question = vary_question(self._random.choice(questions), self._random)
        return [Message("user", question), Message("assistant", answer)]


def vary_question(question: str, draw: random.Random) -> str:
    """The question as another person might type it."""
    for usual, other in SPELLINGS:
        if usual in question and draw.random() < 0.3:
            question = question.replace(usual, other)
    if draw.random() < 0.3:
        bare = question.rstrip(" ?!.")
        question = (bare or question) + draw.choice(("", "", "?", ".", "!", " ?", "??"))
    if draw.random() < 0.08 and question[:1].isalpha():
        question = question.rstrip(" ?!.") + draw.choice(CLOSINGS)
    chance = draw.random()
    if chance < 0.12 and question.startswith(QUESTION_WORDS):
        question = draw.choice(ASKING) + _indirect(question, draw)
    elif chance < 0.12 and question.startswith(WISH_WORDS):
        question = draw.choice(WISHING) + _lower_first(question)
    elif chance < 0.18 and question[:1].isalpha():
        question = draw.choice(OPENINGS) + _lower_first(question)
    if draw.random() < 0.04:
        question = _with_slip(question, draw)
    case = draw.random()
    if case < 0.25:
        question = question.lower()
    elif case < 0.28:
        question = question.upper()
    return question


def _indirect(question: str, draw: random.Random) -> str:
    """ "What is a block?" as part of a sentence: "what a block is", or carelessly left as it was."""
    match = re.fullmatch(r"(What|Who) (is|are|was) ([^,]+?)\??", question)
    plain = match is not None and not re.search(r"^meant | for$", match[3])
    if match and plain and draw.random() < 0.6:
        return f"{match[1].lower()} {match[3]} {match[2]}"
    return _lower_first(question)


def _lower_first(question: str) -> str:
    first_word = question.split()[0]
    if first_word == "I" or not first_word[1:].islower():
        return question
    return question[0].lower() + question[1:]


def _with_slip(question: str, draw: random.Random) -> str:
    """The question with two letters swapped, or one left out or doubled."""
    if len(question) < 8:
        return question
    at = draw.randrange(1, len(question) - 2)
    slips = (
        question[:at] + question[at + 1] + question[at] + question[at + 2 :],
        question[:at] + question[at + 1 :],
        question[: at + 1] + question[at:],
    )
    return draw.choice(slips)


def _answer_to(follow_up: FollowUp, entry: Entry) -> str | None:
    """The answer to a follow-up of `entry`; None when there is none."""
    if follow_up.refers_to == "again":
        return entry.answer
    if follow_up.refers_to == "shorter" and entry.short_answer is not None:
        return entry.short_answer
    return follow_up.answer
