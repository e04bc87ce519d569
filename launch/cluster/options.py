"""Options of `amfm launch` that cannot take effect with the chosen launcher, each refused with its fix."""

from __future__ import annotations

from pathlib import Path


def check_options(
    on: str,
    *,
    nodes: int,
    hosts: Path | None,
    node_rank: int | None,
    master: str | None,
    address: str | None,
    dry_run: bool,
) -> None:
    """Reject options that cannot take effect with the chosen launcher. Raises ValueError with the fix."""
    given = {"--hosts": hosts, "--node-rank": node_rank, "--master": master}
    if on != "torchrun":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} {value} belongs to --on torchrun; leave it out with --on {on}")
    if on != "ray" and address is not None:
        raise ValueError(f"--address {address} belongs to --on ray; leave it out with --on {on}")
    if hosts is not None and node_rank is not None:
        raise ValueError("--hosts starts every node and --node-rank only this one; give one of them")
    if node_rank is not None and node_rank >= nodes:
        raise ValueError(f"--node-rank {node_rank} must be less than --nodes {nodes}; count from 0")
    if on == "torchrun" and nodes > 1 and hosts is None and not dry_run and (node_rank is None or master is None):
        raise ValueError(
            f"--nodes {nodes} with torchrun needs --hosts FILE to start them all, or --node-rank and --master HOST[:PORT] "
            "to start this one; --dry-run prints the command of each node"
        )


def check_spares(spares: int, on: str, *, nodes: int, node_rank: int | None, form: str) -> None:
    """Reject spare nodes that cannot serve. Raises ValueError with the nearest number that works."""
    if spares > nodes:
        raise ValueError(f"launch.spare_nodes={spares} is more than --nodes {nodes}; lower it to {nodes} or less")
    if spares and on == "ray":
        raise ValueError(
            f"launch.spare_nodes={spares} with --on ray: every node of the Ray cluster beyond --nodes is a spare already; "
            "set it to 0"
        )
    if spares and on == "kubernetes" and form != "rayjob":
        raise ValueError(
            f"launch.spare_nodes={spares} with --form {form}: each node starts only itself; set it to 0, or use --form rayjob"
        )
    if spares and node_rank is not None:
        raise ValueError(
            f"launch.spare_nodes={spares} with --node-rank: each node starts only itself; set it to 0, or name the hosts with "
            "--hosts FILE"
        )


def check_kubernetes(on: str, form: str | None, *, dry_run: bool, doctor: bool) -> None:
    """Reject what cannot take effect with Kubernetes, or without. Raises ValueError with the fix."""
    if on != "kubernetes":
        if form is not None:
            raise ValueError(f"--form {form} belongs to --on kubernetes; leave it out with --on {on}")
        return
    if not dry_run:
        raise ValueError(
            "--on kubernetes submits nothing on its own; add --dry-run and give what it prints to kubectl apply -f -, or "
            "with --form skypilot to sky launch"
        )
    if doctor:
        raise ValueError("--doctor with --on kubernetes is not written; run amfm doctor --cluster in the pods")
