"""The `tree/*` numbers of a batch of trees, as totals and counts that processes can add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .credit import ScoredTree


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean that can be pooled over processes: `total / count`; undefined if the count is 0."""

    total: float
    count: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """The mean of `values`."""
        values = list(values)
        return cls(float(sum(values)), float(len(values)))


def tree_metrics(trees: Sequence[ScoredTree], num_leaves: int, max_depth: int) -> dict[str, Mean]:
    """What to log of a batch of trees; the same names, in the same order, whatever the trees hold.

    - `tree/nodes`: nodes a tree, the prompt left out.
    - `tree/leaves`: leaves a tree (branches that ended early leave fewer than the complete tree has).
    - `tree/depth`: depth of a leaf.
    - `tree/sampled_tokens`: sampled tokens a tree, each counted once.
    - `tree/token_sharing`: tokens of the tree's rows / its sampled tokens: what a flat sampler would have drawn for
      the same rows.
    - `tree/kept_groups`: share of groups that were not pruned; `tree/kept_groups/depth_d` of those at depth d.
    - `tree/value_range/depth_d`: max - min of the values of a group at depth d.
    - `tree/trained_tokens`: share of the sampled tokens that carry loss.
    - `tree/advantage_abs`: mean absolute advantage of the kept nodes; `tree/advantage_abs/depth_d` of those at d.

    Args:
        trees: This process's trees.
        num_leaves: Leaves of the complete tree.
        max_depth: D.
    """
    metrics = {
        "tree/nodes": Mean.of(len(scored.tree.nodes) - 1 for scored in trees),
        "tree/leaves": Mean.of(len(scored.tree.leaves) for scored in trees),
        "tree/depth": Mean.of(scored.tree.depths[leaf] for scored in trees for leaf in scored.tree.leaves),
        "tree/sampled_tokens": Mean.of(scored.tree.num_sampled_tokens for scored in trees),
        "tree/token_sharing": Mean(
            sum(_row_tokens(scored, num_leaves) for scored in trees),
            sum(scored.tree.num_sampled_tokens for scored in trees),
        ),
        "tree/trained_tokens": Mean(
            sum(
                len(node.token_ids)
                for scored in trees
                for node, kept in zip(scored.tree.nodes, scored.kept, strict=True)
                if kept
            ),
            sum(scored.tree.num_sampled_tokens for scored in trees),
        ),
        "tree/advantage_abs": Mean.of(size for _, size in _advantage_sizes(trees)),
        "tree/kept_groups": Mean.of(any(scored.kept[child] for child in group) for scored, group in _groups(trees)),
    }
    for depth in range(1, max_depth + 1):
        groups = [(scored, group) for scored, group in _groups(trees) if scored.tree.depths[group[0]] == depth]
        metrics[f"tree/kept_groups/depth_{depth}"] = Mean.of(
            any(scored.kept[child] for child in group) for scored, group in groups
        )
        metrics[f"tree/value_range/depth_{depth}"] = Mean.of(
            max(values) - min(values) for scored, group in groups if (values := _values(scored, group))
        )
        metrics[f"tree/advantage_abs/depth_{depth}"] = Mean.of(
            size for node_depth, size in _advantage_sizes(trees) if node_depth == depth
        )
    return metrics


def _groups(trees: Sequence[ScoredTree]) -> list[tuple[ScoredTree, tuple[int, ...]]]:
    return [(scored, group) for scored in trees for group in scored.tree.children if group]


def _advantage_sizes(trees: Sequence[ScoredTree]) -> list[tuple[int, float]]:
    """(depth, |advantage|) of every kept node."""
    return [
        (depth, abs(advantage))
        for scored in trees
        for depth, advantage, kept in zip(scored.tree.depths, scored.advantages, scored.kept, strict=True)
        if kept
    ]


def _values(scored: ScoredTree, group: Sequence[int]) -> list[float]:
    return [value for child in group if (value := scored.values[child]) is not None]


def _row_tokens(scored: ScoredTree, num_leaves: int) -> float:
    """Tokens of the tree's rows. A leaf fills as many rows as the complete tree has leaves below its place."""
    tree = scored.tree
    share = [0.0] * len(tree.nodes)
    share[0] = num_leaves
    for index, children in enumerate(tree.children):
        for child in children:
            share[child] = share[index] / len(children)
    return sum(share[leaf] * sum(len(tree.nodes[node].token_ids) for node in tree.path(leaf)) for leaf in tree.leaves)
