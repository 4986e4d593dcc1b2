"""Trees as the rows of a TRL batch: slots, ownership, and what each token contributes to the loss.

Legend: B rows, T completion tokens, D depth, N nodes of all trees of the batch (roots included).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..credit import ScoredTree
from ..growth import Shape
from ..tree import ROOT, Tree


NO_NODE = -1
Method = TypeVar("Method", bound=Callable[..., Any])


def leaf_rewards(
    trees: Sequence[Tree], shape: Shape, rewards_B: Sequence[float | None]
) -> list[dict[int, float | None]]:
    """The reward of each leaf of each tree, from those of the rows."""
    rewards, start = [], 0
    for tree in trees:
        leaves = shape.slots(tree)
        rewards.append(dict(zip(leaves, rewards_B[start : start + len(leaves)], strict=True)))
        start += len(leaves)
    return rewards


@dataclass(frozen=True)
class RowLayout:
    """Which node every token of every row belongs to, and which row trains it.

    Args:
        node_BT: (B, T) index of the token's node among the nodes of all trees; `NO_NODE` on padding, and on what tools
            answered.
        owned_BT: (B, T) whether the row owns the node. Each node is owned by at most one row.
    """

    node_BT: Tensor
    owned_BT: Tensor


def lay_out(trees: Sequence[Tree], shape: Shape, width: int, active_B: Sequence[bool] | None = None) -> RowLayout:
    """Lay trees out as rows of `width` tokens; each node is owned by its first active row.

    Args:
        trees: The trees of the batch, in row order; node indices continue from tree to tree.
        shape: Of the trees.
        width: T, at least the longest path.
        active_B: Rows that can carry loss; all of them by default. A node that only inactive rows pass is not owned.
    """
    max_depth = shape.max_depth
    paths: list[list[int]] = []
    ends: list[list[int]] = []
    owned: list[list[bool]] = []
    answers: list[tuple[int, int]] = []
    seen: set[int] = set()
    offset = 0
    for tree in trees:
        for leaf in shape.slots(tree):
            is_active = active_B is None or active_B[len(paths)]
            path = tree.path(leaf)
            missing = max_depth - len(path)
            lengths = [len(tree.nodes[node].token_ids) for node in path]
            nodes = [offset + node for node in path]
            paths.append(nodes + [NO_NODE] * missing)
            ends.append(list(accumulate(lengths)) + [sum(lengths)] * missing)
            owned.append([is_active and node not in seen for node in nodes] + [False] * missing)
            if is_active:
                seen.update(nodes)
            if any(tree.nodes[node].sampled is not None for node in path):
                answers += [(len(paths) - 1, t) for t, drawn in enumerate(tree.sampled_mask(leaf)) if not drawn]
        offset += len(tree.nodes)
    position_BT = torch.arange(width).expand(len(paths), width).contiguous()
    # The number of segments that end at or before a position is the depth index of the segment it lies in.
    depth_BT = torch.searchsorted(torch.tensor(ends).view(-1, max_depth), position_BT, right=True)
    is_padding_BT = depth_BT == max_depth
    depth_BT = depth_BT.clamp(max=max_depth - 1)
    node_BT = torch.tensor(paths).view(-1, max_depth).gather(1, depth_BT).masked_fill(is_padding_BT, NO_NODE)
    owned_BT = torch.tensor(owned).view(-1, max_depth).gather(1, depth_BT) & ~is_padding_BT
    if answers:
        rows, positions = torch.tensor(answers).T
        node_BT[rows, positions] = NO_NODE
        owned_BT[rows, positions] = False
    return RowLayout(node_BT, owned_BT)


def project(node_BT: Tensor, value_N: Tensor) -> Tensor:
    """(B, T): each token gets its node's value; padding gets 0."""
    return value_N[node_BT.clamp(min=0)].masked_fill(node_BT == NO_NODE, 0)


def token_weights(tree: Tree, longest_segment: int) -> list[float]:
    """Each token counts the same: the loss is a mean over all kept tokens (the authors' code)."""
    return [1.0] * len(tree.nodes)


def node_weights(tree: Tree, longest_segment: int) -> list[float]:
    """Each node counts the same: a token weighs L / |n|, |n| tokens in its node n (TreeRPO, eq. 5 as printed).

    The factor L makes a token of a full segment weigh 1, so that weights never sum to less than their count.
    """
    return [0.0] + [longest_segment / node.num_sampled for node in tree.nodes[ROOT + 1 :]]


