"""Verbs that measure the machine available: `amfm bench ...`. Those of a clone are in benchmarks/.

`amfm bench calibrate`: this machine as a file for `amfm plan --gpu`, and how well the plan then does.

`amfm bench gpu`: the whole job on a GPU, stage by stage.

`amfm bench kernels`: operations timed on this machine's GPU, or their tiles tuned for it.

`amfm bench numerics`: a model trained by recipes of low precision, next to the same without.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_rows, say


def calibrate(
    path: Annotated[Path, typer.Argument(metavar="OUT.yaml", help="The hardware file to write.")],
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps per model; the models take turns.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure peak speeds and steps of six small models, and write a hardware file for `amfm plan --gpu`.

    The plan of steps that were not fitted is printed next to their measured time.
    """
    if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
        raise ValueError(f"{path} must end in .yaml and be in a folder that exists; use hardware.yaml")
    from amfm.launch.bench.calibration import calibrate as measure
    from amfm.launch.bench.calibration import write_hardware

    hardware, checks = measure(rounds=rounds, num_threads=threads, report=say)
    write_hardware(hardware, checks, path)
    if as_json:
        found = [{"name": c.name, "planned_seconds": c.planned, "measured_seconds": c.measured} for c in checks]
        print_json({"hardware": hardware.model_dump(), "checks": found})
    else:
        print_rows(
            f"{hardware.name} as in {path}",
            ("whole steps", "planned s", "measured s", "error"),
            [(c.name, f"{c.planned:.3f}", f"{c.measured:.3f}", f"{c.error:+.0%}") for c in checks],
        )


def gpu(
    *,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only this stage: losses, resume, two_gpus, first_start, memory, speed or profile; repeatable."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps per comparison.")] = 10,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu for a rehearsal that compares the CPU with itself.")
    ] = "cuda",
    folder: Annotated[
        Path, typer.Option(help="Output folder for runs and report; must not contain older runs.")
    ] = Path("runs/bench_gpu"),
    as_json: JsonOption = False,
) -> None:
    """Train tiny_cpu and ladder_150m on a GPU and check losses against a CPU, two GPUs, resuming, memory, speed, profile."""
    import torch

    from amfm.launch.bench.gpu_job import Job, check_stages, run_stages

    names = check_stages(stage)
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device {device}: use cuda, or cpu for a rehearsal")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that answers; rehearse with --device cpu")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"--folder {folder} is not empty: runs would continue from its files; name another, or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    result = run_stages(Job(device, folder, steps), names, folder / "report.json", report=say)
    if as_json:
        print_json(result)
    else:
        print_job(result)
        say(f"wrote {folder / 'report.json'}")
    if result["faults"]:
        raise RuntimeError(f"verification failed on {device}: {'; '.join(result['faults'])}")


def describe_reserved(allocator: dict[str, int] | None) -> str:
    """What an allocator has reserved, in GiB, with its retries; nothing on a CPU, which has none."""
    if allocator is None:
        return ""
    retries = f", {allocator['alloc_retries']} retries" if allocator["alloc_retries"] else ""
    return f"{allocator['reserved_bytes'] / 2**30:.3f}{retries}"


