"""Number formats of the recipes: rounding bitwise, scales, what is not finite, random rounding, Hadamard."""

import pytest
import torch

from amfm.kernels.low_precision import formats

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def edges(grid):
    """Numbers of a format, the middles between them, and the neighbours of those in float32, with both signs."""
    middles = (grid[1:] + grid[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(end)) for end in (-1e9, 1e9)]
    found = torch.cat([grid, middles, *near, torch.tensor([1e-40, 1e-30, 1e9, torch.inf])])
    return torch.cat([found, -found])


def nearest(numbers, grid):
    """Codes by the definition: the nearest number, of two the one with the even code, and a sign."""
    size = numbers.abs().double().clamp(max=grid[-1].item())
    distance = (size[:, None] - grid.double()).abs()
    is_best = distance == distance.amin(1, keepdim=True)
    odd = torch.arange(len(grid)) % 2
    return (is_best.double() * (2 - odd)).argmax(1)


def test_e4m3_is_the_nearest_number_with_ties_to_even_and_nan_stays_nan():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat([edges(E4M3), torch.randn(20_000, generator=generator) * torch.logspace(-6, 3, 20_000)])
    codes = formats.to_e4m3(numbers)
    assert torch.equal(codes & 0x7F, nearest(numbers, E4M3).to(torch.uint8))
    assert torch.equal(codes >> 7, numbers.signbit().to(torch.uint8))
    assert formats.to_e4m3(torch.tensor([torch.nan, -torch.nan])).tolist() == [0x7F, 0x7F]


def test_e4m3_equals_rounding_by_integers_on_all_bfloat16_numbers():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    for shift in (1.0, 1.3, 0.07):  # not only bfloat16: scaled by another float32 they have all its digits
        numbers = every * shift
        bits = numbers.clamp(-448, 448).view(torch.int32)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
        small = (size.view(torch.float32) * 512.0 + 8388608.0).view(torch.int32) & 0xFF
        codes = torch.where(size < 0x3C800000, small, normal) | (bits >> 24 & 0x80)
        assert torch.equal(formats.to_e4m3(numbers), torch.where(numbers.isnan(), 0x7F, codes).to(torch.uint8))


def test_e2m1_is_the_nearest_number_with_ties_to_even():
    numbers = edges(E2M1)
    codes = formats.to_e2m1(numbers)
    assert torch.equal(codes & 7, nearest(numbers, E2M1).to(torch.uint8))
    assert torch.equal(formats.from_e2m1(codes & 7), E2M1[(codes & 7).int()])
    assert torch.equal(formats.from_e2m1(codes).signbit(), numbers.signbit())


@pytest.mark.parametrize("power", [-140, -126, -118, -10, 0, 60, 119])
def test_a_scale_is_the_smallest_power_of_two_that_keeps_a_block_below_448(power):
    largest = torch.tensor([1.0, 1.75, torch.nextafter(torch.tensor(1.75), torch.tensor(2.0)).item(), 1.99]).double()
    largest = (largest * 2.0**power).float()
    scales, factors = formats.power_of_two_scales(largest)
    assert torch.equal(scales.double() * factors.double(), torch.ones(4).double())
    smallest = torch.tensor([2.0 ** max(power - 8 + more, -126) for more in (0, 0, 1, 1)])
    assert torch.equal(scales, smallest)
    assert torch.equal(formats.to_e8m0(scales).int() - 127, smallest.log2().int())


