"""Load a configuration and check it.

Rules of the whole run need torch, whose import takes seconds. So a wrong key or value is reported before it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amfm.pretrain.checkpoint.manifest_file import continued_step
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_located
from amfm.pretrain.config.schema import RunConfig


def load_checked(
    path: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    world_size: int | Sequence[int] | None = None,
    resumes: bool = False,
    goes_on: bool = False,
) -> RunConfig:
    """Load and check a configuration in one, so that broken rules name file and line too.

    `resumes`: it starts at the newest checkpoint of its run directory, so that ranks need not suit stages that are done;
    the rest is as in `check_run`. Raises ConfigError with every problem, FileNotFoundError if the file is absent.
    """
    located = load_located(path, overrides)
    from amfm.pretrain.checks.check_run import check_run

    done = max(0, continued_step(located.config)) if resumes else 0
    try:
        check_run(located.config, world_size, steps_done=done, goes_on=goes_on)
    except ConfigError as error:
        raise error.located(located.origins) from error
    return located.config
