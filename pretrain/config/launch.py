"""Settings of `amfm launch`: how a run is kept continuing many nodes, and what goes into a batch script of Slurm."""

from __future__ import annotations

from pydantic import Field

from amfm.model.config.section import Section


class SlurmConfig(Section):
    """What goes into the batch script of `amfm launch --on slurm`."""

    partition: str | None = Field(None, description="Partition; null: the cluster's default.")
    account: str | None = Field(None, description="Account that is billed.")
    qos: str | None = Field(None, description="Quality of service.")
    time_limit: str | int | None = Field(
        None, description="Longest time of one job, as Slurm writes it: minutes, or 1-12:00:00."
    )
    gpus: bool = Field(True, description="Ask for one GPU per rank; false on clusters without GPUs.")
    cpus_per_task: int | None = Field(
        None, gt=0, description="Cores per rank, for the job and for srun; null: the cluster's default."
    )
    cpu_bind: str | None = Field(
        None,
        description="How srun binds a rank to cores (--cpu-bind): `cores`, or `rank_ldom` for those of one NUMA node each; "
        "none: the cluster's default.",
    )
    memory: str | int | None = Field(
        None,
        description="Memory per node, as Slurm writes it: megabytes, or 500G (0: all); null: the cluster's default, which is often small.",
    )
    modules: tuple[str, ...] = Field((), description="Loaded with `module load` before anything else runs.")
    signal_seconds: int = Field(
        180,
        gt=0,
        le=65535,
        description="Ranks save and stop this long before the time limit; then the job is requeued.",
    )
    requeue: bool = Field(True, description="Queue the job again after preemption, node failure and the time limit.")
    container_image: str | None = Field(None, description="Image for srun (pyxis: --container-image).")
    container_mounts: str | None = Field(
        None, description="Mounts for srun (pyxis: --container-mounts); the working directory must be among them."
    )
    container_python: str = Field("python3", description="Python of the image that has amfm, for container_image.")
    extra: tuple[str, ...] = Field((), description="Other #SBATCH options, such as --constraint=h100.")


class KubernetesConfig(Section):
    """What goes into the manifests of `amfm launch --on kubernetes --dry-run`."""

    image: str | None = Field(None, description="Image of the pods, with amfm in it, as the Dockerfile builds it.")
    namespace: str | None = Field(None, description="Namespace; null: that of kubectl's context.")
    claim: str | None = Field(
        None, description="PersistentVolumeClaim (ReadWriteMany) that holds configuration, store and run.dir."
    )
    mount: str = Field("/shared", description="Where the shared storage is in each pod; also the working directory.")
    shared_memory: str = Field("64Gi", description="Size of /dev/shm in each pod, whose default of 64 MB is too small.")
    grace_seconds: int = Field(
        300,
        gt=0,
        description="Time of a JobSet's pods to save after SIGTERM, as at a drain; Kubernetes' own default is 30.",
    )
    accelerator: str = Field("H100", description="GPU of a SkyPilot task, by SkyPilot's name.")
    bucket: str | None = Field(None, description="Bucket that a SkyPilot task mounts there, such as s3://BUCKET.")


class LaunchConfig(Section):
    """How `amfm launch` keeps a run alive on many nodes."""

    heartbeat_seconds: float | None = Field(
        900.0,
        gt=0,
        description="A rank that stays in one phase of a step for longer ends the attempt and prints the ranks that it waits for; null: only collectives time out.",
    )
    max_restarts: int = Field(
        3, ge=0, description="Restarts after failures without a newer checkpoint; attempts that wrote one do not count."
    )
    min_nodes: int = Field(
        1, gt=0, description="Fewest nodes to continue with when some are lost; the global batch stays the same."
    )
    node_wait_seconds: float = Field(
        60.0, ge=0, description="How long a new start waits for lost nodes before it continues with fewer."
    )
    storage_wait_seconds: float = Field(
        600.0,
        ge=0,
        description="How long a launcher waits for shared storage that is full, read-only, stale or away, before it ends with code 3.",
    )
    spare_nodes: int = Field(
        0,
        ge=0,
        description="Nodes beyond those of the run that wait, with everything loaded, to replace one that is lost.",
    )
    warm_restarts: bool = Field(
        True,
        description="A server on each host of --on torchrun keeps Python and libraries loaded between attempts; false: each attempt loads them again.",
    )
    notify: str | None = Field(
        None,
        pattern=r"^(https?://.+|\$[A-Za-z_][A-Za-z0-9_]*)$",
        description="URL that gets JSON by POST when ranks are lost or restarted, a step spikes, nothing moves, or the run ends (Slack's webhooks get a text); `$NAME`: held by that variable, so that it is not recorded.",
    )
    setup: str | None = Field(
        None, description="Shell line on every node before the ranks start, such as `source env/bin/activate`."
    )
    environment: dict[str, str] = Field(
        {},
        description="Variables of every rank, such as {NCCL_SOCKET_IFNAME: ib0}; recorded with the run, so no secrets (those: setup).",
    )
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()
