"""Treatments of freed memory in CPU benchmarks: returned to the system, or kept for later.

It weighs as much as the arithmetic. On its own glibc gives large blocks back, and each new page costs a fault;
transformers trains so. `amfm train` keeps them. The C library takes the setting once, so each treatment needs a
separate process.
"""

from __future__ import annotations

import os
import platform

from amfm.data_pipeline.memory import OWN_SETTINGS

RETURNED, KEPT = "returned", "kept"
CARD = "card"  # on a GPU the C library has no part
TITLES = {
    CARD: "On a GPU",
    RETURNED: "Freed memory returned, as the C library does on its own",
    KEPT: "Freed memory kept, as amfm train does",
}


def choose_treatments() -> tuple[tuple[str, ...], list[str]]:
    """Treatments that this machine can compare, and a warning if there is only one.

    Only one: the environment sets the allocator itself, or the C library is not glibc.
    """
    own = [name for name in OWN_SETTINGS if name in os.environ]
    if own:
        return (" ".join(own),), [f"memory is treated one way, as set in the environment by {', '.join(own)}"]
    if platform.libc_ver()[0] != "glibc":
        return (RETURNED,), ["freed memory is kept where the C library is glibc, which it is not here"]
    return (RETURNED, KEPT), []


def title_of(treatment: str) -> str:
    """Title of a table with one treatment."""
    return TITLES.get(treatment, f"Freed memory as set by {treatment}")
