"""Batches that teach nothing: the warning, its cause and its fix; and no warning for a run that learns."""

import logging
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_faults_generation import with_end_bias
from tiny import EOS, PAD, make_tokenizer, spread, spread_reward

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.credit import ScoredTree, assign
from treerpo_trl.growth import TreeShape
from treerpo_trl.reporting.metrics import pool, tree_metrics
from treerpo_trl.reporting.starvation import FIRST_WARNING, StarvationWatch
from treerpo_trl.tree import ROOT, Segment, Tree


TAUGHT = {"tree/kept_groups": 0.01, "tree/value_range_max": 1.0, "tree/reward": 0.5, "tree/advantage_abs": 0.1}
TIED = {"tree/kept_groups": 0.0, "tree/value_range_max": 0.0, "tree/reward": 0.25}
UNSCORED = {"tree/kept_groups": 0.0}
CLOSE = {"tree/kept_groups": 0.0, "tree/value_range_max": 0.04, "tree/reward": 0.02}


def make_watch(is_main_process: bool = True, **options) -> StarvationWatch:
    options = {"advantage_estimator": "treerpo", "bf16": False, "report_to": "none", **options}
    return StarvationWatch(TreeRPOConfig("out", **options), is_main_process)


def watch_batches(caplog, batches, watch=None, weight=1.0) -> list[str]:
    """The warnings that these batches get."""
    caplog.clear()
    watch = watch or make_watch()
    for metrics in batches:
        watch.check(metrics, weight)
    return [record.getMessage() for record in caplog.records if record.name.endswith("starvation")]


# In training


SOON = 3  # batches, in place of FIRST_WARNING: the tests are faster


@pytest.fixture
def warns_soon(monkeypatch):
    monkeypatch.setattr("treerpo_trl.reporting.starvation.FIRST_WARNING", SOON)


def run(model, make_args, dataset, reward, **options) -> TreeRPOTrainer:
    args = make_args(
        **{"per_device_train_batch_size": 8, "segment_length": 2, "max_steps": SOON, "logging_steps": 99,
           "lr_scheduler_type": "constant", **options},
    )  # fmt: skip
    trainer = TreeRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return trainer


def has_moved(trainer) -> bool:
    return any(not torch.equal(x, trainer.before[name]) for name, x in trainer.model.named_parameters())


def constant(reward):
    return lambda completions, **kwargs: [reward] * len(completions)


def small(completions, **kwargs):
    return [0.05 * spread(text) for text in completions]


def lonely(completions, **kwargs):
    """A single completion of all is scored, so no two siblings are."""
    return [1.0, *[None] * (len(completions) - 1)]


