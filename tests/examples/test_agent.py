"""The agent example: its task is fair, its dialogues are TRL's, and a short run learns to use the tool."""

import json
import sys

import agent
import agent_study
import lookup
import pytest
from places import ROOT
from transformers import AutoTokenizer


def test_right_solutions_follow_the_table():
    for row in lookup.make_dataset(50, seed=0):
        table = json.loads(row["table"])
        key = row["prompt"][0]["content"]
        found = [table[key]]
        while found[-1] in table:
            found.append(table[found[-1]])
        assert lookup.follow(table) == found and found[-1] == row["answer"] and row["answer"].isdigit()
        assert lookup.MIN_HOPS <= len(found) <= lookup.MAX_HOPS


def test_no_problem_is_in_both_splits():
    train, held_out = (set(lookup.make_dataset(300, seed=0, held_out=split)["table"]) for split in (False, True))
    assert len(train) == len(held_out) == 300 and not train & held_out


def test_only_the_last_message_is_the_answer():
    tool = {"role": "tool", "name": "look_up", "content": "7"}
    dialogues = [[tool, {"role": "assistant", "content": "7"}], [{"role": "assistant", "content": "77"}], [tool]]
    assert lookup.correctness_reward(dialogues, ["7", "7", "6"]) == [1.0, 0.0, 0.0]


@pytest.mark.slow
def test_the_agent_learns(tmp_path, monkeypatch, capsys):
    """From a base model that is made here, with fewer steps than a user's."""
    monkeypatch.setattr(lookup, "CLEAN_STEPS", 210)
    monkeypatch.setattr(lookup, "NOISY_STEPS", 50)
    monkeypatch.setattr(agent, "NUM_HELD_OUT", 128)
    monkeypatch.setattr(sys, "argv", ["agent.py", "--output_dir", str(tmp_path), "--max_steps", "6"])
    agent.main()
    output = capsys.readouterr().out
    last = json.loads(output.splitlines()[-1])
    assert list(last) == ["pass_at_1_before", "pass_at_1_after", "calls_before", "calls_after", "seconds"]
    assert 0.1 < last["pass_at_1_before"] < 0.6
    assert last["pass_at_1_after"] > last["pass_at_1_before"] + 0.15
    assert last["calls_after"] > last["calls_before"]
    assert "tool_response" in output  # a tree was shown
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    dialogue = lookup.make_demonstrations(tokenizer, [0.0], seed=0)[0]
    text = tokenizer.decode(dialogue["input_ids"])
    (answered,) = (part.split("<|im_end|>")[0] for part in text.split("<tool_response>\n")[1:2])
    # What tools answer stands in the demonstrations as TRL puts it into a path.
    trainer = agent.make_trainer(agent.parse_arguments(["--output_dir", str(tmp_path)]), tmp_path / "base_model")
    message = {"role": "tool", "name": "look_up", "content": answered.split("\n")[0]}
    suffix = trainer._get_tool_suffix_ids([message])
    assert tokenizer.decode(suffix) in text
    ids = dialogue["input_ids"]
    assert any(ids[start : start + len(suffix)] == suffix for start in range(len(ids)))


def test_costs_are_added_up(monkeypatch):
    class Trainer:
        num_generations = 8
        state = type("State", (), {})()

    Trainer.state.log_history = [
        {"eval_reward": 0.25},
        {"completions/mean_length": 10.0, "tools/call_frequency": 1.5},
        {"completions/mean_length": 20.0, "tools/call_frequency": 2.0},
        {"eval_reward": 0.5},
    ]
    rows = agent_study.ROWS_PER_STEP
    first, last = agent_study.measurements(Trainer())
    assert first == {"tokens": 0.0, "calls": 0.0, "pass_at_1": 0.25}
    assert last == {"tokens": 30.0 * rows, "calls": 3.5 * rows, "pass_at_1": 0.5}
    runs = {
        name: [[first, {**last, "pass_at_1": end + seed / 100}] for seed in range(3)]
        for name, end in (("grpo-8", 0.5), ("tree-2x2", 0.7))
    }
    table = agent_study.compare(runs, "grpo-8")
    assert "| tree-2x2 | 3 | 0.710 |" in table and table.count("+20.0 (") == 3


def test_the_documentation_has_what_was_measured():
    runs = json.loads((ROOT / "examples" / "results" / "agent.json").read_text())
    assert list(runs) == list(agent_study.METHODS) and {len(of_seeds) for of_seeds in runs.values()} == {5}
    table = (ROOT / "examples" / "results" / "agent.md").read_text()
    assert table == agent_study.compare(runs, "grpo-8") + "\n"
    assert table in (ROOT / "docs" / "agents.md").read_text()
