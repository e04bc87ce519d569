"""How each fault is done: by signals to real processes, switches of the failing disk, and changed bytes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from amfm.pretrain.checkpoint.inspect import inspect_checkpoint
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints
from tests.soak.faults import Fault
from tests.soak.processes import name_of, send
from tests.soak.start import Start

PAUSE_SECONDS = 2.0
SLOW_SECONDS = 4.0
MAX_OUTPUTS = 150  # of modules before the one that is made NaN, about a step's


def strike(fault: Fault, start: Start) -> str:
    """Do what a fault says to a start under way, and return what was hit, in words."""
    ranks = start.ranks()
    victim, launcher = ranks.get(fault.rank), start.process
    name, hit = fault.kind.name, f"rank {fault.rank}"
    victims = [] if victim is None else [victim]
    if name == "kill a rank":
        send(victims, signal.SIGKILL)
    elif name == "hang a rank":
        send(victims, signal.SIGSTOP)
    elif name == "pause a rank":
        send(victims, signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        send(victims, signal.SIGCONT)
    elif name == "NaN on a rank":
        order = start.folder / f"order-{fault.rank}"
        order.write_text(str(int(fault.draw * MAX_OUTPUTS)))
        order.rename(start.folder / f"NaN-{fault.rank}")
    elif name == "flip a bit in memory":
        (start.folder / f"flip-{fault.rank}").touch()
    elif name == "slow disk":
        hit = "the disk"
        (start.folder / "slow").touch()
        time.sleep(SLOW_SECONDS)
        (start.folder / "slow").unlink()
    elif name == "full disk":
        hit = "the disk"
        (start.folder / "full").touch()
    elif name == "stop signal":
        hit = "the launcher"
        launcher.send_signal(signal.SIGTERM)
    elif name == "kill the launcher":
        hit = "the launcher"
        launcher.kill()
    elif name == "kill the raylet":
        hit = "the raylet"
        send([process for process in start.known if name_of(process) == "raylet"], signal.SIGKILL)
    elif name in ("kill all at once", "damage the newest checkpoint"):
        hit = "all"
        launcher.kill()
        send(ranks.values(), signal.SIGKILL)
    else:
        raise AssertionError(f"no way to {name}")
    return hit


def damage_newest(run_dir: Path, draw: float) -> str:
    """Flip a bit of the newest sound checkpoint of a run that stands still, if another sound one is left.

    Returns what was hit, in words: file and byte, or nothing.
    """
    sound = [path for path in list_checkpoints(run_dir / "checkpoints") if inspect_checkpoint(path)["ok"]]
    if len(sound) < 2:
        return "nothing: it is the only sound one"
    files = sorted(path for path in sound[0].iterdir() if path.suffix in (".safetensors", ".json"))
    file = files[int(draw * len(files))]
    damaged = bytearray(file.read_bytes())
    place = int(draw * 1e6) % len(damaged)
    damaged[place] ^= 1 << int(draw * 1e7) % 8
    file.write_bytes(damaged)
    return f"{sound[0].name}/{file.name}, byte {place}"
