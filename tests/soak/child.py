"""A start of the run with ranks that can be hurt from inside: `python tests/soak/child.py FOLDER RANKS CONFIG`.

The process that is called so is the launcher of `amfm train --nproc`, and starts itself again as each rank. A rank is
`amfm train` with two hooks of torch's. A file `NaN-RANK` in FOLDER makes one output of a module NaN, after as many others as
it says, so that it meets any layer and micro-batch, checked or not; `flip-RANK` flips a bit of one of AdamW's moments, where
it rests between two updates.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from amfm.launch.rank_command import isolated_python


def start_ranks(arguments: list[str]) -> int:
    """Be the launcher, and return one exit code for all ranks."""
    from amfm.launch.cluster.local import run_command

    return run_command([*isolated_python(), __file__, *arguments], int(arguments[1]))


def be_rank(folder: Path, config: str) -> None:
    """Be a rank; ends the process with its exit code."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    poison, flip = (folder / f"{order}-{os.environ['RANK']}" for order in ("NaN", "flip"))
    moments: list[torch.Tensor] = []
    passed = 0

    def remember(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        # A group of which this rank holds nothing has an empty state.
        found = (state.get("exp_avg") for state in optimizer.state.values())
        moments[:] = [moment for moment in found if moment is not None and moment.numel() > 0]

    def obey(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal passed
        if moments and flip.exists():
            flip.unlink()
            moments[0].view(-1).view(torch.int32)[0] ^= 1 << 20
        if isinstance(output, torch.Tensor) and output.is_floating_point() and poison.exists():
            passed += 1
            if passed > int(poison.read_text()):
                poison.unlink()
                return output * float("nan")
        return None

    register_optimizer_step_post_hook(remember)
    register_module_forward_hook(obey)
    sys.argv = ["amfm", "train", config]
    runpy.run_module("amfm.launch", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        be_rank(Path(sys.argv[1]), sys.argv[3])
    else:
        sys.exit(start_ranks(sys.argv[1:]))
