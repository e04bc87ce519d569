"""What a preparation by a thousand actors asks of its driver: `python -m benchmarks.many_actors`, and an estimate for a cluster.

How it works: the dispatcher, journal, manifest and Ray are the real ones, the text is not. An actor is a seat in one of a few
Ray processes: it gets a unit through Ray, waits for a random time and answers with a report as a part of that unit would give
it. So thousands of seats fit on a machine, and what is measured is the driver's own work per part: plan, calls, journal,
manifest, and the memory that they take. The estimate multiplies it by the parts of a text, and names what bounds it.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.data_pipeline.config import FilterConfig
from amfm.data_pipeline.memory import no_garbage_collection
from amfm.data_pipeline.prepare.finished_units import Journal
from amfm.data_pipeline.prepare.plan import SEGMENTS_PER_PART, Unit, UnitSettings, make_units
from amfm.data_pipeline.prepare.ray_actors import OBJECT_STORE_BYTES, Dispatcher, patient_start
from amfm.data_pipeline.prepare.segments import cut_segments
from amfm.data_pipeline.prepare.sources import InputFile
from amfm.data_pipeline.prepare.unit import UnitReport
from amfm.data_pipeline.store.manifest import MANIFEST, MAX_PARTS, Layout, Part, TokenizerRecord, write_manifest
from amfm.data_pipeline.store.store import TokenStore
from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs, print_rows, say
from benchmarks.command import main
from benchmarks.preparation.processes import resident_bytes

SOURCE = "web"
FILE_BYTES = 10**9
LAYOUT = Layout("uint16", 4096, "fast")
TOKENIZER = TokenizerRecord("tokenizer.model", "sentencepiece", "0" * 64, 32000, 1, 2, 3)


@dataclass(frozen=True)
class Cluster:
    """A preparation to estimate. tokens of all text; core_bytes_per_second of text that one actor makes tokens of."""

    tokens: float = 15e12
    bytes_per_token: float = 4.0
    nodes: int = 64
    cores: int = 64
    core_bytes_per_second: float = 5e6


class _Host:
    """Some of the seats, in one process."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def is_alive(self) -> bool:
        return True

    async def run(self, unit: Unit) -> UnitReport:
        """Wait as long as a unit takes, and report it as written."""
        seconds = self.seconds * random.uniform(0.5, 1.5)
        await asyncio.sleep(seconds)
        return _report_of(unit, seconds)


class _Seat:
    """One actor as the dispatcher knows it; its calls go to a host."""

    def __init__(self, host: Any) -> None:
        self.run, self.is_alive = host.run, host.is_alive


class _SeatedRay:
    """Ray, but that an actor is a seat."""

    def __init__(self, ray: Any, hosts: list[Any]) -> None:
        self.put, self.wait, self.get, self.exceptions = ray.put, ray.wait, ray.get, ray.exceptions
        self.hosts, self.seats = hosts, 0

    def remote(self, *_: object, **__: object) -> Any:
        """Stand for `ray.remote(...)(PartWriter)`, whose `.remote(...)` gives an actor."""

        class Seats:
            @staticmethod
            def remote(*_: object) -> _Seat:
                self.seats += 1
                return _Seat(self.hosts[self.seats % len(self.hosts)])

        return lambda _class: Seats

    def kill(self, seat: _Seat) -> None:
        """Nothing: the hosts end with Ray."""


