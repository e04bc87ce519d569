"""The committed configurations, and their plans on H100s."""

from pathlib import Path

from launch.plan.hardware import HARDWARE
from launch.plan.plan import Assumptions, make_plan
from pretrain.checks.check_run import load_checked

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
H100 = HARDWARE["h100"]


def preset(name, *overrides, ranks=None):
    return load_checked(CONFIGS / f"{name}.yaml", overrides, world_size=ranks)


def plan_of(name, *overrides, ranks=8):
    return make_plan(preset(name, *overrides, ranks=ranks), H100, ranks, Assumptions())
