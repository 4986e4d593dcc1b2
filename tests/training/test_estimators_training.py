"""Every advantage estimator, from the configuration to what people see of a run; trees without siblings."""

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import places
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from test_config import make
from test_trainer import train
from tiny import EOS, coin_reward, make_tokenizer, spread_reward
from transformers import Qwen2ForCausalLM
from trl import TrlParser

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.checks.compatibility import UNSCALED_ESTIMATORS
from treerpo_trl.credit import ESTIMATORS, assign_batch
from treerpo_trl.growth import TreeShape
from treerpo_trl.growth.backends import VLLMBackend
from treerpo_trl.growth.backends.vllm import _Completion
from treerpo_trl.reporting.starvation import StarvationWatch
from treerpo_trl.tree import ROOT, Segment, Tree
from treerpo_trl.views import print_tree, read_trees, tree_records


# Shapes of which a group may have a single member, which only a baseline from other trees can train.
LONELY = {
    "one": {"branching_factor": 1, "max_depth": 1},
    "flat": {"branching_factor": 4, "max_depth": 1},
    "path": {"branching_factor": 1, "max_depth": 3},
    "forks below": {"branching_factor": [1, 1, 2, 2], "max_depth": None},
    "no forks below": {"branching_factor": [4, 1], "max_depth": None},
}


# Trees without siblings


@pytest.mark.parametrize("shape", LONELY)
def test_trees_without_siblings_train(model, make_args, dataset, shape):
    args = make_args(
        **LONELY[shape], advantage_estimator="optimal_baseline", segment_length=3, max_steps=2, log_completions=True
    )
    trainer = train(model, args, dataset, spread_reward)
    branching = trainer.tree_shape.branching
    assert len(trainer.last_trees) == 16 // math.prod(branching)
    for scored in trainer.last_trees:
        assert all(scored.kept[1:]) and not scored.kept[ROOT]
        assert any(scored.advantages)
    assert trainer._starvation_watch.batches_in_a_row == 0
    for log in trainer.state.log_history[:2]:
        assert log["tree/kept_groups"] == 1 and log["tree/trained_tokens"] == 1
        assert all(math.isfinite(value) for value in log.values() if isinstance(value, float)), log
        # Upstream compares the rows of a prompt, and one alone does not differ from itself.
        assert (log["frac_reward_zero_std"] == 1) == (math.prod(branching) == 1)
        assert ("tree/value_range_max" in log) == (max(branching) > 1)


