"""The sections `train` and `launch`: steps, batch, precision, checkpoints and what is watched, and how a run is kept running."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amfm.model.config.section import Section

PREFIX = "amfm "  # of every range of ours in a trace of `train.profile`


class BatchRampConfig(Section):
    """A global batch that grows in equal shares of the first steps (as the batch ramp of GPT-3, arXiv 2005.14165)."""

    start_size: int = Field(gt=0, description="Sequences of the first step.")
    increment: int = Field(gt=0, description="Sequences added each time; must lead exactly to the global batch.")
    steps: int = Field(gt=0, description="Steps after which the batch has its full size.")


class ProfileConfig(Section):
    """Steps to trace: what each operation took, by block (docs/debugging.md, `amfm profile`). They take longer than others."""

    steps: tuple[int, ...] = Field(
        min_length=1, description="Steps to trace, from 1; not the first ones, which warm up."
    )
    ranks: tuple[int, ...] = Field((0,), min_length=1, description="Ranks that write a trace.")
    memory: bool = Field(
        False, description="Also each allocation; on CUDA a snapshot for PyTorch's memory viewer, next to the trace."
    )


class TrainConfig(Section):
    """The loop."""

    steps: int | None = Field(
        None, gt=0, le=10**12, description="Optimizer steps of the whole run; null: as in `stages`."
    )
    stop_after_steps: int | None = Field(
        None, gt=0, description="Save and exit (code 0) when this step is done; the schedule still spans `steps`."
    )
    stop_after_minutes: float | None = Field(
        None, gt=0, description="Save and exit (code 0) at the end of the step after this many minutes of a start."
    )
    sequence_length: int = Field(gt=0, description="Tokens per sequence.")
    micro_batch_size: int = Field(gt=0, description="Sequences per forward pass and rank.")
    global_batch_size: int = Field(gt=0, description="Sequences per optimizer step, over all ranks.")
    batch_ramp: BatchRampConfig | None = Field(
        None, description="Start with smaller batches; null: full from the start."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of weights, data order and every other random draw.")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "bf16",
        description="Of weights and activations; master weights and moments are float32 always. auto: bf16 on a GPU, on a CPU the faster by a measurement at the first start; a resume keeps it.",
    )
    checkpoint_every_steps: int | None = Field(
        None, gt=0, description="Save every N steps; null: only at the end and on signals."
    )
    checkpoint_in_background: bool = Field(
        True, description="Steps wait for a copy in memory only while a thread writes; false: until it is on the disk."
    )
    keep_last: int = Field(
        3, ge=2, description="Complete checkpoints kept; 2 at least, so that a damaged one has a predecessor."
    )
    checkpoint_store: str | None = Field(
        None,
        description="URL (s3://, gs://, az://) that gets a copy of each checkpoint, keep_last of them; a start fetches missing checkpoints from there. null: only run.dir.",
    )
    resume_step: int | None = Field(
        None,
        gt=0,
        description="Go back to the checkpoint of this step, once: later ones are set aside, here and in checkpoint_store, as by amfm rollback. none: continue from the newest.",
    )
    keep_every_steps: int | None = Field(
        None,
        gt=0,
        description="Mark the checkpoints of every N steps: they are never pruned, in addition to keep_last; null: marked by hand only.",
    )
    replica_every_steps: int | None = Field(
        None, gt=0, description="Steps without a checkpoint after which the memory of two nodes gets one; null: never."
    )
    replica_folder: str = Field("/dev/shm", description="Folder in each node's memory for replica_every_steps.")
    validate_every_steps: int | None = Field(
        None,
        gt=0,
        description="Measure validation loss every N steps; null: only at the end, and not at all if no document is held out.",
    )
    validation_batches: int = Field(8, gt=0, description="Global batches per validation.")
    log_every_steps: int = Field(
        1, gt=0, description="Steps between lines on the terminal; metrics.jsonl gets every step."
    )
    inspect_every_steps: int | None = Field(
        None,
        gt=0,
        description="Every N steps, log norms of weights, gradients, updates and activations, largest logits and routing, by block; null: never.",
    )
    timeout_seconds: float = Field(
        1200.0,
        gt=0,
        le=1e9,
        description="A collective that takes longer ends the run; above launch.heartbeat_seconds, after which a rank prints the ranks that it waits for.",
    )
    max_skipped_steps: int = Field(10, ge=0, description="Non-finite steps skipped in a row before the run stops.")
    compile: bool = Field(
        False, description="Compile the blocks one by one with torch.compile; costs a minute or two at start."
    )
    cuda_graphs: Literal["none", "blocks"] = Field(
        "none",
        description="Passes that a GPU replays without the host: none, or those of blocks, only on data, tensor and expert ranks.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Blocks that keep only their input and are computed again in the backward pass: none, those of recompute_blocks, all.",
    )
    recompute_blocks: str = Field(
        "", description="For recompute: selective, block types of model.pattern, such as `*E`."
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="Names of parameters or modules that are not trained, such as embedding, head or blocks.0.mixer; `*` for any part.",
    )
    gradient_sums: Literal["auto", "product", "hook"] = Field(
        "auto",
        description="Where weight gradients join the float32 sum of a step: in the product that makes them, which under bf16 saves a rounding and their way through memory, or after it, by a hook; auto: in the product under parallel.zero_stage 1 and 2, unless blocks are compiled.",
    )
    num_threads: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="CPU threads per rank; null: OMP_NUM_THREADS, or cores / ranks on this machine.",
    )
    profile: ProfileConfig | None = Field(None, description="Trace some steps; null: no trace.")
    deterministic: bool | None = Field(
        None,
        description="Library kernels that add in one order, and our kernels' own tiles instead of tuned ones; null: yes on a CPU, no on CUDA, because such library kernels are slower there. Our kernels always add in one order.",
    )

    def sums_in_products(self) -> bool:
        """Whether products add weight gradients to the sums, where ZeRO 1 or 2 has some."""
        return self.gradient_sums != "hook" and not self.compile


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
