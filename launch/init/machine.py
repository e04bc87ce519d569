"""Machine named by `--hardware`, and the fastest layout that the plan finds for it.

The planner of `amfm plan` decides, so that `amfm init` and `amfm plan` cannot disagree about what fits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from amfm.launch.plan.estimate import Assumptions, Estimate, estimate
from amfm.launch.plan.hardware import GIB, HARDWARE, Hardware, load_hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.search import all_layouts, neighbour_layouts, powers_of_two, with_layout
from amfm.pretrain.config.schema import RunConfig

RECOMPUTE = ("none", "full")
MOST_RANKS = 64
MOST_CPU_ROWS = 4
_CARDS = re.compile(r"([1-9][0-9]*)x(.+)")


@dataclass(frozen=True)
class Machine:
    """Ranks of a run and the device of each; `is_cpu`: one rank on this machine's processor."""

    name: str
    ranks: int
    hardware: Hardware
    is_cpu: bool


def find_machine(name: str) -> Machine:
    """Machine of a name: `cpu`, or a number and an accelerator such as `8xh100`.

    The accelerator is of the plan's table or a hardware file. Raises ValueError for any other name.
    """
    if name.lower() == "cpu":
        return Machine("cpu", 1, this_processor(), is_cpu=True)
    found = _CARDS.fullmatch(name)
    if found is None:
        raise ValueError(
            f"--hardware {name} must be cpu, or a number and an accelerator: 1xh100, 8xh100, 64xb200, 8xFILE.yaml; in the "
            f"table are {', '.join(HARDWARE)}"
        )
    return Machine(name, int(found[1]), load_hardware(found[2], f"--hardware {name}:"), is_cpu=False)


def this_processor() -> Hardware:
    """This machine's CPU as a device of the plan: memory is measured, speed assumed (two cores with AVX2)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        name="this machine's CPU",
        bf16_flops=150e9,
        float32_flops=150e9,
        memory_gib=memory / GIB,
        memory_bytes_per_second=20e9,
        gpus_per_node=1,
        node_link_bytes_per_second=10e9,
        network_bytes_per_second=1e9,
    )


@dataclass(frozen=True)
class Choice:
    """A run in the chosen layout, with the plan's estimate of it."""

    config: RunConfig
    estimate: Estimate


def find_layout(config: RunConfig, machine: Machine) -> Choice | None:
    """Fastest layout that fits, None if nothing fits. Recomputation is tried only if nothing fits without it.

    One rank varies ZeRO stage and micro-batch size only; several search all axes. Of equal times the larger micro-batch
    wins.
    """
    for recompute in RECOMPUTE:
        run = config.model_copy(update={"train": config.train.model_copy(update={"recompute": recompute})})
        made = [(with_layout(run, layout), layout) for layout in layouts(run, machine)]
        estimates = [estimate(laid, layout, machine.hardware, Assumptions()) for laid, layout in made]
        fitting = [item for item in estimates if item.fits()]
        if fitting:
            # Of equal times the larger micro-batch: the plan does not count what each call costs beyond its arithmetic.
            best = min(fitting, key=lambda item: (item.step.total(), -item.layout.micro_batch_size))
            return Choice(with_layout(run, best.layout), best)
    return None


def larger_machines(machine: Machine) -> Iterator[Machine]:
    """The same accelerator in doubled numbers up to 64; H100 where the machine is a CPU."""
    name = "h100" if machine.is_cpu else machine.name.partition("x")[2]
    first = 1 if machine.is_cpu else 2 * machine.ranks
    return (find_machine(f"{ranks}x{name}") for ranks in powers_of_two(MOST_RANKS) if ranks >= first)


def layouts(config: RunConfig, machine: Machine) -> list[Layout]:
    """Candidate layouts of a machine.

    On a CPU only those with the largest micro-batch up to four rows: the plan does not count the overhead of calls,
    which small micro-batches pay more often.
    """
    if machine.is_cpu:
        found = [layout for layout in neighbour_layouts(config, 1) if layout.micro_batch_size <= MOST_CPU_ROWS]
        most = max(layout.micro_batch_size for layout in found)
        return [layout for layout in found if layout.micro_batch_size == most]
    if machine.ranks == 1:
        return list(neighbour_layouts(config, 1))
    return list(all_layouts(config, machine.ranks, machine.hardware.gpus_per_node))
