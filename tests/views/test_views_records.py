"""Trees as a table: laws on random trees, and what the files are worth to others."""

import pickle
import tempfile
from pathlib import Path
from statistics import fmean

import datasets
import pandas
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from tiny import make_tokenizer
from view_trees import Texts, example_records, make_tree, scored_forests

from treerpo_trl.growth import TreeShape
from treerpo_trl.tree import ROOT
from treerpo_trl.views import read_trees, tree_records, write_trees
from treerpo_trl.views.files import replacing
from treerpo_trl.views.records import ADDED_LATER, SCHEMA, TREE_COLUMNS, read_summary
from treerpo_trl.views.summary import by_tree, summarise
from treerpo_trl.views.text import final_answer


TOKENIZER = make_tokenizer()


def records_of(forest, **options):
    shape, trees = forest
    return tree_records(trees, TOKENIZER, 7, shape=shape, **options)


def rows_of(shape, scored) -> list[int]:
    """The leaves of the rows, without those that only fill the batch."""
    slots = shape.slots(scored.tree)
    return slots if isinstance(shape, TreeShape) else slots[: len(scored.tree.leaves)]


@given(scored_forests())
@hypothesis_settings(max_examples=40)
def test_every_node_is_one_record_that_says_what_the_tree_says(forest):
    _, trees = forest
    records = records_of(forest, process=2, first_tree=5)
    assert [(record["tree"], record["node"]) for record in records] == [
        (5 + index, node) for index, scored in enumerate(trees) for node in range(len(scored.tree.nodes))
    ]
    assert all(set(record) == set(TREE_COLUMNS) for record in records)
    assert {(record["step"], record["process"]) for record in records} == {(7, 2)}
    for record in records:
        scored, index = trees[record["tree"] - 5], record["node"]
        node, is_leaf = scored.tree.nodes[index], index in scored.tree.leaves
        assert record["parent"] == node.parent
        assert record["depth"] == scored.tree.depths[index]
        assert record["token_ids"] == list(node.token_ids)
        assert record["num_tokens"] == len(node.token_ids)
        assert record["text"] == TOKENIZER.decode(node.token_ids)
        assert record["ended"] == node.ended
        assert record["is_rest"] == node.is_rest
        assert record["truncated"] == (is_leaf and not node.ended)
        assert record["value"] == scored.values[index]
        assert record["advantage"] == scored.advantages[index]
        assert record["kept"] == scored.kept[index]
        assert record["reward"] == (scored.rewards[index] if is_leaf else None)
        assert (record["answer"] is not None) == is_leaf


@given(scored_forests())
@hypothesis_settings(max_examples=40)
def test_a_nodes_rows_are_those_of_the_batch_that_pass_through_it(forest):
    shape, trees = forest
    records = by_tree(records_of(forest))
    for index, scored in enumerate(trees):
        passing = [0] * len(scored.tree.nodes)
        rows = rows_of(shape, scored)
        for leaf in rows:
            for node in (ROOT, *scored.tree.path(leaf)):
                passing[node] += 1
        assert [record["rows"] for record in records[index]] == passing
        assert sum(records[index][leaf]["rows"] for leaf in scored.tree.leaves) == len(rows)


@given(scored_forests())
@hypothesis_settings(max_examples=40)
def test_the_group_mean_is_that_of_the_valued_siblings(forest):
    for nodes in by_tree(records_of(forest)).values():
        assert nodes[ROOT]["group_mean"] is None
        for record in nodes[1:]:
            values = [other["value"] for other in nodes if other["parent"] == record["parent"]]
            valued = [value for value in values if value is not None]
            assert record["group_mean"] == (fmean(valued) if valued else None)


@given(scored_forests())
@hypothesis_settings(max_examples=40)
def test_a_file_gives_back_what_was_written(forest):
    records = records_of(forest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "step_000007.parquet"
        write_trees(records, path)
        assert read_trees(path) == records
        assert read_summary(path) == summarise(by_tree(records).values())
        assert [file.name for file in path.parent.iterdir()] == [path.name]


@given(scored_forests())
@hypothesis_settings(max_examples=40)
def test_the_summary_is_what_the_trainer_logs(forest):
    shape, trees = forest
    summary = summarise(by_tree(records_of(forest)).values())
    rows = [(scored, leaf) for scored in trees for leaf in rows_of(shape, scored)]
    rewards = [reward for scored, leaf in rows if (reward := scored.rewards[leaf]) is not None]
    assert summary.mean_reward == (pytest.approx(fmean(rewards)) if rewards else None)
    assert summary.mean_tokens == pytest.approx(fmean(len(scored.tree.completion_ids(leaf)) for scored, leaf in rows))
    groups = [(scored, group) for scored in trees for group in scored.tree.children if group]
    assert summary.groups == len(groups)
    assert summary.kept_groups == sum(any(scored.kept[child] for child in group) for scored, group in groups)
    assert summary.trees == len(trees)
    assert summary.nodes == sum(len(scored.tree.nodes) - 1 for scored in trees)
    assert summary.leaves == sum(len(scored.tree.leaves) for scored in trees)


def test_records_travel_between_processes():
    records = example_records()
    assert pickle.loads(pickle.dumps(records)) == records


def test_no_trees_make_a_file_too(tmp_path):
    write_trees([], tmp_path / "step_000001.parquet")
    assert read_trees(tmp_path / "step_000001.parquet") == []
    assert pq.read_schema(tmp_path / "step_000001.parquet").equals(SCHEMA)
    summary = read_summary(tmp_path / "step_000001.parquet")
    assert (summary.trees, summary.mean_reward, summary.kept_share) == (0, None, None)


def test_pandas_and_datasets_read_and_write_the_file(tmp_path):
    records, path = example_records(), tmp_path / "step_000010.parquet"
    write_trees(records, path)
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == records
    frame = pandas.read_parquet(path)
    assert frame["text"].tolist() == [record["text"] for record in records]
    assert frame["value"].isna().sum() == sum(record["value"] is None for record in records)
    # Written again, types are wider (large strings, 64-bit integers).
    frame.astype({"node": "int64", "rows": "int64"}).to_parquet(tmp_path / "pandas.parquet")
    loaded.to_parquet(tmp_path / "datasets.parquet")
    assert read_trees(tmp_path / "pandas.parquet") == records
    assert read_trees(tmp_path / "datasets.parquet") == records


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so \\boxed{7}.", "7"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} units", "\\frac{1}{2}"),
        ("\\boxed{ x } and \\boxed{cut {off", "x"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("\\boxed {5}", "5"),
        ("\\boxed{}", ""),
        ("\\boxed{open", "\\boxed{open"),
        ("first\n  last line  \n\n \t\n", "last line"),
        ("\\boxed", "\\boxed"),
        (" \n\t", None),
        ("", None),
    ],
)
def test_the_final_answer(completion, answer):
    assert final_answer(completion) == answer


