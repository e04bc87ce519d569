"""The committed configurations, and their plans on the GPUs that they are for."""

import re
from dataclasses import dataclass
from pathlib import Path

from amfm.launch.plan.estimate import Assumptions
from amfm.launch.plan.hardware import HARDWARE, Hardware
from amfm.launch.plan.plan import make_plan
from amfm.pretrain.checks.load import load_checked

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
H100 = HARDWARE["h100"]
# What a preset's header says of its layout: for all of its training stages, or for those that it names.
LAYOUT = re.compile(
    r"Layout (?:of (?P<stages>[\w ]+?) )?for (?P<gpus>[\d,]+) (?P<card>H100|B200), planned by `amfm plan`: (?P<gib>[\d.]+) GiB "
    r"at most per GPU with 10% headroom, (?P<mfu>[\d.]+%) MFU\.(?: Traced \(`--trace`\): (?P<ranks>.*?)\.(?: |$))?"
)
TRACED = re.compile(
    r"rank (?P<rank>[\d,]+) (?:planned )?at (?P<planned>[\d.]+)(?: GiB)? and (?:traced at )?(?P<traced>[\d.]+)"
)
# A preset without the axes that cut the model.
ZERO_ALONE = (
    "parallel.tensor=1",
    "parallel.sequence_parallel=false",
    "parallel.expert=1",
    "parallel.overlap_experts=false",
    "parallel.expert_buffer_factor=null",
    "parallel.pipeline=1",
    "parallel.schedule=1f1b",
    "parallel.virtual_stages=1",
    "parallel.context=1",
    "parallel.zero_stage=3",
    "train.recompute=none",
    "train.recompute_blocks=''",
    "train.micro_batch_size=1",
)


@dataclass(frozen=True)
class Header:
    """What a preset's header says of one layout: GPUs, memory and MFU as they are printed, and GiB by rank where it was traced."""

    stages: tuple[str, ...]
    gpus: int
    hardware: Hardware
    gib: str
    mfu: str
    ranks: dict[int, tuple[str, float]]  # rank -> planned as printed, traced


def headers(name):
    """The layouts that a preset's header states, each with the training stages that it is for; none named is all."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    text = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    return [
        Header(
            tuple((found["stages"] or "").replace(" and ", " ").split()),
            int(found["gpus"].replace(",", "")),
            HARDWARE[found["card"].lower()],
            found["gib"],
            found["mfu"],
            {
                int(rank["rank"].replace(",", "")): (rank["planned"], float(rank["traced"]))
                for rank in TRACED.finditer(found["ranks"] or "")
            },
        )
        for found in LAYOUT.finditer(text)
    ]


def preset_gpus(name):
    """The size of the cluster for which a preset's layout is."""
    (gpus,) = {header.gpus for header in headers(name)}
    return gpus


def preset(name, *overrides, ranks=None):
    return load_checked(CONFIGS / f"{name}.yaml", overrides, world_size=ranks)


def plan_of(name, *overrides, ranks=8):
    return make_plan(preset(name, *overrides, ranks=ranks), headers(name)[0].hardware, ranks, Assumptions())
