"""The law is found in losses that it made, branches are the runs that they stand for, and a ladder says how far off it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from amfm_study.grid import Cell
from amfm_study.ladder.cells import branch_off, common_unit, expand_ladder, expand_rates
from amfm_study.ladder.config import load_ladder, load_rate_study
from amfm_study.ladder.law import DELTA, LossLaw, fit_ladder, objective
from amfm_study.ladder.rates import SizeRates, best_rate, judge
from amfm_study.ladder.result import LadderFound, exponent_warnings

from amfm.launch.cli import run
from amfm.model.flops import count_parameters
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import diff_configs, resolved_yaml
from amfm.pretrain.train import train
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.report.test_report import line
from tests.pretrain.tiny_run import read_metrics, tiny_config

KNOWN = LossLaw(np.array([np.log(60.0), np.log(400.0), np.log(1.7), 0.34, 0.45]))
SIZES = np.array([1.2e5, 1.8e5, 2.6e5, 3.8e5])
LADDER = """\
dir: {folder}/study
task: {{name: text, config: text.yaml}}
sizes:
  - {{label: a, overrides: [model.feed_forward.hidden_size=32]}}
  - {{label: b, overrides: [model.feed_forward.hidden_size=128]}}
  - {{label: c, overrides: [model.feed_forward.hidden_size=512]}}
held_out:
  - {{label: d, overrides: [model.feed_forward.hidden_size=1024]}}
tokens_per_parameter: [0.5, 1, 2]
held_out_tokens_per_parameter: [1]
resamples: 20
"""


def points(*ratios: float) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and tokens of a ladder."""
    return np.repeat(SIZES, len(ratios)), np.concatenate([size * np.array(ratios) for size in SIZES])


def write_study(folder: Path, text: str = LADDER, **changes: object) -> Path:
    """A study of feed-forwards of several widths."""
    data = make_tiny_store(folder / "data", num_documents=40)
    config = tiny_config(data, folder / "unused", train__validate_every_steps=None, **changes)
    config = config.model_copy(update={"model": config.model.model_copy(update={"pattern": "-"})})
    (folder / "text.yaml").write_text(resolved_yaml(config))
    (folder / "study.yaml").write_text(text.format(folder=folder))
    return folder / "study.yaml"


def finish(cell: Cell, loss: float, tokens: int) -> None:
    """What a run of the study leaves, with this loss."""
    folder = Path(cell.config.run.dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(cell.config))
    assert cell.config.train.steps is not None
    last = line(cell.config.train.steps, tokens=tokens, validation_loss=loss)
    (folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")


def test_the_law_is_found_again_from_its_own_losses() -> None:
    parameters, tokens = points(0.5, 1, 2)
    fitted = fit_ladder(parameters, tokens, KNOWN.predict(parameters, tokens), resamples=2)
    for name, value in KNOWN.constants().items():
        assert fitted.law.constants()[name] == pytest.approx(value, rel=1e-3), name
    assert np.abs(fitted.errors).max() < 1e-7


def test_intervals_have_the_truth_where_losses_are_noisy_and_one_run_far_off_is_forgiven() -> None:
    parameters, tokens = points(0.5, 1, 2)
    losses = KNOWN.predict(parameters, tokens) * (1 + np.random.default_rng(3).normal(0, 2e-3, len(tokens)))
    larger = 8.4e5, 8.4e5
    truth = float(KNOWN.predict(*larger))
    fitted = fit_ladder(parameters, tokens, losses, resamples=10)
    low, high = fitted.interval(*larger)
    assert low < truth < high and high - low < 0.3
    for value, least, most in fitted.constants().values():
        assert least < most and value > 0
    losses[4] *= 1.2  # diverged, say
    assert float(fit_ladder(parameters, tokens, losses, resamples=0).law.predict(*larger)) == pytest.approx(
        truth, rel=0.02
    )


def test_the_objective_is_huber_s_loss_of_the_error_in_log_loss_and_its_gradient_is_right() -> None:
    parameters, tokens = points(1, 2)
    logs = np.log(parameters), np.log(tokens), np.log(KNOWN.predict(parameters, tokens) * 1.01)
    value, _ = objective(KNOWN.numbers[None], *logs)
    error = np.log(1.01) / DELTA
    assert value[0] == pytest.approx(len(tokens) * (error - 0.5))
    # By finite differences, at errors on both sides of delta.
    place = KNOWN.numbers + np.array([0.01, -0.01, 0.003, 0.001, -0.001])
    gradient = objective(place[None], *logs)[1][0]
    for index in range(5):
        step = np.zeros(5)
        step[index] = 1e-6
        above, below = (objective((place + sign * step)[None], *logs)[0][0] for sign in (1, -1))
        assert gradient[index] == pytest.approx((above - below) / 2e-6, rel=1e-4)


def test_the_best_ratio_of_tokens_to_parameters_is_where_the_loss_is_lowest() -> None:
    flops = 1e17
    parameters = np.geomspace(1e6, 1e9, 20_001)
    tokens = flops / 6 / parameters
    lowest = np.argmin(KNOWN.predict(parameters, tokens))
    assert KNOWN.optimal_tokens_per_parameter(flops) == pytest.approx(tokens[lowest] / parameters[lowest], rel=2e-3)


def test_an_exponent_that_the_sizes_do_not_tell_is_named() -> None:
    parameters, tokens = np.repeat([1e5, 1.01e5, 1.02e5], 3), np.tile([1e5, 2e5, 4e5], 3)
    losses = KNOWN.predict(parameters, tokens) * (1 + np.random.default_rng(0).normal(0, 5e-3, 9))
    found = LadderFound((), {"active": fit_ladder(parameters, tokens, losses, resamples=10)})
    assert exponent_warnings(found)[1].startswith("alpha of N = active cannot be told from these runs")


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="5 runs of 3 sizes do not tell the five constants"):
        fit_ladder([1e5, 1e5, 2e5, 2e5, 3e5], [1e5, 2e5, 1e5, 2e5, 1e5], [4, 3.9, 3.8, 3.7, 3.6], resamples=2)