def test_one_path_is_a_completion_of_grpo(model, make_args, dataset):
    """Every row is a prompt of its own, holds loss on each of its tokens, and is drawn as one completion."""
    batches = []

    class Spy(TreeRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

    options = {"branching_factor": 1, "max_depth": 1, "segment_length": 6, "max_steps": 1}
    args = make_args(**options, advantage_estimator="optimal_baseline")
    trainer = Spy(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    (batch,) = batches
    mask = batch["completion_mask"]
    assert torch.equal(batch["tool_mask"] * mask, mask.float()) and batch["num_items_in_batch"] == mask.sum()
    prompts = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    assert len(set(prompts)) == 16
    assert batch["advantages"].square().mul(mask).sum() / mask.sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("num_generations_eval", [None, 1, 2])
def test_evaluation_of_trees_without_siblings(model, make_args, dataset, num_generations_eval):
    args = make_args(
        branching_factor=1, max_depth=1, advantage_estimator="optimal_baseline", max_steps=1, eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4, num_generations_eval=num_generations_eval,
    )  # fmt: skip
    trainer = TreeRPOTrainer(
        model, spread_reward, args, train_dataset=dataset, eval_dataset=dataset.select(range(4)),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert math.isfinite(log["eval_reward"]) and math.isfinite(log["eval_loss"])
    assert trainer.num_generations_eval == (num_generations_eval or 1)


def test_streams_of_prompts_for_single_paths(model, make_args, dataset):
    options = {"branching_factor": 1, "max_depth": 2, "segment_length": 2, "max_steps": 2}
    args = make_args(**options, advantage_estimator="optimal_baseline")
    train(model, args, dataset.to_iterable_dataset(), spread_reward)


# Configuration


def test_one_completion_a_prompt_resolves():
    options = {"branching_factor": 1, "advantage_estimator": "optimal_baseline"}
    config = make(**options, max_depth=1, gradient_accumulation_steps=4)
    assert (config.num_generations, config.num_generations_eval) == (1, 1)
    assert (config.generation_batch_size, config.steps_per_generation) == (32, 4)
    assert make(**options, num_generations=1, max_depth=4).branching_factor == [1, 1, 1, 1]
    assert make(**options, generation_batch_size=24, per_device_train_batch_size=8).steps_per_generation == 3
    assert make(**options, num_generations_eval=4).num_generations_eval == 4
    with pytest.raises(ValueError, match="makes 1 leaves, but num_generations is 4"):
        make(**options, num_generations=4)


def test_a_batch_of_one_completion_is_refused(monkeypatch):
    options = {"branching_factor": 1, "advantage_estimator": "optimal_baseline", "per_device_train_batch_size": 1}
    message = r"per_device_train_batch_size \(1\) x steps_per_generation \(1\) = 1 completion, .* Raise"
    with pytest.raises(ValueError, match=message):
        make(**options)
    assert make(**options, gradient_accumulation_steps=2).num_generations == 1


@pytest.mark.parametrize("branching", [["1"], ["1", "1", "2", "2"]])
def test_the_command_line_takes_them(branching):
    flags = ["--output_dir", "out", "--bf16", "false", "--advantage_estimator", "optimal_baseline"]
    (config,) = TrlParser((TreeRPOConfig,)).parse_args_and_config([*flags, "--branching_factor", *branching])
    assert config.num_generations == math.prod(map(int, branching))
    assert config.branching_factor == (list(map(int, branching)) if len(branching) > 1 else [1, 1])


@pytest.mark.parametrize(("yaml", "expected"), [("1", [1, 1]), ("[1, 2]", [1, 2])])
def test_yaml_takes_them(tmp_path, yaml, expected):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"branching_factor: {yaml}\nmax_depth: 2\nadvantage_estimator: optimal_baseline\n"
        "output_dir: out\nbf16: false\n"
    )
    (config,) = TrlParser((TreeRPOConfig,)).parse_args_and_config(["--config", str(path)])
    assert (config.branching_factor, config.num_generations) == (expected, math.prod(expected))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_documented_where_people_look_for_it(name):
    """In the class, in the help of the command line, and in the page on choosing a tree."""
    fields = TreeRPOConfig.__dataclass_fields__
    assert f'`"{name}"`' in TreeRPOConfig.__doc__
    assert f"'{name}'" in fields["advantage_estimator"].metadata["help"]
    assert f'`"{name}"`' in (places.ROOT / "docs" / "choose.md").read_text()


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("optimal-baseline", "optimal_baseline"), ("tree_rl", "treerl"), ("TreePO", "treepo"), ("rloo_leave_one_out",
     "leave_one_out")],
)  # fmt: skip
def test_a_misspelt_estimator_is_told_with_the_nearest(misspelt, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        make(advantage_estimator=misspelt)


def two_trees() -> tuple[list[Tree], list[dict[int, float | None]]]:
    tree = Tree.from_prompt([5]).grow({ROOT: [Segment((2,), False), Segment((3, 3), False)]})
    tree = tree.grow({1: [Segment((4,), True), Segment((5,), True)], 2: [Segment((6,), True), Segment((7,), True)]})
    return [tree, tree], [{3: 0.0, 4: 0.5, 5: 0.25, 6: 0.25}, {3: 0.0, 4: 0.0, 5: 0.25, 6: 0.5}]


def credit(rewards: list[dict[int, float | None]], name: str) -> list[float]:
    scored = assign_batch(two_trees()[0], rewards, name, None, rows_below=TreeShape((2, 2), 2, 4).rows_below)
    return [advantage for tree in scored for advantage in tree.advantages]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unscaled_estimators_are_those_that_keep_the_scale_of_rewards(name):
    """Only with these, `scale_rewards=False` says the same."""
    rewards = two_trees()[1]
    doubled = [{leaf: 2 * reward for leaf, reward in of_tree.items()} for of_tree in rewards]
    once, twice = credit(rewards, name), credit(doubled, name)
    is_unscaled = twice == pytest.approx([2 * advantage for advantage in once])
    assert is_unscaled == (name in UNSCALED_ESTIMATORS)
    if is_unscaled:
        assert make(advantage_estimator=name, scale_rewards=False).scale_rewards == "none"
    else:
        with pytest.raises(ValueError, match="advantage_estimator scales advantages"):
            make(advantage_estimator=name, scale_rewards=False)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.0])
