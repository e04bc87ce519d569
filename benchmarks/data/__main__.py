"""`python -m benchmarks.data` and its tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs, print_rows, say
from benchmarks.command import main


def data(
    *,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text as in data.sources.paths; may be given again. Default: the installed Python sources."),
    ] = None,
    megabytes: Annotated[int, typer.Option(min=1, help="How much of the default text to use.")] = 120,
    work: Annotated[Path, typer.Option(help="Folder for the stores, found again by the next run.")] = Path(
        "data/bench"
    ),
    samples: Annotated[int, typer.Option(min=8, help="Samples that each reader reads in a round.")] = 512,
    rounds: Annotated[
        int,
        typer.Option(
            min=1, help="Timed rounds of all that takes turns: readers, and preparation with only the tokenizer."
        ),
    ] = 7,
    actors: Annotated[int | None, typer.Option(min=1, help="Ray actors that prepare; default: one per core.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read samples vs. megatron-core, MosaicML streaming, a memmap and zarr-python; prepare vs. the tokenizer."""
    from benchmarks.data.bench import bench_data, collect_text
    from benchmarks.data.files import BenchData

    sources = tuple(text) if text else collect_text(work, megabytes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = BenchData(work, sources, samples=samples, rounds=rounds, actors=actors or cores)
    result = bench_data(settings, say)
    if as_json:
        print_json(result)
    else:
        print_data_tables(result)


def print_data_tables(result: dict[str, Any]) -> None:
    """Print the parts of `bench_data`, a table each."""
    _print_readers(result)
    cold = [
        (row["reader"], f"{row['microseconds']:.0f}", f"{row['disk_bytes']:,}", f"{row['times_as_fast_as_mmap']:.1f}")
        for row in result["cold"]
    ]
    print_rows("Cold reads of a window, wall", ("reader", "us", "bytes from disk", "x mmap"), cold)
    first, made = result["first_batch"], result["preparation"]
    print_pairs(
        f"First batch of {first['tokens']:.0e} tokens in {first['parts']:,} parts",
        [
            ("time", f"{first['seconds']:.2f} s, {first['cpu_seconds']:.2f} CPU s"),
            ("memory", f"{first['memory_bytes'] / 1e6:.0f} MB more than the bare process"),
        ],
    )
    fraction = made["ray_cpu_fraction"]
    print_pairs(
        f"Preparation with {made['actors']} Ray actors, {made['text_bytes'] / 1e6:.0f} MB in {made['parts']:.0f} parts",
        [
            ("tokens/s", f"{made['tokens_per_second']:,.0f}, by the clock"),
            *(
                (
                    f"against SentencePiece, {what}",
                    f"{made[f'share_of_{call}']:.0%} ({made[f'share_of_{call}_min']:.0%} to "
                    f"{made[f'share_of_{call}_max']:.0%}, {made['rounds']} rounds in turns) of "
                    f"{made[f'{call}_tokens_per_second']:,.0f} a process, {made['actors']} at work",
                )
                for call, what in (
                    ("tokenizer", "ids as lists (its default)"),
                    ("fastest", "ids as arrays (its fastest)"),
                )
            ),
            ("inside the actors", f"{made['efficiency']:.0%} of its fastest, a CPU second"),
            ("Ray's share of CPU time", "not measured here" if fraction is None else f"{fraction:.1%}"),
            ("starting Ray", f"{made['ray_start_cpu_seconds']:.1f} CPU s, whatever the text"),
        ],
    )
    for remark in result["remarks"]:
        say(remark)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


def _print_readers(result: dict[str, Any]) -> None:
    rows = [
        (
            row["reader"],
            row["preset"],
            f"{row['microseconds_per_sample']:.1f}",
            f"{row['microseconds_min']:.1f}",
            f"{row['wall_microseconds_per_sample']:.1f}",
            f"{row['bytes_per_token']:.2f}",
            f"{row['times_as_fast_as_gpt_dataset']:.2f}",
            "apart" if row["documents"] else "joined",
            "verified" if row["checksum"] else "",
        )
        for row in result["rows"]
    ]
    columns = ("reader", "preset", "CPU us", "min", "wall us", "B/token", "x GPTDataset", "documents", "checksum")
    sample = result["sample"]
    title = (
        f"A sample of {sample['tokens']:,} tokens, medians of {result['rounds']} rounds in turns; "
        f"{result['text_megabytes']} MB of text, {result['tokens_per_document']} tokens per document"
    )
    print_rows(title, columns, rows)


if __name__ == "__main__":
    main(data)
