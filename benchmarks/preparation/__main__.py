"""`python -m benchmarks.preparation` and its tables."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.data_pipeline.config import DataConfig, PrepareConfig, TokenizerConfig
from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.prepare.choose_tokenizer import training_texts
from amfm.data_pipeline.prepare.plan import plan_source
from amfm.data_pipeline.tokenizer.sentencepiece_model import train_tokenizer
from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs, print_rows, say
from benchmarks.command import main
from benchmarks.data.prepare import CALLS
from benchmarks.preparation.kills import prepare_with_kills
from benchmarks.preparation.text import TextSize, make_text
from benchmarks.preparation.turns import prepare_in_turns

TRAINING_BYTES = 5_000_000  # of the real text


def preparation(
    *,
    megabytes: Annotated[int, typer.Option(min=20, help="Text in jsonl and parquet.")] = 1000,
    shards: Annotated[int, typer.Option(min=1, help="Files of it.")] = 16,
    sources: Annotated[int, typer.Option(min=1, help="Sources that share the shards.")] = 2,
    files: Annotated[int, typer.Option(min=0, help="Text files of half a kilobyte, as a separate source.")] = 0,
    actors: Annotated[int, typer.Option(min=1, help="Ray actors, and bare tokenizers in their pauses.")] = 2,
    slices: Annotated[int, typer.Option(min=1, help="Turns of preparation and bare tokenizer.")] = 8,
    kills: Annotated[int, typer.Option(min=0, help="How often the second preparation is killed.")] = 3,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary of the tokenizer, trained on the text.")] = 8000,
    work: Annotated[Path, typer.Option(help="Folder of text and stores; the text is found again.")] = Path(
        "data/preparation"
    ),
    keep: Annotated[bool, typer.Option(help="Keep the two stores.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prepare a large text undisturbed and killed: the same store, at the speed of the bare tokenizer, in level memory."""
    size = TextSize(megabytes, shards, sources, files)
    os.makedirs(work, exist_ok=True)
    text = make_text(work / "text", size, say)
    tokenizer = TokenizerConfig(vocab_size=vocab_size, training_bytes=TRAINING_BYTES)

    def config(name: str) -> DataConfig:
        return DataConfig(
            store=str((work / name).absolute()),
            sources=tuple(
                source.model_copy(update={"paths": (str(Path(source.paths[0]).absolute()),)}) for source in text
            ),
            tokenizer=tokenizer,
            prepare=PrepareConfig(num_actors=actors),
        )

    trained = work / f"tokenizer-{vocab_size}.model"
    if not trained.exists():
        say(f"training a tokenizer of {vocab_size} pieces")
        real = config("untrained").model_copy(update={"sources": text[:1]})
        texts = training_texts(real, {"real": plan_source(text[0], real)})
        write_file_atomically(trained, train_tokenizer(texts, tokenizer).to_bytes())
    tokenizer = TokenizerConfig(model=str(trained.absolute()))
    for name in ("undisturbed", "killed"):
        shutil.rmtree(work / name, ignore_errors=True)
    result: dict[str, Any] = {"size": vars(size), "actors": actors}
    result["undisturbed"] = prepare_in_turns(config("undisturbed"), slices, actors, work, say)
    shares = [(number + 0.7) / (kills + 1) for number in range(kills)]
    result["killed"] = prepare_with_kills(config("killed"), result["undisturbed"]["units"], shares, work, say)
    result["equal"] = result["undisturbed"]["identity"] == result["killed"]["identity"]
    if not keep:
        for name in ("undisturbed", "killed"):
            shutil.rmtree(work / name)
    if as_json:
        print_json(result)
    else:
        print_tables(result)
    if not result["equal"]:
        raise RuntimeError("the store that was killed and completed differs from the undisturbed one")


def print_tables(result: dict[str, Any]) -> None:
    """Print what `preparation` measured."""
    made, killed = result["undisturbed"], result["killed"]
    columns = ("slice", "parts", "MB", "MB/s", *(f"of it, {call}" for call in CALLS), "MB per CPU s", *CALLS)
    rows = [
        (
            number,
            row["units"],
            f"{row['text_bytes'] / 1e6:.0f}",
            f"{row['bytes_per_second'] / 1e6:.1f}",
            *(f"{row[f'share_of_{call}']:.1%}" for call in CALLS),
            f"{row['bytes_per_cpu_second'] / 1e6:.2f}",
            *(f"{row[f'{call}_bytes_per_cpu_second'] / 1e6:.2f}" for call in CALLS),
        )
        for number, row in enumerate(made["slices"], 1)
    ]
    print_rows("Preparation, and the bare tokenizer in its pauses", columns, rows)
    for name, of in (("undisturbed", made), ("after the kills", killed)):
        memory = [
            (f"{row['seconds']:.0f}", *(f"{row[f'{who}_bytes'] / 2**20:,.0f}" for who in ("driver", "actor", "total")))
            for row in of["memory"]
        ]
        print_rows(f"Memory, {name}, MiB", ("from s", "driver", "most loaded actor", "all processes"), memory)
    print_pairs(
        "Preparation at size",
        [
            ("text", f"{made['text_bytes'] / 1e6:,.0f} MB, {made['tokens']:,} tokens, {made['units']:,} units"),
            *(
                (
                    f"share of the tokenizer, {what}",
                    f"{made[f'share_of_{call}']:.1%} by the clock ({made[f'share_of_{call}_min']:.1%} to "
                    f"{made[f'share_of_{call}_max']:.1%}), {made[f'cpu_share_of_{call}']:.1%} per CPU second, "
                    f"{made[f'whole_share_of_{call}']:.1%} from the call to its end",
                )
                for call, what in (("tokenizer", "ids as lists (its default)"), ("fastest", "ids as arrays"))
            ),
            ("time without pauses", f"{made['seconds']:,.0f} s"),
            (
                "killed at",
                ", ".join(f"{kill['units']} ({kill['seconds_until_gone']:.1f} s)" for kill in killed["kills"]),
            ),
            ("identity", f"{made['identity']}, {'equal' if result['equal'] else 'DIFFERENT'} after the kills"),
        ],
    )


if __name__ == "__main__":
    main(preparation)
