"""Verb launch: check options, then hand the run to torchrun, Slurm or Ray under supervision.

Options that cannot take effect with the chosen launcher are rejected; `--dry-run` prints exactly what would run.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from amfm.launch.arguments import ConfigArgument, JsonOption, OverridesArgument
from amfm.launch.cluster.storage import list_inputs
from amfm.launch.commands.train import summarize
from amfm.launch.console import print_json, say
from amfm.launch.rank_command import rank_command
from amfm.pretrain.launcher_protocol import DONE, RUN_FAILED, STOPPED_FAILS, last_word

if TYPE_CHECKING:
    from amfm.launch.cluster.hosts import RemoteHosts
    from amfm.launch.cluster.ray import RayCluster
    from amfm.launch.cluster.slurm import Allocation
    from amfm.pretrain.config.schema import RunConfig

DEFAULT_PORT = 29500
PLANNED_GPU = "h100"  # a dry run may happen on a machine without the cluster's GPUs


@dataclass(frozen=True)
class Work:
    """What the ranks run: an `amfm` command line; `max_restarts` is none if there is nothing to continue from."""

    arguments: list[str]
    max_restarts: int | None


def launch(
    path: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    on: Annotated[
        Literal["torchrun", "slurm", "ray", "kubernetes"], typer.Option(help="Launcher that starts the ranks.")
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks per node; default: the number of GPUs of this machine, or 1.")
    ] = None,
    doctor: Annotated[
        bool, typer.Option("--doctor", help="Check the ranks, hosts and links that the run would use; do not train.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even if a stage is predicted not to fit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, without running it.")] = False,
    hosts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="torchrun: file of hosts to start on, one per line.")
    ] = None,
    remote_shell: Annotated[
        str,
        typer.Option(
            metavar="COMMAND", help="torchrun: command that runs a line on a host, called as COMMAND HOST LINE."
        ),
    ] = "ssh -tt -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4",
    node_rank: Annotated[int | None, typer.Option(min=0, help="torchrun without --hosts: rank of this node.")] = None,
    master: Annotated[
        str | None,
        typer.Option(metavar="HOST[:PORT]", help="torchrun: rendezvous address; default with --hosts: the first host."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="ray: address of a cluster, such as auto or HOST:6379; default: start one on this machine."),
    ] = None,
    form: Annotated[
        Literal["jobset", "rayjob", "skypilot"] | None,
        typer.Option(help="kubernetes: form of the manifest that --dry-run prints; default: jobset."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `launch`."""
    from amfm.launch.cluster.launcher import check_kubernetes, check_options, check_spares

    ranks = nproc_per_node or count_gpus() or 1
    # A torchrun that each node starts on its own continues on its own, with the ranks that it has.
    goes_on = on != "torchrun" or hosts is not None or nodes == 1
    config = load_run(path, overrides or [], nodes, ranks, goes_on=goes_on)
    check_options(on, nodes=nodes, hosts=hosts, node_rank=node_rank, master=master, address=address, dry_run=dry_run)
    check_spares(config.launch.spare_nodes, on, nodes=nodes, node_rank=node_rank, form=form or "jobset")
    check_kubernetes(on, form, dry_run=dry_run, doctor=doctor)
    options = [*(overrides or []), *(["--force"] if force else [])]
    work = Work(["train", str(path), *options], config.launch.max_restarts)
    misfit = describe_misfit(config, path, nodes * ranks) if dry_run and not doctor else None
    if misfit is not None:
        say(f"amfm launch: warning: {misfit}")
    if doctor:
        work = Work(["doctor", "--cluster", "--shared", config.run.dir], None)
    if on == "torchrun":
        done = launch_torchrun(
            config, work, nodes, ranks, hosts, shlex.split(remote_shell), node_rank, master, dry_run=dry_run
        )
    elif on == "kubernetes":
        done = show_manifest(config, [str(path), *options], form or "jobset", nodes, ranks)
    elif on == "slurm":
        sizes = ["--nodes", str(nodes), "--nproc-per-node", str(ranks), *(["--doctor"] if doctor else [])]
        if config.launch.slurm.container_image is not None:  # whose working directory may be another
            absolute = [str(path.absolute()) if word == str(path) else word for word in work.arguments]
            work = replace(work, arguments=absolute)
        done = launch_slurm(
            config, work, ["launch", str(path), *options, "--on", on, *sizes], nodes, ranks, dry_run=dry_run
        )
    else:
        done = launch_ray(config, work, nodes, ranks, address, dry_run=dry_run)
    if isinstance(done, int):
        raise typer.Exit(finish(done, on, config.run.dir, as_json=as_json, has_run=not doctor))
    if as_json:
        print_json({"launcher": on, "nodes": nodes, "ranks_per_node": ranks, "warning": misfit, **done.facts})
    else:
        sys.stdout.write(done.text)


