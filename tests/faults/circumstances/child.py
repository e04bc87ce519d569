"""A run of six steps in one process, with something about the process that is not as usual.

Called as `python -m tests.faults.circumstances.child DATA.json RUN_DIR WHAT`; ends with the exit code that `amfm` would.
"""

from __future__ import annotations

import locale
import os
import resource
import sys
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.failures import describe, exit_code
from amfm.pretrain.train import train
from tests.faults import inject
from tests.pretrain.tiny_run import tiny_config


def set_clock(seconds: int) -> Any:
    return lambda run: Path(os.environ["AMFM_CLOCK"]).write_text(str(seconds))


def main(data: Path, run_dir: Path, what: str) -> int:
    if what == "clock":  # back by an hour and on by a day, in a run whose clock was right
        inject.after_step(2, set_clock(-3600))
        inject.after_step(4, set_clock(86400))
    elif what == "locale":  # all of it, as a library may ask for
        locale.setlocale(locale.LC_ALL, "")
        print(f"{1.5:n} {'I'.lower()} {locale.localeconv()['decimal_point']}")
    elif what == "size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    config = tiny_config(
        DataConfig.model_validate_json(data.read_text()), run_dir, train__steps=6, train__checkpoint_every_steps=2
    )
    try:
        return train(config)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"amfm: {describe(error)}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
