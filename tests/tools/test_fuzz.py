"""A short run of `fuzz.py`: random cases, from rewards to gradients, against the plain reference."""

from fractions import Fraction

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from plain_credit import OF_TREE

from treerpo_trl.growth import Delimiters, ForkShape, TreeShape


@pytest.mark.slow
@pytest.mark.parametrize("rule", fuzz.SHAPES)
def test_the_gradient_of_every_update_is_the_plain_references(rule):
    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(fuzz.cases([rule]))
    def check(case):
        fuzz.check(case)

    check()


def case_of(**changes) -> fuzz.Case:
    """Two trees of 2 x 3 leaves in four micro-batches, two an update, with every option away from its default."""
    fields = {
        "shape": TreeShape((2, 3), 4, 7), "num_trees": 2, "end_probability": 0.2, "seed": 1, "pattern": "tenths",
        "none_share": 0.1, "weights": (Fraction(3, 4), Fraction(1, 4)), "tau": Fraction(1, 10), "micro_batches": 4,
        "accumulated": 2, "pad_is_eos": True,
        "options": {
            "loss_type": "dapo", "advantage_estimator": "treerpo", "loss_weighting": "node", "beta": 0.1,
            "use_bias_correction_kl": True, "entropy_coef": 0.01, "epsilon_high": 0.28, "delta": 1.5,
            "temperature": 0.6, "mask_truncated_completions": False, "prefix_sharing": True, "num_iterations": 2,
            "pad_to_multiple_of": 8, "split_rule": "length", "min_advantage": 0.0,
        },
    }  # fmt: skip
    return fuzz.Case(**{**fields, **changes})


def test_a_case_compares_every_update_and_many_tokens():
    outcome = fuzz.check(case_of())
    assert outcome.updates == 4 and outcome.at_a_kink == 0
    assert outcome.trained_tokens > 50
    assert outcome.worst < 1e-4


@pytest.mark.parametrize("estimator", [*OF_TREE, "leave_one_out", "optimal_baseline"])
def test_a_case_of_each_estimator_that_looks_beyond_siblings(estimator):
    options = {**case_of().options, "advantage_estimator": estimator}
    outcome = fuzz.check(case_of(options=options, num_trees=4, has_score_norms=True, seed=2))
    assert outcome.updates == 4 and outcome.trained_tokens > 100


FORKS = ForkShape(2, 2, 1, 1, 1, 9)
DELIMITED = TreeShape((2, 3), 4, 11, Delimiters(("\n\n",), 2))
RULES = pytest.mark.parametrize(("rule", "shape"), [("uncertainty", FORKS), ("delimiter", DELIMITED)])


@RULES
@pytest.mark.parametrize("estimator", ["treerl", "optimal_baseline"])
def test_a_case_of_estimators_that_count_leaves_or_rows_on_trees_of_any_shape(rule, shape, estimator):
    options = {**case_of().options, "split_rule": rule, "advantage_estimator": estimator, "num_iterations": 1}
    outcome = fuzz.check(case_of(options=options, shape=shape, num_trees=4, has_score_norms=True, seed=2))
    assert outcome.updates == 2 and outcome.trained_tokens > 50


@RULES
def test_a_case_of_masked_completions_and_small_advantages_on_trees_of_any_shape(rule, shape):
    options = {**case_of().options, "split_rule": rule, "advantage_estimator": "centered", "num_iterations": 1}
    choices = ({}, {"min_advantage": fuzz.MIN_ADVANTAGE}, {"mask_truncated_completions": True})
    whole, large, masked = (
        fuzz.check(case_of(options={**options, **choice}, shape=shape, seed=3, tau=None, end_probability=0.5))
        for choice in choices
    )
    assert whole.updates == large.updates == masked.updates == 2
    assert 0 < large.trained_tokens < whole.trained_tokens and 0 < masked.trained_tokens < whole.trained_tokens


def test_a_case_of_single_completions():
    options = {**case_of().options, "advantage_estimator": "optimal_baseline"}
    outcome = fuzz.check(case_of(options=options, shape=TreeShape((1, 1), 4, 7), num_trees=4))
    assert outcome.updates == 4 and outcome.trained_tokens > 10


def test_a_wrong_advantage_is_noticed(monkeypatch):
    """What the reference says is not what the trainer does if an advantage is off by a hundredth."""
    right = fuzz.advantages_of

    def wrong(*args):
        return [{node: 1.01 * a for node, a in of_tree.items()} for of_tree in right(*args)]

    monkeypatch.setattr(fuzz, "advantages_of", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        fuzz.check(case_of())
