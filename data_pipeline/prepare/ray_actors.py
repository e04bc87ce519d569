"""Ray actors that write parts: they get paths and byte ranges and return counts and digests, never text or tokens.

So little passes through Ray's object store, which may be the smallest. The number of actors and which of them writes a unit
change no byte of the store. Dispatch is by hand, one unit an actor at a time: a unit whose actor died is counted and given
to another one, so that a lost node costs a retry, and a text that kills its process ends the call with its name.

Ray's start on a machine that is busy: it waits for its processes as long as they live, and not for half a minute.

Ray gives its server of tables, its node and each worker a limit of 30 to 60 seconds. At a load of 15 all three are passed
by processes that only wait for a core. Two limits are variables of the environment; that of the node is a number in the
middle of a function (`ray._private.node`, 2.52 to 2.60), so what it asks in a loop waits in its place.

A cluster has a token: Ray listens on all addresses of a machine, and runs what anyone sends to it.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.memory import keep_freed_memory
from amfm.data_pipeline.prepare.own_code import local_modules
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.unit import UnitFailure, UnitReport, run_unit
from amfm.data_pipeline.store.part_writer import import_zarr
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer

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


START_SECONDS = 900  # most of them for one process that lives: a core that serves thirty others gives it half a minute
LOOK_SECONDS = 0.5
NODE = "raylet"  # name of the node's process, which is our child
LIMITS = ("RAY_gcs_server_port_wait_time_s", "RAY_worker_register_timeout_seconds")


@contextmanager
def patient_start() -> Iterator[None]:
    """Inside the block a Ray that starts on this machine may take START_SECONDS for each of its processes.

    Where the environment sets limits they stay, and so does Ray's own where it has no function of that name. Not for one that
    joins a cluster: it would knock as long at an address if nothing is.
    """
    from ray._private import services

    unset = [name for name in LIMITS if name not in os.environ]
    original = getattr(services, "get_node", None)

    def get_node(*arguments: Any) -> Any:
        assert original is not None, "replaced only if there is one"
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return original(*arguments)
            except RuntimeError:  # the node has not reported yet
                if time.monotonic() > deadline or not is_node_alive():
                    raise
                time.sleep(LOOK_SECONDS)

    os.environ.update(dict.fromkeys(unset, str(START_SECONDS)))  # for the processes that Ray starts
    if original is not None:
        services.get_node = get_node
    try:
        yield
    finally:
        if original is not None:
            services.get_node = original
        for name in unset:
            del os.environ[name]


def is_node_alive() -> bool:
    """Whether a node of Ray that this process started runs."""
    import psutil  # comes with Ray

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == NODE and child.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


NOT_STARTED = "node timed out during startup"  # of the message of the bare exception that Ray raises
ATTEMPTS = 3  # of a unit whose actor dies: enough for lost nodes, few enough to notice a text that kills the process
MAX_FAILED_STARTS = 20  # in a row: more than the cores of a node that is lost while its actors start
NO_CORE_SECONDS = 300  # with no actor at work; a cluster that grows on demand needs minutes
# `ray start --head` turns tokens on automatically, and a cluster that rejects one looks like none to Ray's own message.
SEND_TOKEN = (
    "if a cluster runs there, it may ask for a token: set RAY_AUTH_MODE=token here, with the head's ~/.ray/auth_token in "
    "the same place (or its path in RAY_AUTH_TOKEN_PATH); else"
)
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's smallest: nothing but paths and counts goes through it


class PartWriter:
    """An actor: keeps the tokenizer, writes one unit at a time."""

    def __init__(self, store: str, tokenizer: Tokenizer) -> None:
        # One actor a core: the tokenizers library would start a thread a core in each. It looks when it first encodes.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        keep_freed_memory()
        self.store, self.tokenizer = Path(store), tokenizer
        import_zarr()
        gc.freeze()  # or a collection looks at everything that Ray and zarr imported: 50 ms each time

    def is_alive(self) -> bool:
        """Answer, once there is a process."""
        return True

    def run(self, unit: Unit) -> UnitReport | UnitFailure:
        """Write the unit's parts."""
        return run_unit(unit, self.store, self.tokenizer)


def run_on_ray(
    units: Sequence[Unit],
    store: Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    address: str | None = None,
    report: Report = silent,
) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
    """Write units on Ray actors and yield each report as it comes.

    Uses the running Ray of this process, else the cluster at `address`, else starts a small one for the time of the
    call. A unit whose actor dies is given to a new actor, three times at most, then RuntimeError. `report` hears what is
    waited for before the first unit.
    """
    choose_token(address)  # before the import
    import ray  # here: training and a complete store never need it

    wanted = config.prepare.num_actors or (None if address else len(os.sched_getaffinity(0)))
    with running_ray(address, min(wanted or len(units), len(units)), report):
        num_actors = min(len(units), wanted or int(ray.cluster_resources().get("CPU", 1)))
        for module in local_modules():  # their functions go with the units: no other node needs the folder
            ray.cloudpickle.register_pickle_by_value(module)
        report("waiting for processes that write parts")
        yield from Dispatcher(ray, units, store, tokenizer).run(num_actors)


@contextmanager
def running_ray(address: str | None, num_cpus: int, report: Report = silent) -> Iterator[None]:
    """Use the Ray of this process, else the cluster at `address`, else a small one for the time of the block."""
    choose_token(address)
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {}
    if address is None:
        options |= {"num_cpus": num_cpus, "object_store_memory": OBJECT_STORE_BYTES}
        # Ray lets everything else on the machine go first (15), but here its work is what the caller waits for.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        start_ray(address, report, **options)
        yield
    finally:
        ray.shutdown()


