"""TreeRPOTrainer with every split rule: what reaches the loss, the logs, the files, and a run that goes on."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from tiny import make_tokenizer, spread_reward
from transformers import Qwen2ForCausalLM

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.trainers.resuming import pack, unpack
from treerpo_trl.views import print_tree, read_trees, tree_records


FORKS = {"split_rule": "uncertainty", "max_completion_length": 10}
RULES = {
    "delimiter": {"split_rule": "delimiter", "step_delimiters": ["3", "=", "b", "+"], "branching_factor": [2, 3],
                  "segment_length": 4, "max_completion_length": 10, "advantage_estimator": "centered"},
    "delimiter, baseline": {"split_rule": "delimiter", "step_delimiters": ["3", "=", "b"], "branching_factor": [1, 3],
                            "segment_length": 4, "max_completion_length": 12, "min_segment_length": 2,
                            "advantage_estimator": "optimal_baseline"},
    "forks": {**FORKS, "num_trunks": 2, "forks_per_trunk": 1, "continuations_per_fork": 2,
              "advantage_estimator": "group_std", "min_segment_length": 3},
    "forks, baseline": {**FORKS, "forks_per_trunk": 2, "fork_rounds": 2, "uncertainty_measure": "entropy",
                        "min_segment_length": 2, "advantage_estimator": "optimal_baseline", "loss_weighting": "node"},
}  # fmt: skip
LEAVES = {"delimiter": 6, "delimiter, baseline": 3, "forks": 6, "forks, baseline": 5}


class Watched(TreeRPOTrainer):
    """Keeps what goes into the loss."""

    def _generate_and_score_completions(self, inputs):
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch


def start(model_path, folder, rule, **options) -> Watched:
    batch = 4 * LEAVES[rule]
    args = TreeRPOConfig(
        str(folder), per_device_train_batch_size=batch // 2, steps_per_generation=2, gradient_accumulation_steps=1,
        num_iterations=1, max_steps=4, learning_rate=1e-2, logging_steps=1, save_steps=1, report_to="none",
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, log_completions=True, log_trees=True,
        save_strategy=options.pop("save_strategy", "no"), **RULES[rule], **options,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": [f"{i}+{'7' * (i % 3)}=" for i in range(16)]})
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return Watched(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer())


@pytest.fixture(scope="module")
def runs(model_path, tmp_path_factory):
    """Rule -> a run of four updates on two batches of trees, with everything written down that can be."""
    made = {}

    def run(rule: str) -> Watched:
        if rule not in made:
            # One that a run goes on from in the middle of a batch.
            strategy = "steps" if rule == "forks" else "no"
            made[rule] = start(model_path, tmp_path_factory.mktemp("run"), rule, save_strategy=strategy)
            made[rule].train()
        return made[rule]

    return run


@pytest.mark.parametrize("rule", RULES)
def test_each_trained_token_is_in_the_loss_once(runs, rule):
    trainer = runs(rule)
    shape, batch, loss_mask = trainer.tree_shape, trainer.batch, trainer.batch["tool_mask"]
    assert shape.num_leaves == LEAVES[rule] and len(loss_mask) == 4 * LEAVES[rule]
    row, repeats, trained = 0, 0, 0
    for scored in trainer.last_trees:
        tree, seen, owned = scored.tree, set(), dict.fromkeys(range(1, len(scored.tree.nodes)), 0)
        for leaf in shape.slots(tree):
            ids = tree.completion_ids(leaf)
            assert batch["completion_ids"][row, : len(ids)].tolist() == ids
            if leaf in seen:
                assert not loss_mask[row].any()
                repeats += 1
            seen.add(leaf)
            start = 0
            for node in tree.path(leaf):
                part = slice(start, start := start + len(tree.nodes[node].token_ids))
                owned[node] += int((loss_mask[row, part] > 0).sum())
                assert scored.kept[node] or not loss_mask[row, part].any()
                if loss_mask[row, part].any():
                    expected = torch.full((part.stop - part.start,), scored.advantages[node])
                    torch.testing.assert_close(batch["advantages"][row, part], expected)
            assert not loss_mask[row, start:].any()
            row += 1
        for node, count in owned.items():
            assert count == (len(tree.nodes[node].token_ids) if scored.kept[node] else 0)
            trained += count
    assert repeats == len(loss_mask) - sum(len(scored.tree.leaves) for scored in trainer.last_trees)
    assert trained > 20 and (repeats > 0 or rule != "forks")
    assert trained == int((loss_mask > 0).sum())


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_is_finite_and_metrics_say_what_was_trained(runs, rule):
    trainer = runs(rule)
    for log in trainer.state.log_history:
        assert all(math.isfinite(value) for value in log.values() if isinstance(value, float)), log
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history[:-1])
    log = next(log for log in reversed(trainer.state.log_history) if "tree/kept_groups" in log)
    trees = trainer.last_trees
    groups = [[scored.kept[child] for child in group] for scored in trees for group in scored.tree.children if group]
    assert log["tree/kept_groups"] == pytest.approx(sum(map(any, groups)) / len(groups))
    sampled = sum(scored.tree.num_sampled_tokens for scored in trees)
    kept = sum(
        len(node.token_ids)
        for scored in trees
        for node, kept in zip(scored.tree.nodes, scored.kept, strict=True)
        if kept
    )
    assert log["tree/trained_tokens"] == pytest.approx(kept / sampled)
    rewards = [reward for scored in trees for reward in scored.rewards.values()]
    assert len(rewards) == sum(len(scored.tree.leaves) for scored in trees)
    assert log["tree/reward"] == pytest.approx(sum(rewards) / len(rewards))
    below = trainer.tree_shape.rows_below
    row_tokens = sum(
        rows * len(node.token_ids)
        for scored in trees
        for rows, node in list(zip(below(scored.tree), scored.tree.nodes, strict=True))[1:]
    )
    assert log["tree/token_sharing"] == pytest.approx(row_tokens / sampled)


@pytest.mark.parametrize("rule", RULES)
def test_what_people_see_of_it(runs, rule, capsys):
    trainer = runs(rule)
    folder = Path(trainer.args.output_dir)
    records = read_trees(folder / "trees" / "step_000004.parquet")
    assert records == tree_records(trainer.last_trees, make_tokenizer(), 4, shape=trainer.tree_shape)
    has_forks = rule.startswith("forks")
    assert any(record["is_rest"] for record in records) == has_forks
    page = (folder / "trees" / "step_000004.html").read_text()
    columns = json.loads(page.split('id="tree-0">')[1].split("</script>")[0])
    assert any(columns["is_rest"]) == has_forks
    for scored in trainer.last_trees:
        capsys.readouterr()
        print_tree(scored, make_tokenizer())
        shown, nodes, children = capsys.readouterr().out, scored.tree.nodes, scored.tree.children
        forks = [group for group in children if any(nodes[child].is_rest for child in group)]
        assert shown.count("(as drawn)") == len(forks)
        assert shown.count("(fork)") == sum(len(group) - 1 for group in forks)
    assert list((folder / "completions").glob("*.parquet"))
    trainer.create_model_card()
    card = ModelCard.load(folder / "README.md").text
    assert f"| Split rule | `{trainer.args.split_rule}`" in card


def test_a_run_of_forks_goes_on_between_two_updates(runs, model_path, tmp_path):
    unbroken = runs("forks")
    checkpoint = Path(unbroken.args.output_dir) / "checkpoint-3"  # after the first of two updates on the last trees
    resumed = start(model_path, tmp_path / "resumed", "forks")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.last_trees == unbroken.last_trees and not hasattr(resumed, "batch")
    for parameter, other in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(parameter, other)
    for scored in unbroken.last_trees:
        assert unpack(pack(scored)) == scored
    other = start(model_path, tmp_path / "other", "forks", uncertainty_measure="entropy")
    with pytest.raises(ValueError, match="uncertainty_measure was surprisal and is now entropy"):
        other.train(resume_from_checkpoint=str(checkpoint))
