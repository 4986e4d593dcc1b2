"""The statistics of evaluations against enumeration, known distributions and their laws."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_trl.statistics import (
    bootstrap_interval,
    majority_at_k,
    paired_bootstrap,
    pass_at_k,
    ratio_interval,
    sign_flip_test,
)


RIGHT = "right"


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(itertools.combinations(correct, k))
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.integers(1, 200), st.data())
def test_pass_at_k_grows_with_k_from_the_share_of_correct_samples(num_samples, data):
    num_correct = data.draw(st.integers(0, num_samples))
    values = [pass_at_k(num_samples, num_correct, k) for k in range(1, num_samples + 1)]
    assert values[0] == pytest.approx(num_correct / num_samples)
    assert values == sorted(values)
    assert values[-1] == (num_correct > 0)


def test_pass_at_k_is_unbiased():
    """Its mean over binomial samples is the chance that k independent samples hold a correct one."""
    n, k, p = 10, 4, 0.3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def wins_of(drawn) -> Fraction:
    """Whether the right answer wins these votes, by counting."""
    counts = Counter(vote for vote in drawn if vote is not None)
    most = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == most]
    return Fraction(RIGHT in winners, max(len(winners), 1))


@given(st.lists(st.sampled_from([RIGHT, "a", "b", "c", None]), min_size=1, max_size=9), st.data())
def test_majority_at_k_is_the_mean_over_subsets(votes, data):
    k = data.draw(st.integers(1, len(votes)))
    subsets = list(itertools.combinations(votes, k))
    expected = sum(map(wins_of, subsets)) / len(subsets)
    assert majority_at_k(votes, RIGHT, k) == pytest.approx(float(expected))


def test_majority_at_1_is_the_share_of_right_votes_and_many_votes_converge_on_the_most_frequent():
    votes = [RIGHT] * 30 + ["a"] * 20 + ["b"] * 10 + [None] * 4
    assert majority_at_k(votes, RIGHT, 1) == pytest.approx(30 / 64)
    assert 30 / 64 < majority_at_k(votes, RIGHT, 8) < majority_at_k(votes, RIGHT, 32) < 1
    assert majority_at_k(votes, RIGHT, 64) == 1
    assert majority_at_k(votes, "a", 64) == 0


@pytest.mark.parametrize("k", [0, 5])
def test_draws_that_are_impossible_are_named(k):
    with pytest.raises(ValueError, match=f"k is {k}, but there are 4 samples"):
        pass_at_k(4, 1, k)
    with pytest.raises(ValueError, match=f"k is {k}, but there are 4 samples"):
        majority_at_k([RIGHT] * 4, RIGHT, k)
    with pytest.raises(ValueError, match="num_correct is 5 of 4"):
        pass_at_k(4, 5, 1)


def test_bootstrap_agrees_with_all_resamples():
    values = [0.0, 0.1, 0.5, 1.0]
    means = [sum(drawn) / 4 for drawn in itertools.product(values, repeat=4)]
    low, high = bootstrap_interval([values], level=0.8, num_resamples=100_000)
    assert (low, high) == pytest.approx(np.quantile(means, [0.1, 0.9]), abs=0.011)


@pytest.mark.parametrize(
    ("draw", "mean"),
    [(lambda rng: rng.binomial(4, 0.4, 100) / 4, 0.4), (lambda rng: rng.normal(3.0, 2.0, 100), 3.0)],
)
def test_intervals_cover_the_mean_as_often_as_they_say(draw, mean):
    rng, covered, tries = np.random.default_rng(0), {0.5: 0, 0.95: 0}, 600
    for _ in range(tries):
        values = draw(rng)
        for level in covered:
            low, high = bootstrap_interval([values], level=level, num_resamples=500)
            covered[level] += low <= mean <= high
    assert covered[0.95] / tries == pytest.approx(0.95, abs=0.03)
    assert covered[0.5] / tries == pytest.approx(0.5, abs=0.07)


def test_datasets_have_the_same_weight_in_a_macro_mean_and_are_resampled_by_themselves():
    rng = np.random.default_rng(1)
    small, large = rng.normal(0, 1, 50), rng.normal(10, 1, 5000)
    low, high = bootstrap_interval([small, large])
    assert (low + high) / 2 == pytest.approx((small.mean() + large.mean()) / 2, abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * small.std() / 2 / 50**0.5, rel=0.1)


def test_pairing_takes_out_what_the_runs_share():
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 5, 200)
    first, second = difficulty + rng.normal(0, 0.1, 200), difficulty + 1 + rng.normal(0, 0.1, 200)
    low, high = paired_bootstrap([first], [second])
    assert low < 1 < high and high - low < 0.1
    assert (low, high) == bootstrap_interval([second - first])
    assert paired_bootstrap([first], [first]) == (0, 0)


def test_length_ratio_of_a_longer_run():
    lengths = np.random.default_rng(3).uniform(10, 1000, 60)
    assert ratio_interval([lengths], [2 * lengths]) == pytest.approx((2, 2))
    noise = np.random.default_rng(4).uniform(0.5, 1.5, 60)
    low, high = ratio_interval([lengths], [lengths * noise])
    assert low < (lengths * noise).mean() / lengths.mean() < high
    # Of several datasets, the ratio of the macro means and not the mean of the ratios.
    assert ratio_interval([[1.0], [9.0]], [[2.0], [9.0]]) == pytest.approx((1.1, 1.1))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9))
def test_p_value_is_that_of_all_swaps(pairs):
    first, second = (np.array(column) / 4 for column in zip(*pairs, strict=True))
    differences = [Fraction(b - a) for a, b in pairs]
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(pairs))
    ]
    expected = sum(value >= abs(sum(differences)) for value in sums) / len(sums)
    assert sign_flip_test([first], [second]) == pytest.approx(expected)


def test_random_flips_agree_with_all_flips():
    rng = np.random.default_rng(5)
    first, second = rng.uniform(size=12), rng.uniform(size=12) + 0.15
    exact = sign_flip_test([first], [second], num_flips=2**12)
    assert 0.02 < exact < 0.5
    assert sign_flip_test([first], [second], num_flips=4000) == pytest.approx(exact, abs=0.03)


def test_p_values_are_uniform_if_the_runs_are_alike_and_small_if_not():
    rng = np.random.default_rng(6)
    p_values = [sign_flip_test([rng.normal(size=20)], [rng.normal(size=20)], num_flips=999) for _ in range(300)]
    for level in (0.05, 0.2, 0.5, 0.8):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.08)
    assert sign_flip_test([np.zeros(100)], [np.ones(100)], num_flips=999) == 1 / 1000
    assert sign_flip_test([[0.5] * 30], [[0.5] * 30]) == 1


def test_flips_of_several_datasets_are_of_the_macro_mean():
    """One problem of a small dataset weighs as much as all of a large one, so the other way round does not cancel."""
    first, second = [[0.0] * 2, [0.0] * 8], [[1.0] * 2, [-1.0] * 8]
    weights = [1 / 2] * 2 + [1 / 8] * 8
    sums = [
        abs(sum(sign * weight for sign, weight in zip(signs, weights, strict=True)))
        for signs in itertools.product((1, -1), repeat=10)
    ]
    assert sign_flip_test(first, second) == pytest.approx(1.0)  # 2 / 2 - 8 / 8 is 0
    second = [[1.0] * 2, [1.0] * 8]
    assert sign_flip_test(first, second) == pytest.approx(sum(value >= 2 - 1e-9 for value in sums) / len(sums))


def test_order_of_problems_and_seed():
    values = [random.Random(i).random() for i in range(40)]
    assert bootstrap_interval([values]) == bootstrap_interval([values])
    assert bootstrap_interval([values], seed=1) != bootstrap_interval([values], seed=2)
    low, high = bootstrap_interval([values])
    assert (low, high) == pytest.approx(bootstrap_interval([values[::-1]]), abs=0.01)
    assert sign_flip_test([values], [values[::-1]], seed=1) == 1.0  # the differences come in pairs that cancel


def test_values_that_cannot_be_compared_are_named():
    with pytest.raises(ValueError, match="one run has 2 problems, the other 3"):
        paired_bootstrap([[1, 2]], [[1, 2, 3]])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([[]])
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="no datasets"):
        sign_flip_test([], [])
    with pytest.raises(ValueError, match="level is 95"):
        bootstrap_interval([[1, 2]], level=95)
