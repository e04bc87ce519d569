"""The best rate of each size, and whether the first size's rate serves other widths and depths.

The best rate is the lowest point of a parabola in log2 of the rate through the lowest measured loss and its neighbors; where
that is the lowest or highest rate, the best one lies beyond and no transfer is shown. Transfer is shown along an axis if the
first size's best measured rate costs every other size of the axis at most `tolerance` nats more than its own best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amfm.model.config.kinds import kind_of
from amfm.model.flops import count_parameters
from amfm_study.grid import Cell
from amfm_study.ladder.config import RateConfig
from amfm_study.study import Study
from amfm_study.table import read_result

AXES = ("width", "depth")


@dataclass(frozen=True)
class SizeRates:
    """Losses of one size by rate (means over seeds), and its best rate; `at_edge`: that is the lowest or highest tried."""

    size: str
    width: int
    depth: int
    active: int
    losses: dict[float, float]
    best: float
    at_edge: bool

    @property
    def lowest(self) -> float:
        """The rate with the lowest measured loss."""
        return min(self.losses, key=lambda rate: self.losses[rate])


@dataclass(frozen=True)
class Transfer:
    """Whether a rate serves an axis: the first size's rate, the most that it costs in nats, and a sentence."""

    axis: str
    shown: bool
    rate: float
    cost: float
    text: str


@dataclass(frozen=True)
class RatesFound:
    """The whole result."""

    sizes: tuple[SizeRates, ...]
    transfers: tuple[Transfer, ...]
    has_mup: bool


def find_rates(study: Study[RateConfig], cells: Sequence[Cell]) -> RatesFound:
    """Read the finished runs, and judge both axes."""
    found: dict[str, dict[float, list[float]]] = {}
    first: dict[str, Cell] = {}
    for cell in cells:
        result = read_result(cell)
        if result is not None:
            found.setdefault(cell.mixer, {}).setdefault(cell.config.optimizer.learning_rate, []).append(result.value)
            first.setdefault(cell.mixer, cell)
    sizes = tuple(
        rates_of(first[name], {rate: sum(values) / len(values) for rate, values in sorted(losses.items())})
        for name, losses in found.items()
    )
    transfers = [judge(axis, sizes, study.config.tolerance) for axis in AXES]
    has_mup = any(cell.config.model.mup is not None for cell in first.values())
    return RatesFound(sizes, tuple(transfer for transfer in transfers if transfer is not None), has_mup)


def rates_of(cell: Cell, losses: Mapping[float, float]) -> SizeRates:
    """Summary of one size."""
    model = cell.config.model
    depth = sum(kind_of(letter).mixes == "sequence" for letter in model.letters)
    best, at_edge = best_rate(losses)
    return SizeRates(cell.mixer, model.hidden_size, depth, count_parameters(model).active, dict(losses), best, at_edge)


def best_rate(losses: Mapping[float, float]) -> tuple[float, bool]:
    """The rate at the lowest point of the parabola, and whether the lowest measured loss is at an edge of the rates."""
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if place in (0, len(rates) - 1):
        return rates[place], True
    x = [math.log2(rate) for rate in rates[place - 1 : place + 2]]
    y = [losses[rate] for rate in rates[place - 1 : place + 2]]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    if bend <= 0:  # three equal losses
        return rates[place], False
    return 2 ** ((x[0] + x[1]) / 2 - left / (2 * bend)), False


def judge(axis: str, sizes: Sequence[SizeRates], tolerance: float) -> Transfer | None:
    """The verdict for sizes that differ from the first in this axis only; None if there are none."""
    other = "depth" if axis == "width" else "width"
    base = sizes[0]
    along = [size for size in sizes[1:] if getattr(size, other) == getattr(base, other)]
    if not along:
        return None
    values = ", ".join(str(getattr(size, axis)) for size in along)
    rate = base.lowest
    costs = {size.size: size.losses[rate] - size.losses[size.lowest] for size in along if rate in size.losses}
    worst = max(costs, key=lambda name: costs[name])
    edges = [size.size for size in (base, *along) if size.at_edge]
    begin = f"From {axis} {getattr(base, axis)} to {values}, the rate {rate:g} costs at most {costs[worst]:.4f} nats ({worst})"
    if edges:
        text = (
            f"{begin}; no transfer is shown, because the best rate of {', '.join(edges)} is at an edge of those tried."
        )
        return Transfer(axis, False, rate, costs[worst], text)
    shown = costs[worst] <= tolerance
    verdict = "transfer is shown" if shown else "transfer is rejected: take each size's own rate"
    return Transfer(axis, shown, rate, costs[worst], f"{begin}; the tolerance is {tolerance:g}, so {verdict}.")


def rates_json(found: RatesFound) -> dict[str, Any]:
    """The study as JSON values."""
    return {
        "sizes": [
            asdict(size) | {"losses": [{"rate": rate, "loss": loss} for rate, loss in size.losses.items()]}
            for size in found.sizes
        ],
        "transfer": {transfer.axis: asdict(transfer) for transfer in found.transfers},
        "mup": found.has_mup,
    }


def rates_markdown(found: RatesFound) -> str:
    """Losses by size and rate as a table with the lowest in bold, and the verdicts."""
    rates = sorted({rate for size in found.sizes for rate in size.losses})
    lines = ["| size | width | depth | active | " + " | ".join(f"{rate:g}" for rate in rates) + " | best rate |"]
    lines += ["|" + "---|" * (5 + len(rates))]
    for size in found.sizes:
        cells = [size.size, f"{size.width}", f"{size.depth}", f"{size.active:,}"]
        for rate in rates:
            text = f"{size.losses[rate]:.4f}" if rate in size.losses else "-"
            cells.append(f"**{text}**" if rate == size.lowest else text)
        edge = " (edge)" if size.at_edge else ""
        lines.append("| " + " | ".join([*cells, f"{size.best:.2g}{edge}"]) + " |")
    rule = "with muP" if found.has_mup else "without muP"
    return (
        "\n".join([*lines, "", f"Validation loss, nats per token, {rule}.", *(t.text for t in found.transfers)]) + "\n"
    )
