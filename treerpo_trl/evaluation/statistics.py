"""Statistics of an evaluation: pass@k, majority@k, bootstrap intervals over problems, paired tests of two runs.

Legend of shapes: N problems, n samples of one problem, k samples of a draw, D datasets, R resamples.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


Floats = NDArray[np.float64]
CHUNK = 500  # resamples held in memory at once


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold a correct one.

    It is the unbiased estimator of pass@k for one problem (Chen et al. 2021, "Evaluating Large Language Models Trained
    on Code", equation 1).

    Args:
        num_samples: n.
        num_correct: c, how many of them are correct.
        k: samples of a draw.
    Raises:
        ValueError: k is not in 1..n, or c not in 0..n.
    """
    _check_draw(num_samples, k)
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct} of {num_samples} samples; it must be in 0..{num_samples}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(votes: Sequence[Hashable | None], right: Hashable, k: int) -> float:
    """The chance that the most frequent vote among k of n samples, drawn without replacement, is the right one.

    Of t answers that tie, each wins with chance 1 / t. A vote of None is an abstention; with no vote for any answer
    the right one does not win. The mean over problems is maj@k (Wang et al. 2023, "Self-Consistency Improves Chain of
    Thought Reasoning in Language Models"); here its expectation over draws is computed exactly, by counting: with x
    draws of the right answer, no other may have more than x, and those with x tie.

        sum over x >= 1 of C(c, x) * sum over t of W_x(k - x, t) / (t + 1) / C(n, k)

    W_x(s, t) is the number of ways to draw s of the other samples so that t of their answers have x draws, and none
    has more.

    Args:
        votes: [n] answers; equal ones are the same answer.
        right: the right answer.
        k: samples of a draw.
    Raises:
        ValueError: k is not in 1..n.
    """
    _check_draw(len(votes), k)
    counts = Counter(votes)
    num_right, num_abstained = counts.pop(right, 0), counts.pop(None, 0)
    wins = 0.0
    for x in range(1, min(num_right, k) + 1):
        ways = Counter({(drawn, 0): math.comb(num_abstained, drawn) for drawn in range(min(num_abstained, k - x) + 1)})
        for count in counts.values():
            ways = _draw_from(ways, count, x, k - x)
        for (drawn, ties), number in ways.items():
            if drawn == k - x:
                # Python divides integers of any size exactly; their float values may overflow.
                wins += math.comb(num_right, x) * number / (math.comb(len(votes), k) * (ties + 1))
    return wins


def _draw_from(ways: Counter[tuple[int, int]], count: int, most: int, limit: int) -> Counter[tuple[int, int]]:
    """W with one more answer, which `count` samples gave: {(samples drawn, answers with `most` draws): ways}."""
    extended: Counter[tuple[int, int]] = Counter()
    for (drawn, ties), number in ways.items():
        for more in range(min(count, most, limit - drawn) + 1):
            extended[drawn + more, ties + (more == most)] += number * math.comb(count, more)
    return extended


