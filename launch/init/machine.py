"""What `--hardware` names, and the layout that the plan finds for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from launch.plan.hardware import GIB, HARDWARE, Hardware, load_hardware
from launch.plan.layout import Layout
from launch.plan.plan import Assumptions, Estimate, estimate
from launch.plan.search import all_layouts, neighbour_layouts, powers_of_two, with_layout
from pretrain.config.schema import RunConfig

RECOMPUTE = ("none", "full")
MOST_RANKS = 64
MOST_CPU_ROWS = 4
_CARDS = re.compile(r"([1-9][0-9]*)x(.+)")


@dataclass(frozen=True)
class Machine:
    """The ranks of a run and what each of them is; `is_cpu`: one rank on this machine's processor."""

    name: str
    ranks: int
    hardware: Hardware
    is_cpu: bool


def find_machine(name: str) -> Machine:
    """`cpu`, or `8xh100`: a number of one row of the plan's table, or of a hardware file. Raises ValueError."""
    if name.lower() == "cpu":
        return Machine("cpu", 1, this_processor(), is_cpu=True)
    found = _CARDS.fullmatch(name)
    if found is None:
        raise ValueError(
            f"--hardware {name} must be cpu, or a number and an accelerator: 1xh100, 8xh100, 64xb200, 8xFILE.yaml; in the "
            f"table are {', '.join(HARDWARE)}"
        )
    return Machine(name, int(found[1]), load_hardware(found[2]), is_cpu=False)


def this_processor() -> Hardware:
    """This machine as the plan sees a device: its memory is measured, its speed assumed (two cores with AVX2)."""
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
    """A run in the layout that was chosen, and what the plan says of it."""

    config: RunConfig
    estimate: Estimate


def find_layout(config: RunConfig, machine: Machine) -> Choice | None:
    """The fastest layout of the plan that fits; blocks are recomputed only where nothing fits without. None: nothing fits.

    One rank varies ZeRO stage and micro-batches alone; several search all axes.
    """
    for recompute in RECOMPUTE:
        run = config.model_copy(update={"train": config.train.model_copy(update={"recompute": recompute})})
        made = [(with_layout(run, layout), layout) for layout in layouts(run, machine)]
        estimates = [estimate(laid, layout, machine.hardware, Assumptions()) for laid, layout in made]
        fitting = [item for item in estimates if item.fits()]
        if fitting:
            best = min(fitting, key=lambda item: (item.step.total(), -item.layout.micro_batch_size))
            return Choice(with_layout(run, best.layout), best)
    return None


def larger_machines(machine: Machine) -> Iterator[Machine]:
    """The same accelerator in doubled numbers, up to 64; for a processor, H100."""
    name = "h100" if machine.is_cpu else machine.name.partition("x")[2]
    first = 1 if machine.is_cpu else 2 * machine.ranks
    return (find_machine(f"{ranks}x{name}") for ranks in powers_of_two(MOST_RANKS) if ranks >= first)


def layouts(config: RunConfig, machine: Machine) -> list[Layout]:
    """The layouts to try. On a processor micro-batches of four rows or less: the plan does not count what calls cost."""
    if machine.is_cpu:
        found = [layout for layout in neighbour_layouts(config, 1) if layout.micro_batch_size <= MOST_CPU_ROWS]
        most = max(layout.micro_batch_size for layout in found)
        return [layout for layout in found if layout.micro_batch_size == most]
    if machine.ranks == 1:
        return list(neighbour_layouts(config, 1))
    return list(all_layouts(config, machine.ranks, machine.hardware.gpus_per_node))
