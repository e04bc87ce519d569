"""A token for clusters of our own: Ray listens on all addresses of a machine, and runs what anybody sends to it."""

from __future__ import annotations

import os
import secrets
import sys


def ask_for_token() -> None:
    """Let a Ray that this process starts admit only this process and its children. Call it before Ray is imported.

    Ray reads the variables once, at its import: a program that imported it before, or set RAY_AUTH_MODE, has chosen.
    """
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
