from collections import Counter

import numpy as np
import pytest

from amfm.data_pipeline.samples.mixture import Mixture, make_quotas


def draws_of(mixture, count, first=0):
    return mixture.draws(np.arange(first, first + count, dtype=np.int64))


def test_quotas_sum_to_the_block_and_are_off_by_less_than_one():
    weights = [0.7, 0.2, 0.09, 0.01]
    quotas = make_quotas(weights)
    assert sum(quotas) == 4096
    assert all(abs(quota - weight * 4096) < 1 for quota, weight in zip(quotas, weights))


def test_a_rare_source_enlarges_the_block_instead_of_vanishing():
    quotas = make_quotas([1.0, 1e-4])
    assert sum(quotas) == 131072 and quotas[1] >= 8


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], [1.0, float("nan")]])
def test_a_weight_that_is_not_positive_is_refused(weights):
    with pytest.raises(ValueError, match="must be a positive finite number"):
        make_quotas(weights)


def test_every_block_holds_each_source_exactly_by_its_quota():
    mixture = Mixture([(0, {"a": 3.0, "b": 1.0})], seed=5)
    for block in range(3):
        counts = Counter(source for source, _ in draws_of(mixture, 4096, block * 4096))
        assert counts == {"a": 3072, "b": 1024}
    assert draws_of(mixture, 50)[:50] != draws_of(mixture, 50, 4096)[:50]


def test_draws_of_a_source_count_up_without_gaps_even_across_phases():
    mixture = Mixture([(0, {"a": 1.0, "b": 1.0}), (1000, {"a": 9.0, "c": 1.0}), (3001, {"b": 1.0})], seed=1)
    taken = draws_of(mixture, 6000)
    for name in "abc":
        numbers = [draw for source, draw in taken if source == name]
        assert numbers == list(range(len(numbers)))
    assert {source for source, _ in taken[1000:3001]} == {"a", "c"}


def test_draws_before_agrees_with_counting():
    mixture = Mixture([(0, {"a": 1.0, "b": 1.0}), (1000, {"a": 9.0, "c": 1.0})], seed=1)
    for sample in (0, 1, 999, 1000, 1001, 5000, 9000):
        counted = [Counter(source for source, _ in draws_of(mixture, min(sample, 1000)))]
        counted.append(Counter(source for source, _ in draws_of(mixture, max(0, sample - 1000), 1000)))
        for phase, found in enumerate(mixture.draws_before(sample)):
            assert {name: count for name, count in found.items() if count} == dict(counted[phase])


def test_a_later_phase_changes_nothing_before_it():
    short = Mixture([(0, {"a": 1.0, "b": 2.0})], seed=3)
    long = Mixture([(0, {"a": 1.0, "b": 2.0}), (700, {"a": 1.0})], seed=3)
    assert draws_of(short, 700) == draws_of(long, 700)


def test_one_sample_alone_is_drawn_as_in_the_whole():
    mixture = Mixture([(0, {"a": 1.0, "b": 2.0}), (5000, {"b": 1.0, "a": 1.0})], seed=9)
    everything = draws_of(mixture, 9000)
    for sample in (0, 17, 4095, 4096, 4999, 5000, 8999):
        assert draws_of(mixture, 1, sample) == [everything[sample]]


def test_phases_out_of_order_are_refused():
    with pytest.raises(ValueError, match="order the phases by their start"):
        Mixture([(0, {"a": 1.0}), (10, {"a": 1.0}), (10, {"a": 2.0})], seed=0)
    with pytest.raises(ValueError, match="must start at global sample 0"):
        Mixture([(1, {"a": 1.0})], seed=0)
