"""Several runs on one page: one colour a run, curves over each other, and the settings in which they differ."""

from pathlib import Path

import pytest

from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.overlay import MAX_RUNS, compare_configs, compare_numbers, overlay_plots
from amfm.pretrain.report.report import choose_place, write_report
from tests.pretrain.report.test_report import brief, data_of, make_run


def make_runs(folder: Path, *rates: str) -> list[Path]:
    runs = []
    for number, rate in enumerate(rates):
        place = folder / str(number)
        place.mkdir(parents=True)
        run = make_run(
            place,
            [brief(step, loss=8.0 / (step + number), lr=1e-3) for step in range(1, 30 + number)],
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


def test_what_differs_comes_before_the_curves_at_the_same_step_and_at_the_same_tokens(tmp_path):
    """The second run takes twice the tokens per step, and falls as fast per token."""
    folders = []
    for number, per_step in enumerate((512, 1024)):
        (tmp_path / str(number)).mkdir()
        lines = [
            brief(
                step,
                loss=9.0 - step * per_step / 1e4,
                tokens=per_step * step,
                validation_loss=9.0 - step * per_step / 1e4,
            )
            for step in range(1, 101 - 50 * number)
        ]
        folders.append(make_run(tmp_path / str(number), lines, f"run.name=run-{number}"))
    rows = {name: cells for name, *cells in compare_numbers([read_run(folder) for folder in folders]).rows}
    assert rows["validation loss, step 50"] == ["6.44", "3.88", "-2.56 (-39.75 %)"]
    assert rows["training loss, step 50"][:2] == ["6.44", "3.88"]
    assert (
        rows["validation loss, 51.2k tokens"] == rows["training loss, 51.2k tokens"] == ["3.88", "3.88", "+0 (+0.00 %)"]
    )
    page = write_report(folders, tmp_path / "both.html").read_text()
    assert page.index("Settings that differ") < page.index("<h2>Numbers") < page.index("<h2>Curves")


def test_runs_that_cannot_share_a_page_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is given twice; name each run once"):
        choose_place([tmp_path / "a", tmp_path / "b" / ".." / "a"])
    with pytest.raises(ValueError, match=r"different folders.*name one by --out"):
        choose_place([tmp_path / "a", tmp_path / "b" / "c"])
    with pytest.raises(ValueError, match=f"{MAX_RUNS + 1} runs are more than the {MAX_RUNS}"):
        choose_place([tmp_path / str(number) for number in range(MAX_RUNS + 1)])
