"""Tokens of Ray clusters: Ray listens on all addresses of a machine, and runs what anybody sends to it."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path


def choose_token(address: str | None = None) -> None:
    """Set Ray's token for the cluster at an address, or for a new one on this machine. Call it before Ray is imported.

    A new cluster admits this process and its children alone. A cluster that `ray start --head` made asks for the token in
    its user's file, which programs that join send only in the mode `token`. Ray reads the variables once, at its import: a
    program that imported it before, or set RAY_AUTH_MODE, has chosen.
    """
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    if address is None:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or file.is_file():
        os.environ["RAY_AUTH_MODE"] = "token"
