"""Trees whose model calls tools: what GRPOTrainer does with them, on every branch."""

import json
from threading import Lock

import pytest
import torch
from datasets import Dataset
from test_reduces_to_grpo import Gradients
from tool_policy import BROKEN, CALLS, FAILING, UNKNOWN, make_tool_policy
from trl import GRPOConfig, GRPOTrainer

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.trainers.resuming import pack, unpack
from treerpo_trl.views import print_tree, read_trees, render_page, tree_records, write_trees


TREE = {"branching_factor": 8, "max_depth": 1, "advantage_estimator": "group_std", "prune_threshold": None}
FLAT = {"num_generations": 8}


def look_up(key: str) -> str:
    """
    Look up a key.

    Args:
        key: What to look up.

    Returns:
        Its value.
    """
    if key == "missing":
        raise KeyError(key)
    return f"{key} is {ord(key[0])}"


async def look_up_slowly(key: str) -> str:
    """
    Look up a key.

    Args:
        key: What to look up.

    Returns:
        Its value.
    """
    return look_up(key)


look_up_slowly.__name__ = "look_up"


def reward(completions, **kwargs):
    """Of the answer's text, and of how often tools were called."""
    return [sum(map(ord, answer[-1]["content"])) % 7 / 7 + len(answer) / 20 for answer in completions]


@pytest.fixture
def questions() -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"question {i}"}] for i in range(16)]})


def run(trainer_class, config_class, options, questions, tmp_path, calls=None, tools=(look_up,), **policy):
    gradients, batches = Gradients(), []

    class Spy(trainer_class):
        def _generate_and_score_completions(self, inputs):
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

    model, tokenizer = make_tool_policy(calls, **policy)
    trainer = Spy(
        model,
        reward,
        config_class(
            str(tmp_path),
            **{
                "per_device_train_batch_size": 16,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "bf16": False,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                "max_steps": 1,
                "shuffle_dataset": False,
                "max_grad_norm": 0.0,
                "max_completion_length": 300,
                **options,
            },
        ),
        train_dataset=questions,
        processing_class=tokenizer,
        callbacks=[gradients],
        tools=list(tools),
    )
    trainer.train()
    return trainer, batches[0], gradients.first


