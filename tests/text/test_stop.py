from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rayllm.text.stop import StopScanner


def feed(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    scanner = StopScanner(stops, include)
    return "".join(map(scanner.push, pieces)) + scanner.finish(), scanner.matched


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, by brute force: the first end of a match; of the matches that end there, the
    longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text("abc", max_size=4)),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_any_cut_of_the_text_gives_the_same_result(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)

    assert feed(pieces, stops, include) == expected(text, stops, include)


@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1))
def test_nothing_is_shown_that_is_taken_back_and_nothing_is_held_without_need(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for i, character in enumerate(text):
        shown += scanner.push(character)
        if scanner.matched:
            break
        held = text[len(shown) : i + 1]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_no_text_follows_a_match() -> None:
    scanner = StopScanner(["stop"])

    assert scanner.push("a stop b") == "a "
    assert scanner.push("more") == ""
    assert scanner.finish() == ""
    assert scanner.matched == "stop"
