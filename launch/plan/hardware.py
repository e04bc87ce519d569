"""What accelerators and their links can do: a small table with its sources, or a YAML file of the same fields.

Peaks are of the vendors' data sheets, without sparsity: A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 (NVIDIA).
`memory_gib` is what the device reports to PyTorch, which is less than the name says. The efficiencies are assumptions:
what large products, grouped products, attention and passes over memory usually reach of those peaks.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from amfm.pretrain.config.file import read_schema

GIB = 2**30


class Hardware(BaseModel):
    """One accelerator, its node and its network. Rates are per accelerator and second, links in one direction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Shown in the plan.")
    bf16_flops: float = Field(gt=0, description="Dense peak of bfloat16 products, operations a second.")
    float32_flops: float = Field(gt=0, description="Peak of float32 products without TF32, operations a second.")
    memory_gib: float = Field(gt=0, description="Memory that a process can allocate, GiB.")
    memory_bytes_per_second: float = Field(gt=0, description="Memory bandwidth.")
    gpus_per_node: int = Field(8, gt=0, description="Accelerators that share the fast links.")
    node_link_bytes_per_second: float = Field(gt=0, description="Fast link inside a node, one direction.")
    network_bytes_per_second: float = Field(gt=0, description="Network of a node divided by its accelerators.")
    hop_seconds: float = Field(3e-6, ge=0, description="Latency of one step of a ring.")
    product_efficiency: float = Field(0.70, gt=0, le=1, description="Of the peak, in large products.")
    grouped_efficiency: float = Field(0.55, gt=0, le=1, description="Of the peak, in grouped products of experts.")
    attention_efficiency: float = Field(0.50, gt=0, le=1, description="Of the peak, in attention and the scan.")
    memory_efficiency: float = Field(0.75, gt=0, le=1, description="Of the bandwidth, in passes over memory.")
    link_efficiency: float = Field(0.80, gt=0, le=1, description="Of the links, in ring collectives.")

    def peak_flops(self, precision: str) -> float:
        """Dense peak of matrix products in the training precision, operations a second."""
        return self.bf16_flops if precision == "bf16" else self.float32_flops

    def ring_bytes_per_second(self, ranks: int, stride: int = 1) -> float:
        """Bytes a second that a ring of `ranks` ranks carries, link efficiency included.

        `stride`: distance in rank numbers between neighbours of the ring. Across nodes all rings of a node run at once
        and share its network cards: a ring has the cards of its own ranks there.
        """
        inside = self.node_link_bytes_per_second
        members = max(1, self.gpus_per_node // stride)
        across = self.network_bytes_per_second * min(members, ranks)
        return self.link_efficiency * (inside if ranks * stride <= self.gpus_per_node else min(inside, across))


HARDWARE = {
    "a100": Hardware(
        name="A100 80GB SXM",
        bf16_flops=312e12,
        float32_flops=19.5e12,
        memory_gib=79.1,
        memory_bytes_per_second=2.039e12,
        node_link_bytes_per_second=300e9,
        network_bytes_per_second=25e9,
    ),
    "h100": Hardware(
        name="H100 SXM",
        bf16_flops=989e12,
        float32_flops=67e12,
        memory_gib=79.1,
        memory_bytes_per_second=3.35e12,
        node_link_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
    ),
    "h200": Hardware(
        name="H200 SXM",
        bf16_flops=989e12,
        float32_flops=67e12,
        memory_gib=139.8,
        memory_bytes_per_second=4.8e12,
        node_link_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
    ),
    "b200": Hardware(
        name="B200 (DGX)",
        bf16_flops=2250e12,
        float32_flops=75e12,
        memory_gib=178.0,
        memory_bytes_per_second=8.0e12,
        node_link_bytes_per_second=900e9,
        network_bytes_per_second=50e9,
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
    return read_schema(path, (), Hardware)[0]
