"""The arithmetic every printed speed-up goes through, and the order in which providers are called."""

import itertools
import math
from collections import Counter

import pytest

from benchmarks.measure import paired
from benchmarks.timing import HostClock, Ratio, geometric_mean, interleave, orders, paired_ratio, quartiles


def test_ratio_is_taken_within_a_round_and_not_between_medians():
    # The machine is ten times slower in two rounds: each round says 2, the ratio of the medians says 0.2 or 20.
    baseline, fast = [2.0, 20.0, 2.0], [1.0, 10.0, 1.0]
    assert paired_ratio(baseline, fast) == Ratio(median=2.0, q1=2.0, q3=2.0)
    assert paired_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Ratio(median=2.0, q1=1.5, q3=2.5)


def test_ratio_refuses_rounds_without_a_partner():
    with pytest.raises(ValueError, match="rounds must match, got 2 and 1"):
        paired_ratio([1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([1.0], [0.0])
    with pytest.raises(ValueError, match="at least one"):
        paired_ratio([], [])


def test_baselines_are_divided_by_fastgen_and_floors_are_added_up():
    ratios = paired({"fastgen": [2.0], "eager": [6.0], "copy": [0.5], "noise": [0.3]}, ["copy", "noise"])
    assert ratios["eager"] == [3.0, 3.0, 3.0]
    assert ratios["floor"] == [2.5, 2.5, 2.5]
    assert set(ratios) == {"eager", "floor"}


def test_means_and_quartiles():
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert math.isnan(geometric_mean([]))
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("n", range(1, 7))
def test_every_provider_stands_in_every_place_and_follows_every_other_equally_often(n):
    rows = orders("abcdef"[:n])
    assert all(sorted(row) == sorted("abcdef"[:n]) for row in rows)
    places = Counter((place, name) for row in rows for place, name in enumerate(row))
    follows = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert len(places) == n * n and len(set(places.values())) == 1
    assert len(follows) == n * (n - 1) and len(set(follows.values())) <= 1


def test_providers_are_called_in_turn_each_round_in_another_order():
    rounds = []

    class Clock(HostClock):
        def round(self, calls, iterations):
            rounds.append("".join(calls))
            return dict.fromkeys(calls, 1.0)

    providers = {name: (lambda: None) for name in "abc"}
    times, iterations = interleave(providers, Clock(), seconds=0.0, min_rounds=6)
    assert sorted(rounds[-6:]) == sorted(map("".join, itertools.permutations("abc")))
    assert times == {name: [1.0] * 6 for name in "abc"}
    assert iterations == dict.fromkeys("abc", 1)
