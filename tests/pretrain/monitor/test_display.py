"""What a person sees."""

from __future__ import annotations

import builtins
import io
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.text import Text

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.monitor.live import Display
from amfm.pretrain.monitor.panel import (
    BARS,
    PLAIN_BARS,
    RunState,
    choose_bars,
    draw_sparkline,
    format_duration,
    plural,
    show_clock,
)
from amfm.pretrain.stages import total_steps
from tests.pretrain.tiny_run import tiny_config

NOON = 1705492800.0 + 0.0  # 2024-01-17 12:00:00 UTC, a Wednesday


def metrics_of(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5.5,
        "grad_norm": 1.25,
        "lr": 1e-3,
        "tokens": 192 * step,
        "tokens_per_second": 1234.5,
        "mfu": 0.25,
        "seconds": 2.0,
        "auxiliary": {},
        "expert_load": {"1": 1.5},
        "memory_bytes": 3 * 2**29,
        "skipped": False,
        **changes,
    }


def test_piped_output_is_plain_lines_at_the_configured_pace(data: DataConfig, tmp_path: Path) -> None:
    out = io.StringIO()
    config = tiny_config(data, tmp_path, train__steps=20, train__log_every_steps=5)
    display = Display(config, first_step=0, last_step=total_steps(config), console=Console(file=out, soft_wrap=True))
    for step in range(1, 9):
        display.show(metrics_of(step, **({"skipped": True, "loss": None} if step == 7 else {})))
    display.say("[not markup]")
    display.close()
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert [line.split(",")[0] for line in lines] == ["step 1/20", "step 5/20", "step 7/20", "[not markup]"]
    assert lines[0] == (
        "step 1/20, loss 5.5000, grad norm 1.250, lr 1.00e-03, 1,234 tokens/s, MFU 25.0%, max expert load 1.50"
    ), "one step, which warms up, gives no pace"
    assert lines[1].endswith("max expert load 1.50, 30s left")
    assert "SKIPPED" in lines[2] and "loss -" in lines[2]


