"""Numbers on pages are those of the tables that they are from."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from tests.launch.plan.presets import headers
from tests.parallel.layouts import LAYOUTS

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(page: str, first: str) -> list[list[str]]:
    """Cells of the table whose first column has this head, without head and rule."""
    table = read(page).partition(f"| {first} |")[2].partition("\n\n")[0]
    lines = [line for line in table.splitlines()[2:] if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def found(page: str, pattern: str) -> tuple[float, ...]:
    match = re.search(pattern, read(page))
    assert match, f"{page} says no longer: {pattern}"
    return tuple(float(number) for number in match.groups())


def test_the_reader_beside_gpt_dataset() -> None:
    cost = {row[0]: float(row[1]) for row in rows("docs/benchmarks/data.md", "reader")}
    fast, small = cost["amfm, `fast`"], cost["amfm, `small`"]
    alone, collated, apart = (cost[name] for name in cost if name.startswith(("megatron-core", "the same")))
    ratios = [round(peer / own, 1) for peer in (alone, collated, apart) for own in (small, fast)]
    other = found(
        "docs/log.md",
        r"`fast` ([\d.]+), and on another, with AVX-512, ([\d.]+) \(`balanced` ([\d.]+), `small` ([\d.]+)",
    )
    least, most = min(*other, *ratios[:2]), max(*other, *ratios[:2])
    assert found("README.md", r"GPTDataset \| ([\d.]+)x to ([\d.]+)x as fast") == (least, most)
    said = r"([\d.]+) \(`small`, zstd\) to ([\d.]+) times .* ([\d.]+) to ([\d.]+) times .* ([\d.]+) to ([\d.]+) times as fast as with"
    assert list(found("docs/log.md", said)) == ratios
    assert found("docs/log.md", r"checksums: (\d+) to (\d+) us") == (round(fast), round(small))


def test_planned_memory_and_time_beside_measured_and_published() -> None:
    layouts = rows("docs/benchmarks/planning.md", "model | precision")
    for page in ("docs/log.md", "docs/planning.md"):
        assert found(page, r"over (\d+) layouts on CPU") == (len(layouts),)
    errors = [float(row[-1].rstrip("%")) for row in layouts]
    without_zero_2 = [error for row, error in zip(layouts, errors) if "zero_stage=2" not in row[3]]
    assert found("docs/log.md", r"([\d.]+)% below to ([\d.]+)% above") == (-min(without_zero_2), max(without_zero_2))
    assert found("docs/log.md", r"ZeRO 2 is (\d+)% below") == (-min(errors),)
    runs = rows("docs/benchmarks/planning.md", "model | H100")
    by_routing = {
        kind: [abs(int(re.search(r"\((.*)%\)", row[5])[1])) for row in runs if row[3] == kind]
        for kind in ("forced", "natural")
    }
    forced, natural = by_routing["forced"], by_routing["natural"]
    medians = statistics.median(forced), statistics.median(natural)
    summary = rows("docs/benchmarks/planning.md", "| median error | worst")
    table = [tuple(float(cell.rstrip("%")) for cell in row[1:3]) for row in summary]
    assert abs(table[0][0] - medians[0]) <= 1 and abs(table[2][0] - medians[1]) <= 1
    assert (table[0][1], table[2][1]) == (max(forced), max(natural))
    words = r"(\d+)% where routing is forced, (\d+)% where it is natural, worst (\d+)% and (\d+)%"
    assert found("docs/log.md", words) == (table[0][0], table[2][0], table[0][1], table[2][1])
    by_default = found("docs/benchmarks/planning.md", r"median error of (\d+)% and a worst one of (\d+)%")
    said = r"median error is (\d+)% and the worst (\d+)% \((\d+)% with"
    assert found("docs/planning.md", said) == (*by_default, table[0][1])


def test_counts_of_layouts_and_mixers() -> None:
    assert len(LAYOUTS) > found("README.md", r"of more than (\d+) layouts")[0]
    flat = [row for row in rows("docs/benchmarks/mixers.md", "mixer | tokens/s at 1,024") if row[-1] == "flat"]
    assert found("docs/log.md", r"The (\d+) mixers of the table") == (len(flat),)
    assert all(abs(float(cell.split()[0]) - 1) <= 0.15 for row in flat for cell in row[2:4])


def test_predictions_of_the_readme() -> None:
    table = rows("README.md", "preset")
    assert len(table) == 6
    for preset, gpus, memory, mfu, _ in table:  # the range: tests/launch/plan/test_plan.py
        planned = headers(re.findall(r"`(.*?)`", preset)[0])[0]
        assert (gpus, memory, mfu) == (f"{planned.gpus:,}", f"{planned.gib} GiB", planned.mfu), preset


def test_losses_of_the_converted_teacher() -> None:
    loss = {row[0]: float(row[1]) for row in rows("docs/conversion.md", "| nats per token")}
    tuned, alone, teacher = (
        loss["tuned"],
        next(loss[name] for name in loss if name.startswith("window alone")),
        next(loss[name] for name in loss if name.startswith("teacher,")),
    )
    assert found("docs/conversion.md", r"and ([\d.]+) nats more than the teacher") == (round(tuned - teacher, 3),)
    assert found("docs/conversion.md", r"that gap is only ([\d.]+) nats") == (round(alone - teacher, 3),)
