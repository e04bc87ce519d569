"""How PyTorch's allocator takes memory of a GPU, said before PyTorch is imported: later it has read its settings.

Experts over ranks get other numbers of rows in every layer and step, so what is allocated has other sizes each time. Segments of
a fixed size then fragment, and a run that fits ends after some hundred steps. Segments that grow do not.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# The second is the older name, which releases from 2.9 on still read.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def expand_segments(environment: MutableMapping[str, str]) -> None:
    """Ask for segments that grow, unless the user has said anything of the allocator."""
    if not any(environment.get(name) for name in VARIABLES):
        environment[VARIABLES[0]] = EXPANDABLE
