"""What accelerators and their links can do: a small table with its sources, or a YAML file of the same fields.

Peaks are of the vendors' data sheets, without sparsity: A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 (NVIDIA).
`memory_gib` is what the device reports to PyTorch, which is less than the name says. The efficiencies are assumptions, of
amfm's own kernels as they were compiled and of cuBLAS, until a GPU has measured them; so is what collectives, the host and
ranks of unequal speed cost. Fields that a separate file leaves out have the table's values; `python -m
benchmarks.calibration` writes every field, with those costs in the efficiencies that it fits.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from amfm.model.config.low_precision import RecipeName
from amfm.pretrain.config.file import read_schema
from amfm.pretrain.config.schema import RunConfig

GIB = 2**30


# What bounds an operation that multiplies: products of matrices, grouped ones, or attention and scans, which mix tokens.
Limit = Literal["product", "grouped", "mixing"]


class Hardware(BaseModel):
    """One accelerator, its node and its network. Rates are per accelerator and per second, links in one direction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Shown in the plan.")
    bf16_flops: float = Field(gt=0, description="Dense peak of bfloat16 products, operations per second.")
    float32_flops: float = Field(gt=0, description="Peak of float32 products without TF32, operations per second.")
    fp8_flops: float | None = Field(None, gt=0, description="Dense peak of e4m3 products; null: it has none.")
    mxfp8_flops: float | None = Field(None, gt=0, description="The same with scales of MX; null: it has none.")
    fp4_flops: float | None = Field(None, gt=0, description="Dense peak of e2m1 products; null: it has none.")
    memory_gib: float = Field(gt=0, description="Memory that a process can allocate, GiB.")
    memory_bytes_per_second: float = Field(gt=0, description="Memory bandwidth.")
    host_memory_gib: float | None = Field(None, gt=0, description="Memory of a node's host, GiB; null: not checked.")
    gpus_per_node: int = Field(8, gt=0, description="Accelerators that share the fast links.")
    node_link_bytes_per_second: float = Field(gt=0, description="Fast link inside a node, one direction.")
    network_bytes_per_second: float = Field(gt=0, description="Network of a node divided by its accelerators.")
    hop_seconds: float = Field(3e-6, ge=0, description="Latency of one step of a ring.")
    product_efficiency: float = Field(0.70, gt=0, le=1, description="Of the peak, in large products.")
    grouped_efficiency: float = Field(0.55, gt=0, le=1, description="Of the peak, in grouped products of experts.")
    fp8_efficiency: float = Field(0.50, gt=0, le=1, description="Of the peak, in large products of e4m3.")
    fp8_own_efficiency: float | None = Field(
        None, gt=0, le=1, description="The same in those that stay amfm's where a library makes others; null: as they."
    )
    fp8_grouped_efficiency: float = Field(0.42, gt=0, le=1, description="The same in grouped products of experts.")
    fp4_efficiency: float = Field(0.38, gt=0, le=1, description="Of the peak, in large products of e2m1.")
    fp4_grouped_efficiency: float = Field(0.33, gt=0, le=1, description="The same in grouped products of experts.")
    attention_efficiency: float = Field(0.50, gt=0, le=1, description="Of the peak, in attention and scans, forward.")
    attention_backward_efficiency: float | None = Field(None, gt=0, le=1, description="Backward; null: as forward.")
    flash_efficiency: float | None = Field(None, gt=0, le=1, description="In attention, forward; null: as scans.")
    flash_backward_efficiency: float | None = Field(None, gt=0, le=1, description="Backward; null: as scans.")
    memory_efficiency: float = Field(0.75, gt=0, le=1, description="Of the bandwidth, in passes over memory.")
    link_efficiency: float = Field(0.80, gt=0, le=1, description="Of the links, in ring collectives.")
    all_to_all_efficiency: float | None = Field(
        None, gt=0, le=1, description="Of the links, in all-to-alls; null: as rings."
    )
    collective_share: float = Field(
        0.0, ge=0, lt=1, description="Of the multiprocessors, while a collective runs at the same time."
    )
    launch_seconds: float = Field(0.0, ge=0, description="Host time of one operation.")
    wait_seconds: float = Field(0.0, ge=0, description="Lost each time the host waits for the device.")
    jitter: float = Field(0.0, ge=0, description="Standard deviation of a rank's step over its mean.")
    context_gib: float = Field(0.0, ge=0, description="Memory of the CUDA context and of libraries' workspaces.")
    communicator_gib: float = Field(0.0, ge=0, description="Memory of one communicator.")

    def slowest(self, ranks: int) -> float:
        """Expected step of the slowest of this many ranks over the mean, less 1.

        The mean of the largest of N normal numbers is near sqrt(2 ln N) standard deviations (Cramer 1946, "Mathematical
        Methods of Statistics", section 28.6).
        """
        return self.jitter * math.sqrt(2 * math.log(ranks))

    def scaled(self, factor: float) -> Hardware:
        """The same with every efficiency times a factor, at most 1, and every cost divided by it."""
        values = self.model_dump()
        better = {
            name: min(1.0, value * factor) for name, value in values.items() if name.endswith("_efficiency") and value
        }
        costs = ("collective_share", "launch_seconds", "wait_seconds", "jitter")
        return self.model_copy(update=better | {name: values[name] / factor for name in costs})

    def peak_flops(self, precision: str) -> float:
        """Dense peak of matrix products in the training precision, operations per second."""
        return self.bf16_flops if precision == "bf16" else self.float32_flops

    def operation_seconds(
        self,
        flops: float,
        moved: float,
        precision: str,
        limit: Limit,
        *,
        backward: bool = False,
        by_flash: bool = False,
    ) -> float:
        """The longer of an operation's arithmetic and of its bytes, each at its part of the peak.

        The clock of the plan and of simulated ranks (Williams et al. 2009, "Roofline", section 3). by_flash: attention that
        FlashAttention computes.
        """
        moving = moved / (self.memory_bytes_per_second * self.memory_efficiency)
        if not flops:
            return moving
        if limit != "mixing":
            efficiency = self.grouped_efficiency if limit == "grouped" else self.product_efficiency
        else:
            first, back = self.attention_efficiency, self.attention_backward_efficiency
            if by_flash:
                first, back = self.flash_efficiency or first, self.flash_backward_efficiency or back
            efficiency = (back or first) if backward else first
        return max(flops / (self.peak_flops(precision) * efficiency), moving)

    def with_precision(self, config: RunConfig) -> RunConfig:
        """The configuration with the precision of the higher peak, if `train.precision` is to be chosen."""
        if config.train.precision != "auto":
            return config
        precision = "bf16" if self.bf16_flops >= self.float32_flops else "float32"
        return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})

    def with_libraries(self, config: RunConfig) -> Hardware:
        """The same at the rates of the libraries that `kernels` names, which the name then shows; rates of a file stay."""
        is_hopper, kernels = self.fp8_flops is not None and self.mxfp8_flops is None, config.kernels
        rates: dict[str, float] = {}
        if kernels.experts == "torch":
            rates = {"grouped_efficiency": LIBRARY_GROUPED}
            if is_hopper:
                rates |= {"fp8_efficiency": LIBRARY_NARROW["fp8_efficiency"], "fp8_own_efficiency": self.fp8_efficiency}
        if kernels.attention == "FA3" and is_hopper:
            rates |= FLASH_3
        assumed = {name: rate for name, rate in rates.items() if getattr(self, name) == ASSUMED.get(name)}
        chosen = [f"kernels.{name}={getattr(kernels, name)}" for name in ("experts", "attention")]
        shown = [text for text in chosen if not text.endswith("=auto")]
        return self.model_copy(update=assumed | ({"name": f"{self.name} ({', '.join(shown)})"} if shown else {}))

    def recipe_peak(self, recipe: RecipeName) -> float:
        """Dense peak of products by a recipe of low precision, operations per second. Raises ValueError if it has none."""
        peak = {"fp8_block": self.fp8_flops, "mxfp8": self.mxfp8_flops, "nvfp4": self.fp4_flops}[recipe]
        if peak is None:
            raise ValueError(
                f"{self.name} has no products of low_precision.recipe={recipe}; plan for another accelerator (fp8_block: "
                "--gpu h100, mxfp8 and nvfp4: --gpu b200), or with low_precision.emulate=true, which multiplies in high precision"
            )
        return peak

    def recipe_efficiency(self, recipe: RecipeName, *, grouped: bool) -> float:
        """Of that peak, in large products or in grouped products of experts."""
        if recipe == "nvfp4":
            return self.fp4_grouped_efficiency if grouped else self.fp4_efficiency
        return self.fp8_grouped_efficiency if grouped else self.fp8_efficiency

    def ring_bytes_per_second(self, ranks: int, stride: int = 1) -> float:
        """Bytes per second that a ring of `ranks` ranks carries, link efficiency included.

        `stride`: distance in rank numbers between neighbours of the ring. Across nodes all rings of a node run at once
        and share its network cards: a ring has the GPUs of its own ranks there.
        """
        inside = self.node_link_bytes_per_second
        members = max(1, self.gpus_per_node // stride)
        across = self.network_bytes_per_second * min(members, ranks)
        return self.link_efficiency * (inside if ranks * stride <= self.gpus_per_node else min(inside, across))


# Of the peak in FP8, what DeepGEMM states for large shapes on H800, dense and grouped, and what NVIDIA states of cuBLAS 12.9 with
# scales of blocks on Hopper: up to 1.75 times bf16, which is 0.61 of this peak at 0.70 of bf16's; of FP4, a guess below it.
LIBRARY_NARROW = {
    "fp8_efficiency": 0.60,
    "fp8_grouped_efficiency": 0.50,
    "fp4_efficiency": 0.45,
    "fp4_grouped_efficiency": 0.40,
}
# Grouped products of bf16 by our Triton kernels, as occupancy of the compiled ones suggests, and by CUTLASS. Our kernels of codes,
# dense and grouped, are taken to be as far below a library's.
OWN_GROUPED, LIBRARY_GROUPED = 0.46, 0.55
# FlashAttention-3 with heads of 128 channels on H100 (Shah et al. 2024, arXiv 2407.08608, section 4.1): causal at 16,384 tokens, 616
# TFLOPs/s forward; without a mask at 4,096, from where FlashAttention-2 has the rate below, 542 backward.
FLASH_3 = {"flash_efficiency": 0.62, "flash_backward_efficiency": 0.55}
# Judgements, none of them measured: products by cuBLAS; grouped products and those of codes by our kernels; attention by
# FlashAttention-2, whose speed is published; NCCL's all-to-all with messages of about 1 MB.
ASSUMED: dict[str, float] = {
    "product_efficiency": 0.70,
    "grouped_efficiency": OWN_GROUPED,
    **{name: round(OWN_GROUPED / LIBRARY_GROUPED * value, 2) for name, value in LIBRARY_NARROW.items()},
    "attention_efficiency": 0.37,
    "attention_backward_efficiency": 0.31,
    "all_to_all_efficiency": 0.65,
    "collective_share": 0.15,
    "launch_seconds": 5e-6,
    "wait_seconds": 50e-6,
    "jitter": 0.015,
    "context_gib": 0.8,
    "communicator_gib": 0.25,
}

HARDWARE = {
    "a100": Hardware(
        name="A100 80GB SXM",
        bf16_flops=312e12,
        float32_flops=19.5e12,
        memory_gib=79.1,
        host_memory_gib=1024,
        memory_bytes_per_second=2.039e12,
        node_link_bytes_per_second=300e9,
        network_bytes_per_second=25e9,
        **ASSUMED,
    ),
    "h100": Hardware(
        name="H100 SXM",
        bf16_flops=989e12,
        float32_flops=67e12,
        fp8_flops=1979e12,
        memory_gib=79.1,
        host_memory_gib=1800,
        memory_bytes_per_second=3.35e12,
        node_link_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
        **ASSUMED,
    ),
    "h200": Hardware(
        name="H200 SXM",
        bf16_flops=989e12,
        float32_flops=67e12,
        fp8_flops=1979e12,
        memory_gib=139.8,
        host_memory_gib=1800,
        memory_bytes_per_second=4.8e12,
        node_link_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
        **ASSUMED,
    ),
    "b200": Hardware(
        name="B200 (DGX)",
        bf16_flops=2250e12,
        float32_flops=75e12,
        fp8_flops=4500e12,
        mxfp8_flops=4500e12,
        fp4_flops=9000e12,
        memory_gib=178.0,
        host_memory_gib=2000,
        memory_bytes_per_second=8.0e12,
        node_link_bytes_per_second=900e9,
        network_bytes_per_second=50e9,
        **ASSUMED,
    ),
}


def load_hardware(name: str, option: str = "--gpu") -> Hardware:
    """A row of the table, or the content of a YAML file with the fields of `Hardware`.

    Raises ValueError for an unknown name and, with file and line, for a file that breaks a rule.
    """
    known = HARDWARE.get(name.lower())
    if known is not None:
        return known
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name.lower(), HARDWARE, n=1, cutoff=0.3)
        nearest = near[0] if near else "h100"
        raise ValueError(
            f"{option} {name} is not in the table ({', '.join(HARDWARE)}); use {nearest}, or a .yaml file with the fields "
            "that docs/planning.md lists"
        )
    hardware = read_schema(path, (), Hardware)[0]
    return hardware.model_copy(update={k: v for k, v in ASSUMED.items() if k not in hardware.model_fields_set})
