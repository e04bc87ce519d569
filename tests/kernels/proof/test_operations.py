"""Every kernel compiles for the GPUs it is meant for; docs/benchmarks/kernels_ahead_of_time.md has the table."""

from pathlib import Path

import pytest
import torch

from amfm.kernels.cases.problem import CardSizes, Inputs
from amfm.kernels.proof.ahead_of_time import compile_ahead
from amfm.kernels.proof.operations import ON_CARD, all_launches
from amfm.kernels.runtime.backend import INTERPRETED, find_miscompile, triton_version

compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

LAUNCHES = {launch.name: launch for launch in all_launches()}
TABLE = Path(__file__).parents[3] / "docs/benchmarks/kernels_ahead_of_time.md"
SMALL = CardSizes(
    tokens=63, model=32, heads=2, head_dim=16, state=16, experts=4, top_k=2, expert_width=16,
    attention_heads=2, kv_heads=1, attention_dim=16, vocabulary=64,
)  # fmt: skip

# Most bytes of spills a thread on sm_90; everything else has none. Reasons stand in
# docs/benchmarks/kernels_ahead_of_time.md. Triton before 3.7 has an assembler that needs more registers.
SPILLS = {
    "scan gradients, chunks of 64": 40,
    "scan gradients, chunks of 128": 32,
    "mixer gradients, chunks of 64": 80,
    "mixer gradients, chunks of 128": 88,
    "gated norm, up to 8192 wide (Granite), backward": 8,
    "gated norm, up to 8192 wide (Granite), backward with output": 32,
    "delta gradients, 2 steps per token": 16,
    "fp8 experts up, swiglu, hidden rows as codes": 40,
}
# With 64 rows of a product, which wgmma takes, this one spills 400 bytes.
SMALL_PRODUCTS = {"attention d_k d_v, head 256"}
SPILLS_BEFORE_3_7 = {
    "scan gradients, chunks of 64": 200,
    "scan gradients, chunks of 128": 616,
    "mixer gradients, chunks of 64": 264,
    "mixer gradients, chunks of 128": 616,
    "gated norm, up to 8192 wide (Granite), backward with output": 32,
    "attention d_k d_v, head 128": 64,
    "delta gradients, 1 step per token": 40,
    "delta gradients, 2 steps per token": 24,
    "experts down backward, SwiGLU, 1024 rows per expert": 32,
    "experts down backward, SwiGLU, some lost, 1024 rows per expert": 32,
}


def check(name: str, architecture: int) -> None:
    refused = find_miscompile(triton_version(), architecture // 10)
    if refused is not None:
        pytest.skip(f"this Triton is refused there: {refused}")
    launch = LAUNCHES[name]
    if architecture < launch.first_architecture:
        pytest.skip("this architecture has no such products")
    compiled = compile_ahead(launch.kernel, launch.signature, launch.constants, architecture, **launch.options)
    assert compiled.shared_bytes <= {80: 163, 90: 227, 100: 227}[architecture] * 1024, compiled
    assert not compiled.transposed_products, compiled
    if architecture == 90:
        allowed = SPILLS_BEFORE_3_7 if triton_version() < (3, 7, 0) else SPILLS
        assert compiled.spill_bytes <= allowed.get(name, 0), compiled
        assert compiled.uses_wgmma == (launch.multiplies and name not in SMALL_PRODUCTS), compiled
    if launch.first_architecture == 100:
        assert not compiled.spill_bytes and compiled.uses_block_scales == launch.multiplies, compiled


@compiles
@pytest.mark.parametrize(
    "name",
    [
        "attention forward, head 256",
        "experts d_up",
        "fp8 codes of rows and columns, experts",
        "fp8 outer product, experts, added to the sum",
        "fp8 product, experts",
        "router forward, Granite, 64",
        "scan walk, states only, chunks of 64",
        "vector scan gradients of scores",
        "delta walk, states only, 1 step per token",
        "gated norm, groups of 512 (Nemotron), forward",
    ],
)
def test_some_kernels_compile_for_hopper_without_spills(name: str) -> None:
    check(name, 90)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_kernel_compiles(name: str, architecture: int) -> None:
    check(name, architecture)


def test_the_table_shows_every_kernel_and_no_spills_but_the_known_ones() -> None:
    table = TABLE.read_text().split("<!-- compile table: begin -->")[1].split("<!-- compile table: end -->")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    spilled = {row[0].strip(): row[3].split("/")[1].strip() for row in rows if "/" in row[3]}
    assert {row[0].strip() for row in rows} == LAUNCHES.keys()
    assert {name: int(spill) for name, spill in spilled.items() if int(spill)} == SPILLS


@pytest.mark.parametrize("name", [name for name in ON_CARD if name not in ("attention", "swiglu")])
def test_a_problem_in_float64_agrees_with_its_reference(name: str) -> None:
    problem = ON_CARD[name](Inputs(torch.device("cpu"), torch.float64), SMALL)
    results = []
    for backend in ("torch", "reference"):
        output = problem.on(backend)(*problem.leaves)
        results.append([output, *torch.autograd.grad(output, problem.leaves, torch.ones_like(output))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