def test_equal_rewards_have_no_advantage(name, reward):
    """Rounding is no signal: what is divided by its own size could make one of it."""
    rewards = [dict.fromkeys(of_tree, reward) for of_tree in two_trees()[1]]
    assert max(map(abs, credit(rewards, name))) < 1e-12


@pytest.mark.parametrize(
    ("logprobs", "norm"),
    [([0.0], 0.0), ([math.log(0.5), math.log(0.25)], 0.25 + 0.5625), ([-math.inf], 1.0), ([-1.0, math.nan], None)],
)
def test_a_segment_of_vllm_has_a_score_norm_by_its_log_probabilities(logprobs, norm):
    engine = SimpleNamespace(generation_kwargs={"stop": ["="]}, mode="colocate", tensor_parallel_size=1)
    backend = VLLMBackend(engine, [EOS], make_tokenizer())
    plus, equals = make_tokenizer()("+=")["input_ids"]
    whole = backend._cut([], _Completion([plus] * len(logprobs), logprobs, False), len(logprobs))
    cut = backend._cut([], _Completion([*[plus] * (len(logprobs) - 1), equals, plus], [*logprobs, -9.0], True), 9)
    assert (whole.ended, cut.ended) == (False, True) and len(cut.token_ids) == len(logprobs)
    for segment in (whole, cut):  # what comes after a stop string is not counted
        found = segment.score_norms and sum(segment.score_norms)
        assert found == (norm if norm is None else pytest.approx(norm))


# What people see


@pytest.fixture(scope="module")
def runs(model_path, tmp_path_factory):
    """Estimator -> a run of two updates on one batch of trees, with everything written down that can be."""
    made = {}

    def run(name: str) -> TreeRPOTrainer:
        if name not in made:
            made[name] = start(model_path, tmp_path_factory.mktemp(name), name)
            made[name].train()
        return made[name]

    return run


def start(model_path, folder, name, **options) -> TreeRPOTrainer:
    options = {"branching_factor": [2, 2], **options}
    args = TreeRPOConfig(
        str(folder), segment_length=3, per_device_train_batch_size=16,
        num_iterations=2, max_steps=2, learning_rate=1e-2, logging_steps=1, save_steps=1, report_to="none", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, advantage_estimator=name, log_trees=True,
        log_completions=True, save_strategy=options.pop("save_strategy", "steps"), **options,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(16)]})
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return TreeRPOTrainer(model, partly, args, train_dataset=dataset, processing_class=make_tokenizer())


