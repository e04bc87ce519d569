"""The committed list of waits for the GPU, by the runs in which each occurs, next to what a traced step waited for."""

from pathlib import Path

from amfm.kernels.moe.capacity import expert_capacity
from amfm.model.moe.capacity import slots_for
from amfm.pretrain.config.schema import RunConfig

LIST = Path(__file__).with_name("host_waits.txt")
COUNTED = "experts that are spread and counted"  # the heading of the waits for rows, in every block


def waits_by_section() -> dict[str, set[str]]:
    """Lines of the list under their headings: file, function and what is waited for, without the number of the line."""
    found: dict[str, set[str]] = {}
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            own = found.setdefault(line.strip("[]"), set())
        elif line and line[0] != "#":
            own.add(line)
    return found


def sections_of(config: RunConfig) -> set[str]:
    """The headings that hold for a run."""
    section, letters = config.parallel, config.model.letters
    zero = section.zero_stage
    found = {"every step", f"ZeRO {zero}"}
    found |= {"ZeRO 1 or 2"} if zero in (1, 2) else set()
    found |= {"ZeRO 1, 2 or 3"} if zero else set()
    if config.train.precision == "bf16":
        found |= {f"{name} in bf16" for name in found}
    if "E" in letters and section.expert > 1 and section.expert_buffer_factor is None and not has_slots(config):
        found.add(COUNTED)
    return found


def has_slots(config: RunConfig) -> bool:
    """Whether every expert has a fixed number of places for each rank's rows, so that none are counted."""
    section, moe, train = config.parallel, config.model.moe, config.train
    if moe is None or moe.capacity_factor is None:
        return False
    whole = train.micro_batch_size * train.sequence_length
    capacity = expert_capacity(whole, moe.top_k, moe.num_experts, moe.capacity_factor)
    tokens = whole // section.context // section.tensor
    return slots_for(tokens, moe.top_k, moe.num_experts, capacity) is not None


def expected_waits(config: RunConfig) -> set[str]:
    """The waits of a step of this run, all of them."""
    by_section = waits_by_section()
    return set().union(*(by_section.get(name, set()) for name in sections_of(config)))


def unnumbered(waits) -> set[str]:
    """Traced waits as the list names them: the line's number changes with every edit."""
    return {f"{wait.partition(':')[0]} {wait.partition(' ')[2]}" for wait in waits}