LOSS_WEIGHTINGS: dict[str, Callable[[Tree, int], list[float]]] = {"token": token_weights, "node": node_weights}


def credit_tokens(
    layout: RowLayout, trees: Sequence[ScoredTree], loss_weighting: str, longest_segment: int
) -> tuple[Tensor, Tensor]:
    """What each token is trained with, and how much it counts in the loss.

    Args:
        layout: Of the same trees.
        trees: The scored trees of the batch, in row order.
        loss_weighting: A name in `LOSS_WEIGHTINGS`.
        longest_segment: L, most tokens of a segment.

    Returns:
        (B, T) advantage of the token's node; (B, T) weight of the token in the row that owns it, 0 in other rows and
        on nodes that are not kept.
    """
    weigh = LOSS_WEIGHTINGS[loss_weighting]
    advantage_N: list[float] = []
    weight_N: list[float] = []
    for scored in trees:
        weights = weigh(scored.tree, longest_segment)
        advantage_N += scored.advantages
        weight_N += [weight * kept for weight, kept in zip(weights, scored.kept, strict=True)]
    advantage_BT = project(layout.node_BT, torch.tensor(advantage_N))
    return advantage_BT, project(layout.node_BT, torch.tensor(weight_N)) * layout.owned_BT


def leave_out_small(weight_BT: Tensor, advantage_BT: Tensor, min_advantage: float) -> Tensor:
    """(B, T): weights, 0 for tokens whose advantage is smaller than `min_advantage` in absolute value."""
    return weight_BT * (advantage_BT.abs() >= min_advantage)


def row_means(value_BT: Tensor, layout: RowLayout) -> Tensor:
    """(B,): mean of a value over the tokens of each row."""
    is_token_BT = (layout.node_BT != NO_NODE).to(value_BT.device)
    return (value_BT * is_token_BT).sum(dim=1) / is_token_BT.sum(dim=1)


def share_of_batch(inputs: dict[str, Any], num_micro_batches: int) -> Tensor:
    """How much a micro-batch counts in a mean over the whole batch: 1 on average over the micro-batches.

    Args:
        inputs: The micro-batch, with what [`credit_tokens`] made.
        num_micro_batches: Micro-batches of the generation batch, over all processes.

    Returns:
        () weights of its tokens / mean of that over all micro-batches.
    """
    weight = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
    return weight * num_micro_batches / inputs["num_items_in_batch"].clamp(min=1.0)


def entropy_of_the_batch(method: Method) -> Method:
    """Make the entropy bonus a mean over the trained tokens of the whole batch.

    TRL's is one over those of a micro-batch, and all micro-batches count the same. Of a tree that spans several, the
    first owns nearly all tokens, so those of the others would count more, and how a batch is divided would change its
    gradient. In TRL's loss the bonus is the only way for a gradient to reach the entropies: that gradient is scaled.
    The value of the loss, which is only logged, stays TRL's.

    Args:
        method: Of a trainer; it returns log-probabilities, entropies and anything else. `_loss_inputs` are the
            micro-batch it is called for, `None` outside of the loss.
    """

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = method(self, *args, **kwargs)
        entropies, inputs = outputs[1], self._loss_inputs
        if inputs is not None and entropies is not None and entropies.requires_grad:
            share = share_of_batch(inputs, self.args.steps_per_generation * self.accelerator.num_processes)
            entropies.register_hook(lambda gradient: gradient * share)
        return outputs

    return cast(Method, run)


def shuffle_micro_batches(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put shuffled rows back in order, and shuffle the micro-batches instead, so that a tree's rows stay together.

    Args:
        micro_batches: A generation batch, split; "row" holds each row's place before it was shuffled.
    """
    order = torch.cat([batch["row"] for batch in micro_batches]).argsort()
    size = len(order) // len(micro_batches)
    restored: list[dict[str, Any]] = [{} for _ in micro_batches]
    for key, value in micro_batches[0].items():
        is_per_row = isinstance(value, Tensor) and value.dim() > 0
        rows = torch.cat([batch[key] for batch in micro_batches])[order] if is_per_row else None
        for index, batch in enumerate(restored):
            batch[key] = value if rows is None else rows[index * size : (index + 1) * size]
    return [restored[index] for index in torch.randperm(len(restored)).tolist()]
