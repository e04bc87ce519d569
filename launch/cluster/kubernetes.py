"""What a Kubernetes cluster, or a SkyPilot task, needs to run a launch: a JobSet, a KubeRay RayJob or a task, as YAML.

amfm writes and submits nothing there: `amfm launch --on kubernetes --dry-run` prints the text, for `kubectl apply -f -` or `sky launch`.
A JobSet starts one pod per node, each of which runs its own torchrun; a RayJob brings up a Ray cluster and runs `amfm launch --on ray`
on it, which supervises, also with fewer nodes. All pods mount one claim, which holds configuration, store and run directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from amfm.launch.cluster.lines import check_variables, plain
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import BAD_INPUT, STOPPED_FAILS

Form = Literal["jobset", "rayjob", "skypilot"]
PORT = 29500
NODE = "node"  # the JobSet's replicated job, in the host names of its pods
MAX_NAME = 40  # of a run, in names of at most 63 characters
MASTER_OF_TASK = '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"'


def write_manifest(
    form: Form, config: RunConfig, arguments: Sequence[str], *, nodes: int, ranks_per_node: int, gpus: bool
) -> str:
    """The text of a manifest. `arguments`: configuration and overrides of `amfm launch`, as paths of the pods.

    Raises ValueError if a setting is missing that no default can stand for.
    """
    if config.launch.kubernetes.image is None:
        raise ValueError(
            "launch.kubernetes.image is not set, and pods run from an image; build one of the Dockerfile and name it, such as "
            "launch.kubernetes.image=registry.example.com/amfm:1"
        )
    write = {"jobset": make_jobset, "rayjob": make_rayjob, "skypilot": make_task}[form]
    made = write(config, list(arguments), nodes, ranks_per_node, gpus)
    return yaml.safe_dump(made, sort_keys=False, width=1000)


def name_of(config: RunConfig) -> str:
    """The run's name as Kubernetes allows it: lower case letters, digits and hyphens; a changed one with digits of the run's own."""
    text = config.run.name or PurePosixPath(config.run.dir).name
    name = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_NAME].strip("-") or "amfm"
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def shell(config: RunConfig, command: Sequence[str], raw: str = "") -> list[str]:
    """A container's command: setup, if there is one, then amfm in the process's place. `raw`: options with variables of the pod."""
    words = shlex.join(["amfm", *command]) + (f" {raw}" if raw else "")
    steps = [*([config.launch.setup] if config.launch.setup else []), f"exec {words}"]
    return ["bash", "-c", " && ".join(steps)]


def pod_of(config: RunConfig, container: dict[str, Any], ranks: int, *, gpus: bool) -> dict[str, Any]:
    """The specification of a pod that has a node's GPUs, the claim, and enough shared memory: 64 MB are the default."""
    settings = config.launch.kubernetes
    variables = check_variables(config.launch.environment)
    env = [*container.get("env", []), *({"name": name, "value": text} for name, text in variables.items())]
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}}
    ]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if settings.claim is not None:
        claim = plain(settings.claim, "launch.kubernetes.claim")
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "storage", "mountPath": plain(settings.mount, "launch.kubernetes.mount")})
    return {
        "containers": [
            {
                "image": plain(str(settings.image), "launch.kubernetes.image"),
                "workingDir": settings.mount,
                **container,
                **({"env": env} if env else {}),
                **({"resources": {"limits": {"nvidia.com/gpu": ranks}}} if gpus else {}),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def metadata_of(config: RunConfig) -> dict[str, Any]:
    """Name and, where one is set, namespace."""
    namespace = config.launch.kubernetes.namespace
    return {"name": name_of(config)} | ({"namespace": namespace} if namespace else {})


def make_jobset(config: RunConfig, arguments: list[str], nodes: int, ranks: int, gpus: bool) -> dict[str, Any]:
    """A JobSet: one indexed job of a pod per node, on a node each; a pod that fails starts all of them again."""
    name = name_of(config)
    master = f"{name}-{NODE}-0-0.{name}:{PORT}"
    command = ["launch", *arguments, "--on", "torchrun", "--nodes", str(nodes), "--nproc-per-node", str(ranks)]
    words = [*command, "--master", master]
    container = {
        "name": "amfm",
        "command": shell(config, words, '--node-rank "$JOB_COMPLETION_INDEX"' if nodes > 1 else ""),
        "ports": [{"containerPort": PORT}],
    }
    pod = pod_of(config, container | {"env": [{"name": STOPPED_FAILS, "value": "1"}]}, ranks, gpus=gpus) | {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.launch.kubernetes.grace_seconds,
    }
    spread = {
        "podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {
                    "labelSelector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": name}},
                    "topologyKey": "kubernetes.io/hostname",
                }
            ]
        }
    }
    job = {
        "parallelism": nodes,
        "completions": nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # Input that was rejected would be rejected again.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "amfm", "operator": "In", "values": [BAD_INPUT]}}
            ]
        },
        "template": {"spec": pod | {"affinity": spread}},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata_of(config),
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": config.launch.max_restarts,
                "rules": [{"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": job}}],
        },
    }


def make_rayjob(config: RunConfig, arguments: list[str], nodes: int, ranks: int, gpus: bool) -> dict[str, Any]:
    """A RayJob: a head without GPUs, a worker per node and spare, and `amfm launch --on ray` as its entry point."""
    workers = nodes + config.launch.spare_nodes
    # On Ray every further node is a spare, which the setting may not name twice.
    words = ["launch", *arguments, "launch.spare_nodes=0", "--on", "ray", "--address", "auto"]
    words += ["--nodes", str(nodes), "--nproc-per-node", str(ranks)]
    resources = {} if gpus else {"num-cpus": str(ranks)}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata_of(config),
        "spec": {
            "entrypoint": f"cd {shlex.quote(config.launch.kubernetes.mount)} && {shlex.join(shell(config, words))}",
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": importlib.metadata.version("ray"),
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": {"spec": pod_of(config, {"name": "ray-head"}, ranks, gpus=False)},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": NODE,
                        "replicas": workers,
                        "minReplicas": workers,
                        "maxReplicas": workers,
                        "rayStartParams": resources,
                        "template": {"spec": pod_of(config, {"name": "ray-worker"}, ranks, gpus=gpus)},
                    }
                ],
            },
        },
    }


def make_task(config: RunConfig, arguments: list[str], nodes: int, ranks: int, gpus: bool) -> dict[str, Any]:
    """A SkyPilot task: as many nodes with this many GPUs, and each node's own torchrun."""
    settings = config.launch.kubernetes
    command = ["launch", *arguments, "--on", "torchrun", "--nodes", str(nodes), "--nproc-per-node", str(ranks)]
    raw = f'--node-rank "$SKYPILOT_NODE_RANK" --master {MASTER_OF_TASK}:{PORT}' if nodes > 1 else ""
    resources: dict[str, Any] = {"image_id": f"docker:{settings.image}"}
    if gpus:
        resources["accelerators"] = f"{settings.accelerator}:{ranks}"
    task: dict[str, Any] = {"name": name_of(config), "num_nodes": nodes, "resources": resources}
    if settings.bucket is not None:
        task["file_mounts"] = {settings.mount: {"source": settings.bucket, "mode": "MOUNT"}}
    if config.launch.environment:
        task["envs"] = check_variables(config.launch.environment)
    task["run"] = f"cd {shlex.quote(settings.mount)} && {shell(config, command, raw)[2]}\n"
    return task
