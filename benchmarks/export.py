"""Export benchmark: peak memory and time of `amfm export` and `amfm import`, for one model and deeper ones of the same blocks.

How it works: weights of the right shapes are written to a folder, and the two verbs run on it as someone would start
them, each a separate process whose peak the system tells its parent. Tensors go through both some rows at a time, so
the peaks of a model and of one three times as deep are the same. The verification of an export, which loads the whole
model with transformers, is left out (`--no-verify`). Needs `pip install ./examples/foreign_states`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from amfm_foreign_states.adopt import Expected, make_record
from amfm_foreign_states.state import TrainingState, write_run
from torch import Tensor

from amfm.data_pipeline.config import TokenizerConfig
from amfm.data_pipeline.tokenizer.sentencepiece_model import train_tokenizer
from amfm.launch.arguments import JsonOption
from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.console import print_json, print_rows, say
from amfm.launch.rank_command import rank_command
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters
from amfm.model.on_demand import OnDemand, Shape, Source, on_demand
from amfm.model.shapes import weight_shapes
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import Weights, write_weights
from benchmarks.command import main

# As many numbers as are drawn; tensors repeat them.
DRAWN = 1 << 20
TOKENIZER = TokenizerConfig(vocab_size=300, byte_fallback=True)
# A small process in between: the kernel counts a parent's own memory as its child's until the child has its program.
WATCH = """
import pathlib, resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
pathlib.Path(sys.argv[1]).write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code if code >= 0 else 128 - code)
"""
TEXTS = [f"Line {number}: the quick brown fox jumps over {number * 7} lazy dogs." for number in range(400)]


def deepen(config: ModelConfig, times: int) -> ModelConfig:
    """The same model with its blocks this many times over, without MTP layers."""
    plain = config.without_depths()
    deeper = plain.model_copy(update={"pattern": "".join(plain.letters) * times})
    check_model(deeper)
    return deeper


def random_weights(config: ModelConfig) -> Weights:
    """Weights of a model that are made when they are asked for; they compute nothing sensible."""
    drawn = torch.empty(DRAWN).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))

    def source(shape: Shape) -> Source:
        def read(start: int, stop: int) -> Tensor:
            wanted = (stop - start, *shape[1:])
            numel = torch.Size(wanted).numel()
            return drawn.repeat(-(-numel // DRAWN))[:numel].view(wanted)

        return Source(shape, torch.float32, read)

    state = OnDemand({name: source(shape) for name, shape in weight_shapes(config).items()})
    return Weights(config, state, train_tokenizer(TEXTS, TOKENIZER), "a benchmark")


def random_training_state(config: RunConfig) -> TrainingState:
    """A state of the run's model with moments, made when it is asked for, which a checkpoint can be written from."""
    weights, expected = on_demand(random_weights(config.model).state), Expected(config)
    parameters = {name: weights.sources[name] for name in expected.shapes}
    buffers = {name: weights.sources[name] for name in expected.buffers}
    record = {**make_record(config, expected, 1, 1), "state": {}, "identities": {}}
    return TrainingState(
        "a benchmark", dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), parameters), buffers, {}, record
    )


def measure(arguments: Sequence[str]) -> dict[str, float]:
    """Run an `amfm` command line; returns its seconds and its peak of resident memory in bytes.

    Raises RuntimeError with its last words if it fails.
    """
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile() as peak:
        watched = [sys.executable, "-c", WATCH, peak.name, *rank_command(arguments)]
        done = subprocess.run(watched, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"amfm {' '.join(arguments)} failed: {done.stdout[-2000:].decode(errors='replace')}")
        # Linux counts in KiB.
        return {"seconds": time.perf_counter() - begun, "peak_bytes": int(Path(peak.name).read_text()) * 1024}


