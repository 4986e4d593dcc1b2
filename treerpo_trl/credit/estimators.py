"""Advantage estimators by name, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .baseline import optimal_baseline
from .paths import parent, tree_grpo, tree_mean, treepo, treerl
from .siblings import bernoulli_std, centered, group_std, leave_one_out, treerpo
from .values import ValuedTree


@dataclass(frozen=True, slots=True)
class Estimator:
    """How values become advantages.

    Args:
        of_group: Values of a group of two or more siblings -> their advantages. Groups of little range are pruned.
        of_tree: A tree -> [N] advantages.
        of_forest: All trees of the batch -> [N] advantages of each tree.
        needs_unit_interval: Whether rewards have to lie in [0, 1].
        needs_siblings: Whether a node without siblings is never trained.
        has_unit_rms: Whether advantages are divided by their root mean square over the tokens of the batch.
    """

    of_group: Callable[[Sequence[float]], list[float]] | None = None
    of_tree: Callable[[ValuedTree], list[float]] | None = None
    of_forest: Callable[[Sequence[ValuedTree]], list[list[float]]] | None = None
    needs_unit_interval: bool = False
    needs_siblings: bool = True
    has_unit_rms: bool = False

    @property
    def prunes(self) -> bool:
        """Whether groups of siblings whose values hardly differ are left out of training."""
        return self.of_group is not None

    @property
    def needs_batch(self) -> bool:
        """Whether the advantages of a tree depend on the other trees, of all processes."""
        return self.of_forest is not None or self.has_unit_rms


ESTIMATORS: dict[str, Estimator] = {
    "treerpo": Estimator(of_group=treerpo, needs_unit_interval=True),
    "bernoulli_std": Estimator(of_group=bernoulli_std, needs_unit_interval=True),
    "group_std": Estimator(of_group=group_std),
    "centered": Estimator(of_group=centered),
    "leave_one_out": Estimator(of_group=leave_one_out),
    "parent": Estimator(of_tree=parent),
    "tree_mean": Estimator(of_tree=tree_mean),
    "treerl": Estimator(of_tree=treerl),
    "treepo": Estimator(of_tree=treepo, has_unit_rms=True),
    "tree_grpo": Estimator(of_tree=tree_grpo, has_unit_rms=True),
    "optimal_baseline": Estimator(of_forest=optimal_baseline, needs_siblings=False, has_unit_rms=True),
}
