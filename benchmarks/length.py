"""Training speed by sequence length: a model of one mixer, the same tokens per step cut into few long or many short rows.

How it works: a linear mixer costs a token the same at every length; attention costs it what came before. With the
tokens of a step fixed, the rate over lengths shows this without a model of the machine. Lengths take turns within a
round, forwards and backwards, so that a drift of the machine slows all of them, and each is compared with the shortest
of its own round. A rate within `TOLERANCE` of it counts as flat.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say
from amfm.model.config.core_options import AttentionConfig, Mamba2Config
from amfm.model.config.kinds import CORE, describe_symbol, find_kind, kind_of, registered_kinds
from amfm.model.config.options import MixerOptions
from amfm.model.config.pattern import block_kind
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.monitor.environment import read_processor_name
from amfm.pretrain.parallel import initialize_parallel
from benchmarks.command import main

LENGTHS = (1024, 2048, 4096, 8192, 16384)
# How far a rate may be off that of the shortest sequences and still count as flat.
TOLERANCE = 0.15
HIDDEN_SIZE, VOCAB_SIZE = 128, 256
MAMBA = Mamba2Config(num_heads=4, head_dim=64, state_size=64, num_groups=1)
ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=64)
# What a mixer's options take of these where they have the field.
OPTIONS: dict[str, Any] = {"num_heads": 2, "head_dim": 64, "inner_size": 256, "window": 256}

Clock = Literal["cpu", "wall"]
# One step: seconds by clock.
Seconds = dict[str, float]


def choose_mixers(names: str | None) -> list[str]:
    """Pattern symbols from letters and names with commas between; None: all linear mixers, then attention.

    Raises ValueError for a block that mixes nothing along the sequence, and for an unknown name.
    """
    if names is None:
        core = [kind.symbol for kind in CORE if kind.mixes == "sequence"]
        return [*core[:1], *(kind.symbol for kind in registered_kinds().values()), *core[1:]]
    symbols = []
    for name in (part.strip() for part in names.split(",")):
        kind = kind_of(name)
        if kind.mixes == "channels":
            raise ValueError(f"--mixers {name}: {kind.describe()} mixes no tokens along the row; leave it out")
        symbols.append(kind.symbol)
    return list(dict.fromkeys(symbols))


def choose_lengths(text: str | None) -> tuple[int, ...]:
    """Row lengths in rising order from text with commas between; None: 1K to 16K.

    Raises ValueError if a length does not divide the longest, as sequences of a step would come out uneven.
    """
    if text is None:
        return LENGTHS
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--lengths {text} must be integers with commas between; use 1024,4096")
    lengths = sorted({int(part) for part in parts})
    uneven = [length for length in lengths if lengths[-1] % length]
    if uneven or len(lengths) < 2:
        raise ValueError(
            f"--lengths {text} must be two or more that divide the longest, which is what a step holds; use 1024,4096"
        )
    return tuple(lengths)


def length_config(symbol: str) -> ModelConfig:
    """Model of one block of this mixer, and no more than a loss needs.

    Raises ValueError for a mixer with options that have no default and that this benchmark knows no value for.
    """
    mixers: dict[str, MixerOptions] = {}
    name: str | None = None if kind_of(symbol).is_core else kind_of(symbol).name
    while name is not None:
        section = find_kind(name).options
        needed = {key for key, field in section.model_fields.items() if field.is_required()} - OPTIONS.keys()
        if needed:
            raise ValueError(
                f"benchmarks.length knows no value for {', '.join(sorted(needed))} of model.mixers.{name}; choose others "
                "with --mixers"
            )
        mixers[name] = section(**{key: value for key, value in OPTIONS.items() if key in section.model_fields})
        name = mixers[name].wraps()
    return ModelConfig(
        pattern=symbol,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        tie_embeddings=True,
        mamba=MAMBA,
        attention=ATTENTION,
        mixers=mixers,
    )


def bench_lengths(
    symbols: Sequence[str],
    lengths: Sequence[int],
    *,
    rounds: int,
    num_threads: int | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Measure tokens per second by sequence length for each mixer; returns rates, ratios to the shortest sequences, and a
    mark.
    """
    configs = [length_config(symbol) for symbol in symbols]
    parallel = initialize_parallel(timeout_seconds=600, num_threads=num_threads)
    device = parallel.device
    timed: dict[str, dict[int, list[Seconds]]] = {}
    for number, config in enumerate(configs, start=1):
        report(f"{number} of {len(configs)}: {describe_symbol(config.pattern)}")
        model = HybridModel(config, parallel.groups, backend="auto", seed=0, device=device).train()
        seconds = time_lengths(model, lengths, rounds=rounds, device=device)
        timed[block_kind(config.pattern)] = seconds
        report(_say_rates(seconds))
    clock: Clock = "wall" if device.type == "cuda" else steadier_clock(timed)
    return {
        "lengths": list(lengths),
        "tokens_a_step": max(lengths),
        "rounds": rounds,
        "judged_by": clock,
        "tolerance": TOLERANCE,
        "hardware": {
            "processor": read_processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "mixers": {name: summarize(seconds, clock) for name, seconds in timed.items()},
    }


def time_lengths(
    model: HybridModel, lengths: Sequence[int], *, rounds: int, device: torch.device
) -> dict[int, list[Seconds]]:
    """Seconds of forward and backward over max(lengths) tokens, by sequence length, after one step to warm up.

    Lengths run upwards and downwards in turn, so that a drift of the machine favours none.
    """
    generator = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(VOCAB_SIZE, (max(lengths) + 1,), generator=generator).to(device)
    seconds: dict[int, list[Seconds]] = {length: [] for length in lengths}
    for length in lengths:
        _time_step(model, tokens_T, length)
    for number in range(rounds):
        # A drift within a round would otherwise always hit the same lengths.
        for length in lengths if number % 2 == 0 else reversed(lengths):
            seconds[length].append(_time_step(model, tokens_T, length))
    return seconds


def _time_step(model: HybridModel, tokens_T: torch.Tensor, length: int) -> Seconds:
    """CPU and wall seconds of one forward and backward pass at a sequence length; the optimizer is left out."""
    tokens_BT, labels_BT = tokens_T[:-1].view(-1, length), tokens_T[1:].view(-1, length)
    meta = PackMeta.one_document_a_row(*tokens_BT.shape, device=tokens_BT.device)
    model.zero_grad(set_to_none=True)
    gc.collect()
    on_cuda = tokens_T.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    output = model(tokens_BT, meta, labels=labels_BT)
    (output.loss.total / labels_BT.numel() + sum(output.auxiliary.values())).backward()
    if on_cuda:
        torch.cuda.synchronize()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def steadier_clock(timed: dict[str, dict[int, list[Seconds]]]) -> Clock:
    """The clock, CPU or wall, whose rounds spread less in the median over all mixers and lengths."""
    spread = {
        clock: statistics.median(
            _spread([step[clock] for step in steps]) for by_length in timed.values() for steps in by_length.values()
        )
        for clock in ("cpu", "wall")
    }
    return "cpu" if spread["cpu"] <= spread["wall"] else "wall"


def _say_rates(seconds: dict[int, list[Seconds]]) -> str:
    """A mixer's figures as far as one clock or the other says, in a line."""
    rows = summarize(seconds, "cpu")["rows"]
    names = ("ratio_cpu", "ratio_fastest", "ratio_wall")
    cpu, fastest, wall = (", ".join(f"{row[name]:.2f}" for row in rows) for name in names)
    rates = ", ".join(f"{row['tokens_per_cpu_second']:,.0f}" for row in rows)
    return (
        f"  {rates} tokens per second of CPU time; x the shortest sequences {cpu} by CPU time ({fastest} between the fastest "
        f"steps), {wall} by wall time"
    )


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def summarize(seconds: dict[int, list[Seconds]], clock: Clock) -> dict[str, Any]:
    """A mixer's figures by length, and how its rate goes: `flat`, or `falls` or `rises` by more than the tolerance.

    The ratio of a length is the median over the rounds of its rate over that of the shortest sequences in the same round;
    `ratio_fastest` compares the fastest step of each instead, which says more on a machine that others load.
    """
    shortest, tokens = min(seconds), max(seconds)
    rows = []
    for length, steps in seconds.items():
        ratios = {
            each: [base[each] / step[each] for base, step in zip(seconds[shortest], steps, strict=True)]
            for each in ("cpu", "wall")
        }
        rows.append(
            {
                "length": length,
                "tokens_per_second": tokens / statistics.median(step[clock] for step in steps),
                "tokens_per_cpu_second": tokens / statistics.median(step["cpu"] for step in steps),
                "tokens_per_wall_second": tokens / statistics.median(step["wall"] for step in steps),
                "ratio": statistics.median(ratios[clock]),
                "ratio_min": min(ratios[clock]),
                "ratio_max": max(ratios[clock]),
                "ratio_fastest": min(base[clock] for base in seconds[shortest]) / min(step[clock] for step in steps),
                "ratio_cpu": statistics.median(ratios["cpu"]),
                "ratio_wall": statistics.median(ratios["wall"]),
            }
        )
    furthest = max((row["ratio"] for row in rows), key=lambda ratio: abs(ratio - 1))
    mark = "flat" if abs(furthest - 1) <= TOLERANCE else "falls" if furthest < 1 else "rises"
    return {"rows": rows, "furthest_ratio": furthest, "mark": mark}


ROUNDS = 3


def length(
    *,
    mixers: Annotated[
        str | None, typer.Option(metavar="M,G,gla", help="Symbols or names; default: all, and attention.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="1024,16384", help="Tokens per sequence; a step holds the longest row's.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed steps of each, taking turns; default: 3.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time small models of one mixer each, the same tokens cut into longer and longer rows, and say which are flat.

    One thread if none is asked for, so that CPU time means something.
    """

    symbols, chosen = choose_mixers(mixers), choose_lengths(lengths)
    result = bench_lengths(symbols, chosen, rounds=rounds or ROUNDS, num_threads=threads or 1, report=say)
    if as_json:
        print_json(result)
    else:
        print_length_table(result)


def print_length_table(result: dict[str, Any]) -> None:
    """Print a line for each mixer of `bench_lengths`: tokens per second at the shortest sequences, then ratios to it."""
    rows = []
    for name, figures in result["mixers"].items():
        shortest, *longer = figures["rows"]
        ratios = [f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})" for row in longer]
        mark = (
            figures["mark"]
            if figures["mark"] == "flat"
            else f"{figures['mark'].upper()} x {figures['furthest_ratio']:.2f}"
        )
        rows.append((name, f"{shortest['tokens_per_second']:,.0f}", *ratios, mark))
    columns = (
        "mixer",
        f"tokens/s at {result['lengths'][0]:,}",
        *(f"x at {length:,}" for length in result["lengths"][1:]),
    )
    clock = {"cpu": "of CPU time", "wall": "of wall time"}[result["judged_by"]]
    title = (
        f"Forward and backward of {result['tokens_a_step']:,} tokens by sequence length, rates {clock}: medians and range of "
        f"{result['rounds']} rounds in turns"
    )
    print_rows(title, (*columns, ""), rows)
    say(
        f"judged by the clock whose rounds differ less, {result['judged_by']}; flat: within {result['tolerance']:.0%} of "
        "the shortest sequences at every length"
    )
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


if __name__ == "__main__":
    main(length)
