"""Stop strings over text in pieces: equal to a search of the whole text, character by character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.cluster.text import StopStrings, TextError


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The whole text is there: the first stop to be complete wins, of those the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[list[str], str | None]:
    """What was emitted per piece (what was held back is last), and the stop."""
    searcher = StopStrings(stops, include)
    emitted = []
    for piece in pieces:
        text, stop = searcher.feed(piece)
        emitted.append(text)
        if stop is not None:
            return emitted, stop
    return [*emitted, searcher.flush()], None


letters = st.text("ab\u00e9", max_size=6)


@given(
    pieces=st.lists(letters, max_size=12),
    stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_equals_naive_search(pieces: list[str], stops: list[str], include: bool) -> None:
    emitted, stop = run(pieces, stops, include)
    assert ("".join(emitted), stop) == naive("".join(pieces), stops, include)


@given(pieces=st.lists(letters, max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_holds_back_no_more_than_a_stop_may_need(pieces: list[str], stops: list[str]) -> None:
    searcher = StopStrings(stops)
    text = ""
    for piece in pieces:
        _, stop = searcher.feed(piece)
        if stop is not None:
            return
        text = text + piece
        held = text[len(text) - len(searcher._held) :]
        beginnings = [text[-n:] for n in range(1, len(text) + 1) if any(s.startswith(text[-n:]) for s in stops)]
        assert held == max(beginnings, key=len, default="")


def test_stop_that_spans_pieces() -> None:
    assert run(["one E", "N", "D two"], ["END"]) == (["one ", "", ""], "END")
    assert run(["one E", "N", "D two"], ["END"], include=True) == (["one ", "", "END"], "END")


def test_false_beginning_is_released() -> None:
    assert run(["E", "N", "T"], ["END"]) == (["", "", "ENT", ""], None)
    assert run(["EEN", "D"], ["END"]) == (["E", ""], "END")


def test_first_complete_wins_then_longest() -> None:
    assert run(["xabcd"], ["abcd", "bc"]) == (["xa"], "bc")
    assert run(["xabc"], ["bc", "abc", "c"]) == (["x"], "abc")


def test_rest_at_the_end_is_not_lost() -> None:
    assert run(["the E"], ["END"]) == (["the ", "E"], None)


def test_no_stops_hold_nothing() -> None:
    assert run(["a", "b"], []) == (["a", "b", ""], None)


def test_empty_stop_is_refused() -> None:
    with pytest.raises(TextError, match="at least one character"):
        StopStrings(["a", ""])
