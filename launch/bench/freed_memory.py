"""How a benchmark on a CPU treats freed memory: as the C library does by itself, and as `amfm train` does, in turns.

It weighs as much as the arithmetic. By itself glibc gives large blocks back, and each new page costs a fault; transformers
trains so. `amfm train` keeps them. The C library takes the setting once, so each way needs a process of its own.
"""

from __future__ import annotations

import os
import platform

from data_pipeline.memory import OWN_SETTINGS

RETURNED, KEPT = "returned", "kept"
CARD = "card"  # on a card the C library has no part
TITLES = {
    CARD: "On a card",
    RETURNED: "Freed memory returned, as the C library does by itself",
    KEPT: "Freed memory kept, as amfm train does",
}


def choose_treatments() -> tuple[tuple[str, ...], list[str]]:
    """How freed memory can be treated here, and a remark where that is one way alone: the environment's, or no glibc's."""
    own = [name for name in OWN_SETTINGS if name in os.environ]
    if own:
        return (" ".join(own),), [f"memory is treated one way, as the environment says in {', '.join(own)}"]
    if platform.libc_ver()[0] != "glibc":
        return (RETURNED,), ["freed memory is kept where the C library is glibc, which it isn't here"]
    return (RETURNED, KEPT), []


def title_of(treatment: str) -> str:
    """What a table of one treatment is called."""
    return TITLES.get(treatment, f"Freed memory as {treatment} says")
