"""Imported last by the process from which ranks are forked: what is there now is not garbage.

A rank's garbage collector then leaves it alone, and with it the memory that ranks share until one of them writes to it.
"""

from __future__ import annotations

import gc

gc.freeze()
