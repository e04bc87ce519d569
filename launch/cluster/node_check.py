"""What a node must pass before an attempt, in a few seconds: code, storage, clock, memory, devices, and the link to the first node.

The launcher writes a token into the run directory and sends its own time and code; the node answers with what is wrong, one text
a fault. A node that would fail, or make the others wait, an hour into the run is found before the ranks start. The whole
examination is `amfm doctor --cluster`.

    python -m amfm.launch.cluster.node_check REQUEST

Nodes that failed a check or were lost several times are excluded, by name and with the reason. They are kept in the run
directory, so that its next launch excludes them too. Only the launcher writes there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.durable.json_files import read_object
from amfm.data_pipeline.memory import available_bytes
from amfm.launch.cluster.links import LINK_SECONDS, await_links, blame_links, check_link, find_port, listen
from amfm.launch.cluster.storage import blame_inputs, blame_storage, check_inputs, describe_refusal, probe
from amfm.launch.console import say
from amfm.launch.doctor.machine import has_cuda
from amfm.pretrain.packages import collect_versions, digest_code

CLOCK_SECONDS = 60.0
STORAGE_SECONDS = 5.0
LOAD_SECONDS = (
    40.0  # by which nodes may differ where each loads this program on its own, from storage that all ask at once
)
MIN_MEMORY_BYTES = 1 << 29  # a rank
MIN_SHARED_BYTES = 1 << 26  # of /dev/shm, a rank
DEVICE_DIM = 512
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))  # looked for before torch is loaded, which takes seconds
MARK = "amfm-node: "  # before an answer to the launcher, among what ranks print


def make_request(
    run_dir: Path, ranks_per_node: int, *, inputs: Mapping[str, str] = {}, reloads: bool
) -> dict[str, Any]:
    """Write a new token, and return what the launcher asks of each node; `link` is added for each.

    inputs: files that a node must see as the launcher does, with their digests. reloads: ranks run the code as it is now,
    and not as it was when the launcher began.
    """
    if reloads:
        digest_code.cache_clear()
    token, path = secrets.token_hex(16), token_file(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, token.encode())
    return {
        "run_dir": str(run_dir.absolute()),
        "ranks": ranks_per_node,
        "token": token,
        "time": time.time(),
        "inputs": dict(inputs),
        "patience": LINK_SECONDS + LOAD_SECONDS * reloads,
        "code": collect_versions(),
    }


def token_file(run_dir: Path) -> Path:
    """Where the launcher's token is."""
    return run_dir / "launch" / "check-token"


def check_node(request: Mapping[str, Any], received: float) -> list[str]:
    """Everything that is wrong with this node, empty for nothing. `received`: when the request came"""
    run_dir, ranks = Path(request["run_dir"]), int(request["ranks"])
    faults: list[str] = []
    faults += check_clock(request["time"], received)
    faults += check_code(request["code"])
    faults += check_storage(run_dir, request["token"])
    faults += check_inputs(request["inputs"])
    faults += check_memory(ranks)
    faults += check_devices(ranks)
    faults += check_links(request["link"], request["token"], request["patience"])
    return faults


def check_clock(expected: float, now: float) -> Iterator[str]:
    """Heartbeats, logs and certificates assume clocks that agree roughly."""
    if abs(now - expected) > CLOCK_SECONDS:
        yield f"its clock is {abs(now - expected):.0f} s {'ahead' if now > expected else 'behind'}; set it (NTP)"


def check_code(expected: Mapping[str, str]) -> Iterator[str]:
    """Ranks of other code or libraries are rejected by the run itself, later and for all of them."""
    own = collect_versions()
    for name, value in expected.items():
        if own.get(name) != value:
            yield f"{name} is {own.get(name)}, the launcher has {value}; install the same on every node"


def check_storage(run_dir: Path, token: str) -> Iterator[str]:
    """The run directory is the launcher's, and takes a file and gives it back."""
    deadline = time.monotonic() + STORAGE_SECONDS
    try:
        while (seen := read_text(token_file(run_dir))) != token:
            if time.monotonic() > deadline:
                what = "does not see the launcher's file" if seen is None else "sees an old file"
                yield f"{run_dir} {what}: another or a stale mount; mount the shared storage again"
                return
            time.sleep(0.2)
        if not probe(run_dir / "launch"):
            yield f"{run_dir} returns other bytes than were written"
    except OSError as error:
        yield describe_refusal(run_dir, error)


