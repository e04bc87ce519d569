"""What a ladder found: laws for active and for all parameters, and how far off they are for held-out sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amfm.model.flops import count_parameters, flops_per_token
from amfm_study.ladder.cells import LadderCell
from amfm_study.ladder.config import LadderConfig
from amfm_study.ladder.law import EXPONENTS, FLOPS, INTERVAL, Fitted, fit_ladder
from amfm_study.study import Study
from amfm_study.table import read_result

COUNTS = ("active", "total")


@dataclass(frozen=True)
class Point:
    """The best run of a size and a number of tokens: its rate, the mean loss of its seeds, and the model's counts."""

    size: str
    held_out: bool
    active: int
    total: int
    tokens: int
    flops: float
    loss: float
    rate: float
    rates: int

    def parameters(self, count: str) -> int:
        """Parameters of one kind: active or total."""
        return self.active if count == "active" else self.total


@dataclass(frozen=True)
class Prediction:
    """What a law says of a held-out run, with its interval, and what was measured; nats per token."""

    point: Point
    predicted: float
    low: float
    high: float

    @property
    def error_percent(self) -> float:
        """How far the prediction is off, in per cent of the measured loss; above 0: predicted too high."""
        return 100 * (self.predicted / self.point.loss - 1)


@dataclass(frozen=True)
class LadderFound:
    """The whole result: the points, and a law by kind of parameters."""

    points: tuple[Point, ...]
    laws: dict[str, Fitted]

    def predictions(self, count: str) -> list[Prediction]:
        """Predictions of the held-out points by one law."""
        law, found = self.laws[count], []
        for point in self.points:
            if point.held_out:
                place = point.parameters(count), point.tokens
                low, high = law.interval(*place)
                found.append(Prediction(point, float(law.law.predict(*place)), low, high))
        return found

    def most_flops(self) -> float:
        """FLOPs of the largest run that the laws were fitted to, as 6 N D with active parameters."""
        return max(FLOPS * point.active * point.tokens for point in self.points if not point.held_out)


def find_laws(study: Study[LadderConfig], cells: Sequence[LadderCell]) -> LadderFound:
    """Read the finished runs and fit both laws. Raises ValueError for too few of them."""
    points = best_points(cells)
    fitted = [point for point in points if not point.held_out]
    tokens, losses = [point.tokens for point in fitted], [point.loss for point in fitted]
    laws = {
        count: fit_ladder([point.parameters(count) for point in fitted], tokens, losses, study.config.resamples)
        for count in COUNTS
    }
    return LadderFound(tuple(points), laws)


def best_points(cells: Sequence[LadderCell]) -> list[Point]:
    """For each size and number of tokens the rate with the lowest mean loss over the seeds."""
    losses: dict[tuple[str, int], dict[float, list[float]]] = {}
    entries = {}
    for entry in cells:
        result = read_result(entry.cell)
        if result is not None:
            place = entry.size, result.tokens
            losses.setdefault(place, {}).setdefault(entry.rate, []).append(result.value)
            entries[place] = entry
    points = []
    for (size, tokens), by_rate in losses.items():
        means = {rate: sum(values) / len(values) for rate, values in by_rate.items()}
        rate = min(means, key=lambda rate: means[rate])
        config = entries[size, tokens].cell.config
        counts = count_parameters(config.model)
        flops = tokens * sum(flops_per_token(config.model, config.train.sequence_length).values())
        held_out = entries[size, tokens].held_out
        points.append(Point(size, held_out, counts.active, counts.total, tokens, flops, means[rate], rate, len(means)))
    return sorted(points, key=lambda point: (point.held_out, point.active, point.tokens))


