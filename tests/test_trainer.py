"""TreeRPOTrainer as a drop-in for GRPOTrainer: formats, rewards, engines' options, logging, saving."""

import math
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from tiny import EOS, PAD, coin_reward, make_tokenizer, spread, spread_reward, tiny_config
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM, Qwen2ForSequenceClassification
from trl import GRPOConfig

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


def train(model, args, dataset, reward_funcs=coin_reward, **kwargs) -> TreeRPOTrainer:
    kwargs = {"processing_class": make_tokenizer(), **kwargs}
    trainer = TreeRPOTrainer(model, reward_funcs, args, train_dataset=dataset, **kwargs)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.isfinite(parameter).all()
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), f"{name} did not move"
        else:
            assert torch.equal(parameter, before[name]), f"{name} moved, though it is frozen"
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses and all(math.isfinite(loss) for loss in losses)
    return trainer


def chat(dataset):
    return dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})


# Data


def test_plain_prompts_and_the_trees_left_behind(model, make_args, dataset):
    trainer = train(model, make_args(), dataset)
    assert len(trainer.last_trees) == 2
    for scored in trainer.last_trees:
        assert trainer.processing_class.decode(scored.tree.prompt_ids) in dataset["prompt"]
        for leaf, reward in scored.rewards.items():
            text = trainer.processing_class.decode(scored.tree.completion_ids(leaf), skip_special_tokens=True)
            assert reward == float(spread(text) > 0.5)


def test_chat_prompts(model, make_args, dataset):
    def reward(prompts, completions, **kwargs):
        assert all(message["role"] == "assistant" for (message,) in completions)
        assert all(prompt[0]["role"] == "user" for prompt in prompts)
        return spread_reward(completions)

    trainer = train(model, make_args(), chat(dataset), reward)
    text = trainer.processing_class.decode(trainer.last_trees[0].tree.prompt_ids)
    assert text.startswith("<pad>") and text.endswith("\na")  # "u" is no token of ours; the template made the rest


def test_extra_columns_reach_the_reward_function(model, make_args, dataset):
    def reward(prompts, completions, answer, trainer_state, **kwargs):
        assert trainer_state.global_step in (0, 1)
        assert all(prompt.endswith(f"{value}=") for prompt, value in zip(prompts, answer, strict=True))
        return spread_reward(completions)

    train(model, make_args(), dataset, reward)


def test_streaming_datasets(model, make_args, dataset):
    stream = IterableDataset.from_generator(lambda: iter(dataset))
    trainer = train(model, make_args(), stream)
    assert trainer.state.global_step == 2


def test_the_same_prompt_twice_in_a_batch_makes_two_trees(model, make_args):
    dataset = Dataset.from_dict({"prompt": ["1+1="] * 4, "answer": [0, 1, 2, 3]})
    seen = []

    def reward(completions, answer, **kwargs):
        seen.append(answer)
        return spread_reward(completions)

    trainer = train(model, make_args(max_steps=1), dataset, reward)
    assert len(trainer.last_trees) == 2
    assert len(set(seen[0])) == 2


# Rewards


def test_several_rewards_with_weights(model, make_args, dataset):
    def length_reward(completion_ids, **kwargs):
        return [len(ids) / 12 for ids in completion_ids]

    trainer = train(model, make_args(reward_weights=[0.75, 0.25]), dataset, [coin_reward, length_reward])
    for scored in trainer.last_trees:
        for leaf, reward in scored.rewards.items():
            ids = scored.tree.completion_ids(leaf)
            text = trainer.processing_class.decode(ids, skip_special_tokens=True)
            assert reward == pytest.approx(0.75 * (spread(text) > 0.5) + 0.25 * len(ids) / 12)


def test_async_rewards(model, make_args, dataset):
    async def reward(completions, **kwargs):
        return coin_reward(completions)

    train(model, make_args(reward_weights=[0.5, 0.5]), dataset, [reward, spread_reward])