def load_run(path: Path, overrides: list[str], nodes: int, ranks: int, *, goes_on: bool) -> RunConfig:
    """Read and check a configuration for all ranks; if the run `goes_on` with fewer nodes, for the fewest of them too."""
    from amfm.pretrain.checks.load import load_checked

    numbers = range(nodes * ranks, 0, -ranks) if goes_on else [nodes * ranks]
    config = load_checked(path, overrides, world_size=numbers, resumes=True)
    if goes_on and config.launch.min_nodes > 1:
        from amfm.pretrain.checks.check_run import check_run

        check_run(config, numbers[: nodes + 1 - min(nodes, config.launch.min_nodes)])
    return config


def finish(code: int, on: str, run_dir: str, *, as_json: bool, has_run: bool) -> int:
    """Report how a run ended; returns the exit code, that of a failure if a signal stopped it and its caller asked for that."""
    if code == DONE and STOPPED_FAILS in os.environ and last_word(Path(run_dir)) == "signal":
        say("amfm launch: a signal stopped the run before its last step")
        code = RUN_FAILED
    if as_json:
        has_begun = has_run and (Path(run_dir) / "config.yaml").is_file()
        progress = summarize(run_dir) if has_begun else {}
        print_json({"launcher": on, "exit_code": code, **progress})
    return code


@dataclass(frozen=True)
class Shown:
    """What a dry run, or a submission, shows: text for a person, and the same by name for a script."""

    text: str
    facts: dict[str, Any]


def show_commands(commands: list[list[str]], before: str = "") -> Shown:
    """Command lines of a dry run, quoted for a shell."""
    lines = [shlex.join(command) for command in commands]
    return Shown("".join(f"{line}\n" for line in [*([before] if before else []), *lines]), {"commands": lines})


def describe_misfit(config: RunConfig, path: Path, ranks: int) -> str | None:
    """Describe how the run, by the plan, needs more memory than an accelerator has; None if it fits."""
    from amfm.launch.plan.estimate import Assumptions
    from amfm.launch.plan.hardware import load_hardware
    from amfm.launch.plan.plan import advise, make_plan

    if config.parallel.offload_optimizer:
        return None  # not modelled
    hardware = load_hardware(PLANNED_GPU)
    advice = advise(make_plan(config, hardware, ranks, Assumptions()))
    if not advice:
        return None
    return (
        f"on {ranks} x {hardware.name}, {advice}; see amfm plan {shlex.quote(str(path))} --gpus {ranks} "
        f"--gpu {PLANNED_GPU} --search, for other GPUs with their --gpu"
    )


