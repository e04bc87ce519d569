"""Verbs that write a folder, each in a fork of its own whose disk fails while a file exists.

Called as `python -m tests.faults.writes.child PLACE`, which holds jobs.json (the verb of each number), config.json and what the
verbs read; OUT of a number is PLACE/outN. Prints a JSON line a number: its error, None where it was done.
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


def call(module: str, name: str, source: str, **options: Any) -> Callable[[Path], Any]:
    """A function of a module, imported when it is called: preparation needs no torch."""
    return lambda out: getattr(importlib.import_module(module), name)(PLACE / source, out, **options)


def prepare_at(out: Path) -> None:
    config = DataConfig.model_validate_json((PLACE / "config.json").read_text())
    prepare(config.model_copy(update={"store": str(out)}), runner=run_in_process)


VERBS: dict[str, Callable[[Path], Any]] = {
    "export": call("amfm.pretrain.export.export", "export_checkpoint", "run", verify=False),
    "dcp": call("amfm.pretrain.exchange.dcp", "export_dcp", "run"),
    "universal": call("amfm.pretrain.exchange.universal", "export_universal", "run"),
    "import": call("amfm.pretrain.export.import_huggingface", "import_huggingface", "exported"),
    "prepare": prepare_at,
}


def attempt(verb: str, out: Path) -> dict[str, Any]:
    try:
        VERBS[verb](out)
    except (ValueError, RuntimeError, OSError) as error:
        return {"code": 1 if is_bug(error) else exit_code(error), "said": describe(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        return {"code": 1, "said": f"{type(error).__name__}: {error}"}
    return {"code": 0, "said": ""}


if __name__ == "__main__":
    for number, verb in enumerate(json.loads((PLACE / "jobs.json").read_text())):
        reading, writing = os.pipe()
        if os.fork() == 0:
            (PLACE / f"{number}.on").touch()
            first = attempt(verb, PLACE / f"out{number}")
            left = sorted(path.name for path in PLACE.iterdir() if f"out{number}" in path.name)
            (PLACE / f"{number}.on").unlink()
            again = attempt(verb, PLACE / f"out{number}") if first["code"] else None
            os.write(writing, json.dumps({"first": first, "left": left, "again": again}).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            print(pipe.read() or json.dumps({"first": {"code": 1, "said": "the process died"}}), flush=True)
        os.wait()
    os._exit(0)