def print_job(result: dict[str, Any]) -> None:
    """Print what each stage found: losses side by side, memory, speed, and the ten longest operations."""
    stages = result["stages"]
    for name, losses in stages.get("losses", {}).get("losses", {}).items():
        rows = [(str(step + 1), *(f"{loss:.6f}" for loss in row)) for step, row in enumerate(zip(*losses.values()))]
        print_rows(f"Losses of {name}", ("step", *losses), rows)
    if "differing_steps" in stages.get("resume", {}):
        say(f"resume: {stages['resume']['steps']} steps, {len(stages['resume']['differing_steps'])} with other bits")
    two = stages.get("two_gpus", {})
    if "skipped" in two:
        say(f"two_gpus: not run, {two['skipped']}")
    elif "losses" in two:
        rows = [
            (str(step + 1), *(f"{loss:.6f}" for loss in row)) for step, row in enumerate(zip(*two["losses"].values()))
        ]
        print_rows("Losses of two GPUs and of one, bf16", ("step", *two["losses"]), rows)
        say(f"two_gpus: resumed, {len(two['differing_steps'])} steps with other bits")
    starts = [
        (name, f"{found['empty_seconds']:.0f}", f"{found['filled_seconds']:.0f}")
        for name, found in stages.get("first_start", {}).get("first_start", {}).items()
    ]
    if starts:
        print_rows("Start and one step, seconds", ("configuration", "empty caches", "filled caches"), starts)
    memory = [
        (
            name,
            f"{found['predicted_bytes'] / 2**30:.3f}",
            f"{found['measured_bytes'] / 2**30:.3f}",
            *(describe_reserved(found[key]) for key in ("allocator", "allocator_fixed_segments")),
        )
        for name, found in stages.get("memory", {}).get("memory", {}).items()
    ]
    if memory:
        columns = ("configuration", "planned", "measured", "reserved", "reserved, fixed segments")
        print_rows("Peak of a step, GiB", columns, memory)
    speed = [
        (name, f"{found['tokens_per_second']:,.0f}", f"{found['mfu']:.1%}" if found["mfu"] is not None else "")
        for name, found in stages.get("speed", {}).get("speed", {}).items()
    ]
    if speed:
        print_rows("Speed", ("configuration", "tokens per second", "MFU"), speed)
    longest = stages.get("profile", {}).get("kernels", [])[:10]
    if longest:
        rows = [(row["name"][:70], str(row["calls"]), f"{row['milliseconds']:.1f}") for row in longest]
        print_rows("Longest operations of six steps", ("operation", "calls", "ms"), rows)


# Columns of a row that differ between machines: title, field, format.
Columns = tuple[tuple[str, str, str], ...]
ON_CUDA: Columns = (("of roofline", "roofline_fraction", ".0%"), ("worst off float32", "relative_error", ".2g"))


def kernels(
    *,
    op: Annotated[list[str] | None, typer.Option(help="Only this operation; repeatable.")] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Choose tiles for this GPU and save them for training; each is verified before it is timed."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time each operation on this GPU against PyTorch and installed kernel packages."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "this measures kernels on a CUDA GPU, and this machine has none; a clone times them on a CPU by "
            "python -m benchmarks.kernels"
        )
    from amfm.launch.bench.kernels import bench_cuda, tune_cuda

    result = tune_cuda(op, report=say) if tune else bench_cuda(op, report=say)
    if as_json:
        print_json(result)
    elif tune:
        say(f"{len(result['configs'])} kernels have tuned tiles on this GPU")
    else:
        print_kernel_table(result)
    if result["faults"]:
        raise RuntimeError(
            f"our kernels are at fault on this GPU: {'; '.join(result['faults'])}; train with kernels.backend: torch"
        )


def print_kernel_table(result: dict[str, Any]) -> None:
    """Print the rows of `bench_cuda`, a line a variant."""
    print_variants("Operations side by side, medians", result["rows"], ON_CUDA)
    print_shapes(result)


def print_shapes(result: dict[str, Any]) -> None:
    """Print the sizes of each operation, warnings, and what they were measured on."""
    for op, shape in {row["op"]: row["shape"] for row in result["rows"]}.items():
        say(f"{op}: {shape}")
    for remark in result.get("remarks", ()):
        say(remark)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


def print_variants(title: str, rows: list[dict[str, Any]], last: Columns) -> None:
    """Print a line for each variant of each operation, `last` after the columns that all machines have."""
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["op"], row["dtype"], row["backend"])
        lines.setdefault(key, {})[row["pass"]] = row
    table = [
        (
            *key,
            *(f"{passes[which]['milliseconds']:.3g}" for which in ("forward", "backward", "both")),
            *(
                format(passes["both"][field], form) if passes["both"][field] else ""
                for _, field, form in (("x ours", "ratio", ".2f"), *last)
            ),
        )
        for key, passes in lines.items()
    ]
    columns = ["operation", "dtype", "variant", "forward ms", "backward", "both", "x ours"]
    print_rows(title, [*columns, *(name for name, _, _ in last)], table)