@pytest.mark.parametrize(("name", "bound"), [("fp8_block", 2**-4), ("mxfp8", 2**-4), ("nvfp4", 0.26)])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 63), (256, 128)])
def test_numbers_come_back_within_half_a_step_of_their_block(name, bound, weight, shape):
    generator = torch.Generator().manual_seed(0)
    # Scales of nvfp4's blocks reach over 2^17, those of others over all of float32.
    span = 1 if name == "nvfp4" else 3
    x = torch.randn(shape, generator=generator) * torch.logspace(-span, span, shape[0])[:, None]
    x[0, 0] = 0.0
    made = formats.quantize(x, name, weight=weight)
    rows, run = made.rows, made.run
    assert (rows, run) == (formats.WEIGHT_ROWS[name] if weight else 1, formats.RUN[name])
    assert made.scales.shape == (-(-shape[0] // rows), -(-shape[1] // run)) and made.codes.shape == x.shape
    largest = formats.cut_blocks(x.abs(), rows, run).amax((1, 3), keepdim=True).expand(-1, rows, -1, run)
    error = (made.values().double() - x.double()).abs()
    # Half a step of e4m3 is 2^-4 of a number; the smallest numbers of a block lose what is left of its range.
    allowed = bound * x.abs() + formats.join_blocks(largest, x) * (2.0**-18 if name != "nvfp4" else 0.1)
    assert (error <= allowed).all()
    assert torch.equal(made.decode().bfloat16().float(), made.decode()), "decoded numbers are exact in bfloat16"


@pytest.mark.parametrize("name", ["fp8_block", "mxfp8", "nvfp4"])
def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_so_and_disturbs_no_other_block(name):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 9.0  # the largest of the whole matrix stays where it is
    clean = formats.quantize(x, name).values()
    x[1] = 0.0
    x[2, 5], x[3, 200] = torch.nan, torch.inf
    found = formats.quantize(x, name).values()
    assert torch.equal(found[1], torch.zeros(256)) and torch.equal(found[0], clean[0])
    assert found[2, 5].isnan() and not found[3, 200].isfinite()
    run = formats.RUN[name]
    spoilt = found.isnan() | found.isinf()
    assert not spoilt[2, run:].any() and not spoilt[3, :128].any()
    if name != "nvfp4":
        assert spoilt.sum() == 2


def test_random_rounding_has_the_right_mean_and_is_a_function_of_seed_and_numbers():
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 1, 256)

    def drawn(x, seed):
        return formats.quantize(x, "nvfp4", noise=formats.draw_noise(x, seed))

    draws = torch.stack([drawn(x, seed).values() for seed in range(200)])
    made = drawn(x, 0)
    unit = made.scales.repeat_interleave(16, 1) * made.whole
    off = (draws - x) / unit
    # Numbers are at most 2 units apart, so the deviation of a mean of N draws is at most N^-1/2; five of them.
    assert off.mean(0).abs().max() < 5 / 200**0.5
    assert off.mean().abs() < 5 / draws.numel() ** 0.5 and (off * x.sign()).mean().abs() < 5 / draws.numel() ** 0.5
    nearest_off = (formats.quantize(x, "nvfp4").values() - x).norm()
    assert (draws.mean(0) - x).norm() < 0.15 * nearest_off
    again, other = (drawn(x, seed).codes for seed in (7, 8))
    assert torch.equal(again, drawn(x, 7).codes) and not torch.equal(again, other)
    moved = x.clone()
    moved[3, 3] *= 1.01
    there = drawn(moved, 7).codes
    assert (there != again).float().mean() > 0.05, "another matrix draws again everywhere"


def test_noise_is_even_and_independent_of_its_neighbours():
    noise = formats.draw_noise(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)), 3)
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise, 64, 0, 1)
    # Chi squared with 63 degrees of freedom: 63 on average, beyond 120 once in 10^5.
    assert ((counts - 4096).square() / 4096).sum() < 120
    centred = noise - 0.5
    for one, other in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert (one * other).mean().abs() * 12 < 5 / 512, "five deviations of a correlation of 2^18 pairs"


def test_turning_both_operands_leaves_a_product_as_it_is():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 40, generator=generator, dtype=torch.float32) for rows in (5, 7))
    turned = [formats.turn(x, 11) for x in (a, b)]
    assert turned[0].shape == (5, 48) and not torch.allclose(turned[0][:, :40], a)
    exact = a.double() @ b.double().t()
    assert (turned[0].double() @ turned[1].double().t() - exact).norm() <= 1e-6 * exact.norm()
    assert not torch.equal(formats.turn(a, 12), turned[0])
