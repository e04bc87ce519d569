"""Runs of a ladder: one run per size and rate, and branches of it that decay earlier.

How it works: a size's longest run has a constant rate after warm-up and decays over its last fifth. Each smaller number of
tokens is a branch: the checkpoint at four fifths of its steps, continued with `train.steps` of the branch, so that the decay
begins there (Haegele et al. 2024, arXiv 2405.18392). A branch has the same losses as a run of its length from the first step,
and costs a fifth of it. Steps are multiples of five units, hence every branch begins at a checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from amfm.model.flops import count_parameters
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.rollback import fork_run
from amfm_study.grid import Cell, load_run
from amfm_study.ladder.config import LadderConfig, LadderSize, RateConfig, SizesConfig
from amfm_study.study import Study

DECAY = Fraction(1, 5)  # of a run; what a wsd schedule decays over if it does not say otherwise
WARMUP = Fraction(1, 10)  # of the shortest run of a size
KEPT = 100  # checkpoints: all of them, whatever numbers of tokens are added later


@dataclass(frozen=True)
class LadderCell:
    """A run of the ladder: its cell, size, peak rate, and the cell and step that it branches off (None: from step 0)."""

    cell: Cell
    size: str
    held_out: bool
    rate: float
    trunk: Cell | None
    from_step: int

    @property
    def tokens(self) -> int:
        """Tokens that the run is trained on."""
        train = self.cell.config.train
        assert train.steps is not None and train.global_batch_size is not None, "the study sets them"
        return train.steps * train.global_batch_size * train.sequence_length


def expand_ladder(study: Study[LadderConfig]) -> list[LadderCell]:
    """All runs of a ladder, from the smallest size. Raises ConfigError for a run whose configuration is broken."""
    config = study.config
    groups = (
        (config.sizes, config.tokens_per_parameter, False),
        (config.held_out, config.held_out_tokens_per_parameter or config.tokens_per_parameter, True),
    )
    cells = []
    for seed, (sizes, budgets, held_out) in itertools.product(config.seeds, groups):
        for size, rate in itertools.product(sizes, config.rates or (None,)):
            cells += cells_of_size(study, size, size.tokens_per_parameter or budgets, rate, seed, held_out=held_out)
    return cells


def cells_of_size(
    study: Study[LadderConfig],
    size: LadderSize,
    budgets: Sequence[float],
    rate: float | None,
    seed: int,
    *,
    held_out: bool,
) -> list[LadderCell]:
    """The runs of one size at one rate: the longest, and its branches from the shortest."""
    base = load_size(study, size, size.name, rate, seed, [])
    train = base.train
    assert train.global_batch_size is not None, "checked by load_run"
    unit, multiples = common_unit(budgets)
    step_tokens = train.global_batch_size * train.sequence_length
    # Five steps at least per unit, so that a fifth of every run is a number of steps.
    each = 5 * max(1, round(unit * count_parameters(base.model).active / step_tokens / 5))
    warmup = max(1, math.floor(WARMUP * each * multiples[0]))
    cells: list[LadderCell] = []
    trunk: Cell | None = None
    for budget, multiple in reversed(list(zip(budgets, multiples))):
        steps = each * multiple
        name = "-".join([size.name, *([f"rate{rate:g}"] if rate else []), f"{budget:g}tokens", f"seed{seed}"])
        settings = {
            "train.steps": steps,
            "train.checkpoint_every_steps": int(each * (1 - DECAY)),
            "train.keep_last": max(KEPT, multiples[-1] + 1),
            "train.validate_every_steps": steps,
            "schedule.kind": "wsd",
            "schedule.warmup_steps": warmup,
            "schedule.decay_steps": "null",
        }
        run = load_size(study, size, name, rate, seed, [f"{key}={value}" for key, value in settings.items()])
        cell = Cell(name, size.name, "", study.config.task.name, seed, run)
        begin = 0 if trunk is None else int(steps * (1 - DECAY))
        cells.append(LadderCell(cell, size.name, held_out, run.optimizer.learning_rate, trunk, begin))
        trunk = trunk or cell
    return cells


def common_unit(budgets: Sequence[float]) -> tuple[float, list[int]]:
    """The largest number that all budgets are multiples of, and how often: (0.5, [1, 2, 3]) of 0.5, 1 and 1.5."""
    parts = [Fraction(budget).limit_denominator(1000) for budget in budgets]
    scale = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * scale) for part in parts]
    divisor = math.gcd(*whole)
    return divisor / scale, [number // divisor for number in whole]


def expand_rates(study: Study[RateConfig]) -> list[Cell]:
    """All runs of a study of rates: every size at every rate with every seed."""
    cells = []
    for seed, size, rate in itertools.product(study.config.seeds, study.config.sizes, study.config.rates):
        name = f"{size.name}-rate{rate:g}-seed{seed}"
        steps = load_size(study, size, name, rate, seed, []).train.steps
        # A loss that was measured before the last step would favor rates that learn fast at first.
        run = load_size(study, size, name, rate, seed, [f"train.validate_every_steps={steps}"])
        cells.append(Cell(name, size.name, "", study.config.task.name, seed, run))
    return cells


def load_size(
    study: Study[LadderConfig] | Study[RateConfig],
    size: LadderSize,
    name: str,
    rate: float | None,
    seed: int,
    overrides: list[str],
) -> RunConfig:
    """Configuration of a run of one size, checked as `amfm train` would. Raises ConfigError under the cell's name."""
    config: SizesConfig = study.config
    rates = [f"optimizer.learning_rate={rate}"] if rate else []
    run = load_run(study, config.task, name, [*size.settings(config.style), *rates, *overrides], seed)
    if run.data.synthetic is not None or run.stages:
        rule = "must be a run on text without stages: the law is of its validation loss"
        raise ConfigError([Problem("task.config", rule, "name another run", config.task.config)])
    return run


def branch_off(cells: Sequence[LadderCell]) -> None:
    """Make the run directories of branches that are not there, from the checkpoints of their finished runs."""
    for entry in cells:
        out = Path(entry.cell.config.run.dir)
        if entry.trunk is not None and not (out / "config.yaml").is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            fork_run(Path(entry.trunk.config.run.dir), entry.from_step, entry.cell.config)