def _report_of(unit: Unit, seconds: float) -> UnitReport:
    """The report of a unit that became a part of each split."""
    parts = {}
    for split, tokens in (("train", unit.text_bytes // 4), ("validation", unit.text_bytes // 200)):
        path = f"parts/{SOURCE}/{split}-{unit.number:06d}-00.zarr"
        digest = hashlib.blake2b(path.encode(), digest_size=32).hexdigest()
        sizes = (2 * tokens,), (tokens // 100,), (tokens // 1000,)
        parts[split] = [Part(path, tokens, tokens // 800, 4 * tokens, *sizes, digest, digest)]
    tokens = sum(part.num_tokens for of_split in parts.values() for part in of_split)
    return UnitReport(parts, tokens // 800, unit.text_bytes, tokens, 0, unit.text_bytes, seconds, seconds)  # type: ignore[arg-type]


def _make_units(number: int, part_bytes: int) -> list[Unit]:
    """Plan jsonl of so many parts; no file of it is there, and none is read."""
    num_files = math.ceil(number * part_bytes / FILE_BYTES)
    files = [
        InputFile(f"/data/{index:06d}.jsonl", f"0/{index:06d}.jsonl", "jsonl", "none", FILE_BYTES, index)
        for index in range(num_files)
    ]
    settings = UnitSettings("text", FilterConfig(), 0.02, 0, part_bytes, LAYOUT, TOKENIZER.identity, 32000, 2)
    with no_garbage_collection():
        segments = [segment for file in files for segment in cut_segments(file, part_bytes // SEGMENTS_PER_PART)]
    random.Random(0).shuffle(segments)
    return make_units(SOURCE, segments, settings)[:number]


class _Meter:
    """What a piece of work took of this process: CPU seconds, seconds by the clock, and memory that stays."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def begin(self) -> None:
        self.began = time.monotonic(), time.process_time(), resident_bytes(os.getpid())

    def end(self, name: str, parts: int) -> None:
        clock, cpu, memory = self.began
        self.rows[name] = {
            "microseconds": (time.monotonic() - clock) / parts * 1e6,
            "cpu_microseconds": (time.process_time() - cpu) / parts * 1e6,
            "bytes": max(0, resident_bytes(os.getpid()) - memory) / parts,
        }


def simulate(actors: int, hosts: int, number: int, seconds: float, work: Path, part_bytes: int) -> dict[str, Any]:
    """Run all that a driver does for so many parts; returns what each piece takes per part, and how busy actors were."""
    import ray

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    meter = _Meter()
    meter.begin()
    units = _make_units(number, part_bytes)
    meter.end("plan", len(units))
    say(f"{len(units)} units for {actors} actors")
    journal, appended, reports = Journal(work), 0.0, []
    # Not as `amfm prepare` starts it, whose workers import by name: this module's class is sent to them.
    with patient_start():
        ray.init(
            "local",
            num_cpus=hosts,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
        )
    try:
        host_class = ray.remote(num_cpus=0, max_concurrency=math.ceil(actors / hosts) + 1)(_Host)
        seated = _SeatedRay(ray, [host_class.remote(seconds) for _ in range(hosts)])
        results = Dispatcher(seated, units, work, None).run(actors)  # type: ignore[arg-type]
        meter.begin()
        began = time.monotonic()
        for unit, report in results:
            assert isinstance(report, UnitReport), "a seat's disk cannot fail"
            before = time.monotonic()
            journal.append(unit, report)
            appended += time.monotonic() - before
            reports.append(report)
        wall = time.monotonic() - began
        meter.end("calls and journal", len(units))
    finally:
        ray.shutdown()
    meter.begin()
    again = Journal(work)
    meter.end("journal, read again", len(units))
    assert len(again._reports) == len(units), "every unit has a line"
    meter.begin()
    sources = {
        SOURCE: {
            split: [part for report in reports for part in report.parts[split]] for split in ("train", "validation")
        }
    }
    write_manifest(work, TOKENIZER, LAYOUT, sources)  # type: ignore[arg-type]
    meter.end("manifest, written", len(units))
    meter.begin()
    store = TokenStore.open(work)
    meter.end("manifest, opened", len(units))
    assert sum(1 for _ in store.all_parts()) == 2 * len(units)
    size = (work / MANIFEST).stat().st_size
    shutil.rmtree(work)
    return {
        "actors": actors,
        "parts": len(units),
        "pieces": meter.rows,
        "seconds": wall,
        "parts_per_second": len(units) / wall,
        "busy": sum(report.seconds for report in reports) / (actors * wall),
        "journal_microseconds": appended / len(units) * 1e6,
        "manifest_bytes": size / (2 * len(units)),
    }


def estimate(found: dict[str, Any], cluster: Cluster, part_bytes: int) -> list[tuple[str, str, str]]:
    """Rows (bound, what the cluster needs, what there is) for a text in parts of this size."""
    text = cluster.tokens * cluster.bytes_per_token
    actors, pieces = cluster.nodes * cluster.cores, found["pieces"]
    parts, rate = text / part_bytes, actors * cluster.core_bytes_per_second / part_bytes
    driver = pieces["calls and journal"]["cpu_microseconds"]
    memory = parts * (pieces["plan"]["bytes"] + pieces["calls and journal"]["bytes"])
    return [
        ("duration", f"{text / actors / cluster.core_bytes_per_second / 3600:.1f} h", f"{actors:,} actors"),
        ("parts per second, CPU of the driver", f"{rate:.0f}", f"{1e6 / driver:.0f}"),
        ("parts per second, journal with its fsync", f"{rate:.0f}", f"{1e6 / found['journal_microseconds']:.0f}"),
        ("parts in the manifest", f"{2 * parts:,.0f}", f"{MAX_PARTS:,}"),
        ("bytes of the manifest", f"{2 * parts * found['manifest_bytes'] / 2**20:,.0f} MiB", "256 MiB"),
        ("memory of the driver", f"{memory / 2**30:.1f} GiB", ""),
        ("plan, CPU", f"{parts * pieces['plan']['cpu_microseconds'] / 1e6:.0f} s", "once"),
        (
            "journal read again",
            f"{parts * pieces['journal, read again']['cpu_microseconds'] / 1e6:.0f} s",
            "each restart",
        ),
        ("manifest opened, CPU", f"{parts * pieces['manifest, opened']['cpu_microseconds'] / 1e6:.1f} s", "each rank"),
        ("memory of a reader", f"{parts * pieces['manifest, opened']['bytes'] / 2**20:,.0f} MiB", "each rank"),
    ]


def many_actors(
    *,
    actors: Annotated[int, typer.Option(min=1, help="Seats.")] = 1000,
    hosts: Annotated[int, typer.Option(min=1, help="Ray processes that hold them.")] = 4,
    parts: Annotated[int, typer.Option(min=1, help="Units to hand out.")] = 20_000,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Mean time of a unit; 0.5 to 1.5 times as much is drawn.")
    ] = 3.0,
    part_bytes: Annotated[list[int] | None, typer.Option(help="Sizes of a part to estimate with.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of journal and manifest; deleted at the end.")] = Path(
        "data/many_actors"
    ),
    as_json: JsonOption = False,
) -> None:
    """Hand out units to a thousand seats on a few Ray processes: the driver's work per part, and 15 T tokens on 64 nodes."""
    found = simulate(actors, hosts, parts, seconds, work, 64_000_000)
    estimates = {size: estimate(found, Cluster(), size) for size in part_bytes or [64_000_000, 260_000_000]}
    if as_json:
        print_json({**found, "estimates": estimates})
        return
    rows = [
        (name, f"{row['cpu_microseconds']:,.0f}", f"{row['microseconds']:,.0f}", f"{row['bytes']:,.0f}")
        for name, row in found["pieces"].items()
    ]
    print_rows(
        f"Work of the driver per part, {found['parts']:,} parts", ("piece", "CPU us", "us", "bytes that stay"), rows
    )
    print_pairs(
        f"{actors:,} actors",
        [
            ("parts per second", f"{found['parts_per_second']:.0f} in {found['seconds']:.0f} s"),
            ("actors at work", f"{found['busy']:.1%} of the time"),
            ("line of the journal", f"{found['journal_microseconds']:,.0f} us by the clock, with its fsync"),
            ("part in the manifest", f"{found['manifest_bytes']:.0f} bytes"),
        ],
    )
    for size, bounds in estimates.items():
        print_rows(f"15 T tokens on 64 nodes, parts of {size / 1e6:.0f} MB", ("bound", "needed", "there is"), bounds)


if __name__ == "__main__":
    main(many_actors)
