"""A step's trees in a few numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a page and the index say of trees.

    Means are over the rows of the batch, as in TRL's log: a leaf that ended early counts for all the rows it fills.

    Args:
        trees: Number of trees.
        nodes: Number of nodes, prompts left out.
        leaves: Number of leaves.
        groups: Number of groups.
        kept_groups: Groups that are trained.
        mean_reward: Mean reward of the rows that have one; `None` if none has.
        mean_tokens: Mean completion length of the rows, in tokens; `None` if there are none.
    """

    trees: int
    nodes: int
    leaves: int
    groups: int
    kept_groups: int
    mean_reward: float | None
    mean_tokens: float | None

    @property
    def kept_share(self) -> float | None:
        """Share of the groups that are trained; `None` if there are no groups."""
        return self.kept_groups / self.groups if self.groups else None


def by_tree(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Tree -> its nodes, both in order.

    Raises:
        ValueError: A tree's nodes are not numbered 0, 1, 2, ...
    """
    trees: dict[int, list[Record]] = {}
    for record in records:
        trees.setdefault(record["tree"], []).append(record)
    for tree, nodes in trees.items():
        nodes.sort(key=lambda node: node["node"])
        if (numbers := [node["node"] for node in nodes]) != list(range(len(nodes))):
            raise ValueError(
                f"tree {tree} is not whole: its nodes are numbered {numbers[:9]}, not 0, 1, 2, ...; keep all nodes of "
                "a tree, and give the trees of each process a first_tree of their own"
            )
    return dict(sorted(trees.items()))


def summarise(trees: Iterable[Sequence[Record]]) -> Summary:
    """The numbers of some trees, each given by its nodes in order.

    Args:
        trees: Values of [`by_tree`].
    """
    count = nodes = leaves = groups = kept_groups = rows = scored_rows = 0
    rewards = tokens = 0.0
    for tree in trees:
        is_kept: dict[int, bool] = {}  # parent -> whether its children are trained
        lengths = [0] * len(tree)
        for record in tree[1:]:
            parent = record["parent"]
            is_kept[parent] = is_kept.get(parent, False) or record["kept"]
            lengths[record["node"]] = lengths[parent] + record["num_tokens"]
        ends = [record for record in tree[1:] if record["node"] not in is_kept]
        for record in ends:
            rows += record["rows"]
            tokens += record["rows"] * lengths[record["node"]]
            if record["reward"] is not None:
                scored_rows += record["rows"]
                rewards += record["rows"] * record["reward"]
        count += 1
        nodes += len(tree) - 1
        leaves += len(ends)
        groups += len(is_kept)
        kept_groups += sum(is_kept.values())
    return Summary(
        trees=count,
        nodes=nodes,
        leaves=leaves,
        groups=groups,
        kept_groups=kept_groups,
        mean_reward=rewards / scored_rows if scored_rows else None,
        mean_tokens=tokens / rows if rows else None,
    )
