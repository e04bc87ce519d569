"""The verb that puts a model behind HTTP: serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption, choose_device
from amfm.launch.commands.evaluate import BackendOption, DeviceOption
from amfm.launch.console import loading, print_json, say
from amfm.launch.existing import require_model

LOOPBACK = ("127.0.0.1", "::1", "localhost")
GIB = 2**30


def serve(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A run directory, a checkpoint, an import, or an export.", callback=require_model
        ),
    ],
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Any address other than loopback is open to everyone who can reach it."
        ),
    ] = "127.0.0.1",
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Maximum number of tokens of prompt and answer together.")
    ] = 8192,
    keep_gib: Annotated[
        float, typer.Option(min=0, help="Memory for keeping the states of conversations between requests.")
    ] = 1.0,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """The verb `serve`.

    Until Ctrl-C. Conversations continue from the state they left: a turn costs its own tokens. Chat needs a model whose
    folder has a chat template.

    Example: amfm serve exports/tiny_cpu --port 8000
    """
    with loading("serve"):
        from amfm_serve.completions import load_model
        from amfm_serve.server import ModelServer

    # The port first: it is known at once whether it is free, and loading takes time.
    with ModelServer(host, port) as server:
        say(f"loading {model}")
        server.max_tokens = max_tokens
        server.model = load_model(
            model, device=choose_device(device), backend=backend, max_state_bytes=int(keep_gib * GIB)
        )
        chats = server.model.template is not None
        if as_json:
            print_json({"url": server.url, "model": server.model.name, "chat": chats})
        if host not in LOOPBACK:
            say(f"warning: {host} is not loopback: everyone who reaches port {server.server_address[1]} may use it")
        said = "chat and completions" if chats else "completions; it has no chat template"
        say(f"{server.model.name} ({said}) on {server.url}, API below {server.url}/v1; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("amfm: no longer serving")
