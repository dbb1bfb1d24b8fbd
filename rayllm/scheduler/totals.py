"""What one scheduler has done."""

from __future__ import annotations

from dataclasses import dataclass

from rayllm.scheduler.sequence import Sequence


@dataclass(slots=True)
class SchedulerTotals:
    """They only grow."""

    num_preemptions: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache, each sequence's once."""
    prefix_hits: int = 0
    num_started_tokens: int = 0
    """Prompt tokens of the sequences that ran, each counted once."""
    num_ended_tokens: int = 0
    """Tokens of the sequences that came to their own end."""
    num_ended_max_tokens: int = 0
    """Tokens that those might have had."""
    num_slack_plans: int = 0
    """Times that a plan, or the attempt at one, left nothing waiting."""

    def note_end(self, sequence: Sequence) -> None:
        """It came to its own end."""
        self.num_ended_tokens += sequence.num_emitted
        self.num_ended_max_tokens += sequence.max_length - sequence.num_prompt_tokens