def test_a_notebook_gets_lines_and_no_panel(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NotebookStream(io.StringIO):
        def isatty(self) -> bool:  # as ipykernel's
            return True

    shell, out = type("ZMQInteractiveShell", (), {})(), NotebookStream()  # by this name rich knows a notebook
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(sys, "stderr", out)
    display = Display(tiny_config(data, tmp_path, train__steps=20), first_step=0, last_step=20)
    display.show(metrics_of(1))
    display.close()
    assert display.live is None and out.getvalue().startswith("step 1/20, loss 5.5000")


def test_the_time_left_is_that_of_the_usual_step_and_a_cpu_has_no_mfu(data: DataConfig, tmp_path: Path) -> None:
    out = io.StringIO()
    config = tiny_config(data, tmp_path, train__steps=20, train__log_every_steps=1)
    display = Display(config, first_step=0, last_step=20, shows_mfu=False, console=Console(file=out, soft_wrap=True))
    for step, seconds in enumerate([90.0, 2.0, 2.0, 600.0, 2.0], 1):  # a warm-up, and a lid that was closed
        display.show(metrics_of(step, seconds=seconds))
    display.close()
    lines = out.getvalue().splitlines()
    assert [line.rpartition(", ")[2] for line in lines[2:]] == ["34s left", "32s left", "30s left"]
    assert "left" not in "".join(lines[:2]) and "MFU" not in out.getvalue()


def test_terminal_shows_progress_curve_pace_and_experts(data: DataConfig, tmp_path: Path) -> None:
    out = io.StringIO()
    config = tiny_config(data, tmp_path / "my-run", train__steps=20)
    display = Display(
        config, first_step=0, last_step=total_steps(config), console=Console(file=out, force_terminal=True, width=110)
    )
    for step in range(1, 4):
        display.show(metrics_of(step, loss=6.0 - step, validation_loss=4.0))
    assert "no checkpoint yet" in out.getvalue()
    display.show_checkpoint(2)
    display.close()
    shown = out.getvalue()
    for text in (
        "amfm train my-run",
        "3/20",
        "34s left",
        "loss 3.0000",
        "validation 4.0000",
        "MFU 25.0%",
        "1: 1.50",
        "█",
        "memory of rank 0, peak: 1.50 GiB",
        "elapsed 0s",
        "checkpoint of step 2, 0s ago",
    ):
        assert text in shown, text


def test_a_terminal_that_changes_its_size_shows_one_panel_and_the_newest_remarks(
    data: DataConfig, tmp_path: Path
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, height=40, highlight=False)
    config = tiny_config(data, tmp_path / "my-run", train__steps=20)
    display = Display(config, first_step=0, last_step=20, console=console)
    display.say("resumed from [somewhere]")
    display.show(metrics_of(1))
    before = len(out.getvalue())
    console.size = ConsoleDimensions(70, 30)
    display.show(metrics_of(2))
    display.close()
    fresh = out.getvalue()[before:].rpartition("\x1b[2J")[2]  # what a terminal shows since its screen was cleared
    assert fresh.count("resumed from [somewhere]") == 1
    assert fresh.index("resumed") < fresh.index("amfm train my-run")
    assert "2/20" in fresh
    widths = [cell_len(line) for line in Text.from_ansi(fresh).plain.splitlines()]
    assert max(widths) <= 70


def test_ctrl_c_is_answered_above_the_one_panel_with_the_steps_that_are_at_stake(
    data: DataConfig, tmp_path: Path
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40, highlight=False)
    display = Display(tiny_config(data, tmp_path, train__steps=20), first_step=0, last_step=20, console=console)
    for step in range(1, 8):
        display.show(metrics_of(step))
    display.show_checkpoint(5)
    out.write("^C")  # the terminal's echo
    display.answer_interrupt()
    display.show(metrics_of(8))
    display.close()
    shown = draw_screen(out.getvalue())
    assert shown[0] == "Ctrl-C: stopping after this step and saving; Ctrl-C again ends now and loses 3 steps"
    assert "".join(shown).count("╭") == 1 and "8/20" in "".join(shown)


def state_at(step: int, **attributes: Any) -> RunState:
    """A start of 20 steps with three steps of two minutes each, the newest at noon of a Wednesday, UTC."""
    state = RunState("run", first_step=0, last_step=20, began=1e9)
    for number in (step - 2, step - 1, step):
        state.take_metrics(metrics_of(number, seconds=120.0, time=NOON - 120.0 * (step - number)))
    for name, value in attributes.items():
        setattr(state, name, value)
    return state


@pytest.fixture
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_line_has_the_time_of_day_and_of_the_end(in_utc: None) -> None:
    state = state_at(10)
    assert state.metrics is not None
    line = state.format_line(state.metrics)
    assert line.startswith("12:00:00 step 10/20, loss") and line.endswith(", 20m00s left, done 12:20")
    assert show_clock(NOON + 86400, NOON) == "Thu 12:00" and show_clock(NOON + 7 * 86400, NOON) == "24 Jan 12:00"


def test_a_start_that_is_over_has_no_time_left_and_ran_until_its_newest_step() -> None:
    state = state_at(10, is_over=True, began=NOON - 3600)
    assert state.remaining() == "" and state.elapsed() == "ran 1h00m   "


def test_a_start_that_stops_before_the_end_of_the_run_shows_both() -> None:
    assert state_at(10, num_steps=60).place(11) == "11/60, stops at 20" and state_at(10).place(11) == "11/20"


def test_an_mfu_above_the_peak_is_not_printed_but_its_reason() -> None:
    state = state_at(10)
    assert state.describe_mfu(metrics_of(1, mfu=1.0)) == ["MFU 100.0%"]
    assert state.describe_mfu(metrics_of(1, mfu=2.02)) == ["MFU unknown: the peak was measured too low"]


def test_the_curve_is_drawn_in_characters_that_the_terminal_has() -> None:
    assert choose_bars("utf-8") == BARS and choose_bars("ascii") == PLAIN_BARS
    assert draw_sparkline([0.0, 7.0], PLAIN_BARS) == "_#" and len(PLAIN_BARS) == len(BARS)


def draw_screen(output: str) -> list[str]:
    """What a terminal shows of an output whose lines are rewritten in place."""
    rows, row = [""], 0
    for order, number, letter, text in re.findall(r"(\x1b\[\??(\d*)[\d;]*([A-Za-z])|\r|\n)|([^\x1b\r\n]+)", output):
        if letter == "A":
            row -= int(number or 1)
        elif letter == "K":
            rows[row] = ""
        elif order == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif order == "\r":
            rows[row] += "\r"
        else:
            start, _, _ = rows[row].partition("\r")
            rows[row] = text if "\r" in rows[row] else start + text
    return [line.replace("\r", "") for line in rows]


def test_a_number_of_things_is_written_as_one_says_it() -> None:
    assert [plural(number, "rank") for number in (1, 2, 1000)] == ["1 rank", "2 ranks", "1,000 ranks"]


def test_sparkline_spans_the_range_and_averages_long_histories() -> None:
    assert draw_sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert draw_sparkline([1.0]) == "▁"
    assert draw_sparkline([]) == ""
    assert len(draw_sparkline([float(value) for value in range(1000)])) == 48


def test_durations_name_their_two_largest_units() -> None:
    assert [format_duration(seconds) for seconds in (0.4, 59, 61, 3_700)] == ["0s", "59s", "1m01s", "1h01m"]


def test_a_terminal_whose_output_goes_into_a_launcher_s_log_gets_plain_lines(data: DataConfig, tmp_path: Path) -> None:
    """`ssh -tt` gives a rank a terminal; the launcher's line for it sets TERM=dumb."""
    out = io.StringIO()
    config = tiny_config(data, tmp_path, train__steps=4, train__log_every_steps=2)
    console = Console(file=out, soft_wrap=True, force_terminal=True, _environ={"TERM": "dumb"})
    display = Display(config, first_step=0, last_step=total_steps(config), console=console)
    for step in range(1, 5):
        display.show(metrics_of(step))
    display.close()
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == ["step 1/4", "step 2/4", "step 4/4"]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(("width", "shows"), [(80, False), (117, False), (118, True), (200, True)])
def test_a_wide_terminal_shows_the_last_steps_and_events_and_no_line_is_wider_than_it(width: int, shows: bool) -> None:
    state = RunState("amfm watch run", first_step=0, last_step=60, began=None)
    state.take_metrics(metrics_of(1, loss=7.25, expert_load={str(block): 1.5 for block in range(24)}))
    state.take_metrics(metrics_of(2, grad_norm=9.5))
    state.events.append("12:00 skipped step, step 1")
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(state.draw(width))
    drawn = out.getvalue()
    assert max(cell_len(line) for line in drawn.splitlines()) <= width
    found = [text in drawn for text in ("last 2 steps", "5.5000 to 7.2500", "1.250 to 9.500", "skipped step, step 1")]
    assert found == [shows] * 4
