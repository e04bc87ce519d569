"""What a plug-in, a library or the system may do to a rank in the middle of its run; for forked ranks, whose end undoes it."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.pretrain import start
from amfm.pretrain.hook import Hook
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult
from tests.helpers.spoiled_gradient import spoil_gradient


class AfterStep(Hook):
    """Does something once, after a step."""

    def __init__(self, run: Run, step: int, do: Callable[[Run], None]) -> None:
        self.run, self.step, self.do = run, step, do

    def after_step(self, result: StepResult) -> None:
        if self.run.progress.step == self.step:
            self.do(self.run)


def after_step(step: int, do: Callable[[Run], None]) -> None:
    """Give every run of this process a hook, as a package would, that does something after a step."""
    build = start.build_hooks

    def with_fault(run: Run, *others: Any) -> tuple[Hook, ...]:
        return (*build(run, *others), AfterStep(run, step, do))

    start.build_hooks = with_fault


def exit_in_order(run: Run) -> None:
    """As a library does that takes its own end for the program's."""
    sys.exit(0)


def hold_python(run: Run) -> None:
    """Keep Python's lock for good, in C: a library that is loaded so does not give it back while it is called."""
    ctypes.PyDLL(None).sleep(1 << 30)


def close_descriptors(run: Run) -> None:
    """As a daemon does that frees itself."""
    os.closerange(3, 4096)


def lower_descriptors(run: Run) -> None:
    """No other file can be opened."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def lower_memory(run: Run) -> None:
    """No more memory than there is; the next large tensor does not fit."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
    torch.empty(1 << 33, dtype=torch.uint8)


def move_away(run: Run) -> None:
    """As someone does who tidies up."""
    run.directory.rename(run.directory.with_name("moved"))


def remove_gradients(run: Run) -> None:
    """As code does that only evaluates."""
    torch.set_grad_enabled(False)


def change_defaults(run: Run) -> None:
    """Other seeds, umask and environment of the process. Nothing of a run without dropout may depend on them."""
    torch.manual_seed(99)
    os.umask(0o077)
    os.environ.clear()


def spoil_one_expert(run: Run) -> None:
    """The gradient of one expert of one block is NaN at the next step, and at no other."""
    name, weight = next((name, weight) for name, weight in run.model.named_parameters() if ".experts." in name)
    assert weight.shape[0] == run.config.model.moe.num_experts, name

    def spoil(gradient: Tensor) -> Tensor:
        stop()
        spoiled = gradient.clone()
        spoiled[1] = float("nan")
        return spoiled

    stop = spoil_gradient(weight, spoil)


def overflow(run: Run) -> None:
    """Model weights beyond what products of bfloat16 can hold, until they are written again from their master weights."""
    for weight in run.model.parameters():
        weight.data.fill_(3e38)


def replace_store(run: Run) -> None:
    """Another sound store takes the place of the one that is read, by renames, as a preparation would."""
    store = Path(run.config.data.store)
    store.rename(store.with_name("away"))
    store.with_name("other").rename(store)


def remove_store(run: Run) -> None:
    """The store goes, with its tokenizer."""
    store = Path(run.config.data.store)
    store.rename(store.with_name("away"))


LIMIT_FILES = {"memory": "memory.limit_in_bytes", "pids": "pids.max"}


def limited_group(controller: str, name: str, limit: int) -> Path:
    """A cgroup with a limit, below the one of all processes here. Raises OSError if the system gives none."""
    group = Path("/sys/fs/cgroup", controller, f"amfm-test-{os.getpid()}-{name}")
    group.mkdir()
    (group / LIMIT_FILES[controller]).write_text(str(limit))
    return group


def run_out_of_memory(run: Run) -> None:
    """The kernel kills this rank for want of memory, as in a job with a limit."""
    (limited_group("memory", "rank", 64 << 20) / "cgroup.procs").write_text(str(os.getpid()))
    torch.ones(1 << 28)


def run_out_of_threads(run: Run) -> None:
    """This rank gets no further process or thread, as in a job with a limit that its other processes have used up."""
    (limited_group("pids", "rank", 1) / "cgroup.procs").write_text(str(os.getpid()))
    subprocess.Popen(["true"])