def partly(prompts, completions, **kwargs) -> list[float | None]:
    """0 or 1, and nothing for one prompt of four."""
    rewards = coin_reward(completions)
    return [
        None if int(prompt.split("+")[0]) % 4 == 0 else reward for prompt, reward in zip(prompts, rewards, strict=True)
    ]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_metrics_say_what_was_trained(runs, name):
    trainer = runs(name)
    log = trainer.state.log_history[0]
    groups = [(scored, group) for scored in trainer.last_trees for group in scored.tree.children if group]
    kept = [any(scored.kept[child] for child in group) for scored, group in groups]
    assert log["tree/kept_groups"] == pytest.approx(sum(kept) / len(kept))
    if not ESTIMATORS[name].prunes:  # every node that has a value
        for scored in trainer.last_trees:
            assert scored.kept[1:] == tuple(value is not None for value in scored.values[1:])
    nodes = [(scored, node) for scored in trainer.last_trees for node in range(len(scored.kept)) if scored.kept[node]]
    assert log["tree/advantage_abs"] == pytest.approx(sum(abs(s.advantages[n]) for s, n in nodes) / len(nodes))
    trained = sum(len(s.tree.nodes[n].token_ids) for s, n in nodes)
    assert log["tree/trained_tokens"] == pytest.approx(
        trained / sum(scored.tree.num_sampled_tokens for scored in trainer.last_trees)
    )
    assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
    if ESTIMATORS[name].has_unit_rms:
        squares = sum(len(s.tree.nodes[n].token_ids) * s.advantages[n] ** 2 for s, n in nodes)
        assert squares / trained == pytest.approx(1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_views_show_it(runs, name, capsys):
    trainer = runs(name)
    folder = Path(trainer.args.output_dir) / "trees"
    records = read_trees(folder / "step_000002.parquet")
    assert records == tree_records(trainer.last_trees, make_tokenizer(), 2, shape=trainer.tree_shape)
    measured = [record["score_norm"] for record in records if record["depth"] > 0]
    if name == "optimal_baseline":
        tokens = [record["num_tokens"] for record in records if record["depth"] > 0]
        assert all(0 < norm < 2 * length for norm, length in zip(measured, tokens, strict=True))
    else:
        assert measured == [None] * len(measured)
    page = (folder / "step_000002.html").read_text()
    columns = json.loads(page.split('id="tree-0">')[1].split("</script>")[0])
    assert True in columns["kept"] and max(map(abs, columns["advantage"])) > 0
    assert (folder / "index.html").exists()
    for scored in trainer.last_trees:
        capsys.readouterr()
        print_tree(scored, make_tokenizer())
        shown = capsys.readouterr().out
        assert shown.count("A=") == sum(scored.kept)
        assert shown.count(" no value") == sum(value is None for value in scored.values[1:])
        assert ESTIMATORS[name].prunes or " pruned" not in shown


@pytest.mark.parametrize("name", ["group_std", "treepo", "optimal_baseline"])
def test_a_run_goes_on_between_two_updates_on_the_same_trees(runs, model_path, tmp_path, name):
    """With the same advantages and score norms."""
    unbroken = runs(name)
    checkpoint = Path(unbroken.args.output_dir) / "checkpoint-1"
    resumed = start(model_path, tmp_path / "resumed", name, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.last_trees == unbroken.last_trees
    for parameter, other in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_a_run_of_single_paths_goes_on_between_two_updates(model_path, tmp_path):
    name, options = "optimal_baseline", {"branching_factor": 1, "max_depth": 1}
    unbroken = start(model_path, tmp_path / "unbroken", name, **options)
    unbroken.train()
    resumed = start(model_path, tmp_path / "resumed", name, save_strategy="no", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-1"))
    assert resumed.last_trees == unbroken.last_trees and len(resumed.last_trees) == 16
    for parameter, other in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize(
    ("name", "against", "threshold"),
    [("group_std", "its siblings", "0.1"), ("treerl", "its tree", "none"),
     ("optimal_baseline", "the other trees of the batch", "none")],
)  # fmt: skip
def test_the_model_card_says_what_steps_were_compared_with(runs, name, against, threshold):
    trainer = runs(name)
    trainer.create_model_card()
    text = ModelCard.load(Path(trainer.args.output_dir) / "README.md").text
    assert f"trains every step against {against}: the\nvalue of a step" in text
    assert f"| Advantage estimator | `{name}` |" in text and f"| Prune threshold | {threshold} |" in text


# Nothing to learn


@pytest.mark.parametrize("shape", ["one", "forks below"])
@pytest.mark.parametrize(
    ("reward", "message"),
    [(0.3, "same (reward|value).*0.3.*nothing to compare.*too hard or too easy"), (None, "every reward was None")],
)
def test_a_batch_that_teaches_nothing_is_told_without_siblings(
    model, make_args, dataset, caplog, monkeypatch, shape, reward, message
):
    monkeypatch.setattr("treerpo_trl.reporting.starvation.FIRST_WARNING", 2)
    args = make_args(**LONELY[shape], advantage_estimator="optimal_baseline", segment_length=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = TreeRPOTrainer(
        model, lambda completions, **_: [reward] * len(completions), args, train_dataset=dataset,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    (warning,) = [record.getMessage() for record in caplog.records if record.name.endswith("starvation")]
    assert re.search(message, warning), warning


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_that_learns_is_not_warned(runs, name):
    watch = runs(name)._starvation_watch
    assert isinstance(watch, StarvationWatch) and watch.batches_in_a_row == 0
