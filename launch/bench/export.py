"""Export benchmark: peak memory and time of `amfm export` and `amfm import`, for one model and deeper ones of the same blocks.

How it works: weights of the right shapes are written to a folder, and the two verbs run on it as somebody would start
them, each a process of its own whose peak the system tells its parent. Tensors go through both some rows at a time, so
the peaks of a model and of one three times as deep are the same. The proof of an export, which loads the whole model with
transformers, is left out (`--no-verify`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.config import TokenizerConfig
from amfm.data_pipeline.tokenizer.tokenizer import train_tokenizer
from amfm.launch.bench.hardware import describe_hardware
from amfm.launch.rank_command import rank_command
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters
from amfm.model.huggingface.shapes import weight_shapes
from amfm.model.on_demand import OnDemand, Shape, Source
from amfm.pretrain.inference.weights import Weights, write_weights

# As many numbers as are drawn; tensors repeat them.
DRAWN = 1 << 20
TOKENIZER = TokenizerConfig(vocab_size=300, byte_fallback=True)
TEXTS = [f"Line {number}: the quick brown fox jumps over {number * 7} lazy dogs." for number in range(400)]


def deepen(config: ModelConfig, times: int) -> ModelConfig:
    """The same model with its blocks so many times over, without depths of multi-token prediction."""
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


def measure(arguments: Sequence[str]) -> dict[str, float]:
    """Run an `amfm` command line; returns its seconds and its peak of resident memory in bytes.

    Raises RuntimeError with its last words where it fails.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(rank_command(arguments), env=dict(os.environ), stdout=words, stderr=words)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            words.seek(0)
            raise RuntimeError(f"amfm {' '.join(arguments)} failed: {words.read()[-2000:].decode(errors='replace')}")
    # Linux tells KiB.
    return {"seconds": time.perf_counter() - begun, "peak_bytes": usage.ru_maxrss * 1024}


def bench_export(
    config: ModelConfig, times: Sequence[int], place: Path | None, *, report: Callable[[str], None]
) -> dict[str, Any]:
    """Export and import the model with its blocks once, and as often as `times` says; returns peaks and seconds of each.

    `place`: a folder on the disk to use; None: the system's folder for temporary files. Raises RuntimeError where the disk
    has not twice the largest model free.
    """
    models = [deepen(config, number) for number in times]
    with tempfile.TemporaryDirectory(dir=place) as root:
        needed = 2 * 4 * max(count_parameters(model).total for model in models)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise RuntimeError(f"{root} has {free:,} bytes free and {needed:,} are needed; name another --folder")
        rows = [_bench_model(model, Path(root, str(number)), report) for number, model in enumerate(models)]
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