def bench_export(
    config: ModelConfig,
    times: Sequence[int],
    place: Path | None,
    *,
    report: Callable[[str], None],
    run: RunConfig | None = None,
    file_format: str = "huggingface",
) -> dict[str, Any]:
    """Export and import the model with its blocks once, and as often as `times` says; returns peaks and seconds of each.

    `place`: a folder on the disk to use; None: the system's folder for temporary files. `file_format`: another one than
    huggingface moves a whole training state of `run`. Raises RuntimeError if the disk has not twice the largest free.
    """
    models = [deepen(config, number) for number in times]
    bytes_each = 4 if file_format == "huggingface" else 12
    with tempfile.TemporaryDirectory(dir=place) as root:
        needed = 2 * bytes_each * max(count_parameters(model).total for model in models)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise RuntimeError(f"{root} has {free:,} bytes free and {needed:,} are needed; name another --folder")
        rows = [
            _bench_model(model, Path(root, str(number)), report)
            if run is None
            else _bench_state(run.model_copy(update={"model": model}), file_format, Path(root, str(number)), report)
            for number, model in enumerate(models)
        ]
    return {"rows": rows, "hardware": describe_hardware()}


def _bench_model(model: ModelConfig, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Write weights, export them, and import the export; what is no longer needed is removed on the way."""
    number = count_parameters(model).total
    weights, out, back = (folder / name for name in ("weights", "export", "import"))
    weights.mkdir(parents=True)
    report(f"writing {number / 1e9:.2f}B parameters")
    write_weights(weights, random_weights(model))
    report("exporting")
    exported = measure(["export", str(weights), str(out), "--no-verify", "--json"])
    shutil.rmtree(weights)
    report("importing")
    imported = measure(["import", str(out), str(back), "--json"])
    shutil.rmtree(folder)
    return {"parameters": number, "bytes": 4 * number, "export": exported, "import": imported}


def _bench_state(run: RunConfig, file_format: str, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Write a checkpoint with moments, export its training state, and import that, as `_bench_model` does with weights."""
    number = count_parameters(run.model).total
    start, out, back = (folder / name for name in ("start", "export", "import"))
    report(f"writing {number / 1e9:.2f}B parameters with moments")
    write_run(start, random_training_state(run))
    report("exporting")
    exported = measure(["export", str(start), str(out), "--format", file_format, "--json"])
    shutil.rmtree(start)
    report("importing")
    imported = measure(["import", str(out), str(back), "--json"])
    shutil.rmtree(folder)
    return {"parameters": number, "bytes": 12 * number, "export": exported, "import": imported}


def export(
    path: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration, or run, whose model it is.")
    ] = Path("configs/ladder_1b_a300m.yaml"),
    *,
    times: Annotated[str, typer.Option(metavar="1,3", help="Its blocks so many times over; one row each.")] = "1,3",
    folder: Annotated[Path | None, typer.Option(help="A folder on the disk to use; default: /tmp.")] = None,
    file_format: Annotated[
        Literal["huggingface", "dcp", "deepspeed-universal"],
        typer.Option("--format", help="Weights for transformers, or whole training states with moments."),
    ] = "huggingface",
    as_json: JsonOption = False,
) -> None:
    """Export and import a model and a deeper one, without the verification, and print the peaks of memory.

    The disk needs twice the larger model in float32, and three times that with moments.
    """
    from benchmarks.models import read_model

    numbers = [int(text) if text.isdecimal() else 0 for text in times.split(",")]
    if not all(numbers):
        raise ValueError(f"--times {times} must be integers from 1 on with commas between them, such as 1,3")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    run = None if file_format == "huggingface" else load_config(path / "config.yaml" if path.is_dir() else path)
    result = bench_export(read_model(path), numbers, folder, report=say, run=run, file_format=file_format)
    if as_json:
        print_json(result)
    else:
        print_export_table(result)


def print_export_table(result: dict[str, Any]) -> None:
    """Print a row a model, and the hardware."""
    rows = [
        (
            f"{row['parameters'] / 1e9:.2f}B",
            f"{row['bytes'] / 2**30:.1f}",
            *(
                cell
                for verb in ("export", "import")
                for cell in (f"{row[verb]['peak_bytes'] / 2**20:,.0f}", f"{row[verb]['seconds']:.0f}")
            ),
        )
        for row in result["rows"]
    ]
    columns = ("parameters", "GiB", "export peak MiB", "export s", "import peak MiB", "import s")
    print_rows("Memory of exports and imports", columns, rows)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


if __name__ == "__main__":
    main(export)