def start_ray(address: str | None, report: Report = silent, **options: Any) -> None:
    """Join the cluster at an address, or start one on this machine; call `choose_token` before Ray is imported.

    Workers import nothing from the working directory of this process, and have our packages' folder as theirs. Raises ValueError for an address at which no
    cluster answers: asked before Ray is, which tries for a minute and prints what its own libraries think of it.
    RuntimeError if Ray's processes end while they start, or do not answer for a quarter of an hour.
    """
    report("starting Ray" if address is None else f"joining the Ray cluster at {address}")
    import ray

    if address is None:
        options["include_dashboard"] = False
    else:
        must_answer(address)
    package_root = str(Path(__file__).parents[3])
    job = ray.job_config.JobConfig(code_search_path=[package_root])
    try:
        # From there, because Ray puts the working directory before the packages of its workers. Without an address Ray
        # itself would join a cluster that runs here.
        with nullcontext() if address else patient_start(), chdir(package_root), _keeping_sigterm():
            ray.init(
                address=address or "local", job_config=job, log_to_driver=False, logging_level=logging.ERROR, **options
            )
    except ConnectionError as error:
        reason = str(error).strip().split("\n")[0]
        # It has answered before, so that it is there; a driver talks to it through the Ray process of its own machine.
        join = (
            f"This machine must be a node of the cluster: `ray start --address {address}` here, or run this on a node."
        )
        raise ValueError(f"--address {address}: {reason} {join} {SEND_TOKEN} {START_RAY}") from error
    except Exception as error:
        if NOT_STARTED not in str(error):  # Ray gives it no class of its own
            raise
        raise RuntimeError(
            f"Ray did not start on this machine: its node ended, or did not answer within {START_SECONDS // 60} minutes; look at "
            "/tmp/ray/session_latest/logs/raylet.err, and run the same command to continue"
        ) from error


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Give SIGTERM back the handler that it has: Ray's own prints a stack of C++."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


class Dispatcher:
    """Keeps every actor that lives busy with one unit, and replaces actors that died.

    A new actor gets work when it answers: on a cluster that lost a node it may wait for a core for ever, while the
    others do its share.
    """

    def __init__(self, ray: Any, units: Sequence[Unit], store: Path, tokenizer: Tokenizer) -> None:
        self.ray, self.store = ray, store
        self.tokenizer = ray.put(tokenizer)
        self.actor_class = ray.remote(num_cpus=1, max_restarts=0)(PartWriter)
        self.waiting = list(reversed(units))
        self.failures: dict[str, int] = {}
        self.failed_starts = 0
        self.actors: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self.running: dict[Any, tuple[Unit, Any]] = {}
        self.idle: list[Any] = []

    def run(self, num_actors: int) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
        """Start the actors, hand out units and yield reports as they come; the actors end with the iterator."""
        try:
            for _ in range(num_actors):
                self._start_actor()
            while self.waiting or self.running:
                finished = []
                for answer in self._wait():
                    if answer in self.starting:
                        self._finish_start(answer)
                    elif (done := self._finish_unit(answer)) is not None:
                        finished.append(done)
                while self.waiting and self.idle:
                    unit, actor = self.waiting.pop(), self.idle.pop()
                    self.running[actor.run.remote(unit)] = unit, actor
                yield from finished  # last: what is done with a report must not keep its actor waiting
        finally:
            for actor in self.actors:
                self.ray.kill(actor)

    def _start_actor(self) -> None:
        """Ask Ray for an actor; it gets units once `is_alive` has answered."""
        actor = self.actor_class.remote(str(self.store.absolute()), self.tokenizer)
        self.actors.append(actor)
        self.starting[actor.is_alive.remote()] = actor

    def _wait(self) -> list[Any]:
        """Wait for an answer of any actor; RuntimeError if none works and none gets a core."""
        pending = [*self.running, *self.starting]
        done, _ = self.ray.wait(pending, num_returns=1, timeout=None if self.running else NO_CORE_SECONDS)
        if not done:
            raise RuntimeError(
                f"Ray gave no core within {NO_CORE_SECONDS} seconds: {len(self.waiting)} parts wait, finished parts are kept; "
                "look at `ray status`, and run the same command to continue"
            )
        return list(done)

    def _finish_start(self, answer: Any) -> None:
        """Take a started actor into service, or start another for one that died; RuntimeError when none can start."""
        actor = self.starting.pop(answer)
        try:
            self.ray.get(answer)
        except self.ray.exceptions.RayActorError as error:
            self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"processes that write parts cannot start on the Ray cluster ({str(error).splitlines()[-1]}); its nodes need this package "
                    "and its requirements at the same versions"
                ) from error
            self._start_actor()  # its node went while it started: the next one starts elsewhere
        else:
            self.failed_starts = 0
            self.idle.append(actor)

    def _finish_unit(self, answer: Any) -> tuple[Unit, UnitReport | UnitFailure] | None:
        """Take a unit's report; None when its actor died and the unit waits again. Errors of the unit are raised."""
        unit, actor = self.running.pop(answer)
        try:
            report = self.ray.get(answer)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error  # as it was raised, without Ray's frames around it
        except self.ray.exceptions.RayActorError as error:
            self._note_failure(unit, error)
            self._start_actor()
            return None
        self.idle.append(actor)
        return unit, report

    def _note_failure(self, unit: Unit, error: Exception) -> None:
        self.failures[unit.name] = self.failures.get(unit.name, 0) + 1
        if self.failures[unit.name] >= ATTEMPTS:
            raise RuntimeError(
                f"the process that writes part {unit.name} was killed {ATTEMPTS} times ({str(error).splitlines()[0]}); its inputs are "
                f"{', '.join(sorted({item.file.shown for item in unit.segments}))}. Out of memory? Then lower "
                "data.prepare.part_bytes or num_actors; finished parts are kept"
            ) from error
        self.waiting.append(unit)
