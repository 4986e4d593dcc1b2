"""TreeRPO as plainly as it can be written: exact fractions, recursion and loops; one sequence at a time, no rows.

It shares no code with the package but `Tree`, and follows the paper (arXiv:2506.05183) and TRL's losses by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import sqrt

import torch
from plain_credit import OF_TREE, Rewards, of_tree, optimal_baseline, to_unit_rms, value_of
from torch import Tensor, nn

from treerpo_trl import Tree


def reward_of(parts: Sequence[Fraction | None], weights: Sequence[Fraction]) -> Fraction | None:
    """The weighted sum of what the reward functions gave; `None` if none of them gave anything."""
    given = [weight * part for part, weight in zip(parts, weights, strict=True) if part is not None]
    return sum(given, Fraction(0)) if given else None


def advantages_of(
    trees: Sequence[Tree],
    rewards: Sequence[Rewards],
    estimator: str,
    tau: Fraction | None,
    branching: Sequence[int] | None,
) -> list[dict[int, float]]:
    """Of each tree of a batch, the advantage of every node that is trained.

    `branching` is that of complete trees, in which every path is as deep; `None` for trees whose leaves are the rows.
    """
    if estimator == "optimal_baseline":
        return to_unit_rms(trees, rewards, optimal_baseline(trees, rewards, branching))
    if estimator not in OF_TREE:
        return [against_siblings(*pair, estimator, tau) for pair in zip(trees, rewards, strict=True)]
    advantages = [of_tree(*pair, estimator) for pair in zip(trees, rewards, strict=True)]
    return to_unit_rms(trees, rewards, advantages) if estimator in ("treepo", "tree_grpo") else advantages


def against_siblings(tree: Tree, rewards: Rewards, estimator: str, tau: Fraction | None) -> dict[int, float]:
    """The advantages of the nodes whose group is not pruned."""
    advantages = {}
    for parent in range(len(tree.nodes)):
        group = {
            child: value
            for child in range(len(tree.nodes))
            if tree.nodes[child].parent == parent and (value := value_of(tree, child, rewards)) is not None
        }
        values = list(group.values())
        if len(values) < 2 or (tau is not None and max(values) - min(values) <= tau):
            continue
        mean = sum(values) / len(values)
        variance = mean * (1 - mean)
        if estimator == "treerpo":
            scale = float(variance)
        elif estimator == "bernoulli_std":
            scale = sqrt(variance)
        elif estimator == "group_std":
            scale = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) + 1e-4
        elif estimator == "leave_one_out":
            scale = (len(values) - 1) / len(values)
        else:
            scale = 1.0
        for child, value in group.items():
            advantages[child] = float(value - mean) / scale if value != mean else 0.0
    return advantages


def rows_of(tree: Tree, branching: Sequence[int] | None) -> list[list[int]]:
    """The nodes that each row passes, depth first.

    Of a complete tree a row takes the child of one place at each depth, until a branch has ended. Without `branching`,
    each leaf is a row.
    """
    children = [
        [child for child in range(len(tree.nodes)) if tree.nodes[child].parent == node]
        for node in range(len(tree.nodes))
    ]

    def paths_below(node: int) -> list[list[int]]:
        return [[child, *path] for child in children[node] for path in paths_below(child)] or [[]]

    if branching is None:
        return paths_below(0)
    rows = []
    for places in product(*(range(number) for number in branching)):
        path, node = [], 0
        for place in places:
            if not children[node]:
                break
            node = children[node][place]
            path.append(node)
        rows.append(path)
    return rows


def tokens_of(model: nn.Module, tree: Tree, temperature: float) -> dict[int, tuple[Tensor, Tensor]]:
    """Node -> log-probabilities and entropies of its tokens, from one sequence a leaf."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for leaf in tree.leaves:
        ids = torch.tensor([[*tree.prompt_ids, *tree.completion_ids(leaf)]])
        logps = (model(input_ids=ids).logits[0, :-1].double() / temperature).log_softmax(-1)
        chosen = logps.gather(1, ids[0, 1:, None]).squeeze(1)
        entropy = -(logps.exp() * logps).sum(-1)
        start = len(tree.prompt_ids) - 1
        for node in tree.path(leaf):
            end = start + len(tree.nodes[node].token_ids)
            found.setdefault(node, (chosen[start:end], entropy[start:end]))
            start = end
    return found


@dataclass
class Loss:
    """The options of a loss, named as in `GRPOConfig`."""

    loss_type: str
    epsilon: float
    epsilon_high: float
    delta: float | None
    beta: float
    use_bias_correction_kl: bool

    def kinks(self) -> list[float]:
        """Ratios at which the gradient of a token jumps, so that rounding decides it."""
        kinks = [self.epsilon_high] if self.loss_type == "cispo" else [1 - self.epsilon, 1 + self.epsilon_high]
        return kinks if self.delta is None else [*kinks, self.delta]

    def of_tokens(self, logps: Tensor, old: Tensor, reference: Tensor, advantage: float) -> Tensor:
        """The loss of each token of a node."""
        ratio = (logps - old).exp()
        kl = (reference - logps).exp() - (reference - logps) - 1
        kl = self.beta * (kl * ratio if self.use_bias_correction_kl else kl)
        if self.loss_type == "cispo":
            return -ratio.detach().clamp(max=self.epsilon_high) * advantage * logps + kl
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        return -torch.min(bounded * advantage, clipped * advantage) + kl
