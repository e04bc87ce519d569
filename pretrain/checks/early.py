"""What rules a start out before PyTorch is imported: two small files are read, where the run's own checks take 8 s to begin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from amfm.data_pipeline.durable.files import take_lock
from amfm.data_pipeline.store.manifest import MANIFEST
from amfm.data_pipeline.store.object_store import SCHEMES, is_url
from amfm.pretrain.checkpoint.compatibility import check_resumable
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name, continued_step, read_manifest
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.ownership import LOCK_NAME, describe_taken


def check_early(config: RunConfig, prepare: str) -> None:
    """Reject a run without a prepared store, one that another process of this host trains, and settings of another run.

    prepare: the command that makes the store. Raises ValueError. For the process that starts the ranks: a rank would find
    the lock of rank 0.
    """
    store, run_dir = config.data.store, Path(config.run.dir)
    if (
        store is not None
        and config.data.synthetic is None
        and not is_url(store)
        and not Path(store, MANIFEST).is_file()
    ):
        raise ValueError(f"data.store={store!r} must hold a prepared store; run `{prepare}` first")
    if (run_dir / LOCK_NAME).is_file():
        lock = take_lock(run_dir / LOCK_NAME, wait=False)
        if lock is None:
            raise ValueError(describe_taken(run_dir))
        lock.close()
    step = continued_step(config)
    if step >= 0:
        check_settings(config, run_dir / "checkpoints" / checkpoint_name(step))


def check_settings(config: RunConfig, checkpoint_dir: Path) -> None:
    """Reject settings that a run cannot change, where the checkpoint's manifest is sound; the run's own check follows."""
    try:
        manifest = read_manifest(checkpoint_dir)
    except RuntimeError:
        return  # damaged or not whole: the run finds out which one it continues from
    check_resumable(manifest, config, manifest["identities"])


def vocabulary_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that every piece of the tokenizer has a row of the embedding; nothing for a synthetic task, which has none."""
    if config.data.synthetic is not None:
        return
    given, rows = config.data.tokenizer, config.model.vocab_size
    # The size of a given tokenizer file is known only when it is read: training compares it with the store.
    if given.model is None and isinstance(given.eos_token, str):
        rule = "is of a tokenizer file, and data.tokenizer.model names none"
        yield Problem("data.tokenizer.eos_token", rule, "name the file, or remove it", given.eos_token)
    if given.model is None and given.vocab_size > rows:
        from amfm.data_pipeline.prepare.choose_tokenizer import names_only_ids

        rule, remedy = f"must be at least data.tokenizer.vocab_size={given.vocab_size}", "or a multiple of 64 above it"
        if not names_only_ids(config.data):
            yield Problem("model.vocab_size", rule, f"use {given.vocab_size} {remedy}", str(rows))


def keeping_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that checkpoints which are kept for good are saved in the first place, and that copies go where they can."""
    every, saved = config.train.keep_every_steps, config.train.checkpoint_every_steps
    if every is not None and (saved is None or every % saved):
        rule = f"must be a multiple of train.checkpoint_every_steps={'null' if saved is None else saved}"
        remedy = "set that first" if saved is None else f"use {(every // saved + 1) * saved}"
        yield Problem("train.keep_every_steps", rule, remedy, str(every))
    store = config.train.checkpoint_store
    if store is not None and (store.partition("://")[0] not in SCHEMES or not is_url(store)):
        rule = f"must begin with {', '.join(f'{name}://' for name in SCHEMES)}"
        yield Problem("train.checkpoint_store", rule, "checkpoints in folders are those of run.dir", store)
    replica, folder = config.train.replica_every_steps, config.train.replica_folder
    if replica is not None and saved is not None and replica >= saved:
        rule = f"must be less than train.checkpoint_every_steps={saved}, or checkpoints are always newer"
        yield Problem("train.replica_every_steps", rule, "lower it, or remove it", str(replica))
    if replica is None and folder != type(config.train).model_fields["replica_folder"].default:
        rule = "has no effect without train.replica_every_steps"
        yield Problem("train.replica_folder", rule, "set that, or remove it", folder)
    if not Path(folder).is_absolute():
        yield Problem("train.replica_folder", "must be absolute", "name the mount of a tmpfs, such as /dev/shm", folder)