def test_a_size_is_one_run_and_branches_at_four_fifths_of_their_steps(tmp_path: Path) -> None:
    cells = expand_ladder(load_ladder(write_study(tmp_path), ["rates=[1e-3, 2e-3]"]))
    assert len(cells) == (3 * 3 + 1) * 2 and sum(entry.trunk is None for entry in cells) == 4 * 2
    whole, middle, short = cells[:3]
    steps = [entry.cell.config.train.steps for entry in (whole, middle, short)]
    assert steps[0] == 2 * steps[1] == 4 * steps[2] and steps[2] % 5 == 0
    assert whole.tokens == pytest.approx(2 * count_parameters(whole.cell.config.model).active, rel=0.05)
    for entry in (middle, short):
        saved = whole.cell.config.train.checkpoint_every_steps
        assert entry.trunk == whole.cell and entry.from_step == entry.cell.config.train.steps * 4 // 5
        assert entry.from_step % saved == 0, "there is a checkpoint"
        changed = {item.key for item in diff_configs(whole.cell.config, entry.cell.config)}
        assert {key for key in changed if not key.startswith("run.")} == {"train.steps", "train.validate_every_steps"}
    assert [entry.size for entry in cells if entry.held_out] == ["d", "d"]
    assert common_unit([0.4, 0.8, 2]) == (0.4, [1, 2, 5]) and common_unit([1.5, 2])[1] == [3, 4]


def test_a_size_may_have_its_own_numbers_of_tokens(tmp_path: Path) -> None:
    text = LADDER.replace("size=512]}}", "size=512], tokens_per_parameter: [0.25, 1]}}")
    cells = [entry for entry in expand_ladder(load_ladder(write_study(tmp_path, text))) if entry.size == "c"]
    assert [entry.cell.name for entry in cells] == ["c-1tokens-seed0", "c-0.25tokens-seed0"]
    assert cells[0].tokens == pytest.approx(4 * cells[1].tokens, rel=0.01)


@pytest.mark.slow
def test_a_branch_has_the_loss_of_a_run_of_its_length(tmp_path: Path) -> None:
    cells = expand_ladder(load_ladder(write_study(tmp_path)))[:3]
    assert train(cells[0].cell.config) == 0
    branch_off(cells)
    branch_off(cells)  # does nothing where they are
    alone = cells[2].cell.config
    alone = alone.model_copy(update={"run": alone.run.model_copy(update={"dir": str(tmp_path / "alone")})})
    assert train(cells[2].cell.config) == 0 and train(alone) == 0
    branch, whole = read_metrics(Path(cells[2].cell.config.run.dir)), read_metrics(tmp_path / "alone")
    assert [(item["loss"], item["lr"]) for item in branch] == [(item["loss"], item["lr"]) for item in whole]
    assert branch[-1]["validation_loss"] == whole[-1]["validation_loss"]


def test_finished_runs_make_a_law_that_says_how_far_off_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    for entry in expand_ladder(load_ladder(path)):
        active = count_parameters(entry.cell.config.model).active
        loss = float(KNOWN.predict(active, entry.tokens)) * (1.01 if entry.held_out else 1)
        finish(entry.cell, loss, entry.tokens)
    assert run(["study", "ladder", str(path), "--dry-run", "--json"]) == 0
    assert all(row["done"] for row in json.loads(capsys.readouterr().out))
    assert run(["study", "ladder", str(path)]) == 0
    text = capsys.readouterr().out
    assert "| active | d |" in text and "-0.99% |" in text and "| d (held out) |" in text
    assert "cannot be told" not in text
    found = json.loads((tmp_path / "study/study.json").read_text())
    (held,) = found["laws"]["active"]["held_out"]
    assert held["error_percent"] == pytest.approx(100 * (1 / 1.01 - 1), abs=0.02) and len(found["points"]) == 10
    assert (tmp_path / "study/study.png").stat().st_size > 10_000


