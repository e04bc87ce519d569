"""The verbs `amfm study ladder` and `amfm study rate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json
from amfm.pretrain.packages import require_extra
from amfm_study.verbs import DryRunOption, StudyArgument, print_table, replace_files, study, train_all

if TYPE_CHECKING:
    from amfm_study.ladder.cells import LadderCell


@study.command(epilog="Example: amfm study ladder configs/studies/ladder_to_23m.yaml --dry-run")
def ladder(
    path: StudyArgument,
    overrides: OverridesArgument = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train sizes on several numbers of tokens, fit how the loss depends on both, and predict held-out larger sizes."""
    from amfm_study.ladder.cells import branch_off, expand_ladder
    from amfm_study.ladder.config import load_ladder

    plan = load_ladder(path, overrides or [])
    cells = expand_ladder(plan)
    if dry_run:
        print_table(list(map(describe, cells)), as_json=as_json)
        return
    require_extra("report", "amfm study")
    from amfm_study.ladder.plot import draw_ladder
    from amfm_study.ladder.result import find_laws, ladder_json, ladder_markdown

    # Held-out sizes last: they cost most, and a law can be read before.
    for held_out in (False, True):
        group = [entry for entry in cells if entry.held_out == held_out]
        train_all(plan, [entry.cell for entry in group if entry.trunk is None])
        branch_off(group)
        train_all(plan, [entry.cell for entry in group])
    found = find_laws(plan, cells)
    write(plan.config.dir, ladder_json(found), ladder_markdown(found), as_json=as_json)
    draw_ladder(found, Path(plan.config.dir, "study.png"))


@study.command(epilog="Example: amfm study rate configs/studies/rate_1m.yaml --dry-run")
def rate(
    path: StudyArgument,
    overrides: OverridesArgument = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the best learning rate of each size, and show or refuse that the first one's serves other widths and depths."""
    from amfm_study.ladder.cells import expand_rates
    from amfm_study.ladder.config import load_rate_study

    plan = load_rate_study(path, overrides or [])
    cells = expand_rates(plan)
    if dry_run:
        rows = [
            {"run": cell.name, "rate": cell.config.optimizer.learning_rate, "steps": cell.config.train.steps}
            for cell in cells
        ]
        print_table(rows, as_json=as_json)
        return
    require_extra("report", "amfm study")
    from amfm_study.ladder.rates import find_rates, rates_json, rates_markdown
    from amfm_study.ladder.rates_plot import draw_rates

    train_all(plan, cells)
    found = find_rates(plan, cells)
    write(plan.config.dir, rates_json(found), rates_markdown(found), as_json=as_json)
    draw_rates(found, Path(plan.config.dir, "study.png"))


def describe(entry: LadderCell) -> dict[str, Any]:
    """A run of a ladder before it runs."""
    from amfm.model.flops import count_parameters
    from amfm_study.table import read_result

    counts = count_parameters(entry.cell.config.model)
    return {
        "run": entry.cell.name,
        "pattern": entry.cell.config.model.pattern,
        "active": counts.active,
        "parameters": counts.total,
        "tokens": entry.tokens,
        "rate": entry.rate,
        "from_step": entry.from_step,
        "steps": entry.cell.config.train.steps,
        "held_out": entry.held_out,
        "done": read_result(entry.cell) is not None,
    }


def write(folder: str, summary: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Write study.json and study.md, and print one of them."""
    replace_files(Path(folder), {"study.json": json.dumps(summary, indent=2) + "\n", "study.md": text})
    if as_json:
        print_json(summary)
    else:
        print(text, end="")
