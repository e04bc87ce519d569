"""Choices over an expert's capacity: which are lost, where the recycled go, and that a draw repeats."""

import pytest
import torch

from amfm.kernels.moe.capacity import drop_overflow, expert_capacity, mix_bits, recycle_overflow

NUM_EXPERTS, TOP_K = 8, 3


def skewed_choices(tokens, seed):
    """Half of the tokens want experts 0, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)]
    return torch.stack([torch.arange(TOP_K) if token % 2 else row for token, row in enumerate(rows)])


def loads(ids):
    return torch.bincount(ids.flatten(), minlength=NUM_EXPERTS + 1)


def test_capacity_is_the_factor_times_an_even_share_rounded_up():
    assert expert_capacity(8, 2, 4, 1.0) == 4
    assert expert_capacity(9, 2, 4, 1.0) == 5
    assert expert_capacity(63, 3, 8, 1.5) == 36
    assert expert_capacity(1, 1, 64, 1.0) == 1


@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_dropped_are_the_choices_after_an_expert_is_full(tokens):
    ids = skewed_choices(tokens, tokens)
    capacity = expert_capacity(tokens, TOP_K, NUM_EXPERTS, 1.25)
    expected, seen = ids.clone(), [0] * NUM_EXPERTS
    for token in range(tokens):
        for choice in range(TOP_K):
            expert = int(ids[token, choice])
            seen[expert] += 1
            if seen[expert] > capacity:
                expected[token, choice] = NUM_EXPERTS
    assert torch.equal(drop_overflow(ids, NUM_EXPERTS, capacity), expected)


def test_what_is_dropped_of_a_token_depends_on_none_after_it():
    ids = skewed_choices(40, 0)
    other = ids.clone()
    other[25:] = skewed_choices(15, 1)
    assert torch.equal(drop_overflow(ids, NUM_EXPERTS, 12)[:25], drop_overflow(other, NUM_EXPERTS, 12)[:25])


@pytest.mark.parametrize("seed", range(8))
def test_recycled_choices_go_to_other_experts_with_room(seed):
    ids = skewed_choices(63, seed)
    capacity = expert_capacity(63, TOP_K, NUM_EXPERTS, 1.25)
    dropped, recycled = (
        drop_overflow(ids, NUM_EXPERTS, capacity),
        recycle_overflow(ids, NUM_EXPERTS, capacity, torch.tensor(seed)),
    )
    assert torch.equal(recycled[dropped < NUM_EXPERTS], dropped[dropped < NUM_EXPERTS]), "a choice in time was moved"
    assert loads(recycled)[:NUM_EXPERTS].max() <= capacity
    # A few may meet only seats of experts that their token has.
    assert loads(dropped)[NUM_EXPERTS] >= 20 and loads(recycled)[NUM_EXPERTS] <= 3
    for row in recycled.tolist():
        kept = [expert for expert in row if expert < NUM_EXPERTS]
        assert len(set(kept)) == len(kept), "a token got one expert twice"


def test_draws_repeat_for_a_seed_and_differ_between_seeds_and_batches():
    ids = skewed_choices(63, 0)
    again = [recycle_overflow(ids, NUM_EXPERTS, 24, torch.tensor(5)) for _ in range(2)]
    assert torch.equal(*again)
    assert not torch.equal(again[0], recycle_overflow(ids, NUM_EXPERTS, 24, torch.tensor(6)))
    other = ids.clone()
    other[0] = torch.tensor([5, 6, 7])  # only the first token wants others; odd tokens' draws change
    moved = recycle_overflow(other, NUM_EXPERTS, 24, torch.tensor(5))
    assert (moved[1:] != again[0][1:]).any()


def test_every_expert_with_room_gets_its_share_of_the_recycled():
    # 2,000 choices of expert 0, which takes 500: the others have 500 seats each for 1,500 choices.
    ids = torch.zeros(2000, 1, dtype=torch.int64)
    counts = torch.stack(
        [torch.bincount(recycle_overflow(ids, 6, 500, torch.tensor(seed)).flatten(), minlength=6) for seed in range(5)]
    )
    assert (counts.sum(1) == 2000).all() and (counts[:, 0] == 500).all()
    # 5 draws of 1,500 among 5 experts of 500 seats: 300 each, with a deviation below 15 of one and 7 of the mean.
    assert (counts[:, 1:].double().mean(0) - 300).abs().max() < 30


def test_nothing_is_lost_or_moved_while_there_is_room():
    ids = skewed_choices(20, 2)
    assert torch.equal(recycle_overflow(ids, NUM_EXPERTS, 60, torch.tensor(0)), ids)
    assert torch.equal(drop_overflow(ids, NUM_EXPERTS, 60), ids)


def test_without_room_the_rest_is_lost():
    ids = torch.zeros(10, 1, dtype=torch.int64)
    recycled = recycle_overflow(ids, 3, 2, torch.tensor(0))
    assert torch.bincount(recycled.flatten(), minlength=4).tolist() == [2, 2, 2, 4]


def test_bits_are_mixed_as_splitmix64_does():
    # By the definition, in unbounded integers.
    def mixed(value):
        value %= 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
        return value - 2**64 if value >= 2**63 else value

    values = torch.tensor([0, 1, 5, -3, 2**62 + 17, -(2**63)])
    assert mix_bits(values).tolist() == [mixed(value) for value in values.tolist()]
