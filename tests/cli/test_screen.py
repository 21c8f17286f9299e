"""What a person sees: lines within a width, and a bar only where it takes long."""

import io
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_kvret.cli import screen
from mlx_kvret.cli.screen import Words, cells, fitted, progress, span

LETTERS = st.text(st.sampled_from("ab \n\tcé世界-.\u0301"), max_size=80)


def wide(line):
    return sum(map(cells, line))


@given(LETTERS, st.integers(8, 30), st.integers(0, 80))
def test_no_line_is_too_long_and_nothing_is_lost(text, width, cut):
    words = Words(width)
    shown = words.add(text[:cut]) + words.add(text[cut:]) + words.end()
    assert all(wide(line) <= width for line in shown.split("\n"))
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    whole = Words(width)
    assert shown == whole.add(text) + whole.end()


def test_lines_break_between_words():
    words = Words(12)
    assert words.add("the weary mil") == "the weary "
    assert words.add("ler walks.\n") == "\nmiller " + "\nwalks.\n"
    assert words.add("past") + words.end() == "past"
    assert Words(None).add("x" * 99) == "x" * 99


def test_a_word_longer_than_a_line_is_broken_where_the_line_ends():
    words = Words(8)
    assert (words.add("ab " + "c" * 20 + " d") + words.end()).split("\n") == [
        "ab ",
        "c" * 8,
        "c" * 8,
        "cccc d",
    ]


def test_remarks_fit():
    text = "one two three four\nfive"
    assert fitted(text, 9).split("\n") == ["one two", "three", "four", "five"]
    assert fitted(text, 9, "  ").split("\n") == ["one two", "  three", "  four", "five"]
    assert fitted(text, None) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def lines(self):
        """What stood in the line, each time it was drawn over."""
        return [line for line in re.split(r"[\r\n]", self.getvalue()) if line.strip()]


def at_a_terminal(monkeypatch):
    """Stderr is one from now on, and its ``clock`` stands still."""
    stream, clock = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    stream.clock = clock
    return stream


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_a_bar_comes_after_a_second_and_goes(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = at_a_terminal(monkeypatch)
    with progress() as tell:
        tell(0, 4000)
        terminal.clock[0] = 0.9
        tell(1000, 4000)
        assert terminal.getvalue() == ""
        terminal.clock[0] = 2.0
        tell(2000, 4000)
        assert terminal.lines()[-1].startswith("reading")
        tell(4000, 4000)
    shown = terminal.lines()
    assert len(shown) == 1 and all(len(line) < columns for line in shown)
    assert terminal.getvalue().endswith("\r") and terminal.getvalue().count("\n") == 0
    if columns == 200:
        assert shown[0] == f"reading [{'#' * 15}{'.' * 15}] 2,000 of 4,000 tokens, 2 s left"


def test_a_bar_goes_when_reading_is_broken_off(monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    with pytest.raises(KeyError), progress(after=0) as tell:
        tell(0, 10)
        raise KeyError
    assert terminal.getvalue().endswith(" \r")


def test_without_a_terminal_it_is_a_line_a_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    with progress() as tell:
        for second in range(0, 200, 10):
            clock[0] = second
            tell(second, 200)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "reading: 60 of 200 tokens, 2:20 min left",
        "reading: 120 of 200 tokens, 1:20 min left",
        "reading: 180 of 200 tokens, 20 s left",
    ]


def test_times_for_people():
    assert [span(s) for s in (0.4, 59, 61, 3599.6, 7325)] == [
        "0 s",
        "59 s",
        "1:01 min",
        "1 h 00 min",
        "2 h 02 min",
    ]
