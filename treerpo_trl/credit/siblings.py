"""A node against its siblings: advantages from the values of one group.

Each function takes the values of a group of two or more and returns their advantages.

An estimator is unbiased if its advantages times the scores of the nodes have the exact gradient for their expectation,
up to a positive factor for each depth; every leaf is scored. Where one is not, its docstring gives the lowest cosine
between the two at one depth, of 10 random policies with 2 x 2 trees of three tokens, first with rewards of 0 or 1,
then with rewards drawn evenly from [0, 1] (by enumeration: tests/credit/test_credit_unbiased.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean


def treerpo(values: Sequence[float]) -> list[float]:
    """A(c) = (V(c) - mu) / (mu (1 - mu)), mu = mean of the group (TreeRPO, eq. 4). There is no square root.

    For values in [0, 1]; then |A| is at most the size of the group. Biased, as mu holds the node itself: cosines 0.999
    and 0.925.
    """
    return _scaled_by_bernoulli(values, lambda variance: variance)


def bernoulli_std(values: Sequence[float]) -> list[float]:
    """A(c) = (V(c) - mu) / sqrt(mu (1 - mu)): TreeRPO's eq. 4 with the standard deviation of a Bernoulli variable.

    For values in [0, 1]. Biased, as mu holds the node itself: cosines 1.000 and 0.979.
    """
    return _scaled_by_bernoulli(values, math.sqrt)


def group_std(values: Sequence[float]) -> list[float]:
    """A(c) = (V(c) - mu) / (sigma + 1e-4), sigma with Bessel's correction: GRPO (arXiv:2402.03300), as in TRL.

    Biased, as sigma holds the node itself; of two siblings it keeps only which is better: cosines 0.995 and 0.253.
    """
    mean = fmean(values)
    scale = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) + 1e-4
    return [(value - mean) / scale for value in values]


def centered(values: Sequence[float]) -> list[float]:
    """A(c) = V(c) - mu: Dr. GRPO (arXiv:2503.20783).

    Unbiased: that mu holds the node itself only scales the expectation by (N - 1) / N, N siblings.
    """
    mean = fmean(values)
    return [value - mean for value in values]


def _scaled_by_bernoulli(values: Sequence[float], scale: Callable[[float], float]) -> list[float]:
    clipped = [min(max(value, 0.0), 1.0) for value in values]
    mean = fmean(clipped)
    variance = mean * (1 - mean)
    # Only a group whose values are all 0 or all 1 has no variance, and there every value is the mean.
    if variance <= 0:
        return [0.0] * len(clipped)
    return [(value - mean) / scale(variance) for value in clipped]


def leave_one_out(values: Sequence[float]) -> list[float]:
    """A(c) = V(c) - mean of the *other* siblings' values: RLOO (arXiv:2402.14740), on trees d-TreeRPO.

    Unbiased at every depth. It is `centered` times N / (N - 1), N siblings.
    """
    total = sum(values)
    return [value - (total - value) / (len(values) - 1) for value in values]
