"""What tests of a preparation compare, and the processes that they kill."""

from pathlib import Path

from amfm.data_pipeline.prepare.prepare import LOCK, prepare
from tests.helpers.tiny_store import run_in_process

ROOT = Path(__file__).resolve().parents[3]


def contents(store):
    """Bytes of every file that belongs to a finished store, journal aside: its lines come in the order of the work."""
    skip = {"journal.jsonl", LOCK}
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(Path(store).rglob("*"))
        if path.is_file() and path.name not in skip
    }


def moments(store):
    return {path: path.stat().st_mtime_ns for path in sorted(Path(store).rglob("*")) if path.name != LOCK}


def elsewhere(config, tmp_path, **prepare_settings):
    return config.model_copy(
        update={
            "store": str(tmp_path / "store"),
            "prepare": config.prepare.model_copy(update=prepare_settings),
        }
    )


def in_process(config, **arguments):
    return prepare(config, runner=run_in_process, **arguments)


def actor_pids():
    """Processes of our actors, found by the title that Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::PartWriter"):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def is_descendant(pid, ancestor):
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            return False
        if pid == ancestor:
            return True
    return False


KILLED_DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.prepare import prepare
from tests.helpers.tiny_store import run_in_process
prepare(DataConfig.model_validate_json(sys.argv[2]), runner=run_in_process, progress=lambda p: print(p.stage, flush=True))
"""