def test_an_answer_is_found_in_the_whole_completion_without_special_tokens():
    texts = Texts()
    scored = make_tree(
        texts, "\\boxed{0}", {ROOT: ["so \\boxed{1", "no<eos>"], 1: ["2}<eos>", "\n<eos>"]}, [1.0, 0.0, 0.0]
    )
    records = tree_records([scored], texts, 0, shape=TreeShape((2, 2), 9, 18))
    assert [record["answer"] for record in records] == [None, None, "no", "12", "so \\boxed{1"]


def test_half_a_character_can_be_written(tmp_path):
    texts = Texts()
    scored = make_tree(texts, "?", {ROOT: ["a\ud83d", "b"]}, [1.0, 0.0])
    write_trees(tree_records([scored], texts, 0, shape=TreeShape((2,), 9, 9)), tmp_path / "step_000000.parquet")
    assert read_trees(tmp_path / "step_000000.parquet")[1]["text"] == "a?"


@pytest.mark.parametrize("branching", [(2,), (2, 3), (3, 2)])
def test_other_branching_factors_than_the_trees_are_refused(branching):
    texts = Texts()
    scored = make_tree(texts, "?", {ROOT: ["a", "b"], 1: ["c", "d"]}, [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"node \d at depth \d has 2 children, which branching"):
        tree_records([scored], texts, 0, shape=TreeShape(branching, 9, 9 * len(branching)))


def test_trees_of_two_processes_need_indices_of_their_own():
    records = example_records() + example_records()
    with pytest.raises(ValueError, match=r"tree 0 is not whole: its nodes are numbered \[0, 0, 1, 1.*first_tree"):
        by_tree(records)


def test_a_file_that_is_no_table_of_trees_is_named(tmp_path):
    path = tmp_path / "step_000001.parquet"
    for broken in (b"", b"not parquet at all"):
        path.write_bytes(broken)
        for read in (read_trees, read_summary):
            with pytest.raises(ValueError, match=r"step_000001\.parquet is broken, or no parquet file"):
                read(path)
    write_trees(example_records(), path)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)  # the footer is whole, the data are not
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"step_000001\.parquet is broken"):
        read_trees(path)
    with pytest.raises(FileNotFoundError):
        read_trees(tmp_path / "none.parquet")


def test_other_columns_are_named(tmp_path):
    path = tmp_path / "step_000001.parquet"
    table = pa.Table.from_pylist(example_records(), SCHEMA).drop_columns(["rows"])
    pq.write_table(table.append_column("colour", pa.array(["red"] * len(table))), path)
    for read in (read_trees, read_summary):
        with pytest.raises(ValueError, match=r"step_000001.*missing \['rows'\], unknown \['colour'\]"):
            read(path)


def test_files_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "step_000010.parquet"
    records = [{**record, "score_norm": 0.5} for record in example_records()]
    write_trees(records, path)
    assert read_trees(path) == records
    pq.write_table(pq.read_table(path).drop_columns(list(ADDED_LATER)), path)
    assert read_trees(path) == [{**record, "is_rest": None} for record in example_records()]
    assert read_summary(path).trees == 4


def test_a_column_of_another_type_is_named(tmp_path):
    path = tmp_path / "step_000001.parquet"
    table = pa.Table.from_pylist(example_records(), SCHEMA)
    place = table.schema.get_field_index("kept")
    pq.write_table(table.set_column(place, "kept", pa.array(["perhaps"] * len(table))), path)
    with pytest.raises(ValueError, match=r"step_000001.* string in column 'kept', not bool"):
        read_trees(path)


def test_a_part_of_a_table_does_not_pass_for_the_whole(tmp_path):
    path = tmp_path / "step_000010.parquet"
    write_trees(example_records(), path)
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.compute.less(table["tree"], 2)), path)  # with the footer of the whole
    assert read_summary(path).trees == 2


def test_a_write_that_is_cut_short_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "step_000010.parquet"
    write_trees(example_records(), path)
    before = path.read_bytes()

    def cut_short(table, where, **options):
        Path(where).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", cut_short)
    with pytest.raises(KeyboardInterrupt):
        write_trees([], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_two_writers_of_one_file_leave_one_whole_file(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
