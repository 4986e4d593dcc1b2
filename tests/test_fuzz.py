"""A short run of `fuzz.py`: random cases, from rewards to gradients, against the plain reference."""

from fractions import Fraction

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings

from treerpo_trl.sampling import TreeShape


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(fuzz.cases())
def test_the_gradient_of_every_update_is_the_plain_references(case):
    fuzz.check(case)


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
            "pad_to_multiple_of": 8,
        },
    }  # fmt: skip
    return fuzz.Case(**{**fields, **changes})


def test_a_case_compares_every_update_and_many_tokens():
    outcome = fuzz.check(case_of())
    assert outcome.updates == 4 and outcome.at_a_kink == 0
    assert outcome.trained_tokens > 50
    assert outcome.worst < 1e-4


def test_a_wrong_advantage_is_noticed(monkeypatch):
    """What the reference says is not what the trainer does if an advantage is off by a hundredth."""
    right = fuzz.advantages_of
    monkeypatch.setattr(fuzz, "advantages_of", lambda *args: {node: 1.01 * a for node, a in right(*args).items()})
    with pytest.raises(AssertionError, match="relative error"):
        fuzz.check(case_of())
