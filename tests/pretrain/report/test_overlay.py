"""Several runs on one page: one colour a run, curves over each other, and the settings in which they differ."""

from pathlib import Path

import pytest

from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.overlay import MAX_RUNS, compare_configs, overlay_plots
from amfm.pretrain.report.report import choose_place, write_report
from tests.pretrain.report.test_report import data_of, line, make_run


def make_runs(folder: Path, *rates: str) -> list[Path]:
    runs = []
    for number, rate in enumerate(rates):
        place = folder / str(number)
        place.mkdir(parents=True)
        run = make_run(
            place,
            [line(step, loss=8.0 / (step + number)) for step in range(1, 30 + number)],
            f"optimizer.learning_rate={rate}",
            f"run.name=rate-{rate}",
        )
        runs.append(run.rename(folder / f"run-{number}"))
    return runs


def test_a_run_has_one_colour_in_all_plots_and_in_the_legend(tmp_path):
    runs = make_runs(tmp_path, "1e-3", "2e-3", "4e-3")
    path = write_report(runs)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    styles = {}
    for plot in data_of(page)["plots"]:
        assert [curve["name"] for curve in plot["curves"]] == ["rate-1e-3", "rate-2e-3", "rate-4e-3"]
        for curve in plot["curves"]:
            styles.setdefault(curve["run"], set()).add((curve["series"], curve["dash"]))
    assert [len(found) for found in styles.values()] == [1, 1, 1]
    assert len(set().union(*styles.values())) == 3
    for run, ((series, dash),) in styles.items():
        assert f'data-run="{run}" data-series="{series}" data-dash="{dash}"' in page
    assert "<td>optimizer.learning_rate</td><td>0.001</td><td>0.002</td><td>0.004</td>" in page


def test_settings_that_are_the_same_are_not_listed(tmp_path):
    records = [read_run(run) for run in make_runs(tmp_path, "1e-3", "1e-3", "2e-3")]
    assert [row[0] for row in compare_configs(records).rows] == ["optimizer.learning_rate"]
    assert compare_configs(records).rows[0][1:] == ("0.001", "0.001", "0.002")
    assert compare_configs(records[:2]).title == "All settings are the same."
    names = [curve.name for curve in overlay_plots(records)[0].curves]
    assert len(set(names)) == 3, "runs of the same name are told apart by their folders"


def test_runs_that_cannot_share_a_page_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is given twice; name each run once"):
        choose_place([tmp_path / "a", tmp_path / "b" / ".." / "a"])
    with pytest.raises(ValueError, match=r"different folders.*name one by --out"):
        choose_place([tmp_path / "a", tmp_path / "b" / "c"])
    with pytest.raises(ValueError, match=f"{MAX_RUNS + 1} runs are more than the {MAX_RUNS}"):
        choose_place([tmp_path / str(number) for number in range(MAX_RUNS + 1)])
