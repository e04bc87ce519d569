"""The committed configurations, and their plans on H100s."""

from pathlib import Path

from launch.plan.estimate import Assumptions
from launch.plan.hardware import HARDWARE
from launch.plan.plan import make_plan
from pretrain.checks.check_run import load_checked

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
H100 = HARDWARE["h100"]
# The cluster of H100s for which each preset's layout is.
PRESET_GPUS = {
    "tiny_cpu": 1,
    "ladder_20m": 8,
    "ladder_150m": 8,
    "ladder_1b_a300m": 8,
    "ladder_1b_muon": 8,
    "ladder_8b_a1b": 64,
    "nemotron3_nano_30b": 128,
    "granite4_h_small": 64,
    "qwen3_next_80b": 128,
    "kimi_linear_48b": 128,
    "nemotron3_super_120b": 256,
    "jamba1.5_large_like": 512,
    "nemotron3_ultra_550b": 1024,
    "turbos_560b": 2048,
}
# A preset without the axes that cut the model.
ZERO_ALONE = (
    "parallel.tensor=1",
    "parallel.sequence_parallel=false",
    "parallel.expert=1",
    "parallel.pipeline=1",
    "parallel.zero_stage=3",
    "train.recompute=none",
    "train.recompute_blocks=''",
    "train.micro_batch_size=1",
)


def preset(name, *overrides, ranks=None):
    return load_checked(CONFIGS / f"{name}.yaml", overrides, world_size=ranks)


def plan_of(name, *overrides, ranks=8):
    return make_plan(preset(name, *overrides, ranks=ranks), H100, ranks, Assumptions())
