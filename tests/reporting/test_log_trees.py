"""Trees written down while training: which steps, which trees, and that the files say what was trained."""

import json
import logging
import re
import resource
from pathlib import Path

import pytest
from tiny import coin_reward, make_tokenizer

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.callbacks import TreeLoggingCallback
from treerpo_trl.views import print_tree, read_trees, tree_records


ROOT_LINE = re.compile(r"^[^\s├└│].*V=", re.MULTILINE)  # the prompt's, at the top of a printed tree


def make_trainer(model, args, dataset) -> TreeRPOTrainer:
    return TreeRPOTrainer(model, coin_reward, args, train_dataset=dataset, processing_class=make_tokenizer())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_k_steps_the_trees_that_were_trained_are_on_disk(model, make_args, dataset, capsys):
    args = make_args(log_trees=True, log_trees_steps=2, max_steps=5, num_trees_to_print=1)
    make_trainer(model, args, dataset).train()
    folder = Path(args.output_dir) / "trees"
    steps = [f"step_{step:06d}.{kind}" for step in (2, 4, 5) for kind in ("html", "parquet")]
    assert names(folder) == ["index.html", *steps]
    for step in (2, 4):
        records = read_trees(folder / f"step_{step:06d}.parquet")
        assert {record["step"] for record in records} == {step}
        assert {record["tree"] for record in records} == {0, 1}
    assert len(ROOT_LINE.findall(capsys.readouterr().out)) == 3  # one a step
    assert "step_000004.html" in (folder / "index.html").read_text()


@pytest.mark.parametrize("num_trees", [0, 1, 2])
def test_those_with_most_to_learn_from_are_printed(model, make_args, dataset, capsys, num_trees):
    trainer = make_trainer(model, make_args(max_steps=1), dataset)
    trainer.train()
    pruned, kept = sorted(trainer.last_trees, key=lambda scored: sum(scored.kept))
    assert sum(pruned.kept) < sum(kept.kept)
    trainer.last_trees = [pruned, kept]
    capsys.readouterr()
    for scored in [kept, pruned][:num_trees]:
        print_tree(scored, make_tokenizer())
    expected = capsys.readouterr().out
    callback = TreeLoggingCallback(trainer, steps=1, num_trees_to_print=num_trees)
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert capsys.readouterr().out == expected


def test_the_newest_trees_are_those_of_the_trainer(model, make_args, dataset):
    args = make_args(log_trees=True, max_steps=2)
    assert args.logging_steps == 1
    trainer = make_trainer(model, args, dataset)
    trainer.train()
    records = read_trees(Path(args.output_dir) / "trees" / "step_000002.parquet")
    expected = tree_records(trainer.last_trees, make_tokenizer(), 2, shape=trainer.tree_shape)
    assert records == expected
    page = (Path(args.output_dir) / "trees" / "step_000002.html").read_text()
    for scored in trainer.last_trees:
        assert json.dumps(make_tokenizer().decode(scored.tree.prompt_ids))[1:-1] in page


def test_nothing_is_written_unless_asked(model, make_args, dataset):
    args = make_args(max_steps=1)
    make_trainer(model, args, dataset).train()
    assert not (Path(args.output_dir) / "trees").exists()


def test_a_page_holds_as_many_trees_as_asked_and_further_ones_the_others(model, make_args, dataset, capsys):
    args = make_args(max_steps=1)
    trainer = make_trainer(model, args, dataset)
    trainer.add_callback(TreeLoggingCallback(trainer, steps=1, max_trees_per_page=1))
    trainer.train()
    folder = Path(args.output_dir) / "trees"
    page = (folder / "step_000001.html").read_text()
    assert 'id="tree-0">' in page and 'id="tree-1">' not in page
    assert 'id="tree-1">' in (folder / "step_000001-2.html").read_text()
    assert len({record["tree"] for record in read_trees(folder / "step_000001.parquet")}) == 2
    assert not re.search(r"\d tok", capsys.readouterr().out)  # lengths of the nodes of a printed tree


def test_a_folder_that_cannot_be_written_to_costs_a_warning(model, make_args, dataset, caplog):
    args = make_args(log_trees=True, max_steps=2)
    trainer = make_trainer(model, args, dataset)
    (Path(args.output_dir) / "trees").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="treerpo_trl.reporting.callbacks"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert "The trees of step 1 could not be written to" in caplog.text


def test_a_full_disk_costs_a_warning_and_no_half_file(model, make_args, dataset, caplog):
    """The most bytes that a file may have stand for those that are left."""
    trainer = make_trainer(model, make_args(max_steps=1), dataset)
    trainer.train()
    callback = TreeLoggingCallback(trainer, steps=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (warning,) = [record.message for record in caplog.records if record.name == "treerpo_trl.reporting.callbacks"]
    assert warning.startswith("The trees of step 1 could not be written to")
    assert names(Path(trainer.args.output_dir) / "trees") == ["step_000001.parquet"]  # the page is larger


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_trees_steps": 5}, "log_trees_steps is 5, but log_trees is False; set log_trees=True"),
        ({"log_trees": True, "log_trees_steps": 0}, "log_trees_steps is 0; trees are written every 1 or more steps"),
        ({"num_trees_to_print": -1}, "num_trees_to_print is -1; use 0 to print none"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TreeRPOConfig(str(tmp_path), per_device_train_batch_size=8, **options)
    if options.get("log_trees_steps") == 0:
        with pytest.raises(ValueError, match="steps is 0"):
            TreeLoggingCallback(None, steps=0)
