"""Does what must survive a crash, while disk.c writes down what it asks of the disk.

Called as `python -m tests.faults.crash.record_child PLACE [stages]`, watched below PLACE/watched: training across the boundary of
two stages, or else all that is quick. For each name: PLACE/initial/NAME is the folder before, PLACE/NAME.record the
operations, PLACE/watched/NAME the folder after.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.node_cache import BlockCache, CacheSettings
from amfm.pretrain.launcher_protocol import DONE, NEXT_LAYOUT
from amfm.pretrain.monitor.metrics import RunLog
from amfm.pretrain.parallel import initialize_parallel
from tests.faults.staged import BOUNDARY, run_to_the_end, staged_config
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tiny_store import make_tiny_store, run_in_process
from tests.pretrain.checkpoint.toys import make_engine, run_steps, save
from tests.pretrain.tiny_run import tiny_config, tiny_data

PLACE = Path(sys.argv[1])
RECORD = Path(os.environ["AMFM_RECORD"])


def record(name: str, before: Callable[[Path], None], work: Callable[[Path], None]) -> None:
    folder = PLACE / "watched" / name
    folder.mkdir(parents=True)
    before(folder)
    shutil.copytree(folder, PLACE / "initial" / name)
    begin = RECORD.stat().st_size
    work(folder)
    (PLACE / f"{name}.record").write_bytes(RECORD.read_bytes()[begin:])


def record_save() -> None:
    engine = make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1))

    def save_at(folder: Path, step: int) -> None:
        run_steps(engine, step - 1, step)
        save(folder, step, engine, keep_last=2)

    record(
        "save", lambda folder: [save_at(folder, step) for step in (1, 2)] and None, lambda folder: save_at(folder, 3)
    )

    def save_again(folder: Path) -> None:
        save(folder, 3, engine, keep_last=2)

    record("replace", lambda folder: [save_at(folder, step) for step in (2, 3)] and None, save_again)


def record_prepare() -> None:
    texts = PLACE / "texts"
    config = make_tiny_store(texts, num_documents=40, num_sources=2, part_bytes=8_000)
    config = config.model_copy(update={"store": str(PLACE / "watched" / "prepare")})
    (PLACE / "data.json").write_text(json.dumps(config.model_dump(mode="json")))
    first = DataConfig.model_validate(config.model_dump() | {"sources": config.sources[:1]})
    record(
        "prepare",
        lambda folder: prepare(first, runner=run_in_process) and None,
        lambda folder: prepare(config, runner=run_in_process) and None,
    )


def record_metrics() -> None:
    data = DataConfig.model_validate(json.loads((PLACE / "data.json").read_text()))

    def log(folder: Path, steps: range, resumed: int) -> None:
        lines = RunLog(tiny_config(data, folder), resumed_at_step=resumed)
        for step in steps:
            lines.write_metrics({"step": step, "loss": 1 / step})
            lines.write_event("step", step)
            if step % 2 == 0:
                lines.sync()
        lines.close()

    record("metrics", lambda folder: log(folder, range(1, 5), 0), lambda folder: log(folder, range(3, 7), 2))


def record_cache() -> None:
    def keep(folder: Path) -> None:
        cache = BlockCache(CacheSettings(str(folder), 10**6, 4096))
        for name in ("aa11", "aa22"):
            os.close(cache._keep(cache._path(name), name.encode() * 1000))

    record("cache", lambda folder: None, keep)


def record_stages() -> None:
    data = tiny_data(PLACE / "texts")
    (PLACE / "data.json").write_text(data.model_dump_json())

    def run(folder: Path, steps: int) -> list[int]:
        return run_to_the_end(staged_config(data, folder, train__stop_after_steps=steps))

    def cross(folder: Path) -> None:
        assert run(folder, BOUNDARY + 1) == [NEXT_LAYOUT, DONE]

    record("stages", lambda folder: run(folder, BOUNDARY - 1) and None, cross)


if __name__ == "__main__":
    if sys.argv[2:] == ["stages"]:
        record_stages()
    else:
        record_prepare()
        record_metrics()
        record_cache()
        record_save()
    os._exit(0)
