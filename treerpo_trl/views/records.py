"""Trees as a table: one row per node, to keep in parquet files and to draw pages from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..credit import ScoredTree
from ..growth import Shape
from ..tree import ROOT
from .files import replacing
from .summary import Record, Summary, by_tree, summarise
from .text import Tokenizer, decode, leaf_answer, pieces


# One row per node, the prompt (the root, node 0) included.
TREE_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "step": (pa.int64(), "optimizer step at which the tree was grown"),
    "tree": (pa.int32(), "index of the tree within the step, over all processes"),
    "process": (pa.int32(), "index of the process that grew it"),
    "node": (pa.int32(), "index of the node within the tree; 0 is the prompt, a child follows its parent"),
    "parent": (pa.int32(), "node of the parent; -1 at the prompt"),
    "depth": (pa.int32(), "0 at the prompt"),
    "text": (pa.string(), "the node's own tokens, decoded with special tokens"),
    "token_ids": (pa.list_(pa.int32()), "the node's own tokens"),
    "num_tokens": (pa.int32(), "their number"),
    "ended": (pa.bool_(), "whether generation is over after the node: it drew EOS or a stop string"),
    "truncated": (pa.bool_(), "a leaf that did not end"),
    "value": (pa.float64(), "mean of the children's values, a leaf's reward; null if no leaf below was scored"),
    "group_mean": (pa.float64(), "mean value of the node's group, itself included; null at the prompt"),
    "advantage": (pa.float64(), "advantage, by the estimator of the run; 0 if the node is not trained"),
    "kept": (pa.bool_(), "whether the node is trained: it has a value, and its group was not pruned"),
    "reward": (pa.float64(), "a leaf's weighted sum over the reward functions; null elsewhere or if unscorable"),
    "answer": (pa.string(), "a leaf's final answer, for display; null elsewhere"),
    "rows": (
        pa.int32(),
        "rows of the batch that pass through the node: leaves of the complete tree below its place; with "
        "split_rule='uncertainty' its leaves, itself if it is one",
    ),
    "score_norm": (pa.float64(), "squared norm of the score, summed over the tokens; null if it was not measured"),
    "is_rest": (pa.bool_(), "whether a fork cut the node from its parent: the two were drawn as one segment"),
    "sampled": (pa.list_(pa.bool_()), "whether each token was sampled, or answered by tools; null if all were"),
    "pieces": (
        pa.list_(pa.string()),
        "the text in turns: what the model wrote, what tools answered, what it wrote then, ...; null if none answered",
    ),
}
ADDED_LATER = ("score_norm", "is_rest", "sampled", "pieces")  # null in files that lack them
SCHEMA = pa.schema([(name, data_type) for name, (data_type, _) in TREE_COLUMNS.items()])
SUMMARY_KEY = b"treerpo_trl.summary"


def tree_records(
    trees: Sequence[ScoredTree],
    tokenizer: Tokenizer,
    step: int,
    *,
    shape: Shape,
    process: int = 0,
    first_tree: int = 0,
) -> list[dict[str, Any]]:
    """One plain dict per node, with the columns of `TREE_COLUMNS`.

    Args:
        trees: One process's trees, such as `trainer.last_trees`.
        tokenizer: Decodes the steps.
        step: The optimizer step.
        shape: What the trees were grown with, such as `trainer.tree_shape`.
        process: Index of the process.
        first_tree: Index of the first of `trees` within the step: how many trees the processes before hold.

    Returns:
        Records of plain Python values, tree by tree, each tree's nodes in order.

    Raises:
        ValueError: A tree was grown with another shape.
    """
    return [
        {"step": step, "tree": first_tree + index, "process": process, **record}
        for index, scored in enumerate(trees)
        for record in _node_records(scored, tokenizer, shape)
    ]


def _node_records(scored: ScoredTree, tokenizer: Tokenizer, shape: Shape) -> list[dict[str, Any]]:
    tree, rows, records = scored.tree, shape.rows_below(scored.tree), []
    group_means = [_group_mean(scored, group) for group in tree.children]
    for index, node in enumerate(tree.nodes):
        is_leaf = index != ROOT and not tree.children[index]
        records.append(
            {
                "node": index,
                "parent": node.parent,
                "depth": tree.depths[index],
                "text": decode(tokenizer, node.token_ids),
                "token_ids": list(node.token_ids),
                "num_tokens": len(node.token_ids),
                "ended": node.ended,
                "truncated": is_leaf and not node.ended,
                "value": scored.values[index],
                "group_mean": None if index == ROOT else group_means[node.parent],
                "advantage": scored.advantages[index],
                "kept": scored.kept[index],
                "reward": scored.rewards.get(index),
                "answer": leaf_answer(tree, index, tokenizer) if is_leaf else None,
                "rows": rows[index],
                "score_norm": node.score_norm,
                "is_rest": node.is_rest,
                "sampled": None if node.sampled is None else list(node.sampled),
                "pieces": None if node.sampled is None else pieces(tokenizer, node),
            }
        )
    return records


def _group_mean(scored: ScoredTree, group: Sequence[int]) -> float | None:
    values = [value for child in group if (value := scored.values[child]) is not None]
    return fmean(values) if values else None


def write_trees(records: Sequence[Record], path: str | Path) -> None:
    """Write a step's records to a parquet file, in one go: a reader never meets half of it.

    Args:
        records: Of [`tree_records`], of all processes; may be empty.
        path: The file; [`~treerpo_trl.views.files.step_path`] names it so that the index finds it.
    """
    # With its numbers in the footer, the index need not read the trees.
    summary = json.dumps(asdict(summarise(by_tree(records).values())))
    table = pa.Table.from_pylist(list(records), SCHEMA.with_metadata({SUMMARY_KEY: summary}))
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_trees(path: str | Path) -> list[dict[str, Any]]:
    """The records of a parquet file that [`write_trees`] wrote.

    Raises:
        ValueError: It is no parquet file, or holds other columns (the message names the file and the columns).
    """
    with _naming(path):
        table = pq.read_table(path)
    _check_columns(table.schema, path)
    for name in ADDED_LATER:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table)))
    # What pandas or datasets wrote again has wider types.
    columns = [_cast(table, field, path) for field in SCHEMA]
    records: list[dict[str, Any]] = pa.table(columns, schema=SCHEMA).to_pylist()
    return records


def _cast(table: pa.Table, field: pa.Field, path: str | Path) -> pa.ChunkedArray:
    try:
        return table[field.name].cast(field.type)
    except pa.ArrowException as error:
        raise ValueError(
            f"{path} has {table[field.name].type} in column '{field.name}', not {field.type} ({error}); write it "
            "again with write_trees, or move it out of the folder"
        ) from error


def read_summary(path: str | Path) -> Summary:
    """The numbers of a parquet file's trees, from its footer where they stand there.

    Raises:
        ValueError: See [`read_trees`].
    """
    with _naming(path):
        metadata = pq.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    _check_columns(schema, path)
    if (written := (schema.metadata or {}).get(SUMMARY_KEY)) is not None:
        summary = Summary(**json.loads(written))
        # A table that was filtered may have kept the numbers of the whole.
        if summary.trees + summary.nodes == metadata.num_rows:
            return summary
    return summarise(by_tree(read_trees(path)).values())


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Errors of pyarrow name the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:  # a damaged page of data is an OSError
        raise ValueError(f"{path} is broken, or no parquet file of trees: {error}") from error


def _check_columns(schema: pa.Schema, path: str | Path) -> None:
    missing = [name for name in SCHEMA.names if name not in (*schema.names, *ADDED_LATER)]
    unknown = [name for name in schema.names if name not in SCHEMA.names]
    if missing or unknown:
        raise ValueError(
            f"{path} has other columns than the trees of this version of treerpo_trl: missing {missing}, unknown "
            f"{unknown}; write it again with write_trees, or move it out of the folder"
        )
