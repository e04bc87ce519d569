"""Training steps of several models side by side: forward and backward of the same tokens, in turns.

What a change of structure is worth: the models of two configurations, of a checkpoint before and after `amfm compact`, or of
one sequence mixer each (those of `python -m benchmarks.length`). They take turns, upwards and downwards, so that a drift of the machine slows all of them, and each step is compared with the first
model's of its own round. CPU time vs. wall time tells more on a machine that others load.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.console import print_json, print_rows, say
from amfm.model.config.kinds import describe_symbol
from amfm.model.config.schema import ModelConfig, read_saved_model
from amfm.model.flops import count_parameters
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.config.file import load_located
from amfm.pretrain.inference.weights import DESCRIPTION
from amfm.pretrain.parallel import initialize_parallel
from benchmarks.command import main
from benchmarks.length import choose_mixers, length_config

Seconds = tuple[float, float]  # of the processor, of the wall


def read_model(path: Path) -> ModelConfig:
    """The model of a configuration file, a run directory or a weights folder; no weights are read."""
    if (path / DESCRIPTION).is_file():
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        return ModelConfig.model_validate(read_saved_model(description["model"], description.get("packages", {})))
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is not a configuration, run directory or weights folder")
    return load_located(file, ()).config.model


def mixer_models(names: str) -> dict[str, ModelConfig]:
    """Models of one block of a mixer each, by name, from letters and names with commas between; heads and states are alike.

    Raises as `choose_mixers` and `length_config` do.
    """
    return {describe_symbol(symbol): length_config(symbol) for symbol in choose_mixers(names)}


def bench_models(
    named: Mapping[str, ModelConfig],
    *,
    rows: int,
    tokens: int,
    rounds: int,
    num_threads: int | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Time a forward and backward pass of each model; ratios are to the first one, above 1 where a model is faster."""
    configs = list(named.values())
    parallel = initialize_parallel(timeout_seconds=600, num_threads=num_threads)
    models = [
        HybridModel(config, parallel.groups, backend="auto", seed=0, device=parallel.device).train()
        for config in configs
    ]
    generator = torch.Generator().manual_seed(1)
    smallest = min(config.vocab_size for config in configs)
    drawn = torch.randint(smallest, (rows, tokens + 1), generator=generator).to(parallel.device)
    for model in models:
        time_step(model, drawn)
    taken: list[list[Seconds]] = [[] for _ in models]
    for number in range(rounds):
        report(f"round {number + 1} of {rounds}")
        order = range(len(models))
        for index in order if number % 2 == 0 else reversed(order):
            taken[index].append(time_step(models[index], drawn))
    found = [
        {"model": name, "parameters": count_parameters(config).total, **compare(taken[0], own, rows * tokens)}
        for (name, config), own in zip(named.items(), taken, strict=True)
    ]
    return {
        "rows": rows,
        "tokens": tokens,
        "rounds": rounds,
        "models": found,
        "hardware": describe_hardware() | {"threads": torch.get_num_threads()},
    }


def time_step(model: HybridModel, drawn: torch.Tensor) -> Seconds:
    """Seconds of one forward and backward pass over rows of tokens [B, T + 1]; the optimizer is left out."""
    tokens_BT, labels_BT = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    meta = PackMeta.one_document_a_row(*tokens_BT.shape, device=drawn.device)
    model.zero_grad(set_to_none=True)
    gc.collect()
    if drawn.is_cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    output = model(tokens_BT, meta, labels=labels_BT)
    (output.loss.total / labels_BT.numel() + sum(output.auxiliary.values())).backward()
    if drawn.is_cuda:
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(first: Sequence[Seconds], own: Sequence[Seconds], tokens: int) -> dict[str, float]:
    """Figures of a model: its rate, and medians and range of its ratio to the first model in the same round."""
    cpu, wall = ([base[clock] / step[clock] for base, step in zip(first, own, strict=True)] for clock in (0, 1))
    return {
        "tokens_per_cpu_second": tokens / statistics.median(step[0] for step in own),
        "tokens_per_second": tokens / statistics.median(step[1] for step in own),
        "ratio_cpu": statistics.median(cpu),
        "ratio_cpu_min": min(cpu),
        "ratio_cpu_max": max(cpu),
        "ratio_wall": statistics.median(wall),
    }


def models(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL...", help="Configurations, run directories or weights folders."),
    ] = None,
    *,
    mixers: Annotated[
        str | None,
        typer.Option(metavar="G,K", help="Instead: models of one mixer each, by symbols or names, of equal sizes."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each, taking turns.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time forward and backward passes of models on the same tokens; above 1: faster than the first. Or of mixers.

    One thread if none is asked for, so that CPU time means something.
    """

    if paths and mixers is not None:
        raise ValueError(f"--mixers names what is compared, and so does {paths[0]}; leave out one of them")
    named = mixer_models(mixers) if mixers is not None else {str(path): read_model(path) for path in paths or []}
    if len(named) < 2:
        given = f"{next(iter(named))} is one; name another" if named else "none is named; name two, or --mixers G,K"
        raise ValueError(f"benchmarks.models compares two or more models, and {given}")
    result = bench_models(named, rows=rows, tokens=tokens, rounds=rounds, num_threads=threads or 1, report=say)
    if as_json:
        print_json(result)
        return
    table = [
        (
            found["model"],
            f"{found['parameters']:,}",
            f"{found['tokens_per_cpu_second']:,.0f}",
            f"{found['ratio_cpu']:.2f} ({found['ratio_cpu_min']:.2f} to {found['ratio_cpu_max']:.2f})",
            f"{found['ratio_wall']:.2f}",
        )
        for found in result["models"]
    ]
    title = f"Forward and backward of {rows} x {tokens} tokens, {rounds} rounds in turns"
    print_rows(title, ("model", "parameters", "tokens a CPU second", "x the first", "by the wall"), table)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


if __name__ == "__main__":
    main(models)