def numerics(
    path: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration file.")],
    overrides: OverridesArgument = None,
    *,
    recipes: Annotated[str, typer.Option(help="Recipes to compare, separated by commas.")] = "fp8_block,mxfp8,nvfp4",
    steps: Annotated[int, typer.Option(min=1, help="Steps per run; the schedule is that of the configuration.")] = 100,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds; each trains one run without a recipe and one per recipe.")
    ] = 1,
    limit: Annotated[
        float | None,
        typer.Option(help="Exit with 3 if a recipe's loss is higher than without by more than this, such as 0.003."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model with and without each low-precision recipe on the same data, and compare losses and gradients.

    One rank, the first training stage; recipes that this machine's GPU lacks are emulated.
    """
    from amfm.launch.bench.numerics import RECIPES, compare_recipes, find_excess
    from amfm.pretrain.config.file import load_config
    from amfm.pretrain.startup.arithmetic import settle_precision

    names = [name for name in RECIPES if name in recipes.split(",")]
    unknown = [word for word in recipes.split(",") if word not in RECIPES]
    if unknown:
        raise ValueError(f"--recipes {recipes}: there is no recipe {unknown[0]!r}; use some of {','.join(RECIPES)}")
    config = settle_precision(load_config(path, overrides or []))[0]
    with tempfile.TemporaryDirectory(prefix="amfm_numerics_") as folder:
        result = compare_recipes(config, names, steps=steps, seeds=seeds, folder=Path(folder), report=say)
    if as_json:
        print_json(result)
    else:
        print_numerics(result, str(path))
    excess = [] if limit is None else find_excess(result, limit)
    for text in excess:
        say(text)
    if excess:
        raise typer.Exit(3)


def print_numerics(result: dict[str, Any], title: str) -> None:
    """Print a line for each recipe: losses, gap and spread, errors of gradients, and the most that quantising zeroes."""
    from amfm.launch.bench.numerics import WIDE, last_loss

    rows = []
    for name, found in result["recipes"].items():
        losses = [last_loss(own) for own in found["losses"]]
        spread = f" +- {found['spread']:.2%}" if found.get("spread") is not None else ""
        worst = max(found.get("zeroed", {}).items(), key=lambda item: item[1], default=("", 0.0))
        rows.append(
            (
                result["precision"] if name == WIDE else f"{name}, emulated" if found["emulated"] else name,
                " ".join(f"{loss:.4f}" for loss in losses),
                "" if name == WIDE else f"{found['gap']:+.2%}{spread}",
                " ".join(f"{kind} {error:.1%}" for kind, error in found.get("gradient_error", {}).items()),
                f"{worst[0]} {worst[1]:.1%}" if worst[0] else "",
            )
        )
    columns = ("recipe", "last losses, by seed", "gap", "errors of gradients", "zeroed most")
    print_rows(f"{title}, {result['steps']} steps", columns, rows)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


VERBS = (
    (calibrate, "amfm bench calibrate own.yaml --threads 1"),
    (gpu, "amfm bench gpu --stage losses --stage resume"),
    (kernels, "amfm bench kernels --op decay_scan --json"),
    (numerics, "amfm bench numerics configs/tiny_cpu.yaml --recipes fp8_block --steps 40"),
)


def add_verbs(app: typer.Typer) -> None:
    """Add `bench` to the command."""
    bench = typer.Typer(
        epilog="Example: amfm bench gpu",
        no_args_is_help=True,
    )
    for verb, example in VERBS:
        bench.command(epilog=f"Example: {example}")(verb)
    app.add_typer(bench, name="bench")