def bootstrap_interval(
    groups: Sequence[ArrayLike], *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over groups of each group's mean (Efron 1979).

    One group gives the interval of a mean; several, that of a macro mean over datasets, each of which is resampled by
    itself. What is resampled are problems, so the interval holds for other problems of the same kind. With a few dozen
    problems it is somewhat too narrow.

    Args:
        groups: D arrays, [N_d] each: one value a problem.
        level: share of the resamples inside.
        num_resamples: R.
        seed: of the resampling.
    Returns:
        The lower and the upper end.
    Raises:
        ValueError: there is no group, or an empty one.
    """
    means_R = _resample(_macro_mean, [[_values(group)] for group in groups], num_resamples, seed)
    return _middle(means_R, level)


def paired_bootstrap(
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The bootstrap interval of mean(second) - mean(first) over the same problems, which are resampled in pairs.

    Args:
        first, second: D arrays each, [N_d]; the same place is the same problem.
        level, num_resamples, seed: as in [`bootstrap_interval`].
    """
    differences = [b - a for a, b in _pairs(first, second)]
    return bootstrap_interval(differences, level=level, num_resamples=num_resamples, seed=seed)


def ratio_interval(
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The bootstrap interval of mean(second) / mean(first) over the same problems, which are resampled in pairs.

    Of several datasets the ratio is that of the macro means.

    Args:
        first, second: D arrays of positive numbers each, [N_d]; the same place is the same problem.
        level, num_resamples, seed: as in [`bootstrap_interval`].
    """

    def ratio(groups: list[list[Floats]]) -> Floats:
        return _macro_mean([group[1:] for group in groups]) / _macro_mean([group[:1] for group in groups])

    return _middle(_resample(ratio, [list(pair) for pair in _pairs(first, second)], num_resamples, seed), level)


def sign_flip_test(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], *, num_flips: int = 10_000, seed: int = 0
) -> float:
    """The two-sided p-value of "swapping the two runs on any problem changes nothing" (paired permutation test).

    The statistic is |sum of w_i d_i|, d_i = second_i - first_i, w_i = 1 / N_d, which for one dataset orders as the
    difference of the means does and for several as that of the macro means. It is compared with the same under random
    signs of d_i: all of them if there are at most `num_flips` patterns, else that many random ones and the observed
    one, p = (1 + #{at least as large}) / (1 + num_flips) (Phipson & Smyth 2010), so that p is never 0.

    Args:
        first, second: D arrays each, [N_d]; the same place is the same problem.
        num_flips: patterns of signs.
        seed: of the random signs.
    """
    pairs = _pairs(first, second)
    differences = np.concatenate([(b - a) / len(a) for a, b in pairs])
    differences = differences[differences != 0]  # their sign changes nothing
    observed = abs(differences.sum())
    at_least = observed - 1e-9 * np.abs(differences).sum()  # sums that are equal but for rounding count as equal
    if 2 ** len(differences) <= num_flips:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(differences))))
        return float((np.abs(signs @ differences) >= at_least).mean())
    rng, extreme = np.random.default_rng(seed), 0
    for start in range(0, num_flips, CHUNK):
        flips = rng.integers(0, 2, size=(min(CHUNK, num_flips - start), len(differences)))
        extreme += int((np.abs((2.0 * flips - 1) @ differences) >= at_least).sum())
    return (1 + extreme) / (1 + num_flips)


def _check_draw(num_samples: int, k: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}, but there are {num_samples} samples; choose k in 1..{num_samples} or sample more")


def _values(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"values have the shape {array.shape}; give one number a problem, and at least one")
    return array


def _pairs(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> list[tuple[Floats, Floats]]:
    pairs = [(_values(a), _values(b)) for a, b in zip(first, second, strict=True)]
    if not pairs:
        raise ValueError("there are no datasets to compare; give at least one array of values for each run")
    for a, b in pairs:
        if len(a) != len(b):
            raise ValueError(f"one run has {len(a)} problems, the other {len(b)}; compare them on the same problems")
    return pairs


def _macro_mean(groups: list[list[Floats]]) -> Floats:
    """Groups of one array, [R, N_d], to the mean over groups of their means, [R]."""
    return np.stack([values_RN.mean(axis=1) for (values_RN,) in groups]).mean(axis=0)


def _resample(
    statistic: Callable[[list[list[Floats]]], Floats], groups: list[list[Floats]], num_resamples: int, seed: int
) -> Floats:
    """A statistic of resampled problems, [R]. Arrays of one group are resampled together."""
    if not groups:
        raise ValueError("there are no values; give at least one array of them")
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, num_resamples, CHUNK):
        size = min(CHUNK, num_resamples - start)
        drawn: list[Any] = [rng.integers(0, len(group[0]), size=(size, len(group[0]))) for group in groups]
        parts.append(statistic([[v[index] for v in group] for group, index in zip(groups, drawn, strict=True)]))
    return np.concatenate(parts)


def _middle(values_R: Floats, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; choose one between 0 and 1, such as 0.95")
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
