"""Launch on Ray: one actor per rank in a placement group of whole nodes; the actor starts the rank and waits for it.

How it works: a STRICT_SPREAD placement group reserves one bundle per node. The first actor of each node checks it
(node_check.py); who fails is excluded, and the group is placed again on others. Each actor starts its rank as a
separate process, so that a rank that crashes leaves an actor to report its exit code. Ray reports lost nodes;
`supervise.py` decides about another attempt. The ranks of a node write to a log file in the run directory, which all nodes
share; rank 0's lines are shown here.

The head of a Ray cluster: without it Ray ends every program of the cluster after a minute, by exit codes of its own.

So the launcher looks whether the head answers, and ends before that, with a code and words that say what to do.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from amfm.data_pipeline.prepare.ray_actors import start_ray
from amfm.launch.cluster.links import find_port
from amfm.launch.cluster.node_check import ExcludedNodes, blame, make_request, read_answers
from amfm.launch.cluster.node_logs import Follower, copy_labelled, last_words, node_log
from amfm.launch.cluster.supervise import Attempt, Outcome, forward_to_ranks
from amfm.launch.console import say
from amfm.launch.rank_command import isolated_python, rank_command, rank_variables
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, GOES_ON, LAUNCHER_PID, RESTART_CAUSE, RUN_FAILED

LOOK_SECONDS = 2.0
LOST_SECONDS = 30.0  # of the 60 after which Ray ends this program


class RayHead:
    """Whether the head of the cluster that this program is connected to answers."""

    def __init__(self) -> None:
        self.address = str(ray.get_runtime_context().gcs_address)
        self.looked = self.heard = time.monotonic()

    def answers(self) -> bool:
        """Whether it answers now."""
        host, _, port = self.address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_SECONDS):
                return True
        except OSError:
            return False

    def poll(self) -> None:
        """Look now and then; ends this program where the head has not answered for LOST_SECONDS.

        At once, since Ray's own clean-up would wait for the head, and end the program by another code.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        if self.answers():
            self.heard = time.monotonic()
        elif now - self.heard > LOST_SECONDS:
            say(
                f"amfm launch: the head of the Ray cluster at {self.address} does not answer; start it, and give the same command"
            )
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(RUN_FAILED)


POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0
PLACEMENT_SECONDS = 60.0
LAST_LINES_SECONDS = 5.0  # for what a rank left behind and that holds its output open
READY_SECONDS = 600.0  # for Ray to start the actors' processes, which load from storage that all nodes ask at once
CHECK_SECONDS = 120.0


class Place(NamedTuple):
    """Where an actor is: Ray's number of the node, host, address in the cluster, two free ports, the GPUs it may use."""

    node: str
    host: str
    address: str
    port: int
    check_port: int
    gpus: str


class RankHost:
    """Ray actor that owns the process of one rank; the rank ends when the actor does (LAUNCHER_PID)."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def describe(self) -> Place:
        """Where this actor is."""
        node, gpus = ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Place(node, socket.gethostname(), ray.util.get_node_ip_address(), find_port(), find_port(), gpus)

    def check(self, request: str, gpus: str) -> list[str]:
        """What is wrong with this node and these GPUs, found in a process that holds nothing of them afterwards."""
        done = subprocess.run(
            [*isolated_python(), "-m", "amfm.launch.cluster.node_check", request],
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = [answer["faults"] for answer in read_answers(done.stdout) if "faults" in answer]
        last_line = done.stderr.strip().splitlines()[-1:]
        return found[0] if found else [": ".join([f"its check ended with code {done.returncode}", *last_line])]

    def run(
        self, command: list[str], variables: dict[str, str], directory: str, log: str, rank: int | None = None
    ) -> int:
        """Start the process with its output appended to `log`, wait for it, and return its exit code.

        `rank`: the log is its node's, and each line begins with this number; None if no other process writes there.
        """
        path = Path(directory, log)
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **variables, LAUNCHER_PID: str(os.getpid())}
        # Unbuffered: the ranks of a node append whole lines to one file.
        with open(
            path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)
        ) as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output if rank is None else subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            if rank is None:
                return self.process.wait()
            copying = threading.Thread(target=copy_labelled, args=(rank, self.process.stdout, output), daemon=True)
            copying.start()
            code = self.process.wait()
            copying.join(LAST_LINES_SECONDS)
        return code

    def signal(self, number: int) -> None:
        """Forward a signal to the rank, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


