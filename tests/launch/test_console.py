"""What a person sees on a terminal of any width, and in a log file."""

import io

import pytest
from rich.console import Console

from amfm.launch.console import BAR_WIDTH, show_progress

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


def test_a_log_file_gets_lines_with_the_time_left():
    out = io.StringIO()
    with show_progress("evaluate", console=Console(file=out, width=200), every_seconds=0) as show:
        show(1, 2, "tokens", 154.0)
        show(2, 2, "tokens")
    assert out.getvalue() == "evaluate: 1/2 tokens, 3 min to go\nevaluate: 2/2 tokens\n"
