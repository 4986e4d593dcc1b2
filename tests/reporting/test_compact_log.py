"""The log in the terminal: a line of main metrics by default, all of them by choice; trackers get all either way."""

import math

import pytest
from tiny import spread_reward
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.reporting.console import HEADER_EVERY, CompactLog


STEP = {
    "loss": 0.01234,
    "reward": 0.5,
    "tree/kept_groups": 0.75,
    "tree/advantage_abs": 0.8,
    "num_tokens": 12345.0,
    "step_time": 1.5,
}


def test_a_line_has_what_to_watch_and_what_changed():
    log = CompactLog()
    header, first = log.lines({**STEP, "completions/mean_length": 27.25}, 5)
    assert header.split() == ["step", "loss", "reward", "change", "kept", "|A|", "length", "tokens", "s/step"]
    assert first.split() == ["5", "0.0123", "0.500", "-", "0.75", "0.80", "27.2", "12.3k", "1.50"]
    (second,) = log.lines({**STEP, "reward": 0.4, "completions/mean_length": 27.0}, 10)
    assert second.split() == ["10", "0.0123", "0.400", "-0.100", "0.75", "0.80", "27.0", "12.3k", "1.50"]
    assert len(header) == len(first) == len(second)


def test_what_was_not_measured_is_a_dash():
    _, line = CompactLog().lines({"loss": math.nan, "reward": None} | {"tree/kept_groups": None}, 1)
    assert line.split() == ["1", *"--------"]


def test_the_header_comes_again():
    log = CompactLog()
    counts = [len(log.lines(STEP, step)) for step in range(2 * HEADER_EVERY + 1)]
    assert [index for index, count in enumerate(counts) if count == 2] == [0, HEADER_EVERY, 2 * HEADER_EVERY]


def test_logs_of_other_kinds():
    log = CompactLog()
    evaluated = {"eval_reward": 0.25, "eval_loss": 0.5, "eval_runtime": 3.0, "eval_completions/mean_length": 9.0}
    (line,) = log.lines(evaluated, 20)
    assert line.split(maxsplit=1) == ["20", "eval_reward 0.25, eval_loss 0.5, eval_completions/mean_length 9"]
    assert log.lines({"train_runtime": 61.4, "train_loss": 0.00123}, 40) == [
        "trained to step 40 in 61 s, mean loss 0.00123"
    ]
    assert log.lines({"mine": 1}, 3) == ["{'mine': 1}"]  # nothing is hidden that is not known


@pytest.mark.parametrize("disable_tqdm", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_training_prints_a_line_a_log_and_keeps_every_metric(
    compact, disable_tqdm, model, tokenizer, dataset, make_args, capsys
):
    args = make_args(compact_log=compact, disable_tqdm=disable_tqdm, max_steps=2, logging_steps=1)
    trainer = TreeRPOTrainer(model, spread_reward, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    printed = "".join(capsys.readouterr())
    assert ("tree/token_sharing" in printed) == (not compact)
    assert ("s/step" in printed) == compact
    assert ("trained to step 2 in" in printed) == compact
    assert all("tree/token_sharing" in log and "entropy" in log for log in trainer.state.log_history[:2])


def test_a_user_may_take_the_log_away(model, tokenizer, dataset, make_args, capsys):
    args = make_args(disable_tqdm=True, max_steps=1, logging_steps=1)
    trainer = TreeRPOTrainer(model, spread_reward, args, train_dataset=dataset, processing_class=tokenizer)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    assert "s/step" not in "".join(capsys.readouterr())