class RayCluster:
    """Runs attempts of a training run on the nodes of a Ray cluster, one at a time."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        address: str | None,
        run_dir: str,
        ranks_per_node: int,
        gpus: bool,
        wait_seconds: float,
        environment: Mapping[str, str] = {},
        inputs: Mapping[str, str] = {},
    ) -> None:
        self.command = rank_command(arguments)
        self.run_dir, self.ranks_per_node, self.wait_seconds = run_dir, ranks_per_node, wait_seconds
        self.need = {"GPU" if gpus else "CPU": float(ranks_per_node)}
        self.environment, self.inputs = dict(environment), inputs
        self.actors: list[Any] = []
        self.running: set[str] = set()  # Ray's numbers of the nodes that had ranks last
        self.excluded = ExcludedNodes(Path(run_dir))
        if not ray.is_initialized():
            start_ray(address)
        self.head = RayHead()

    def usable_nodes(self) -> int:
        """Number of live nodes whose total resources hold a node's ranks, and which are not excluded."""
        nodes = ray.nodes()
        for node in nodes:
            if not node["Alive"] and node["NodeID"] in self.running:
                self.running.remove(node["NodeID"])
                self.excluded.lose(node["NodeName"])
        alive = [node for node in nodes if node["Alive"] and node["NodeName"] not in self.excluded.reasons]
        return sum(all(node["Resources"].get(name, 0) >= count for name, count in self.need.items()) for node in alive)

    def start(self, attempt: Attempt) -> Outcome:
        """Run one attempt to its end; the first rank that fails, or whose node is lost, ends it for all.

        Actors and the placement group are released whatever happens.
        """
        avoided = [node["NodeID"] for node in ray.nodes() if node["NodeName"] in self.excluded.reasons]
        selectors = [{"ray.io/node-id": f"!in({','.join(avoided)})"}] * attempt.nodes if avoided else None
        group = placement_group([self.need] * attempt.nodes, strategy="STRICT_SPREAD", bundle_label_selector=selectors)
        try:
            if not self._is_placed(group, attempt.nodes):
                usable = self.usable_nodes()
                cause = f"no {attempt.nodes} nodes with {self.need} free; {usable} are alive and large enough"
                return Outcome(RUN_FAILED, cause, began=usable >= attempt.nodes)
            return self._run_ranks(attempt, group)
        except RayError as error:
            return Outcome(RUN_FAILED, first_line(error))
        finally:
            while not self.head.answers():  # or these would wait for it, and raise
                self.head.poll()
                time.sleep(POLL_SECONDS)
            for actor in self.actors:
                ray.kill(actor)
            remove_placement_group(group)
            self.actors = []

    def _is_placed(self, group: Any, nodes: int) -> bool:
        """Wait until the group has its nodes; False when that takes too long, or too few are left to hope for.

        Ray frees what the attempt before held in the background, and may notice only now that a node is lost.
        """
        deadline = time.monotonic() + max(PLACEMENT_SECONDS, self.wait_seconds)
        while time.monotonic() < deadline:
            if group.wait(timeout_seconds=1):
                return True
            if self.usable_nodes() < nodes:
                return False
        return False

    def _run_ranks(self, attempt: Attempt, group: Any) -> Outcome:
        """Create the actors, tell every rank where rank 0 is, start all ranks and wait."""
        host_class = ray.remote(max_concurrency=3, max_restarts=0)(RankHost)
        resource = {"num_gpus": 1, "num_cpus": 0} if "GPU" in self.need else {"num_cpus": 1}
        num_ranks = attempt.nodes * self.ranks_per_node
        self.actors = [
            host_class.options(
                **resource,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank // self.ranks_per_node
                ),
            ).remote()
            for rank in range(num_ranks)
        ]
        references = [actor.describe.remote() for actor in self.actors]
        _, late = ray.wait(references, num_returns=num_ranks, timeout=READY_SECONDS)
        if late:
            return Outcome(RUN_FAILED, f"{len(late)} of {num_ranks} actors did not start within {READY_SECONDS:.0f} s")
        places: list[Place] = ray.get(references)
        if failed := self._check(places):
            return Outcome(RUN_FAILED, f"{', '.join(failed)} did not pass the check", began=False)
        self.running = {place.node for place in places}
        nodes = [rank // self.ranks_per_node for rank in range(num_ranks)]
        logs = [str(node_log(self.run_dir, attempt.number, node)) for node in nodes]
        running = {
            actor.run.remote(self.command, self._variables(attempt, rank, places), os.getcwd(), logs[rank], rank): rank
            for rank, actor in enumerate(self.actors)
        }
        with forward_to_ranks(self._forward) as interrupt:
            ended = self._wait(running, [place.host for place in places], logs)
        return interrupt.outcome(ended)

    def _check(self, places: Sequence[Place]) -> list[str]:
        """Check all nodes at once, and their links to the first; returns the names of those that fail, which are excluded."""
        request = make_request(Path(self.run_dir), self.ranks_per_node, inputs=self.inputs, reloads=True)
        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
        waiting = {}
        for rank in range(0, len(places), self.ranks_per_node):
            link: dict[str, Any] = {"connect": [places[0].address, [places[0].check_port]]}
            if rank == 0:
                link = {"ports": [places[0].check_port], "expect": len(places) // self.ranks_per_node - 1}
            gpus = ",".join(place.gpus for place in places[rank : rank + self.ranks_per_node] if place.gpus)
            check = self.actors[rank].check.remote(json.dumps(request | {"link": link}), gpus)
            waiting[check] = names[places[rank].node]
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=CHECK_SECONDS)
        late = [f"it did not answer the check within {CHECK_SECONDS:.0f} s"]
        faults = {name: ray.get(check) if check in done else late for check, name in waiting.items()}
        failed = {
            name: texts for name, texts in blame(faults, names[places[0].node], Path(self.run_dir)).items() if texts
        }
        for name, texts in failed.items():
            self.excluded.exclude(name, "; ".join(texts))
        return list(failed)

    def _variables(self, attempt: Attempt, rank: int, places: Sequence[Place]) -> dict[str, str]:
        """torchrun's variables for a rank; all ranks meet at rank 0's address and free port."""
        variables = rank_variables(rank, len(places), self.ranks_per_node, places[0].address, places[0].port)
        if "GPU" in self.need:
            # Ray shows each actor its own GPU, which is then number 0.
            variables["LOCAL_RANK"] = "0"
        return self.environment | variables | {GOES_ON: "1"} | ({RESTART_CAUSE: attempt.cause} if attempt.cause else {})

    def _forward(self, number: int) -> None:
        """Forward a signal to every rank through its actor, which runs several calls at a time for this."""
        for actor in self.actors:
            actor.signal.remote(number)

    def _wait(self, running: dict[Any, int], hosts: Sequence[str], logs: Sequence[str]) -> Outcome:
        """Collect exit codes until all ranks ended; after a first failure the others get `GRACE_SECONDS`.

        The cause is that of the first failure seen. BAD_INPUT of any rank decides the code, since another attempt is
        rejected too.
        """
        shown, codes = Follower(Path(logs[0])), []
        failed: Outcome | None = None
        deadline: float | None = None
        while running and (deadline is None or time.monotonic() < deadline):
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            shown.show()
            self.head.poll()
            for reference in done:
                rank = running.pop(reference)
                place = f"rank {rank} on {hosts[rank]}"
                try:
                    codes.append(ray.get(reference))
                except RayError as error:
                    codes.append(RUN_FAILED)
                    failed = failed or Outcome(RUN_FAILED, f"{place} was lost: {first_line(error)}")
                if codes[-1] != DONE and failed is None:
                    failed = Outcome(codes[-1], f"{place}: {last_words(Path(logs[rank]), codes[-1], rank=rank)}")
            if failed is not None and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
        shown.show()
        if failed is None:
            return Outcome(DONE)
        return Outcome(BAD_INPUT if BAD_INPUT in codes else RUN_FAILED, failed.cause)


def first_line(error: RayError) -> str:
    """First line of a Ray error, without the advice that follows."""
    return str(error).strip().splitlines()[0]
