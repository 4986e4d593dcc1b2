"""Rewards in a thread, while other trees grow: the same run, and what fails there, fails as it would have."""

import _thread
import threading
import traceback
import warnings
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from test_trainer import chat
from tiny import make_tokenizer, spread, spread_reward, tiny_config
from tool_policy import make_tool_policy
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification
from trl.chat_template_utils import add_response_schema

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.checks.reward_functions import check_overlap
from treerpo_trl.growth.backends import TransformersBackend
from treerpo_trl.rows import RewardOverlap


BLOCKS = {"max_frontier_rows": 5, "per_device_train_batch_size": 32, "advantage_estimator": "group_std"}
PATIENCE = 60.0  # seconds, of tests that fail
OPTIONS = [
    {},
    {"max_frontier_rows": 256},
    {"steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": 16, "max_steps": 6},
    {"split_rule": "uncertainty", "max_depth": None, "segment_length": None, "num_trunks": 2, "forks_per_trunk": 3,
     "max_completion_length": 12},
    {"split_rule": "delimiter", "step_delimiters": ["+"], "max_completion_length": 14},
]  # fmt: skip


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


class Judge:
    """Judges each completion by itself, logs what it can, and remembers what it was given and by which thread."""

    __name__ = "judge"

    def __init__(self):
        self.calls, self.threads = [], []

    def __call__(self, prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        assert set(kwargs) <= {"environments"} and trainer_state.max_steps > 0
        rows = zip(prompts, completions, completion_ids, answer, strict=True)
        self.calls.append(sorted((str(prompt), str(text), ids, answer) for prompt, text, ids, answer in rows))
        self.threads.append(threading.current_thread().name)
        rewards = spread_reward(completions)
        log_extra("judged", rewards)
        log_extra("answer", answer)
        if any(reward > 0.9 for reward in rewards):
            log_extra("sometimes", [str(reward) for reward in rewards])
        log_metric("judge/mean", sum(rewards) / len(rewards))
        for reward in rewards:
            log_metric("judge/each", reward)
        return rewards


def skipping(completions, **kwargs):
    return [spread("b" + text_of(each)) if spread("a" + text_of(each)) < 0.7 else None for each in completions]


async def gentle(completions, log_extra, **kwargs):
    log_extra("by", [threading.current_thread().name] * len(completions))
    return [spread("c" + text_of(each)) for each in completions]


@pytest.fixture
def start(model_path, make_args, dataset):
    """A trainer that goes from a fixed state, whatever else ran before."""

    def make(*reward_funcs, data=dataset, tokenizer=None, model=None, eval_dataset=None, **options) -> TreeRPOTrainer:
        if model is None:
            model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        return TreeRPOTrainer(
            model,
            list(reward_funcs),
            make_args(**{**BLOCKS, **options}),
            train_dataset=data,
            eval_dataset=eval_dataset,
            processing_class=tokenizer or make_tokenizer(),
            reward_processing_classes=[make_tokenizer() for _ in reward_funcs],
        )

    return make


def outcome(trainer: TreeRPOTrainer) -> tuple[list, dict, dict]:
    """Logs without times, the table of completions of the last batch, and the weights."""
    logs = [
        {name: value for name, value in log.items() if "time" not in name and "second" not in name}
        for log in trainer.state.log_history[:-1]
    ]
    tables = {name: {**log} if isinstance(log, dict) else list(log) for name, log in trainer._logs.items()}
    tables |= {name: {key: list(each) for key, each in tables[name].items()} for name in ("rewards", "extra")}
    return logs, tables, trainer.model.state_dict()


def reward_model() -> Qwen2ForSequenceClassification:
    torch.manual_seed(1)
    return Qwen2ForSequenceClassification(tiny_config(num_labels=1, initializer_range=0.2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_of_the_run_is_another(start, options):
    """With all kinds of reward functions, whose exact values and tables are compared."""
    outcomes, judges = [], []
    for overlap in (False, True):
        judge = Judge()
        trainer = start(judge, skipping, reward_model(), gentle, overlap_rewards=overlap, **options)
        trainer.train()
        assert trainer._overlap is None
        outcomes.append(outcome(trainer))
        judges.append(judge)
    (logs, tables, weights), (other_logs, other_tables, other_weights) = outcomes
    assert len(logs) == len(other_logs) > 1 and "judge/mean" in logs[0] and "tree/kept_groups" in logs[0]
    for log, other in zip(logs, other_logs, strict=True):
        means = [each.pop("judge/mean", 0.0) for each in (log, other)]  # a mean of means: but for rounding
        assert log == other and means[0] == pytest.approx(means[1], rel=1e-6)
    sparse, others = (table["extra"].pop("sometimes", None) for table in (tables, other_tables))
    assert repr(tables) == repr(other_tables) and {"judged", "answer", "by"} <= tables["extra"].keys()
    assert all(each in (None, full) for each, full in zip(others or [], sparse or [], strict=True))
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    plain, overlapped = judges
    assert set(plain.threads) == {"MainThread"} and set(overlapped.threads) == {"treerpo-rewards"}
    assert sorted(chain(*plain.calls)) == sorted(chain(*overlapped.calls))
    if options.get("max_frontier_rows", 0) < 256:
        assert len(overlapped.calls) > 2 * len(plain.calls)


def parsing():
    """A model whose tokenizer says how to read what it writes: its messages may hold more than text."""
    model, tokenizer = make_tool_policy()
    return {"tokenizer": add_response_schema(tokenizer), "model": model}


@pytest.mark.parametrize("kind", ["chat", "parsed"])
def test_messages_are_those_that_trl_makes(start, dataset, kind):
    seen = []
    for overlap in (False, True):
        given = []

        def reward(prompts, completions, given=given, **kwargs):
            given += [(str(prompt), str(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
            return [spread(str(completion)) for completion in completions]

        own = parsing() if kind == "parsed" else {}
        start(reward, data=chat(dataset), **own, overlap_rewards=overlap, max_steps=1).train()
        seen.append(sorted(given))
    assert seen[0] == seen[1]
    assert any("tool_calls" in completion for _, completion in seen[0]) == (kind == "parsed")


def test_rewards_are_computed_while_later_blocks_are_sampled(start, monkeypatch):
    """The function and the next block wait for each other, which only ends if both are under way."""
    begun, goes_on, has_ended = threading.Event(), threading.Event(), threading.Event()
    met = []
    extend, add = TransformersBackend.extend, RewardOverlap.add

    def extend_together(self, trees, wave):
        if has_ended.is_set() and not met:
            met.append(begun.wait(PATIENCE))
            goes_on.set()
        return extend(self, trees, wave)

    def add_and_tell(self, *args):
        has_ended.set()
        add(self, *args)

    def reward(completions, **kwargs):
        begun.set()
        met.append(goes_on.wait(PATIENCE))
        assert met[-1]
        return spread_reward(completions)

    monkeypatch.setattr(TransformersBackend, "extend", extend_together)
    monkeypatch.setattr(RewardOverlap, "add", add_and_tell)
    start(reward, overlap_rewards=True, max_steps=1).train()
    assert len(met) > 2 and all(met)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("treerpo")]


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("treerpo"):
            thread.join(PATIENCE)
    assert not threads()


@pytest.mark.parametrize("position", [0, 1])
def test_an_exception_is_raised_as_it_would_have_been(start, position):
    """With its type and traceback, after which no function is called, no thread is left, and the trainer trains on."""
    calls = []

    def failing(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            raise FileNotFoundError("the judge is gone")
        return spread_reward(completions)

    functions = [skipping, skipping]
    functions[position] = failing
    trainer = start(*functions, overlap_rewards=True)
    with pytest.raises(FileNotFoundError, match="the judge is gone") as raised:
        trainer.train()
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert "failing" in names and "_calculate_rewards" in names
    assert len(calls) == 2 and trainer.reward_funcs == functions and trainer.state.global_step == 0
    wait_for_threads()
    trainer.train()
    assert trainer.state.global_step == 2 and len(calls) > 4
    wait_for_threads()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda rewards: rewards[1:], ValueError, r"'reward' returned \d+ rewards, but \d+ were expected"),
        (lambda rewards: None, TypeError, "'reward' returned an object of type NoneType; return a list"),
        (lambda rewards: ["good"] * len(rewards), TypeError, "'reward' returned 'good' for completion 0"),
    ],
)
def test_bad_rewards_are_refused(start, answer, error, message):
    def reward(completions, **kwargs):
        return answer(spread_reward(completions))

    with pytest.raises(error, match=message):
        start(reward, overlap_rewards=True).train()
    wait_for_threads()


def test_where_sampling_fails_nobody_waits_for_the_function(start, monkeypatch):
    """The function ends its call, and is not called for what was waiting."""
    begun, may_end, calls = threading.Event(), threading.Event(), []
    extend, add, added = TransformersBackend.extend, RewardOverlap.add, []

    def failing(self, trees, wave):
        if len(added) == 2:
            assert begun.wait(PATIENCE)
            raise MemoryError("no room")
        return extend(self, trees, wave)

    def count(self, *args):
        added.append(args)
        add(self, *args)

    def reward(completions, **kwargs):
        calls.append(len(completions))
        begun.set()
        assert may_end.wait(PATIENCE)
        return spread_reward(completions)

    monkeypatch.setattr(TransformersBackend, "extend", failing)
    monkeypatch.setattr(RewardOverlap, "add", count)
    with pytest.raises(MemoryError, match="no room"):
        start(reward, overlap_rewards=True).train()
    assert len(threads()) == 1
    may_end.set()
    wait_for_threads()
    assert len(calls) == 1


def test_ctrl_c_ends_a_run_whose_function_hangs(start):
    may_end = threading.Event()

    def reward(completions, **kwargs):
        _thread.interrupt_main()
        assert may_end.wait(PATIENCE)
        return spread_reward(completions)

    with pytest.raises(KeyboardInterrupt):
        start(reward, overlap_rewards=True).train()
    assert not may_end.is_set() and all(thread.daemon for thread in threading.enumerate() if "treerpo" in thread.name)
    may_end.set()
    wait_for_threads()


def test_evaluation_is_scored_as_before(start, dataset):
    """Also between two steps of training; its completions are whole batches, and scored by no thread."""
    evaluations = []
    for overlap in (False, True):
        judge = Judge()
        trainer = start(
            judge, eval_dataset=dataset.select(range(8)), overlap_rewards=overlap, eval_strategy="steps",
            eval_steps=1, per_device_eval_batch_size=8,
        )  # fmt: skip
        trainer.train()
        logs = [log for log in trainer.state.log_history if "eval_reward" in log]
        logs.append(trainer.evaluate())
        assert len(logs) == 3
        evaluations.append([log["eval_reward"] for log in logs])
        by_main = [call for call, thread in zip(judge.calls, judge.threads, strict=True) if thread == "MainThread"]
        assert len(by_main) >= 3 and (len(by_main) < len(judge.calls)) == overlap
    assert evaluations[0] == evaluations[1]


def test_rewards_do_not_overlap_with_tools(start, dataset):
    def look_up(key: str) -> str:
        """Look something up.

        Args:
            key: What.
        """
        return key

    model, tokenizer = make_tool_policy()
    args = start(spread_reward, overlap_rewards=True).args
    with pytest.raises(ValueError, match="overlap_rewards=True does not work with tools or environment_factory"):
        TreeRPOTrainer(model, spread_reward, args, chat(dataset), processing_class=tokenizer, tools=[look_up])


@pytest.mark.parametrize(
    ("options", "reward_funcs", "reason"),
    [
        ({"max_frontier_rows": 16}, spread_reward, "all 16 rows of a process fit into max_frontier_rows=16"),
        ({"use_vllm": True}, [spread_reward], "with vLLM, all trees end together"),
        ({}, [gentle, "reward-model"], "after sampling"),
        ({}, [spread_reward, gentle], None),
        ({"overlap_rewards": False, "use_vllm": True}, [spread_reward], None),
    ],
)
def test_a_warning_says_where_nothing_can_overlap(options, reward_funcs, reason):
    given = {"overlap_rewards": True, "use_vllm": False, "max_frontier_rows": 8, **options}
    args = SimpleNamespace(**given, per_device_train_batch_size=8, steps_per_generation=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_overlap(args, False, reward_funcs)
    assert [reason in str(each.message) for each in caught] == ([True] if reason else [])
