"""Token ids to text while they come: a character is never split, a stop string never shown in part."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from rayllm.request import SamplingParams
from rayllm.text.stop import StopScanner
from rayllm.text.tokenizer import Tokenizer

_MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """Joins the bytes of tokens and gives the characters that are complete.

    Bytes, because log-probabilities need each token's bytes anyhow, and because joining them can never take
    back what was given: decoding ids again, in a window, can (a byte token after a whole character changes
    how some decoders see that character). Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown_ids: frozenset[int] = frozenset(),
    ):
        """`prompt_ids`: what came before. A character that the prompt left unfinished is finished by the
        first ids. `shown_ids`: special tokens that are not skipped."""
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_token_ids - shown_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt_ids[-_MAX_CHARACTER_BYTES:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


class ChoiceText:
    """The text of one choice, from its token ids.

    `text` is all that may be shown so far; `stop_reason` the stop string that ended it. Where a stop string
    ends the choice, tokens after the one that completed it do not count (`num_tokens_used`). A stop string
    must lie wholly after the first `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        shown_ids: frozenset[int] = frozenset(),
    ):
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_ids=prompt_ids, shown_ids=shown_ids
        )
        self._stops = StopScanner(params.stop, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens if params.stop else 0
        self._shows_stop_token = params.include_stop_str_in_output
        self._parts: list[str] = []
        self._num_characters = 0
        self.num_tokens_used = 0
        self.offsets: list[int] = []
        """For each token used, where its text begins, in characters of the text before any cut at a stop
        string."""

    @property
    def text(self) -> str:
        """All text shown so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def stop_reason(self) -> str | None:
        """The stop string that matched."""
        return self._stops.matched

    def push(self, token_ids: Sequence[int], *, stop_token: bool = False) -> str:
        """Adds tokens and returns the new text that may be shown.

        `stop_token`: the last id is the one that ended the choice (end of sequence, or one of
        `stop_token_ids`). It counts, and has no text unless `include_stop_str_in_output`.
        """
        num_shown = len(token_ids) - 1 if stop_token and not self._shows_stop_token else len(token_ids)
        shown = ""
        for i, token_id in enumerate(token_ids):
            if self._stops.matched is not None:
                break
            self.num_tokens_used += 1
            self.offsets.append(self._num_characters)
            if i < num_shown:
                shown += self._scan(self._detokenizer.push(token_id))
        self._parts.append(shown)
        return shown

    def finish(self) -> str:
        """No more tokens come: the text that was held back, to be shown after all."""
        if self._stops.matched is not None:
            return ""
        shown = self._scan(self._detokenizer.finish())
        if self._stops.matched is None:
            shown += self._stops.finish()
        self._parts.append(shown)
        return shown

    def _scan(self, text: str) -> str:
        self._num_characters += len(text)
        if self.num_tokens_used <= self._min_tokens:
            return text
        return self._stops.push(text) if text else ""
