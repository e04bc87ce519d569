"""Verbs that write a folder, each in a fork of its own whose disk fails while a file exists.

Called as `python -m tests.faults.writes.child PLACE`, which holds jobs.json (the verb of each number), config.json and what the
verbs read; OUT of a number is PLACE/outN. Prints a JSON line a number: its error, None if it was done. What a verb
imports is imported once, before the first fork.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.pretrain.failures import describe, exit_code, is_bug
from tests.helpers.tiny_store import run_in_process

PLACE = Path(sys.argv[1])

Action = Callable[[Path], Any]  # writes OUT


def of_torch(module: str, name: str, source: str, **options: Any) -> Action:
    function = getattr(importlib.import_module(module), name)
    return lambda out: function(PLACE / source, out, **options)


def merging() -> Action:
    from amfm.pretrain.export.average import choose_merge, merge_checkpoints

    return lambda out: merge_checkpoints(
        PLACE / "run", [choose_merge(PLACE / "run", 1, None, "uniform")], out, evaluate=False
    )


def writing_tokens() -> Action:
    from amfm.data_pipeline.store.megatron_files import export_megatron
    from amfm.data_pipeline.store.store import TokenStore

    return lambda out: export_megatron(TokenStore.open(PLACE / "store"), "source0", "train", out / "text")


def training() -> Action:
    from amfm.pretrain.config.file import load_config
    from amfm.pretrain.train import train

    def run(out: Path) -> None:
        if code := train(load_config(PLACE / "run" / "config.yaml", [f"run.dir={out}"])):
            raise RuntimeError(f"the run ended with {code}")

    return run


def preparing() -> Action:
    config = DataConfig.model_validate_json((PLACE / "config.json").read_text())
    return lambda out: prepare(config.model_copy(update={"store": str(out)}), runner=run_in_process)


VERBS: dict[str, Callable[[], Action]] = {
    "export": lambda: of_torch("amfm.pretrain.export.export", "export_checkpoint", "run", verify=False),
    "dcp": lambda: of_torch("amfm_foreign_states.dcp", "export_dcp", "run"),
    "universal": lambda: of_torch("amfm_foreign_states.universal", "export_universal", "run"),
    "import": lambda: of_torch("amfm.pretrain.export.import_huggingface", "import_huggingface", "exported"),
    "state": lambda: of_torch("amfm_foreign_states.adopt", "import_state", "state"),
    "merge": merging,
    "tokens": writing_tokens,
    "prepare": preparing,
    "train": training,
}


def attempt(action: Action, out: Path) -> dict[str, Any]:
    try:
        action(out)
    except (ValueError, RuntimeError, OSError) as error:
        return {"code": 1 if is_bug(error) else exit_code(error), "said": describe(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        return {"code": 1, "said": f"{type(error).__name__}: {error}"}
    return {"code": 0, "said": ""}


def attempt_in_fork(action: Action, out: Path) -> dict[str, Any]:
    """What a process of its own makes of a verb: its code, and what it said."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        os.write(writing, json.dumps(attempt(action, out)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.wait()
    return dict(json.loads(said)) if said else {"code": 1, "said": "the process died"}


if __name__ == "__main__":
    jobs = json.loads((PLACE / "jobs.json").read_text())
    actions = {verb: VERBS[verb]() for verb in dict.fromkeys(jobs)}
    for number, verb in enumerate(jobs):
        out = PLACE / f"out{number}"
        (PLACE / f"{number}.on").touch()
        first = attempt_in_fork(actions[verb], out)
        left = sorted(path.name for path in PLACE.iterdir() if f"out{number}" in path.name)
        (PLACE / f"{number}.on").unlink()
        again = attempt_in_fork(actions[verb], out) if first["code"] else None
        print(json.dumps({"first": first, "left": left, "again": again}), flush=True)
    os._exit(0)
