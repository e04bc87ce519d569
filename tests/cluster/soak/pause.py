"""A hook that makes each step wait, installed only for a soak: a run of light steps, which shares two cores with its restarts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SPEC = '''"""A pause in each step, as configurations see it."""

from pydantic import Field

from amfm.pretrain.config.hook_registry import INTERFACE, HookOptions, HookSpec


class Options(HookOptions):
    """A pause in each step."""

    seconds: float = Field(0.0, description="How long.")


SPEC = HookSpec("pause", "soak_pause:Pause", Options, INTERFACE)
'''
HOOK = '''"""A pause in each step."""

import time

from amfm.pretrain.hook import Hook


class Pause(Hook):
    def __init__(self, options, run):
        self.seconds = options.seconds

    def before_update(self):
        time.sleep(self.seconds)
'''


def install_pause(folder: Path) -> None:
    """Write the hook as an installed package, which this process and its children find; before configurations are imported."""
    metadata = folder / "soak_pause-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "soak_pause.py").write_text(HOOK)
    (folder / "soak_pause_spec.py").write_text(SPEC)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: soak-pause\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[amfm.hooks]\npause = soak_pause_spec:SPEC\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
