"""Verbs evaluate and generate."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import CheckpointArgument, JsonOption, Place, WeightsOption, choose_device
from amfm.launch.console import loading, print_json, print_pairs, show_progress
from amfm.launch.existing import load_packaged

if TYPE_CHECKING:
    from amfm.pretrain.inference.evaluate import Evaluation
    from amfm.pretrain.scores import SourceLoss
    from amfm.pretrain.tasks.suite import TaskChoice


DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Device; auto: cuda if available, else cpu.")
]
BackendOption = Annotated[
    Literal["auto", "triton", "native", "torch", "reference"],
    typer.Option(help="Kernel backend, as `kernels.backend`."),
]


StoreOption = Annotated[Path | None, typer.Option(metavar="STORE", help="The token store; default: the run's own.")]
SplitOption = Annotated[
    Literal["validation", "train"] | None, typer.Option(help="Split of the store; default: validation.")
]
LengthOption = Annotated[
    int | None,
    typer.Option("--sequence-length", "--length", min=1, help="Tokens per sequence; default: as in training."),
]
TasksOption = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Evaluate these lm-eval tasks instead (docs/evaluation.md).")
]
IncludePathOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with YAML files of more tasks; default: evaluate.include_path."),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Documents of each task; default: all.")]
NumFewshotOption = Annotated[int | None, typer.Option(min=0, help="Few-shot examples; default: as the task defines.")]
MaxTokensOption = Annotated[int | None, typer.Option(min=1, help="Stop after about this many tokens; default: all.")]
# As data.synthetic.task of a configuration, whose import would slow every verb's help down.
SyntheticTask = Literal["mqar", "overwriting", "selective_copying", "parity", "s3", "s4", "a5", "s5"]
SyntheticOption = Annotated[
    SyntheticTask | None, typer.Option(help="Evaluate this synthetic task instead (docs/synthetic_tasks.md).")
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the synthetic task (data.synthetic); repeatable."),
]
RowsOption = Annotated[int | None, typer.Option(min=1, help="Sequences of the synthetic task; default: 256.")]
NprocOption = Annotated[
    int, typer.Option(min=1, help="Ranks per node, which share the text and, if memory requires it, the model.")
]
OnOption = Annotated[
    Literal["slurm"] | None, typer.Option(help="Start the ranks there, by the section `launch` of the run.")
]
NodesOption = Annotated[int, typer.Option(min=1, help="With --on: number of nodes.")]
PrecisionOption = Annotated[
    Literal["float32", "bf16"] | None,
    typer.Option(help="Of weights and activations; default: float32 on one rank, bf16 over several."),
]


def evaluate(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    *,
    data: StoreOption = None,
    split: SplitOption = None,
    sequence_length: LengthOption = None,
    max_tokens: MaxTokensOption = None,
    synthetic: SyntheticOption = None,
    settings: SettingsOption = None,
    rows: RowsOption = None,
    tasks: TasksOption = None,
    include_path: IncludePathOption = None,
    limit: LimitOption = None,
    num_fewshot: NumFewshotOption = None,
    weights: WeightsOption = "last",
    nproc: NprocOption = 1,
    on: OnOption = None,
    nodes: NodesOption = 1,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """The verb `evaluate`."""
    ranks = {"--nproc": None if nproc == 1 else nproc, "--on": on, "--precision": precision}
    check_options(
        "--tasks" if tasks else "--synthetic" if synthetic else None,
        {"--synthetic": synthetic, "--sequence-length": sequence_length},
        {
            "--data": data,
            "--split": split,
            "--max-tokens": max_tokens,
            "--weights": None if weights == "last" else weights,
        },
        {"--set": settings, "--rows": rows},
        {"--include-path": include_path, "--limit": limit, "--num-fewshot": num_fewshot},
        ranks,
    )
    if nodes > 1 and on is None:
        raise ValueError(f"--nodes {nodes} has no effect without --on; add --on slurm, or leave it out")
    if on is not None or nproc > 1:
        raise typer.Exit(start_ranks(context, checkpoint, nproc, nodes, on))
    place = Place.of_options(device, backend, precision)
    if tasks is not None:
        choice = read_choice(tasks, include_path, limit, num_fewshot)
        evaluate_on_tasks(checkpoint, choice, place, as_json=as_json)
    elif synthetic is not None:
        measure = load_packaged("evaluate.synthetic", "synthetic")
        measure(checkpoint, synthetic, settings or [], sequence_length, rows, place, as_json=as_json)
    else:
        evaluate_on_text(
            checkpoint, data, split or "validation", sequence_length, max_tokens, weights, place, as_json=as_json
        )


def start_ranks(context: typer.Context, checkpoint: Path, nproc: int, nodes: int, on: str | None) -> int:
    """Start ranks of the same command line, here or under Slurm, and return the exit code.

    Raises ValueError for Slurm without a run, whose section `launch` says how.
    """
    words = words_of(context, left_out=("nproc", "nodes", "on"))
    if on is None:
        from amfm.launch.cluster.local import run_local

        return run_local(words, nproc)
    from amfm.launch.commands.launch import Shown, Work, launch_slurm
    from amfm.pretrain.config.file import load_config

    files = [folder / "config.yaml" for folder in (checkpoint, checkpoint.absolute().parent.parent)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError(f"--on slurm reads the section launch of a run, and {checkpoint} is none; use only --nproc")
    in_script = [*words, "--nproc", str(nproc), "--nodes", str(nodes), "--on", "slurm"]
    done = launch_slurm(load_config(found), Work(words, None), in_script, nodes, nproc, name="evaluate", dry_run=False)
    if isinstance(done, Shown):
        sys.stdout.write(done.text)
        return 0
    return done


def words_of(context: typer.Context, left_out: Sequence[str]) -> list[str]:
    """The command line of a verb, without these options and those that have their default."""
    words = [str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in left_out or value in (None, parameter.default):
            continue
        if parameter.param_type_name == "argument":
            words.append(str(Path(str(value)).absolute()))
        elif isinstance(value, bool):
            words.append(parameter.opts[0])
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(each)]
    return words


def evaluate_on_text(
    checkpoint: Path,
    data: Path | None,
    split: Literal["validation", "train"],
    sequence_length: int | None,
    max_tokens: int | None,
    weights: str,
    place: Place,
    *,
    as_json: bool,
) -> None:
    """Measure the loss on a part of a store, and print it on the first rank."""
    with loading("evaluate"):
        from amfm.pretrain.inference.evaluate import evaluate_checkpoint
        from amfm.pretrain.inference.weights import read_weights

    with (
        Waiting("amfm evaluate", speaks=place.is_first) as waiting,
        show_progress("evaluate", every_seconds=5.0) as show,
    ):

        def show_tokens(done: int, total: int) -> None:
            waiting.end()
            if place.is_first:
                show(done, total, "tokens")

        found = evaluate_checkpoint(
            checkpoint if weights == "last" else read_weights(checkpoint, waiting, averaged=True),
            store=data,
            split=split,
            sequence_length=sequence_length,
            max_tokens=max_tokens,
            device=place.device,
            backend=place.backend,
            precision=place.precision,
            num_ranks=place.num_ranks,
            progress=show_tokens,
            report=waiting,
            announce=place.announce,
        )
    if place.is_first:
        print_evaluation(checkpoint, found, as_json=as_json)


def print_evaluation(checkpoint: Path, found: Evaluation, *, as_json: bool) -> None:
    """Print what was measured on text, whole and by source."""
    if as_json:
        print_json(
            {
                "loss": found.loss,
                "perplexity": found.perplexity,
                "bits_per_byte": found.bits_per_byte,
                "tokens": found.tokens,
                "by_source": {name: asdict(source) for name, source in found.by_source.items()},
                "split": found.split,
                "store": found.store,
                "sequence_length": found.sequence_length,
            }
        )
        return
    pairs = [("loss", f"{found.loss:.4f} nats per token"), ("perplexity", f"{found.perplexity:,.2f}")]
    if found.bits_per_byte is not None:
        pairs.append(("bits per byte", f"{found.bits_per_byte:.4f}"))
    if len(found.by_source) > 1:
        pairs += [(f"loss of {name}", describe_source(source)) for name, source in found.by_source.items()]
    pairs.append(("measured on", f"{found.tokens:,} tokens of the {found.split} part of {found.store}"))
    print_pairs(f"Evaluation of {checkpoint}", pairs)


def describe_source(source: SourceLoss) -> str:
    """The loss of one source in words."""
    bits = "" if source.bits_per_byte is None else f", {source.bits_per_byte:.4f} bits per byte"
    return f"{source.loss:.4f}{bits}, {source.tokens:,} tokens"


def check_options(
    measure: str | None,
    others: Mapping[str, object],
    of_text: Mapping[str, object],
    of_synthetic: Mapping[str, object],
    of_tasks: Mapping[str, object],
    of_ranks: Mapping[str, object],
) -> None:
    """Reject options that the chosen measure would not read: `--tasks`, `--synthetic`, or None for the loss on text."""
    unread = {"--tasks": {**others, **of_text}, "--synthetic": {**of_text, **of_ranks}, None: {}}[measure]
    for name, value in unread.items():
        if value is not None:
            raise ValueError(f"{name} has no effect with {measure}; leave it out")
    for owner, options in (("--synthetic", of_synthetic), ("--tasks", of_tasks)):
        for name, value in options.items():
            if owner != measure and value is not None:
                raise ValueError(f"{name} has no effect without {owner}; leave it out")


def read_choice(names: str, include_path: Path | None, limit: int | None, num_fewshot: int | None) -> TaskChoice:
    """Turn the options of a command line into a choice of tasks; `names` are separated by commas."""
    from amfm.pretrain.tasks.suite import TaskChoice

    listed = tuple(name.strip() for name in names.split(",") if name.strip())
    if not listed:
        raise ValueError(f"--tasks {names!r} names no task; give names separated by commas, such as arc_easy,hellaswag")
    return TaskChoice(listed, None if include_path is None else str(include_path), limit, num_fewshot)


def evaluate_on_tasks(checkpoint: Path, choice: TaskChoice, place: Place, *, as_json: bool) -> None:
    """Measure a checkpoint on tasks, and print the values on the first rank."""
    from amfm.pretrain.tasks.suite import evaluate_tasks

    with Waiting("amfm evaluate", speaks=place.is_first) as waiting:
        waiting("measuring tasks")
        values = evaluate_tasks(
            checkpoint,
            choice,
            device=place.device,
            backend=place.backend,
            precision=place.precision,
            num_ranks=place.num_ranks,
            announce=place.announce,
        )
    if not place.is_first:
        return
    if as_json:
        print_json({"tasks": values})
        return
    print_pairs(f"Tasks on {checkpoint}", [(name, f"{value:.4f}") for name, value in values.items()])


def generate(
    checkpoint: CheckpointArgument,
    *,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0: always the most likely token.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens with this total probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """The verb `generate`."""
    with loading("generate"):
        from amfm.pretrain.inference.generate import Sampling
        from amfm.pretrain.inference.generate import generate as generate_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    with Waiting("amfm generate") as waiting:
        pieces = generate_text(
            checkpoint,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            device=choose_device(device),
            backend=backend,
            report=waiting,
        )
    if as_json:
        print_json({"prompt": prompt, "text": "".join(pieces)})
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm evaluate runs/my --nproc 8 --tasks arc_easy,hellaswag")(evaluate)
    app.command(epilog='Example: amfm generate runs/tiny_cpu --prompt "To be, or not to be" --top-p 0.9')(generate)
