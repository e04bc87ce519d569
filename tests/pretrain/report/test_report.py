"""The report: one self-contained page of any run directory, finished, unfinished or truncated."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from amfm.model.flops import flops_per_token
from amfm.pretrain.config.file import load_config, resolved_yaml
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.draw import draw_plot
from amfm.pretrain.report.numbers import LIGHT, count, distinct, plain
from amfm.pretrain.report.overlay import draw_picture
from amfm.pretrain.report.page import show_time
from amfm.pretrain.report.page_data import MAX_POINTS
from amfm.pretrain.report.plots import make_plots
from amfm.pretrain.report.report import describe_model, write_report
from tests.helpers.full_disk import largest_file
from tests.pretrain.config.files import BASE


def line(step: int, **more: object) -> dict[str, object]:
    return {
        "step": step,
        "loss": 8.0 / step,
        "grad_norm": 1.0 / step,
        "lr": 1e-3,
        "tokens": 512 * step,
        "tokens_per_second": 1000.0,
        "mfu": 0.25,
        "seconds": 0.5,
        **more,
    }


def brief(step: int, **more: object) -> dict[str, object]:
    """A line of a run with one plot, for what is not in plots: each is drawn for a tenth of a second."""
    return {"step": step, "loss": 8.0 / step, "tokens": 512 * step, "seconds": 0.5, **more}


def make_run(folder: Path, lines: list[dict[str, object]], *overrides: str) -> Path:
    source = folder / "source.yaml"
    source.write_text(BASE)
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(resolved_yaml(load_config(source, overrides)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    return run


def figures(page: str) -> dict[str, ElementTree.Element]:
    """Title -> SVG; parsing shows that each is well-formed."""
    found = re.findall(r"<figcaption><b>(.*?)</b>.*?<noscript>(<svg.*?</svg>)\s*</noscript>", page, flags=re.DOTALL)
    return {title: ElementTree.fromstring(svg) for title, svg in found}


def data_of(page: str) -> dict[str, Any]:
    """What the page's script draws."""
    return json.loads(re.search(r'<script type="application/json" id="plots-data">(.*?)</script>', page)[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a usual run, which several tests read."""
    lines = [line(step, expert_load={"1": 1.5}) for step in range(1, 30)]
    return write_report([make_run(tmp_path_factory.mktemp("page"), lines)]).read_text()


def test_what_was_inspected_is_a_map_by_block_and_step_without_blocks_that_have_no_such_thing(tmp_path):
    lines = [brief(step) for step in range(1, 31)]
    for step in (10, 20, 30):
        blocks = {
            "weight": [2.0, 4.0, 1.0, 8.0],
            "update": [0.1, 0.0, 0.1, 0.1],
            "router_entropy": [None, 1.5, None, 1.0],
            "bias_low": [None, -0.5, None, -1.0],
            "bias_high": [None, 0.5, None, 1.0 if step > 10 else None],
            "bias_mean": [None, 1e-9, None, 0.0],
        }
        lines[step - 1]["inspect"] = {"blocks": blocks, "groups": {}}
    run = make_run(tmp_path, lines, "model.pattern=MEME", "model.moe={num_experts: 4, top_k: 2, expert_hidden_size: 8}")
    page = write_report([run]).read_text()
    assert {"Weights by block", "Updates by block", "Router entropy", "Range of balancing biases"} < set(figures(page))
    assert "Gradients by block" not in figures(page) and "Mean of balancing biases" not in figures(page)
    heats = {plot["name"]: plot["heat"] for plot in data_of(page)["plots"] if plot["heat"]}
    weights = heats["inspect-weight"]
    assert weights["names"] == ["0 M", "1 E", "2 M", "3 E"] and weights["edges"] == [5.0, 15.0, 25.0, 35.0]
    assert weights["rows"] == [[2.0] * 3, [4.0] * 3, [1.0] * 3, [8.0] * 3]
    assert (weights["lowest"], weights["highest"], weights["log"]) == (1.0, 8.0, True)
    assert heats["inspect-update"]["names"] == ["0 M", "2 M", "3 E"]  # of nothing there is no ratio
    assert heats["inspect-bias_range"]["rows"] == [[1.0] * 3, [None, 2.0, 2.0]]


def test_a_finished_run_shows_its_numbers_and_all_its_plots(tmp_path):
    lines = [
        line(
            step,
            expert_load={"1": 1.5, "3": 2.0},
            auxiliary={"balance": 0.01},
            validation_loss=3.0,
            data={"phase": step // 60, "tokens": {"plays": 512 * (step % 60)}, "epochs": {"plays": step / 80}},
        )
        for step in range(1, 101)
    ]
    run = make_run(tmp_path, lines)
    (run / "events.jsonl").write_text(json.dumps({"time": 0, "event": "checkpoint", "step": 50, "seconds": 1.5}) + "\n")
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0", "host": {"cores": 2}}))
    page = write_report([run]).read_text()
    assert set(figures(page)) == {
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "MFU",
        "Epochs by source",
        "Expert load",
        "Auxiliary losses",
    }
    assert ">finished<" in page
    assert "perplexity 20.1" in page
    assert "25.0 %" in page
    assert "<td>checkpoint</td><td>seconds 1.5</td>" in page
    assert "<th>host.cores</th><td>2</td>" in page
    assert "pattern: M*-" in page
    assert "<code>Pattern M*-</code>" in page
    assert "<tr><td>0</td><td>plays</td><td>30,208</td><td>0.738</td></tr>" in page
    assert "<tr><td>1</td><td>plays</td><td>20,480</td><td>1.250</td></tr>" in page
    assert "<tr><td>all</td><td></td><td>50,688</td><td></td></tr>" in page


def test_one_step_of_an_unfinished_run_is_enough(tmp_path):
    page = write_report([make_run(tmp_path, [brief(1, lr=1e-3)])]).read_text()
    assert "unfinished: step 1 of 100" in page
    assert set(figures(page)) == {"Loss", "Learning rate"}
    assert "No events were logged." in page


def test_the_page_asks_for_nothing_outside_itself(page):
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert "<link" not in page
    assert "default-src 'none'" in page, "the browser is told to fetch nothing"


def test_ids_of_the_plots_do_not_clash(page):
    page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    ids = re.findall(r'\bid="([^"]*)"', page)
    references = re.findall(r'(?:url\(|href=")#([^")]*)', page)
    assert len(ids) == len(set(ids))
    assert set(references) <= set(ids)


def test_plot_colours_follow_the_theme(page):
    assert "var(--series-1)" in page
    assert re.search(r"#0[1-3]0[1-3]0[1-6]", page) is None
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [
        ("svg", b"<?xml"),
        pytest.param("png", b"\x89PNG", marks=pytest.mark.slow),
        pytest.param("pdf", b"%PDF", marks=pytest.mark.slow),
    ],
)
def test_a_picture_has_the_curves_and_the_size_of_the_run(tmp_path, suffix, begins):
    record = read_run(make_run(tmp_path, [line(step, validation_loss=3.0) for step in range(1, 30)]))
    path = tmp_path / f"run.{suffix}"
    draw_picture([record], path)
    assert path.read_bytes().startswith(begins)
    if suffix == "svg":
        texts = [element.text for element in ElementTree.parse(path).iter() if element.text]
        assert {"Loss", "Gradient norm", "Throughput"} <= set(texts)
        assert any("29 steps" in text and "validation loss 3.00" in text for text in texts)
        before = path.read_bytes()
        draw_picture([record], path)
        assert path.read_bytes() == before, "the same run gives the same file"


def test_plots_without_marks_fill_their_places_in_a_picture(tmp_path):
    record = read_run(make_run(tmp_path, [line(step) for step in range(1, 30)]))
    figure = Figure(figsize=(9.6, 5.7), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for plot, axes in zip(make_plots(record), panels):
        assert plot.marks == ()
        draw_plot(plot, axes, LIGHT)
    figure.draw_without_rendering()
    assert all(axes.get_position().width > 0.35 and axes.get_position().height > 0.3 for axes in panels)


def test_a_step_repeated_after_a_resume_counts_once_as_logged_last(tmp_path):
    record = read_run(make_run(tmp_path, [line(1), line(2), line(3), line(2, loss=9.0), line(3, loss=7.0)]))
    assert record.series("loss") == ([1, 2, 3], [8.0, 9.0, 7.0])
    assert record.seconds() == 1.5


def test_a_line_cut_by_a_kill_is_left_out_and_said(tmp_path):
    run = make_run(tmp_path, [brief(1), brief(2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    page = write_report([run]).read_text()
    assert "metrics.jsonl: line 3 is truncated or damaged and left out" in page
    assert "unfinished: step 2 of 100" in page


def test_values_that_are_no_finite_numbers_are_not_drawn(tmp_path):
    run = make_run(tmp_path, [brief(1, mfu=0.1), brief(2, loss=float("nan"), mfu=None), brief(3, mfu=0.1)])
    assert read_run(run).series("loss")[0] == [1, 3]
    write_report([run])


def test_times_are_shown_in_one_form():
    assert show_time(0) == "1970-01-01 00:00:00"
    assert show_time("2026-11-24T17:28:07+01:00") == "2026-11-24 16:28:07"
    assert show_time("yesterday") == "yesterday"
    assert show_time(None) == ""
    for damaged in (1e308, float("nan"), -(10**30), "9999-99-99T99:99:99", "0001-01-01T00:00:00+14:00"):
        assert show_time(damaged) == str(damaged)


def test_text_of_the_run_cannot_become_markup(tmp_path):
    run = make_run(tmp_path, [brief(1)], "run.name=<b>bold</b>")
    (run / "events.jsonl").write_text(json.dumps({"event": "<script>x</script>"}) + "\n")
    page = write_report([run]).read_text()
    assert "<script>x" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page


def spiky_lines(num_steps: int) -> list[dict[str, object]]:
    return [
        line(step, expert_load={"1": 1.5}, loss=99.0 if step == num_steps // 3 else 3.0)
        for step in range(1, num_steps + 1)
    ]


def test_a_long_run_stays_a_small_page_that_keeps_its_spikes(tmp_path):
    path = write_report([make_run(tmp_path, spiky_lines(3_000))])
    assert path.stat().st_size < 1_000_000
    plots = data_of(path.read_text())["plots"]
    (loss,) = (plot["curves"][0] for plot in plots if plot["name"] == "loss")
    place = loss["highs"].index(99.0)
    assert loss["steps"][place] <= 1_000 < loss["steps"][place + 1]
    assert max(len(curve["steps"]) for plot in plots for curve in plot["curves"]) <= MAX_POINTS


def test_numbers_of_events_are_rounded_and_long_lists_cut(tmp_path):
    event = {"event": "validation", "step": 1200, "loss": 2.591929838429384, "ids": list(range(20)), "from": None}
    run = make_run(tmp_path, [brief(1)])
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    details = "loss 2.592, ids 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
    assert f"<td>1,200</td><td>validation</td><td>{details}</td>" in write_report([run]).read_text()
    assert plain([{"rank": 0, "slow": True}]) == "(rank: 0, slow: yes)"


def test_an_mfu_above_the_peak_is_neither_printed_nor_drawn(tmp_path):
    page = write_report([make_run(tmp_path, [brief(step, mfu=2.02) for step in range(1, 9)])]).read_text()
    assert "202.0 %" not in page and "the peak was measured too low" in page and "MFU" not in figures(page)


def test_speed_and_mfu_are_those_of_the_newest_start(tmp_path):
    lines = [brief(step, mfu=0.5 if step <= 40 else 0.1, tokens_per_second=1e3 * step) for step in range(1, 51)]
    run = make_run(tmp_path, lines)
    starts = [{"event": "start", "step": 0}, {"event": "start", "step": 40}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in starts))
    (run / "environment.json").write_text(json.dumps({"peak": {"source": "measured at start"}}))
    page = write_report([run]).read_text()
    assert read_run(run).typical("mfu") == 0.1
    assert '<div class="value">10.0 %</div>' in page
    assert "median since the start at step 40" in page
    assert "The peak was measured at each of 2 starts" in page


def test_a_gradient_norm_within_one_decade_has_several_ticks(tmp_path):
    page = write_report([make_run(tmp_path, [brief(step, grad_norm=0.4 + step / 100) for step in range(1, 50)])])
    texts = [element.text for element in figures(page.read_text())["Gradient norm"].iter() if element.text]
    assert sum(re.fullmatch(r"0\.\d+", text.strip()) is not None for text in texts) >= 3


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.yaml, so it is not a run directory; give run\.dir"):
        write_report([tmp_path])


def test_a_run_without_a_step_is_told_to_wait(tmp_path):
    with pytest.raises(ValueError, match=r"has no step yet; write the report after the first training step"):
        write_report([make_run(tmp_path, [])])


def test_each_row_length_of_the_stages_has_its_own_arithmetic(tmp_path):
    stages = '[{"name": "short", "tokens": 102400}, {"name": "long", "tokens": 102400, "sequence_length": 256}]'
    run = make_run(tmp_path, [line(1)], "train.steps=null", f"stages={stages}")
    record = read_run(run)
    table = describe_model(record)
    assert table.header[3:] == (
        "training FLOPs per token, sequences of 128",
        "training FLOPs per token, sequences of 256",
    )
    for column, length in ((3, 128), (4, 256)):
        expected = flops_per_token(record.config.model, length)
        cells = {row[0]: row[column] for row in table.rows}
        assert cells["attention"] == count(expected["attention"])
        assert cells["all"] == count(sum(expected.values()))


def test_a_full_disk_is_named_with_the_path_of_the_page(tmp_path):
    run = make_run(tmp_path, [brief(step) for step in range(1, 30)])
    with largest_file(1000), pytest.raises(OSError, match=r"\.writing-report\.html"):
        write_report([run])


def test_a_link_in_the_place_of_the_page_or_of_its_unfinished_file_is_not_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path, [brief(step) for step in range(1, 30)])
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("report.html", "report.html.part", ".writing-report.html"):
        (run / name).symlink_to(precious)
    page = write_report([run])
    assert precious.read_text() == "precious"
    assert "<html" in page.read_text() and not page.is_symlink()


def test_labels_of_an_axis_differ() -> None:
    assert distinct([1.10e-4, 1.104e-4, 1.108e-4]) == ["0.00011", "0.0001104", "0.0001108"]
    assert [count(999_999), count(999.9), count(1234), count(0.5)] == ["1M", "1k", "1.23k", "0.5"]
    assert distinct([0.0, 500.0, 1000.0, 12345.0]) == ["0", "500", "1k", "12.3k"]


def test_spikes_do_not_rule_the_speed_and_events_are_on_every_plot(tmp_path) -> None:
    lines = [line(step, tokens_per_second=12_000.0 if step == 51 else 1000.0 + step % 7) for step in range(1, 101)]
    run = make_run(tmp_path, lines)
    events = [("start", 0), ("checkpoint", 50), ("start", 50), ("resume", 50), ("skipped_step", 70), ("end", 100)]
    (run / "events.jsonl").write_text(
        "".join(json.dumps({"time": 0, "event": event, "step": step}) + "\n" for event, step in events)
    )
    page = write_report([run]).read_text()
    assert "1 of 100 steps are above the axis" in page
    plots = {plot["name"]: plot for plot in data_of(page)["plots"]}
    assert 1000 < plots["throughput"]["highest"] < 1500 and plots["mfu"]["highest"] is None
    assert data_of(page)["runs"][0]["marks"] == [[50, "other", 1, "start"], [70, "trouble", 1, "skipped step"]]
    assert set(data_of(page)["runs"][0]["rates"]) == {1e-3}


def test_a_report_takes_the_counts_that_the_run_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path, [line(1)])
    kinds = {"parameters": {"mamba": 70}, "active_parameters": {"mamba": 60}}
    length = read_run(run).stages[0].train.sequence_length
    facts = {"by_kind": {**kinds, "flops_per_token": {str(length): {"mamba": 5.0}}}}
    (run / "environment.json").write_text(json.dumps({"model": facts}))
    record = read_run(run)
    assert (record.counts.total, record.counts.active) == (70, 60)
    assert ("mamba", "70", "60", "5") in describe_model(record).rows
    assert record.flops_per_token(length + 1) == flops_per_token(record.config.model, length + 1)
