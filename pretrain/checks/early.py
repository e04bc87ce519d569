"""What rules a start out before PyTorch is imported: two small files are read, where the run's own checks take 8 s to begin."""

from __future__ import annotations

from pathlib import Path

from amfm.data_pipeline.durable.locks import take_lock
from amfm.data_pipeline.store.manifest import MANIFEST
from amfm.data_pipeline.store.object_store import is_url
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.ownership import LOCK_NAME, describe_taken


def check_early(config: RunConfig, prepare: str) -> None:
    """Refuse a run without a prepared store, or in a directory in which another process of this host trains.

    prepare: the command that makes the store. Raises ValueError. For the process that starts the ranks: a rank would find
    the lock of rank 0.
    """
    store, run_dir = config.data.store, Path(config.run.dir)
    if store is not None and config.data.probe is None and not is_url(store) and not Path(store, MANIFEST).is_file():
        raise ValueError(f"data.store={store!r} must hold a prepared store; run `{prepare}` first")
    if (run_dir / LOCK_NAME).is_file():
        lock = take_lock(run_dir / LOCK_NAME, wait=False)
        if lock is None:
            raise ValueError(describe_taken(run_dir))
        lock.close()
