"""Tokens of Ray clusters: Ray listens on all addresses of a machine, and runs what anyone sends to it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

ANSWER_SECONDS = 10  # in which the head of a cluster takes a connection
ASK_SECONDS = 120  # for a process that imports Ray, on a busy machine
START_RAY = "start one with `ray start --head`, name the address that it prints, or leave --address out"


def choose_token(address: str | None = None) -> None:
    """Set Ray's token for the cluster at an address, or for a new one on this machine. Call it before Ray is imported.

    A new cluster admits only this process and its children. A cluster that `ray start --head` made asks for the token in
    its user's file, which programs that join send only in the mode `token`; where a cluster asks for none, the workers of a
    program in that mode never start. Ray reads the variables once, at its import: a program that imported it before, or
    set RAY_AUTH_MODE, has chosen. Raises ValueError for an address at which nothing listens.
    """
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    if address is None:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if ("RAY_AUTH_TOKEN" in os.environ or file.is_file()) and not _is_open(address):
        os.environ["RAY_AUTH_MODE"] = "token"


def must_answer(address: str) -> None:
    """Raise ValueError if nothing listens at HOST:PORT; other forms of an address (auto, ray://) are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit() or not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"--address {address}: no Ray cluster answers there ({error.strerror or error}); {START_RAY}"
        ) from error


def _is_open(address: str) -> bool:
    """Whether the cluster at an address answers a program without a token; a separate process asks it."""
    must_answer(address)
    question = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        answer = subprocess.run(
            question,
            check=False,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=ASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0
