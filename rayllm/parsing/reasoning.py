"""How models mark their reasoning, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands first in an answer, between one of `begin` and one of `end`. The prompt may already hold the
    beginning (`opened_by`)."""

    name: str
    begin: tuple[str, ...]
    end: tuple[str, ...]
    signs: tuple[str, ...] = ()
    """Texts that a chat template of such a model holds, all of them; none: never chosen by itself."""
    turn: str = ""
    """What a prompt ends with where reasoning may begin; empty: it may after any that does not end it."""
    answer: str = ""
    """What begins the answer where it stands in a frame of its own."""

    @property
    def markers(self) -> tuple[str, ...]:
        return self.begin + self.end

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends inside reasoning: its last words are the beginning marker."""
        return prompt.rstrip().endswith(self.begin)


_THINK = ("<think>",), ("</think>",)
REASONING_FORMATS: dict[str, ReasoningFormat] = {
    found.name: found
    for found in (
        ReasoningFormat(
            "openai_gptoss",
            ("<|channel|>analysis<|message|>",),
            ("<|end|><|start|>assistant",),
            signs=("<|channel|>analysis",),
            turn="<|start|>assistant",
            answer="<|channel|>final<|message|>",
        ),
        ReasoningFormat("mistral", ("[THINK]",), ("[/THINK]",), signs=("[THINK]",)),
        ReasoningFormat("glm45", *_THINK, signs=("</think>", "<arg_key>")),
        ReasoningFormat("qwen3", *_THINK, signs=("</think>", "<|im_start|>")),
        ReasoningFormat("deepseek_r1", *_THINK, signs=("</think>",)),
        ReasoningFormat(
            "granite",
            ("Here is my thought process:", "Here's my thought process:"),
            ("Here is my response:", "Here's my response:"),
            signs=("Here is my thought process:",),
        ),
    )
}
"""In the order in which a template is looked at."""


def detect_reasoning(template: str) -> ReasoningFormat | None:
    """The format that a chat template shows; None where its model does not reason."""
    for found in REASONING_FORMATS.values():
        if all(sign in template for sign in found.signs):
            return found
    return None