def test_the_best_rate_is_the_lowest_point_of_a_parabola() -> None:
    losses = {rate: 3 + 0.1 * (np.log2(rate) + 7.3) ** 2 for rate in (2**-9, 2**-8, 2**-7, 2**-6)}
    assert best_rate(losses) == (pytest.approx(2**-7.3), False)
    assert best_rate({0.1: 3.0, 0.2: 2.0, 0.4: 1.0}) == (0.4, True)


@pytest.mark.parametrize(
    ("shift", "verdict", "shown"),
    [
        (0.1, "so transfer is shown", True),
        (1.0, "transfer is rejected", False),
        (9.0, "at an edge of those tried", False),
    ],
)
def test_transfer_of_a_rate_is_shown_or_rejected(shift: float, verdict: str, shown: bool) -> None:
    sizes = []
    for width, best in ((64, np.log2(2e-3)), (128, np.log2(2e-3) + shift)):
        losses = {rate: float(3 + 0.05 * (np.log2(rate) - best) ** 2) for rate in (1e-3, 2e-3, 4e-3, 8e-3)}
        sizes.append(SizeRates(f"w{width}", width, 2, width**2, losses, *best_rate(losses)))
    found = judge("width", sizes, 0.02)
    assert found is not None and found.shown == shown and verdict in found.text
    assert found.text.startswith("From width 64 to 128, the rate 0.002 costs at most") and found.rate == 2e-3
    assert judge("depth", sizes, 0.02) is None, "no size differs from the first in depth only"


def test_finished_runs_make_a_table_of_rates_and_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = LADDER.split("sizes:", maxsplit=1)[0]
    text = head + "sizes: [{{depth: 2}}, {{depth: 2, width: 128}}]\nrates: [1e-3, 2e-3, 4e-3]\n"
    path = write_study(tmp_path, text)
    for cell in expand_rates(load_rate_study(path)):
        assert cell.config.train.validate_every_steps == cell.config.train.steps
        finish(cell, 3 + 0.05 * float(np.log2(cell.config.optimizer.learning_rate / 2e-3)) ** 2, 100)
    assert run(["study", "rate", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| d2w128 | 128 | 2 |" in printed and "| 3.0500 | **3.0000** | 3.0500 | 0.002 |" in printed
    found = json.loads((tmp_path / "study/study.json").read_text())
    assert found["transfer"]["width"]["shown"] and "depth" not in found["transfer"]
    assert (tmp_path / "study/study.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokens_per_parameter=[2, 1]", "must be numbers above 0, each once, from the smallest"),
        ("style=mamba", "must be one of nemotron, granite"),
        ("held_out=[{depth: 1}]", "depth 1 must be from 2 to 64 layers"),
        ("held_out=[{label: a, overrides: [model.hidden_size=64]}]", "sizes = a: must differ"),
        ("held_out=[{width: 64}]", "a size without depth needs a label and overrides"),
        (
            "held_out=[{depth: 4, tokens_per_parameter: [2, 1]}]",
            "held_out.0.tokens_per_parameter = [2.0, 1.0]: must be numbers",
        ),
    ],
)
def test_what_makes_no_ladder_is_refused(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "study.yaml").write_text(LADDER.format(folder=tmp_path))
    with pytest.raises(ConfigError) as refused:
        load_ladder(tmp_path / "study.yaml", [override])
    assert message in str(refused.value)


def test_a_study_of_rates_takes_no_tokens_of_a_size(tmp_path: Path) -> None:
    head = LADDER.split("sizes:", maxsplit=1)[0].format(folder=tmp_path)
    (tmp_path / "study.yaml").write_text(
        head + "sizes: [{depth: 2}, {depth: 3, tokens_per_parameter: [1]}]\nrates: [1e-3, 2e-3, 4e-3]\n"
    )
    with pytest.raises(ConfigError, match=r"sizes\.1\.tokens_per_parameter: is for a ladder"):
        load_rate_study(tmp_path / "study.yaml")


def test_shapes_follow_from_a_depth_and_leave_the_rest_of_the_task() -> None:
    folder = Path(__file__).parents[2] / "configs" / "studies"
    cells = expand_ladder(load_ladder(folder / "ladder_to_23m.yaml"))
    sizes = list(dict.fromkeys(count_parameters(entry.cell.config.model).active for entry in cells))
    assert sizes == sorted(sizes)
    model = cells[-1].cell.config.model
    assert (model.hidden_size, model.vocab_size, model.tie_embeddings) == (192, 512, True)
    assert model.mup is not None and model.mamba is not None and model.mamba.num_heads == 6
