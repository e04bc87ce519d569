"""Tokens of Ray clusters: Ray listens on all addresses of a machine, and runs what anybody sends to it."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path


def choose_token(address: str | None) -> None:
    """Set Ray's token for the cluster at an address, or for one of our own. Call it before Ray is imported."""
    if address is None:
        ask_for_token()
    else:
        bring_token()


def ask_for_token() -> None:
    """Let a Ray that this process starts admit only this process and its children. Call it before Ray is imported.

    Ray reads the variables once, at its import: a program that imported it before, or set RAY_AUTH_MODE, has chosen.
    """
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)


def bring_token() -> None:
    """Send a token to the cluster that this process joins, where this user has one. Call it before Ray is imported.

    `ray start --head` turns tokens on by itself and writes the user's token file; programs that join send what they find
    in that mode alone.
    """
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or file.is_file():
        os.environ["RAY_AUTH_MODE"] = "token"