def count_gpus() -> int:
    """Number of CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def run_attempts(
    config: RunConfig, work: Work, cluster: RemoteHosts | Allocation | RayCluster, nodes: int, ranks: int
) -> int:
    """Run once if there is no checkpoint to resume (the doctor), else under supervision; returns the exit code."""
    from amfm.launch.cluster.launcher import launching
    from amfm.launch.cluster.supervise import start_once, supervise

    if work.max_restarts is None:
        return start_once(cluster.start, nodes)
    with launching(config):
        return supervise(config, cluster.start, nodes=nodes, ranks_per_node=ranks, usable_nodes=cluster.usable_nodes)


def launch_torchrun(
    config: RunConfig,
    work: Work,
    nodes: int,
    ranks: int,
    hosts: Path | None,
    remote_shell: list[str],
    node_rank: int | None,
    master: str | None,
    *,
    dry_run: bool,
) -> int | Shown:
    """Launch on all hosts of a list, or only on this machine, under supervision; or run this node's part of several.

    What is one part of several, torchrun itself restarts. Returns the exit code, or what a dry run shows. Raises ValueError for a bad port and for too few hosts.
    """
    from amfm.launch.cluster.hosts import HERE, RemoteHosts, read_hosts
    from amfm.launch.cluster.lines import check_variables, with_variables
    from amfm.launch.cluster.local import run_here, torchrun_command
    from amfm.pretrain.stages import fresh_starts

    environment = check_variables(config.launch.environment)
    host, _, port = (master or "").partition(":")
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            f"--master {master} must be HOST or HOST:PORT with a number from 1 to 65535; use {host}:{DEFAULT_PORT}"
        )
    number = int(port or DEFAULT_PORT)
    if hosts is not None or (nodes == 1 and not dry_run):
        names = [host or "localhost"] if hosts is None else read_hosts(hosts)
        spares = config.launch.spare_nodes
        if len(names) < nodes + spares:
            counted = f"--nodes {nodes}" + (f" and launch.spare_nodes={spares}" if spares else "")
            raise ValueError(
                f"{counted} and {hosts or 'this machine'} names {len(names)} hosts; add hosts, or lower "
                + (f"launch.spare_nodes to {len(names) - nodes}" if len(names) >= nodes else "--nodes")
            )
        remote = RemoteHosts(
            work.arguments,
            names,
            nodes=nodes,
            ranks_per_node=ranks,
            port=number if port else None,
            run_dir=config.run.dir,
            setup=None if hosts is None else config.launch.setup,
            remote_shell=HERE if hosts is None else remote_shell,
            environment=environment,
            spares=spares,
            warm_restarts=config.launch.warm_restarts,
            inputs=list_inputs(config),
        )
        if dry_run:
            return show_commands(remote.commands())
        try:
            return run_attempts(config, work, remote, nodes, ranks)
        finally:
            remote.close()
    # torchrun counts a start in another layout, or without guides, as a restart too.
    restarts = 0 if nodes == 1 or work.max_restarts is None else work.max_restarts + len(fresh_starts(config))
    commands = [
        torchrun_command(
            work.arguments,
            nodes=nodes,
            ranks_per_node=ranks,
            node_rank=node_number,
            master=host or "localhost",
            port=number,
            max_restarts=restarts,
        )
        for node_number in (range(nodes) if node_rank is None else [node_rank])
    ]
    if dry_run:
        return show_commands([with_variables(environment, command) for command in commands])
    assert node_rank is not None, "without it only a dry run has several nodes"
    return run_here(commands[0], environment, node_rank=node_rank, master=host, port=number)


def show_manifest(
    config: RunConfig, arguments: list[str], form: Literal["jobset", "rayjob", "skypilot"], nodes: int, ranks: int
) -> Shown:
    """What a dry run for Kubernetes shows; GPUs are asked for unless the planned cluster has none (launch.slurm.gpus)."""
    from amfm.launch.cluster.kubernetes import write_manifest

    gpus = config.launch.slurm.gpus
    text = write_manifest(form, config, arguments, nodes=nodes, ranks_per_node=ranks, gpus=gpus)
    return Shown(text, {"manifest": text, "form": form})


def launch_slurm(
    config: RunConfig,
    work: Work,
    script_arguments: list[str],
    nodes: int,
    ranks: int,
    *,
    name: str = "job",
    dry_run: bool,
) -> int | Shown:
    """Submit a batch script, or run attempts with srun inside an allocation; returns the exit code, or what is shown.

    script_arguments: the command line that the script runs; name: of its file in the run directory.
    """
    from amfm.launch.cluster.launcher import queue_rest
    from amfm.launch.cluster.slurm import Allocation, is_inside_allocation, submit, write_script
    from amfm.pretrain.monitor.signals import note_signals

    if dry_run or not is_inside_allocation():
        script = write_script(config, script_arguments, work.arguments, nodes=nodes, ranks_per_node=ranks)
        if dry_run:
            return Shown(script, {"script": script})
        answer = submit(config, script, name)
        return Shown(f"{answer}\n", {"submitted": answer, "job": answer.split()[-1]})
    note_signals()  # those that come before there are ranks, or between two attempts
    allocation = Allocation(config, work.arguments, ranks_per_node=ranks)
    try:
        code = run_attempts(config, work, allocation, nodes, ranks)
    finally:
        allocation.watch.close()
    return code if work.max_restarts is None else queue_rest(config, allocation, code)


def launch_ray(
    config: RunConfig, work: Work, nodes: int, ranks: int, address: str | None, *, dry_run: bool
) -> int | Shown:
    """Run ranks as actors of a Ray cluster, under supervision. Returns the exit code, or what a dry run shows."""
    from amfm.launch.cluster.lines import check_variables, with_variables

    environment = check_variables(config.launch.environment)
    gpus = count_gpus() > 0
    if dry_run:
        what = (
            f"ray cluster {address or 'on this machine'}: {nodes} bundles of "
            f"{{'{'GPU' if gpus else 'CPU'}': {ranks}}} on {nodes} nodes (STRICT_SPREAD), one actor a rank, each runs:"
        )
        return show_commands([with_variables(environment, rank_command(work.arguments))], what)
    from amfm.data_pipeline.prepare.ray_actors import choose_token

    choose_token(address)
    from amfm.launch.cluster.ray import RayCluster

    cluster = RayCluster(
        work.arguments,
        address=address,
        run_dir=config.run.dir,
        ranks_per_node=ranks,
        gpus=gpus,
        wait_seconds=config.launch.node_wait_seconds,
        environment=environment,
        inputs=list_inputs(config),
    )
    return run_attempts(config, work, cluster, nodes, ranks)


def add_verbs(app: typer.Typer) -> None:
    """Register the verb of this file."""
    app.command(
        epilog="Example: amfm launch configs/granite4_h_small.yaml --on slurm --nodes 16 --nproc-per-node 8 --dry-run"
    )(launch)
