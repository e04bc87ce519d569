"""Peak memory of a training step beyond what libraries take, next to what a step cannot do without.

How it works: a process per configuration builds its engine and takes steps on random tokens. The least is the state (weights,
master weights, two moments and the sum of gradients) and what autograd keeps of one micro-batch, each storage counted once.
The peak is the process's resident memory (VmHWM of Linux), less what it had after a step of a model of 0.2M parameters, with
which libraries load their parts. Next to it: the most that tensors had at once, as PyTorch's allocator records it.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from amfm.data_pipeline.memory import keep_freed_memory
from amfm.launch.arguments import JsonOption
from amfm.launch.cluster.child import Child, open_answers
from amfm.launch.console import print_json, print_rows
from amfm.pretrain.checks.load import load_checked
from benchmarks import ROOT
from benchmarks.command import main

MIB = 2**20
STEPS = 3  # after two that fill caches
CONFIGS = ("configs/tiny_cpu.yaml", "configs/ladder_20m.yaml")


def step_memory(
    configs: Annotated[list[Path] | None, typer.Argument(help="Default: tiny_cpu and ladder_20m.")] = None,
    *,
    override: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of all configurations.")] = None,
    passes: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 2,
    returned: Annotated[bool, typer.Option("--returned", help="Let the C library return freed memory.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the memory of a step as a multiple of the least."""
    rows = []
    for path in configs or [ROOT / each for each in CONFIGS]:
        asked = {"config": str(path.absolute()), "overrides": override or [], "passes": passes, "keep": not returned}
        with Child("benchmarks.step_memory", "--child", json.dumps(asked), root=ROOT) as child:
            rows.append({"config": path.stem, **child.receive()})
    if as_json:
        print_json(rows)
        return
    shown = [
        (row["config"], row["precision"], *(f"{row[each] / MIB:,.0f}" for each in ("state", "kept", "tensors", "peak")),
         f"{row['tensors'] / (row['state'] + row['kept']):.2f}", f"{row['peak'] / (row['state'] + row['kept']):.2f}")
        for row in rows
    ]  # fmt: skip
    columns = ("config", "precision", "state MiB", "kept", "tensors at most", "peak", "tensors / least", "peak / least")
    print_rows("Memory of a step beyond libraries", columns, shown)


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a configuration's step: state, kept, tensors, peak."""
    from benchmarks.small_steps import begin_ranks, build_for_steps, load_small, take_step

    config, single = load_twice(Path(asked["config"]), asked["overrides"], asked["passes"])
    parallel = begin_ranks(config)
    if asked["keep"]:
        keep_freed_memory()  # as a run does
    small = load_small([f"train.precision={config.train.precision}", "kernels.backend=auto"], 1)
    take_step(
        small, parallel, build_for_steps(small, parallel)[0], None
    )  # libraries load parts and buffers at first use
    gc.collect()
    before = read_status("VmRSS")
    engine, pipeline = build_for_steps(config, parallel)
    for _ in range(2):
        take_step(config, parallel, engine, pipeline)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    for _ in range(STEPS):
        take_step(config, parallel, engine, pipeline)
    peak = read_status("VmHWM") - before
    parameters = list(engine.module.parameters())
    with counting_kept(engine.module) as kept:
        take_step(single, parallel, engine, pipeline)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        take_step(config, parallel, engine, pipeline)
    state = sum(each.numel() * (each.element_size() + 16) for each in parameters)
    return {
        "precision": config.train.precision,
        "state": state,
        "kept": sum(kept.values()),
        "tensors": state + most_added(recorded),
        "peak": peak,
    }


def load_twice(path: Path, overrides: list[str], passes: int) -> tuple[Any, Any]:
    """A configuration with so many micro-batches per step, and the same with one."""
    rows = load_checked(path, overrides, world_size=1).train.micro_batch_size
    own = [*overrides, "train.num_threads=1"]
    many, one = (
        load_checked(path, [*own, f"train.global_batch_size={rows * count}"], world_size=1) for count in (passes, 1)
    )
    return many, one


@contextmanager
def counting_kept(module: nn.Module) -> Iterator[dict[int, int]]:
    """Inside, collects bytes of storages that autograd keeps, by address, without the weights."""
    weights = {each.untyped_storage().data_ptr() for each in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def most_added(recorded: Any) -> int:
    """The most bytes of tensors that a recorded step added to those that existed before it."""
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return max(accumulate(changes))


def read_status(field: str) -> int:
    """Bytes of this process by the name of a line in /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (each for each in lines if each.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if "--child" in sys.argv:
        answer = open_answers()
        answer(measure(json.loads(sys.argv[-1])))
    else:
        main(step_memory)
