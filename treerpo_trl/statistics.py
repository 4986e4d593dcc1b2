"""The public place of [`~treerpo_trl.evaluation.statistics`]: pass@k, majority@k, intervals and paired tests."""

from .evaluation.statistics import (
    bootstrap_interval,
    majority_at_k,
    paired_bootstrap,
    pass_at_k,
    ratio_interval,
    sign_flip_test,
)


__all__ = ["bootstrap_interval", "majority_at_k", "paired_bootstrap", "pass_at_k", "ratio_interval", "sign_flip_test"]
