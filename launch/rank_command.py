"""Command lines of ranks and of every other amfm process, started apart from the working directory; variables of ranks.

`python -m amfm.launch` searches the working directory first and would run a user's `amfm.py` or `amfm/` in place of ours, on
every rank. `-P` turns that off; installed packages, editable installs and PYTHONPATH stay. A clone that is not installed is
found through PYTHONPATH=src, which ranks inherit: as an absolute path where they have another working directory.

How PyTorch's allocator takes memory of a GPU, said before PyTorch is imported: later it has read its settings.

Experts over ranks get other numbers of rows in every layer and step, so what is allocated has other sizes each time. Segments of
a fixed size then fragment, and a run that fits ends after some hundred steps. Segments that grow do not.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping, Sequence


def isolated_python() -> list[str]:
    """Start of a command line for a Python that does not search the working directory."""
    return [sys.executable, "-P"]


def rank_command(arguments: Sequence[str]) -> list[str]:
    """Command line of a process that runs an `amfm` command line."""
    return [*isolated_python(), "-m", "amfm.launch", *arguments]


def rank_variables(rank: int, num_ranks: int, ranks_per_node: int, master: str, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank; consecutive ranks share a node, and rank 0 is met at `master`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % ranks_per_node),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
    }


# The second is the older name, which releases from 2.9 on still read.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def expand_segments(environment: MutableMapping[str, str]) -> None:
    """Ask for segments that grow, unless the user has said anything of the allocator."""
    if not any(environment.get(name) for name in VARIABLES):
        environment[VARIABLES[0]] = EXPANDABLE
