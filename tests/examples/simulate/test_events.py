"""Events of a trace: at which rate a product runs, and its FLOPs where torch does not take it apart."""

from __future__ import annotations

import pytest
import torch
from amfm_simulate.events import EventLog
from torch._subclasses.fake_tensor import FakeTensorMode

from amfm.launch.plan.flops import count_flops

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, False), (torch.float32, True)], ids=["bfloat16", "float32"]
)
def test_a_product_runs_at_the_rate_of_its_factors_whatever_its_sum_is(dtype: torch.dtype, wide: bool) -> None:
    log = EventLog({})
    with FakeTensorMode():
        left, right, total = (torch.empty(*shape, device="cuda") for shape in ((8, 16), (16, 4), (8, 4)))
        left, right = left.to(dtype), right.to(dtype)
        for func, args in (
            (aten.mm.dtype, (left, right, torch.float32)),
            (aten.addmm.default, (total.to(dtype), left, right)),
        ):
            out = func(*args)
            log.compute(func, args, {}, out, flops=1024, kind="M", phase="backward")
        log.compute(aten.add.Tensor, (total, total), {}, total, flops=0, kind="M", phase="backward")
    assert [event["wide"] for event in log.events] == [wide, wide, False]


def test_a_linear_inside_a_body_has_the_flops_of_its_product() -> None:
    x, weight = torch.empty(2, 21, 16, device="meta"), torch.empty(40, 16, device="meta")
    out = torch.empty(2, 21, 40, device="meta")
    assert count_flops(aten.linear.default, (x, weight), {}, out) == 2 * 42 * 16 * 40