def test_reward_models(model, make_args, dataset):
    torch.manual_seed(0)
    reward_model = Qwen2ForSequenceClassification(tiny_config(num_labels=1))
    args = make_args(advantage_estimator="group_std")
    trainer = train(model, args, dataset, reward_model, reward_processing_classes=make_tokenizer())
    scored = trainer.last_trees[0]
    leaf = scored.tree.leaves[-1]
    text = trainer.processing_class.decode([*scored.tree.prompt_ids, *scored.tree.completion_ids(leaf)])
    inputs = make_tokenizer()(text.replace("<eos>", ""), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        expected = reward_model(**inputs).logits[0, 0].item()
    assert scored.rewards[leaf] == pytest.approx(expected, abs=1e-5)


def test_a_reward_function_sees_each_trajectory_once_and_the_table_lines_up(model, make_args, dataset, tmp_path):
    calls = []

    def reward(prompts, completions, log_extra, **kwargs):
        calls.append(list(zip(prompts, completions, strict=True)))
        log_extra("first", [text[:1] for text in completions])
        return spread_reward(completions)

    args = make_args(log_completions=True, max_steps=3, num_completions_to_print=0)
    trainer = train(model, args, dataset, reward)
    assert all(max(Counter(call).values()) == 1 for call in calls)
    assert any(len(call) < 16 for call in calls)  # some branches did end early
    table = pd.read_parquet(Path(args.output_dir) / "completions" / "completions_00003.parquet")
    assert len(table) == 16
    assert set(zip(table["prompt"], table["completion"], strict=True)) == set(calls[-1])
    assert table["first"].tolist() == [text[:1] for text in table["completion"]]
    assert table["reward"].tolist() == pytest.approx([spread(text) for text in table["completion"]], rel=1e-6)
    expected = []
    for scored in trainer.last_trees:
        for leaf in trainer.tree_shape.slots(scored.tree):
            tokens = [node for node in scored.tree.path(leaf) for _ in scored.tree.nodes[node].token_ids]
            expected.append(sum(scored.advantages[node] for node in tokens) / len(tokens))
    assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-6)


# Training options


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 4, "per_device_train_batch_size": 4, "max_steps": 4},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"loss_weighting": "node", "top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01, "loss_type": "bnpo"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "dr_grpo", "advantage_estimator": "centered"},
        {"mask_truncated_completions": True, "max_steps": 4},
        {"max_frontier_rows": 3},
        {"pad_to_multiple_of": 8},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 10, "repetition_penalty": 1.1},
        {"sync_ref_model": True, "beta": 0.1, "ref_model_sync_steps": 1},
        {"bf16": True, "use_cpu": True},
        {"branching_factor": [3, 2], "max_depth": 2, "per_device_train_batch_size": 12, "segment_length": 5},
        {"max_completion_length": 10},
    ],
    ids=lambda options: "-".join(options),
)
def test_training_options(model, make_args, dataset, options):
    train(model, make_args(**{"max_steps": 2, **options}), dataset)


def test_gradient_checkpointing_does_not_stop_the_forking_of_caches(model, make_args, dataset):
    """Trainers turn the cache off for training; sampling must still have it."""
    trainer = train(model, make_args(gradient_checkpointing=True), dataset)
    assert trainer._can_fork_caches