@pytest.mark.parametrize(
    ("calls", "tools", "options"),
    [
        (CALLS, [look_up], {"num_iterations": 1}),
        (CALLS, [look_up_slowly], {"max_tool_calling_iterations": 2}),
        (CALLS, [look_up], {"max_completion_length": 1}),
        ([*CALLS, FAILING, UNKNOWN, BROKEN], [look_up], {"max_completion_length": 50}),
    ],
    ids=["plain", "async, few iterations", "cut short", "failing, overlong"],
)
def test_depth_one_is_grpo(questions, tmp_path, calls, tools, options):
    tree, tree_batch, tree_gradient = run(
        TreeRPOTrainer, TreeRPOConfig, {**TREE, **options}, questions, tmp_path / "tree", calls, tools
    )
    flat, flat_batch, flat_gradient = run(
        GRPOTrainer, GRPOConfig, {**FLAT, **options}, questions, tmp_path / "flat", calls, tools
    )
    for name in ["prompt_ids", "prompt_mask", "completion_ids", "completion_mask"]:
        assert torch.equal(tree_batch[name], flat_batch[name]), name
    mask = flat_batch["completion_mask"] * flat_batch["tool_mask"]
    assert torch.equal(tree_batch["tool_mask"] * tree_batch["completion_mask"], mask)
    if "max_completion_length" not in options or options["max_completion_length"] > 1:
        assert (mask.sum(dim=1) < flat_batch["completion_mask"].sum(dim=1)).any()  # tools answered
    assert tree_batch["num_items_in_batch"] == flat_batch["num_items_in_batch"]
    expected = flat_batch["advantages"].unsqueeze(1) * mask
    assert torch.allclose(tree_batch["advantages"] * mask, expected, atol=1e-5)
    for name, gradient in flat_gradient.items():
        error = (tree_gradient[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, name
    logs = [trainer.state.log_history[0] for trainer in (tree, flat)]
    assert logs[1]["tools/call_frequency"] > 0
    for name, value in logs[1].items():
        if name != "step_time":
            assert logs[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert tree._logs["completion"] == flat._logs["completion"]


def losses_of(policy, trees, loss_weighting):
    """Of each token that was sampled in a kept node, its loss and weight, from one sequence a node."""
    losses, weights = [], []
    for scored in trees:
        for index, kept in enumerate(scored.kept):
            if not kept:
                continue
            node = scored.tree.nodes[index]
            prefix = [*scored.tree.prompt_ids, *scored.tree.completion_ids(node.parent)]
            logits = policy(input_ids=torch.tensor([[*prefix, *node.token_ids]])).logits[0, len(prefix) - 1 : -1]
            logps = logits.double().log_softmax(-1)[torch.arange(len(node.token_ids)), list(node.token_ids)]
            sampled = torch.tensor(node.sampled_mask)
            losses.append(-(logps - logps.detach()).exp()[sampled] * scored.advantages[index])
            weights += [1.0 if loss_weighting == "token" else 1 / node.num_sampled] * node.num_sampled
    return torch.cat(losses), torch.tensor(weights)


@pytest.mark.parametrize(
    ("loss_weighting", "prefix_sharing", "split"),
    [
        ("token", True, {}),
        ("node", False, {}),
        ("node", True, {"branching_factor": [2, 2] + [1] * 38, "segment_length": 2}),
    ],
)
def test_the_gradient_is_that_of_what_was_sampled(questions, tmp_path, loss_weighting, prefix_sharing, split):
    """With what tools answered inside of segments, and branches in the middle of turns."""
    options = {"branching_factor": [2, 2], "max_completion_length": 80, "loss_weighting": loss_weighting} | split
    options["prefix_sharing"] = prefix_sharing
    plain, _ = make_tool_policy([*CALLS, FAILING], call_share=0.7)
    trainer, _, gradient = run(
        TreeRPOTrainer, TreeRPOConfig, options, questions, tmp_path, [*CALLS, FAILING], call_share=0.7
    )
    trees = trainer.last_trees
    nodes = [node for scored in trees for node in scored.tree.nodes[1:]]
    if split:  # a turn in two
        assert any(not node.ended and node.sampled is None for node in nodes)
    else:  # an answer in the middle of a node
        assert any(node.sampled is not None and node.sampled[-1] for node in nodes)
    assert any(scored.tree.children[index] for scored in trees for index in range(1, len(scored.tree.nodes)))
    losses, weights = losses_of(plain, trees, loss_weighting)
    ((losses * weights).sum() / weights.sum()).backward()
    for name, parameter in plain.named_parameters():
        scale = gradient[name].abs().max().clamp(min=1e-6)
        assert (parameter.grad - gradient[name]).abs().max() / scale < 2e-4, name


def test_turns_are_nodes_and_their_calls_are_shared(questions, tmp_path):
    asked = []

    def look_up_counted(key: str) -> str:
        """
        Look up a key.

        Args:
            key: What to look up.
        """
        asked.append(key)
        return look_up(key) + f", call {len(asked)}"

    look_up_counted.__name__ = "look_up"
    options = {"branching_factor": [2, 2, 2], "advantage_estimator": "group_std", "per_device_train_batch_size": 64}
    trainer, batch, _ = run(
        TreeRPOTrainer, TreeRPOConfig, options, questions, tmp_path, tools=[look_up_counted], call_share=0.7
    )
    tokenizer, log = trainer.processing_class, trainer.state.log_history[0]
    assert trainer.args.split_rule == "turn"
    num_calls = 0
    for scored in trainer.last_trees:
        for index, node in enumerate(scored.tree.nodes[1:], start=1):
            text = tokenizer.decode(
                [token for token, drawn in zip(node.token_ids, node.sampled_mask, strict=True) if drawn]
            )
            num_calls += text.count("<tool_call>")
            if scored.tree.depths[index] < 3:
                assert text.count("<|im_end|>") == 1 and text.endswith("<|im_end|>")  # one turn
                assert node.ended == ("<tool_call>" not in text)
            else:
                assert node.ended
    assert len(asked) == num_calls == log["tree/tool_calls"] * len(trainer.last_trees)
    assert log["tree/call_sharing"] == pytest.approx(log["tools/call_frequency"] * 64 / num_calls)
    assert log["tools/call_frequency"] * 64 > 1.3 * len(asked)  # what flat samples would have called
    sampled = sum(scored.tree.num_sampled_tokens for scored in trainer.last_trees)
    assert log["tree/sampled_tokens"] * len(trainer.last_trees) == pytest.approx(sampled)
    kept = sum(
        node.num_sampled
        for scored in trainer.last_trees
        for node, is_kept in zip(scored.tree.nodes, scored.kept, strict=True)
        if is_kept
    )
    assert (batch["tool_mask"] * batch["completion_mask"] > 0).sum() == kept  # each once, and no answer
    text = tokenizer.decode(batch["completion_ids"][(batch["tool_mask"] == 0) & (batch["completion_mask"] == 1)])
    assert "is 97, call" in text


class Desk:
    """An environment that counts what it was asked; it cannot be copied, unless a subclass says how."""

    def __init__(self):
        self.lock = Lock()

    def reset(self, **kwargs):
        self.asked = []
        self.topic = kwargs.get("topic")
        return f" (about {self.topic})"

    def look_up(self, key: str) -> str:
        """
        Look up a key.

        Args:
            key: What to look up.
        """
        self.asked.append(key)
        if key == "missing":
            raise KeyError(key)
        return f"{key}, question {len(self.asked)}"

    def get_reward(self) -> float:
        return (len(self.asked) % 3) / 2


class CopiedDesk(Desk):
    def __deepcopy__(self, memo):
        other = type(self)()
        other.asked, other.topic = list(self.asked), self.topic
        return other


class ForkedDesk(Desk):
    def fork(self):
        return CopiedDesk.__deepcopy__(self, {})


def run_desk(factory, tmp_path, questions, reward_func=None, checkpoint=None, **options):
    model, tokenizer = make_tool_policy([*CALLS, FAILING], call_share=0.7)
    trainer = TreeRPOTrainer(
        model,
        reward_func,
        TreeRPOConfig(
            str(tmp_path),
            **{
                "branching_factor": [2, 2],
                "per_device_train_batch_size": 16,
                "max_steps": 2,
                "report_to": "none",
                "save_strategy": "no",
                "bf16": False,
                "disable_tqdm": True,
                "max_completion_length": 1200,
                "logging_steps": 1,
                **options,
            },
        ),
        train_dataset=questions,
        processing_class=tokenizer,
        environment_factory=factory,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize(
    ("factory", "options"), [(CopiedDesk, {}), (ForkedDesk, {}), (Desk, {"replay_environments": True})]
)
def test_each_branch_has_an_environment_as_it_was(factory, options, questions, tmp_path):
    seen = []

    def check(prompts, completions, environments, topic, **kwargs):
        for prompt, messages, desk, of_row in zip(prompts, completions, environments, topic, strict=True):
            told = [message["content"] for message in messages if message["role"] == "tool"]
            assert len(told) == len(desk.asked)
            for number, (text, key) in enumerate(zip(told, desk.asked, strict=True), start=1):
                assert text == (f"{key}, question {number}" if key != "missing" else "{'error': \"'missing'\"}")
            assert desk.topic == of_row
            assert prompt[-1]["content"].endswith(f" (about {of_row})")
            seen.append(len(told))
        assert len(set(map(id, environments))) == len(environments)
        return [0.0] * len(prompts)

    questions = questions.add_column("topic", [f"topic {i}" for i in range(len(questions))])
    trainer = run_desk(factory, tmp_path, questions, check, **options)
    assert max(seen) > 2
    assert trainer.reward_func_names == ["check", factory.__name__]
    assert any(trainer.state.log_history[0][f"rewards/{factory.__name__}/{stat}"] > 0 for stat in ("mean", "std"))
    assert trainer._logs["prompt"] and all(
        "(about topic" in prompt[-1]["content"] for prompt in trainer._logs["prompt"]
    )
    # Instances are used again: one a tree, and those that a replay takes.
    assert len(trainer._environment_pool[None]) <= (4 if not options else 16)


class Closing(CopiedDesk):
    """It counts how often each instance is closed, and its reset keeps and changes what it is given."""

    closed: list

    def reset(self, topic, **kwargs):
        topic.append("seen")
        self.seen = topic
        return super().reset(topic=len(topic))

    def close(self):
        self.closed.append(id(self))
        raise RuntimeError("the door is stuck")


def test_copies_are_closed_once_and_the_rest_stays_open(questions, tmp_path):
    Closing.closed = []
    with pytest.warns(UserWarning, match=r"closing a copy of Closing failed: RuntimeError\('the door is stuck'\)"):
        trainer = run_desk(Closing, tmp_path, questions.add_column("topic", [[]] * len(questions)))
    pooled = {id(instance) for instance in trainer._environment_pool[None]}
    assert len(Closing.closed) >= 8 and not pooled & set(Closing.closed)
    assert not any(tool.__name__ == "close" for tool in trainer.tools)


def test_a_replay_resets_as_at_first(questions, tmp_path):
    topics = []

    class Replayed(Closing):
        def __deepcopy__(self, memo):
            raise AssertionError

        def reset(self, topic, **kwargs):
            topics.append(list(topic))
            return super().reset(topic, **kwargs)

    run_desk(Replayed, tmp_path, questions.add_column("topic", [[]] * len(questions)), replay_environments=True)
    assert len(topics) > 8 and not any(topics)


def test_what_is_no_copy_is_refused(questions, tmp_path):
    class Lazy(CopiedDesk):
        def fork(self):
            return self

    class Other(CopiedDesk):
        def fork(self):
            return CopiedDesk()

    class Slow(CopiedDesk):
        async def fork(self):
            return self

    for factory, message in (
        (Lazy, r"the fork\(\) of a Lazy gave itself"), (Other, r"the fork\(\) of a Other gave a CopiedDesk"),
        (Slow, r"Slow\.fork is async"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            run_desk(factory, tmp_path, questions)


def test_an_environment_without_tools(questions, tmp_path):
    class Quiet:
        def reset(self, **kwargs):
            self.judged = 0
            return " now"

        def get_reward(self):
            self.judged += 1
            return float(self.judged)

    def reward_rows(completions, environments, **kwargs):
        assert len(set(map(id, environments))) == len(environments)
        return [len(messages[-1]["content"]) / 9 for messages in completions]

    options = {"split_rule": "length", "segment_length": 1, "max_completion_length": 2}
    trainer = run_desk(Quiet, tmp_path, questions, reward_rows, **options)
    assert trainer.args.split_rule == "length" and trainer.tools == []
    assert trainer.state.log_history[0]["rewards/Quiet/mean"] == 1.0
    assert all(reward is not None for scored in trainer.last_trees for reward in scored.rewards.values())


def test_rewards_may_change_what_they_are_given(questions, tmp_path):
    def greedy(prompts, completions, **kwargs):
        for prompt, messages in zip(prompts, completions, strict=True):
            assert len(prompt) == 1 and all(m["role"] == "tool" or "tool_calls" in m for m in messages[:-1])
            prompt.append("read")
            for message in messages:
                message.pop("tool_calls", None)
        return [0.0] * len(prompts)

    run_desk(CopiedDesk, tmp_path, questions, greedy)


def test_options_that_count_tokens_of_segments_are_refused_with_tools(questions, tmp_path):
    for rule in ({}, {"split_rule": "length", "segment_length": 150}):
        with pytest.raises(ValueError, match=r"min_new_tokens=2.* counts tokens"):
            run(
                TreeRPOTrainer,
                TreeRPOConfig,
                {"generation_kwargs": {"min_new_tokens": 2}, **rule},
                questions,
                tmp_path,
            )


def test_a_segment_length_bounds_turns(questions, tmp_path):
    options = {"branching_factor": [2, 2], "segment_length": 150}
    trainer, _, _ = run(TreeRPOTrainer, TreeRPOConfig, options, questions, tmp_path)
    assert trainer.args.split_rule == "length" and trainer.tree_shape.segment_length == 150


def test_an_environment_that_cannot_be_copied_is_refused(questions, tmp_path):
    with pytest.raises(TypeError, match=r"deepcopy of Desk fails \(TypeError: .*lock.*\). Define fork"):
        run_desk(Desk, tmp_path, questions)


def test_an_environment_that_owns_its_data(tmp_path):
    trainer = run_desk(CopiedDesk, tmp_path, None)
    assert "(about None)" in trainer.processing_class.decode(trainer.last_trees[0].tree.prompt_ids)


def test_environments_by_name(questions, tmp_path):
    class Other(CopiedDesk):
        def reset(self, **kwargs):
            assert "environment" not in kwargs
            return super().reset(topic="other")

    names = ["desk", "other"] * (len(questions) // 2)
    trainer = run_desk({"desk": CopiedDesk, "other": Other}, tmp_path, questions.add_column("environment", names))
    topics = [trainer.processing_class.decode(scored.tree.prompt_ids) for scored in trainer.last_trees]
    assert {"(about other)" in text for text in topics} == {True, False}


def test_what_tools_answered_is_told_apart(questions, tmp_path, capsys):
    trainer, _, _ = run(TreeRPOTrainer, TreeRPOConfig, {"branching_factor": [2, 2]}, questions, tmp_path)
    tokenizer = trainer.processing_class
    records = tree_records(trainer.last_trees, tokenizer, 1, shape=trainer.tree_shape)
    write_trees(records, tmp_path / "trees.parquet")
    assert read_trees(tmp_path / "trees.parquet") == records
    answered = [record for record in records if record["pieces"]]
    assert 0 < len(answered) < len(records)
    for record in answered:
        assert "".join(record["pieces"]) == record["text"]
        assert record["sampled"].index(False) == len(tokenizer(record["pieces"][0])["input_ids"])
        assert all(("tool_call>" in piece) == (index % 2 == 0) for index, piece in enumerate(record["pieces"][:2]))
        assert " is 9" in record["pieces"][1]
    page = render_page(records, title="tools").replace("\\u003c", "<").replace("\\u003e", ">")
    assert json.dumps(answered[0]["pieces"], separators=(",", ":")) in page
    print_tree(next(one for one in trainer.last_trees if any(node.sampled for node in one.tree.nodes)), tokenizer)
    assert "tool_response" in capsys.readouterr().out


def test_the_card_tells_of_the_tools(questions, tmp_path):
    trainer, _, _ = run(TreeRPOTrainer, TreeRPOConfig, {"branching_factor": [2, 2]}, questions, tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert (
        "| Tools | `look_up` |" in card and "| Split rule | `turn` |" in card and "| Segment length | a turn;" in card
    )


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"split_rule": "uncertainty"}, {"tools": [look_up]}, "split_rule='uncertainty' does not work with tools"),
        ({"split_rule": "turn"}, {}, "split_rule='turn' is for models that call tools, but neither"),
        ({"replay_environments": True}, {"tools": [look_up]}, "replay_environments=True has no effect without"),
    ],
)
def test_what_does_not_go_together(questions, tmp_path, options, arguments, message):
    model, tokenizer = make_tool_policy()
    args = TreeRPOConfig(str(tmp_path), report_to="none", bf16=False, per_device_train_batch_size=16, **options)
    with pytest.raises(ValueError, match=message):
        TreeRPOTrainer(model, reward, args, questions, processing_class=tokenizer, **arguments)


def test_texts_call_no_tools(tmp_path):
    model, tokenizer = make_tool_policy()
    args = TreeRPOConfig(str(tmp_path), report_to="none", bf16=False, per_device_train_batch_size=16)
    texts = Dataset.from_dict({"prompt": ["a question"] * 16})
    with pytest.raises(ValueError, match="the prompts are texts, such as 'a question', but a model calls tools"):
        TreeRPOTrainer(model, reward, args, texts, processing_class=tokenizer, tools=[look_up])


def test_tools_without_a_template_are_trls_error(tmp_path, questions):
    model, tokenizer = make_tool_policy()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    args = TreeRPOConfig(str(tmp_path), report_to="none", bf16=False, per_device_train_batch_size=16)
    with pytest.raises(ValueError, match="does not support tool calling"):
        TreeRPOTrainer(model, reward, args, questions, processing_class=tokenizer, tools=[look_up])


def test_trees_with_answers_are_kept_in_a_checkpoint(questions, tmp_path):
    trainer, _, _ = run(TreeRPOTrainer, TreeRPOConfig, {"branching_factor": [2, 2]}, questions, tmp_path)
    scored = next(one for one in trainer.last_trees if any(node.sampled for node in one.tree.nodes))
    assert unpack(pack(scored)) == scored


def test_training_goes_on_in_the_middle_of_a_batch(questions, tmp_path):
    """With the trees and what tools answered in them."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 2}
    options |= {"max_completion_length": 200, "per_device_train_batch_size": 8, "num_iterations": 1}
    unbroken = run_desk(CopiedDesk, tmp_path / "unbroken", questions, **options)
    resumed = run_desk(
        CopiedDesk, tmp_path / "resumed", questions, checkpoint=tmp_path / "unbroken/checkpoint-3", **options
    )
    for (name, one), other in zip(unbroken.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    timings = ("step_time", "tree/seconds", "train_", "total_flos")
    last, again = (
        {name: value for name, value in trainer.state.log_history[-2].items() if not name.startswith(timings)}
        for trainer in (unbroken, resumed)
    )
    assert last == again