def ladder_json(found: LadderFound) -> dict[str, Any]:
    """The ladder as JSON values."""
    return {
        "points": [asdict(point) for point in found.points],
        "interval": INTERVAL,
        "laws": {
            count: {
                "constants": {
                    name: dict(zip(("value", "low", "high"), values)) for name, values in fitted.constants().items()
                },
                "range": {
                    "parameters": [float(fitted.parameters.min()), float(fitted.parameters.max())],
                    "tokens": [float(fitted.tokens.min()), float(fitted.tokens.max())],
                },
                "largest_error_percent": 100 * float(abs(fitted.errors).max()),
                "untold": untold(fitted),
                "optimal_tokens_per_parameter": None
                if untold(fitted)
                else {
                    "flops": found.most_flops(),
                    **dict(zip(("value", "low", "high"), fitted.optimal_ratio(found.most_flops()))),
                },
                "held_out": [
                    {
                        "size": prediction.point.size,
                        "tokens": prediction.point.tokens,
                        "predicted": prediction.predicted,
                        "low": prediction.low,
                        "high": prediction.high,
                        "measured": prediction.point.loss,
                        "error_percent": prediction.error_percent,
                    }
                    for prediction in found.predictions(count)
                ],
            }
            for count, fitted in found.laws.items()
        },
    }


def ladder_markdown(found: LadderFound) -> str:
    """Runs, constants and predictions as tables."""
    low, high = (f"{100 * part:.0f}%" for part in INTERVAL)
    lines = ["| size | active | parameters | tokens | per active parameter | rate | loss |", "|" + "---|" * 7]
    for point in found.points:
        name = f"{point.size} (held out)" if point.held_out else point.size
        ratio = f"{point.tokens / point.active:.2f}"
        columns = [name, f"{point.active:,}", f"{point.total:,}", f"{point.tokens:,}", ratio, f"{point.rate:g}"]
        lines.append("| " + " | ".join([*columns, f"{point.loss:.4f}"]) + " |")
    lines += ["", f"L = E + A / N^alpha + B / D^beta, with {low} to {high} of the fits to resampled errors:", ""]
    lines += ["| N | E | A | alpha | B | beta | largest error | D / N of the lowest loss |", "|" + "---|" * 8]
    for count, fitted in found.laws.items():
        constants = [show(*values) for values in fitted.constants().values()]
        ratio = "-" if untold(fitted) else show(*fitted.optimal_ratio(found.most_flops()))
        error = f"{100 * float(abs(fitted.errors).max()):.2f}%"
        lines.append("| " + " | ".join([count, *constants, error, ratio]) + " |")
    lines += ["", f"D / N is at 6 N D = {found.most_flops():.2g} FLOPs, the most that a fitted run had."]
    if any(point.held_out for point in found.points):
        lines += ["", "| N | held out | tokens | predicted | measured | off by |", "|" + "---|" * 6]
    for count in found.laws:
        for prediction in found.predictions(count):
            point = prediction.point
            columns = [
                count,
                point.size,
                f"{point.tokens:,}",
                f"{prediction.predicted:.4f} ({prediction.low:.4f} to {prediction.high:.4f})",
            ]
            columns += [f"{point.loss:.4f}", f"{prediction.error_percent:+.2f}%"]
            lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, *exponent_warnings(found), *rate_warnings(found)]) + "\n"


def exponent_warnings(found: LadderFound) -> list[str]:
    """A sentence for each law with exponents that the runs do not tell."""
    return [
        line
        for count, fitted in found.laws.items()
        if (names := untold(fitted))
        for line in (
            "",
            f"{' and '.join(names)} of N = {count} cannot be told from these runs; add sizes that differ more.",
        )
    ]


def untold(fitted: Fitted) -> list[str]:
    """Exponents whose interval reaches a bound of the fit."""
    (least, most), constants = EXPONENTS, fitted.constants()
    return [name for name in ("alpha", "beta") if constants[name][1] <= least or constants[name][2] >= most]


def rate_warnings(found: LadderFound) -> list[str]:
    """One sentence if a best rate is the lowest or the highest that was tried, so that a better one may lie beyond."""
    tried = sorted({point.rate for point in found.points})
    several = [point for point in found.points if point.rates > 1 and point.rate in (tried[0], tried[-1])]
    if not several:
        return []
    names = ", ".join(dict.fromkeys(point.size for point in several))
    return ["", f"The best rate is at the edge of those tried for {names}: its losses are upper bounds."]


def show(value: float, low: float, high: float) -> str:
    """A number with its interval, in three digits."""
    return f"{value:.3g} ({low:.3g} to {high:.3g})"
