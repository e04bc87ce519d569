"""What a person sees on a terminal of any width, and in a log file."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from amfm.launch.console import BAR_WIDTH, print_pairs, print_rows, say, show_progress

REMARK = "1,234,567 tokens, 1,234 documents/s, 12.3 MB/s, 1,234,567 tokens/s"


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_bar_keeps_its_width_and_the_time_left_however_long_the_remark(width):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with show_progress("prepare", console=console) as show:
        show(170, 340, REMARK, 154.0)
    line = out.getvalue().replace("\x1b[2K", "\r").split("\r")[-1].split("\n")[0]
    assert line.count("━") >= BAR_WIDTH // 2 - 1
    assert "170/340" in line and "3 min to go" in line
    assert len(line) <= width and (REMARK in line) == (width == 160)


def test_names_from_elsewhere_give_the_terminal_no_orders(capsys):
    """ESC]0; sets its title, ESC[2J clears it, \x9b begins what ESC[ does; brackets are rich's own orders."""
    for show in (say, lambda text: print_pairs(text, [(text, text)]), lambda text: print_rows(text, [text], [[text]])):
        show("\x1b]0;title\x07 \x1b[2J \x9b31m [bold] \u202e\tnext\nline")
    told = capsys.readouterr()
    assert not set(told.err + told.out) & set("\x1b\x07\x9b\u202e")
    assert "\\x1b]0;title\\x07 \\x1b[2J \\x9b31m [bold] \\u202e" in told.err


def test_a_log_file_gets_lines_with_the_time_left():
    out = io.StringIO()
    with show_progress("evaluate", console=Console(file=out, width=200), every_seconds=0) as show:
        show(1, 2, "tokens", 154.0)
        show(2, 2, "tokens")
    assert out.getvalue() == "evaluate: 1/2 tokens, 3 min to go\nevaluate: 2/2 tokens\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_long_title_is_cut_between_words_on_a_terminal_and_nowhere_else(capsys, monkeypatch, is_terminal):
    monkeypatch.setenv("FORCE_COLOR", "1") if is_terminal else monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    words = [f"setting_{number}=value" for number in range(12)]
    print_pairs(" ".join(words), [])
    lines = [Text.from_ansi(line).plain for line in capsys.readouterr().out.strip().splitlines()]
    assert [word for line in lines for word in line.split()] == words
    assert len(lines) == (2 if is_terminal else 1)


@pytest.mark.parametrize("number", [5, 20])
def test_a_table_that_is_too_wide_for_its_words_is_a_paragraph_per_row_and_cuts_none(capsys, number):
    cells = [f"{place}_a_long_word" for place in range(number)]
    print_rows("Runs", [f"measure {place}" for place in range(number)], [cells])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 160
    assert set(cells) <= set(" ".join(lines).replace(";", " ").split())
    assert ("\u2502" in "".join(lines)) == (number == 5)
