"""A checkpoint is read once, by ranks of any number, and a damaged one leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from amfm.pretrain.checkpoint import manifest_file
from amfm.pretrain.engine.engine import build_engine
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import digest_state, load, make_engine, run_steps, save, toy_config


def bytes_read() -> int:
    """What this process has read so far, from files and pipes."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_each_file_is_read_once(tmp_path: Path) -> None:
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    engine = build_engine(
        nn.Linear(512, 512), optimizer=toy_config().optimizer, precision="float32", zero_stage=1, parallel=parallel
    )
    path = save(tmp_path, 1, engine)
    saved = (path / "rank-00000.safetensors").stat().st_size
    before = bytes_read()
    assert load(tmp_path, engine) is not None
    # Manifests, heads of files and what Python reads of its packages come to some percent.
    assert saved <= bytes_read() - before < 1.2 * saved


def save_state(folder: str, block_ranks: int) -> list[str]:
    """Save steps 1 and 2, in folders of that many ranks, and return what this rank holds at each."""
    manifest_file.BLOCK_RANKS = block_ranks
    engine = make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1), stage=2)
    digests = []
    for step in (1, 2):
        run_steps(engine, step - 1, step)
        save(Path(folder), step, engine)
        digests.append(digest_state(engine))
    return digests


def load_state(folder: str) -> tuple[int, str]:
    """Load into an engine that has gone elsewhere."""
    engine = make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1), stage=2, seed=7)
    run_steps(engine, 5, 6)
    loaded = load(Path(folder), engine)
    assert loaded is not None
    return loaded.step, digest_state(engine)


@pytest.mark.parametrize(
    ("block_ranks", "name"), [(256, "rank-00001.safetensors"), (1, "ranks-00001/rank-00001.safetensors")]
)
def test_what_a_damaged_checkpoint_left_is_replaced_by_the_one_before(
    tmp_path: Path, block_ranks: int, name: str
) -> None:
    """Rank 0 restores its sound file of step 2 before rank 1 finds a flipped bit in its own."""
    digests = run_ranks(save_state, str(tmp_path), block_ranks, num_ranks=2)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    assert run_ranks(load_state, str(tmp_path), num_ranks=2) == [(1, digest) for digest, _ in digests]