def read_text(path: Path) -> str | None:
    """Content of a small file, None where it is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def check_memory(ranks: int) -> Iterator[str]:
    """Memory that another job, or what an attempt left behind, may hold."""
    free = available_bytes()
    if free is not None and free < ranks * MIN_MEMORY_BYTES:
        yield f"{free / 2**30:.1f} GiB of memory are free for {ranks} ranks; end what holds the rest"
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < ranks * MIN_SHARED_BYTES:
        yield f"/dev/shm has {shutil.disk_usage(shared).free / 2**20:.0f} MiB free for {ranks} ranks; enlarge or clear it"


def check_links(link: Mapping[str, Any], token: str, patience: float) -> Iterator[str]:
    """The first node listens, tells at which port, and lets this many come; each other one goes there and hears the token."""
    if link.get("expect"):
        for port in link.get("ports") or [0]:
            with suppress(OSError):
                listener = listen(port, backlog=max(16, link["expect"]))
                break
        else:
            yield f"none of its ports {link['ports']} is free for others to reach it"
            return
        with listener:
            reply(listening=listener.getsockname()[1])
            await_links(listener, link["expect"], token, patience)
    if "connect" in link:
        yield from check_link(link, token, patience)


def check_devices(ranks: int) -> Iterator[str]:
    """Each rank's GPU is there, has memory, and multiplies as the processor does. Nothing to do without GPUs."""
    if not any(device.exists() for device in DRIVERS) or not has_cuda():
        return
    import torch

    count = torch.cuda.device_count()
    if count < ranks and count != 1:
        yield f"it has {count} GPUs for {ranks} ranks"
        return
    left = torch.randint(-4, 5, (DEVICE_DIM, DEVICE_DIM)).float()
    expected = left @ left  # integers below 2**24: exact in every order
    for index in range(min(count, ranks)):
        try:
            found = (left.to(f"cuda:{index}") @ left.to(f"cuda:{index}")).cpu()
        except RuntimeError as error:
            yield f"GPU {index}: {str(error).splitlines()[0]}"
            continue
        if not torch.equal(found, expected):
            yield f"GPU {index} multiplies wrongly: {int((found != expected).sum())} of {expected.numel()} values differ"


def blame(faults: Mapping[str, Sequence[str]], first: str, run_dir: Path) -> dict[str, list[str]]:
    """Faults by the node that has them. Raises OSError if the storage has them, and ValueError if no node sees the launcher's files."""
    blame_storage(faults, run_dir)
    blame_inputs(faults)
    return blame_links(faults, first)


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not say."""
    stat = read_text(Path("/proc/self/stat"))
    if stat is None:
        return 0.0
    started = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")  # since the system's own start
    return max(0.0, time.monotonic() - started)


def reply(**answer: Any) -> None:
    """Answer the launcher with one line; started over, since a rank may have left one unfinished."""
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()


def read_answers(printed: str) -> list[dict[str, Any]]:
    """What nodes told, among all that was printed."""
    return [json.loads(line.partition(MARK)[2]) for line in printed.splitlines() if MARK in line]


def main(text: str) -> None:
    """Check this node as the request says, and tell the launcher."""
    # Not now: to load this from storage that all nodes ask at once may take longer than clocks may differ.
    received, request = time.time() - process_age(), json.loads(text)
    link = request["link"]
    if "SLURM_NODEID" in os.environ and {"ports", "connect"} <= link.keys():  # all nodes got the same request
        chosen = ("ports", "expect") if os.environ["SLURM_NODEID"] == "0" else ("connect",)
        request["link"] = {name: link[name] for name in chosen}
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    reply(faults=check_node(request, received), node=node, port=find_port())


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for the ranks, which save before a time limit
    main(sys.argv[1])


FILE = Path("launch") / "excluded_nodes.json"
OLD_FILE, OLD_KEY = FILE.with_name("left_out.json"), "left_out"  # of launches before the file had its present name
MAX_LOSSES = 2  # the first one may be anyone's


class ExcludedNodes:
    """`reasons`: why, by name of the node; `losses`: how often a node was lost while it had ranks."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        path = file_of(run_dir)
        try:
            known = read_excluded(path)
            self.reasons = {str(name): str(reason) for name, reason in known["excluded"].items()}
            self.losses = Counter({str(name): int(count) for name, count in known["losses"].items()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not what amfm wrote ({error!r}); delete it") from error
        for name, reason in self.reasons.items():
            say(f"amfm launch: {name} is excluded, as before: {reason} (listed in {path}; delete it to try again)")

    def exclude(self, name: str, reason: str) -> None:
        """Do without a node from now on."""
        say(f"amfm launch: {name} is excluded: {reason}")
        self.reasons[name] = reason
        self._write()

    def lose(self, name: str) -> None:
        """Count a node that was lost while it had ranks; one that is lost MAX_LOSSES times is excluded."""
        self.losses[name] += 1
        if self.losses[name] >= MAX_LOSSES and name not in self.reasons:
            self.exclude(name, f"it was lost {self.losses[name]} times")
        self._write()

    def _write(self) -> None:
        text = json.dumps({"excluded": self.reasons, "losses": dict(self.losses)}, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(self.path, text.encode())
        except OSError as error:  # this launcher knows it anyway
            say(f"amfm launch: {self.path}: {error.strerror}; the next launch tries these nodes again")


def file_of(run_dir: Path) -> Path:
    """The file of a run's excluded nodes: the one of before if only that is there."""
    return run_dir / (OLD_FILE if (run_dir / OLD_FILE).is_file() and not (run_dir / FILE).is_file() else FILE)


def read_excluded(path: Path) -> dict[str, Any]:
    """What a file of `file_of` holds: `excluded` and `losses`, empty without a file. Raises ValueError if it is not JSON."""
    if not path.is_file():
        return {"excluded": {}, "losses": {}}
    known = read_object(path)
    return {("excluded" if key == OLD_KEY else key): value for key, value in known.items()}