SITUATIONS = {
    "small rewards": (small, {}, r"largest range .* was 0\.0[34]\d*, .*prune_threshold=0\.1 are .*Scale the rewards"),
    "no reward": (constant(None), {}, "every reward was None or NaN.*return numbers"),
    "NaN": (constant(math.nan), {}, "every reward was None or NaN.*return numbers"),
    "one reward": (lonely, {}, "no two siblings had a reward, as most were None or NaN.*return numbers"),
    "all wrong": (constant(0.0), {}, r"same value \(mean reward of a batch: 0\).* is 0 .*too hard.*solves sometimes"),
    "all kept, and equal": (constant(1.0), {"prune_threshold": None}, r"a batch: 1\).* is 0 and there is nothing"),
    "high threshold": (
        spread_reward,
        {"prune_threshold": 2.0, "advantage_estimator": "centered"},
        r"largest range .* was 0\.\d+, but only groups above prune_threshold=2\.0 .*prune_threshold=0\.\d+\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.usefixtures("warns_soon")
def test_a_run_that_learns_nothing_is_told_why_and_what_to_do(model, make_args, dataset, caplog, name):
    reward, options, message = SITUATIONS[name]
    trainer = run(model, make_args, dataset, reward, **options)
    assert not has_moved(trainer)
    (warning,) = [record.getMessage() for record in caplog.records if record.name.endswith("starvation")]
    assert re.search(rf"Nothing was learned from the last {SOON} batches: .*{message}", warning)


@pytest.mark.usefixtures("warns_soon")
def test_the_threshold_that_the_warning_names_trains(model, make_args, dataset, caplog):
    run(model, make_args, dataset, small)
    threshold = float(re.search(r"such as prune_threshold=(\S+)\.$", caplog.text.strip())[1])
    caplog.clear()
    assert has_moved(run(model, make_args, dataset, small, prune_threshold=threshold))
    assert "Nothing was learned" not in caplog.text


@pytest.mark.usefixtures("warns_soon")
def test_masked_truncated_completions_alone_are_told(model, make_args, dataset, caplog):
    model = with_end_bias(model, -1e4)
    with torch.no_grad():
        model.lm_head.bias[PAD] = -1e4  # which TRL takes for an end
    trainer = run(model, make_args, dataset, spread_reward, mask_truncated_completions=True)
    assert not has_moved(trainer)
    assert re.search(r"truncated, and mask_truncated.*Raise segment_length \(2\) or max_depth \(3\)", caplog.text)


@pytest.mark.usefixtures("warns_soon")
def test_a_run_that_learns_is_not_warned(model, make_args, dataset, caplog):
    assert has_moved(run(model, make_args, dataset, spread_reward, max_steps=SOON + 2, learning_rate=1e-5))
    assert "Nothing was learned" not in caplog.text


# When


def test_it_is_said_again_after_twice_as_many_batches(caplog):
    warnings = watch_batches(caplog, [TIED] * 100)
    assert [int(re.search(r"last (\d+) batches", warning)[1]) for warning in warnings] == [10, 20, 40, 80]


def test_rare_batches_that_teach_are_enough(caplog):
    assert watch_batches(caplog, [*[TIED] * (FIRST_WARNING - 1), TAUGHT] * 50) == []


def test_where_trees_are_compared_the_advice_is_not_about_siblings(caplog):
    """Siblings tie there as well, but a wider tree would not help."""
    equal = {"tree/kept_groups": 1.0, "tree/value_range_max": 0.0, "tree/reward": 0.0, "tree/advantage_abs": 0.0}
    watch = make_watch(advantage_estimator="optimal_baseline")
    (warning,) = watch_batches(caplog, [equal] * FIRST_WARNING, watch)
    assert "all completions of a batch had the same reward (0)" in warning and "branching_factor" not in warning


def test_a_new_drought_must_be_twice_as_long(caplog):
    dry, drier = [TIED] * FIRST_WARNING, [TIED] * 2 * FIRST_WARNING
    assert len(watch_batches(caplog, [*dry, TAUGHT, *dry, TAUGHT])) == 1
    assert len(watch_batches(caplog, [*dry, TAUGHT, *drier, TAUGHT])) == 2


def test_the_cause_is_of_the_batches_in_a_row_alone(caplog):
    (warning,) = watch_batches(caplog, [CLOSE, TAUGHT, *[UNSCORED] * FIRST_WARNING])
    assert "every reward was None" in warning


def test_of_several_causes_the_nearest_to_training_is_named(caplog):
    several = [UNSCORED] * 5 + [TIED] * 3 + [CLOSE] + [UNSCORED]
    (warning,) = watch_batches(caplog, several)
    assert "was 0.04, but only groups above prune_threshold=0.1" in warning
    (warning,) = watch_batches(caplog, [UNSCORED] * 9 + [TIED])
    assert "mean reward of a batch: 0.25" in warning
    (warning,) = watch_batches(caplog, [TIED] * 9 + [{**TIED, "tree/reward": 1.0}])
    assert "mean reward of a batch: 0.25 to 1)" in warning


# On several processes


SHAPE = TreeShape((3,), 2, 2)


def scored(rewards: list[float | None]) -> ScoredTree:
    tree = Tree.from_prompt([9]).grow({ROOT: [Segment((place + 2, EOS), True) for place in range(len(rewards))]})
    return assign(tree, dict(enumerate(rewards, start=1)))


@given(st.lists(st.lists(st.sampled_from([None, 0.0, 0.05, 1.0]), min_size=3, max_size=3), min_size=2, max_size=4))
def test_processes_see_what_one_would(rewards):
    """A batch is starved if no process has a group to train, and all are told the same range."""
    trees = [scored(given) for given in rewards]
    parts = [tree_metrics(part, SHAPE, [], {}, 0) for part in (trees[:1], trees[1:])]
    pooled, whole = pool(parts), pool([tree_metrics(trees, SHAPE, [], {}, 0)])
    watches = [make_watch(is_main_process) for is_main_process in (True, False)]
    for watch, metrics in zip(watches, (pooled, whole), strict=True):
        watch.check(metrics, 1.0)
    assert watches[0].batches_in_a_row == watches[1].batches_in_a_row == (not any(any(t.kept) for t in trees))
    assert watches[0].largest_range == watches[1].largest_range


def test_only_the_main_process_warns(caplog):
    caplog.set_level(logging.DEBUG)
    assert watch_batches(caplog, [TIED] * 30, make_watch(is_main_process=False)) == []
    assert len(watch_batches(caplog, [TIED] * 30, make_watch(is_main_process=True))) == 2