def test_old_log_probabilities_are_kept_when_updates_lag(model, make_args, dataset):
    """steps_per_generation above the accumulation steps: the second half is trained off policy."""
    batches = []

    class Spy(TreeRPOTrainer):
        def _compute_loss(self, model, inputs):
            batches.append(inputs)
            return super()._compute_loss(model, inputs)

    args = make_args(per_device_train_batch_size=8, steps_per_generation=2, max_steps=2)
    trainer = Spy(model, coin_reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    assert [batch["advantages"].shape for batch in batches] == [batch["completion_ids"].shape for batch in batches]
    assert all("old_per_token_logps" in batch for batch in batches)
    assert {batch["row"][0].item() for batch in batches} == {0, 8}


def test_evaluation_is_flat(model, make_args, dataset):
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return spread_reward(completions)

    args = make_args(eval_strategy="steps", eval_steps=1, num_generations_eval=4, per_device_eval_batch_size=8)
    trainer = train(model, args, dataset, reward, eval_dataset=dataset.select(range(4)))
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2
    assert all(math.isfinite(log["eval_loss"]) and 0 < log["eval_reward"] < 1 for log in evaluations)
    assert not any(name.startswith("eval_tree/") for log in evaluations for name in log)
    assert calls.count(8) >= 4  # 4 prompts x 4 samples, in two batches, twice: repeats are not folded


def test_lora(model, make_args, dataset, model_path, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = train(model, make_args(beta=0.1, max_steps=3), dataset, peft_config=config)
    assert trainer.ref_model is None
    trainer.save_model(str(tmp_path / "adapter"))
    base = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    input_ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(reloaded(input_ids).logits, trainer.model(input_ids).logits, atol=1e-5)


def test_a_model_by_name_and_a_default_configuration(model_path, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = TreeRPOTrainer(
        model_path, coin_reward, TreeRPOConfig("out", bf16=False, report_to="none", segment_length=4),
        train_dataset=dataset, processing_class=make_tokenizer(),
    )  # fmt: skip
    assert trainer.tree_shape.branching == (2, 2)


def test_saving_and_the_model_card(model, make_args, dataset):
    args = make_args(save_strategy="steps", save_steps=2)
    trainer = train(model, args, dataset)
    trainer.save_model()
    trainer.create_model_card(model_name="tiny")
    card = (Path(args.output_dir) / "README.md").read_text()
    assert "TreeRPO: Tree Relative Policy Optimization" in card and "2506.05183" in card and "treerpo" in card
    reloaded = AutoModelForCausalLM.from_pretrained(args.output_dir)
    assert all(
        torch.equal(a, b)
        for a, b in zip(reloaded.state_dict().values(), trainer.model.state_dict().values(), strict=True)
    )
    assert (Path(args.output_dir) / "checkpoint-2" / "model.safetensors").exists()


def test_tree_metrics_are_logged_and_finite(model, make_args, dataset):
    trainer = train(model, make_args(), dataset)
    logs = trainer.state.log_history[0]
    assert {name for name in logs if name.startswith("tree/")} >= {
        "tree/nodes", "tree/leaves", "tree/token_sharing", "tree/kept_groups", "tree/kept_groups/depth_3",
    }  # fmt: skip
    scored = trainer.last_trees
    assert trainer.state.log_history[1]["tree/nodes"] == sum(len(tree.tree.nodes) - 1 for tree in scored) / len(scored)


def test_tokens_that_carry_no_loss_are_not_counted_as_trained(model, make_args, dataset):
    """Where all completions are truncated and masked, nothing is trained, though groups are kept."""
    never_ends = {"suppress_tokens": [PAD, EOS]}
    args = make_args(mask_truncated_completions=True, max_steps=1, generation_kwargs=never_ends)
    trainer = TreeRPOTrainer(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 1
    assert log["grad_norm"] == 0 and log["tree/trained_tokens"] == 0
    assert log["tree/kept_groups"] > 0 and log["tree/advantage_abs"] > 0


def test_the_same_seed_gives_the_same_run(model_path, make_args, dataset):
    runs = []
    for _ in range(2):
        model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        runs.append(
            train(model, make_args(max_steps=3, per_device_train_batch_size=4, steps_per_generation=4), dataset)
        )
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_learnable_reward_is_learned(model, make_args, dataset):
    """Longer completions are better: the mean reward must rise."""

    def reward(completion_ids, **kwargs):
        return [sum(token == 7 for token in ids) / 12 for ids in completion_ids]

    trainer = train(model, make_args(max_steps=30, learning_rate=1e-2, prune_threshold=0.0), dataset, reward)
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5


# Bad input


def test_a_grpo_config_is_refused(model, dataset, tmp_path):
    args = GRPOConfig(str(tmp_path), bf16=False, report_to="none")
    with pytest.raises(TypeError, match="args is a GRPOConfig, but TreeRPOTrainer needs a TreeRPOConfig"):
        TreeRPOTrainer(model, coin_reward, args, train_dataset=dataset)


def test_what_a_tree_cannot_follow_is_refused(model, make_args, dataset):
    with pytest.raises(ValueError, match=r"rollout_func=.* is not supported.*use trl\.GRPOTrainer"):
        TreeRPOTrainer(model, coin_reward, make_args(), train_dataset=dataset, rollout_func=print)
