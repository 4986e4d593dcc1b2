"""The quickstart, run as a user runs it: Pass@1 rises, the last line is JSON, the saved model reloads."""

import json
import subprocess
import sys

import pytest
import quickstart
from places import ROOT
from quickstart import TREES_PER_STEP, make_config
from transformers import AutoModelForCausalLM, AutoTokenizer


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/single_cpu.yaml"]


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    command = [*LAUNCH, "examples/quickstart.py", "--seed", "3", "--output_dir", str(tmp_path / "model")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    output = result.stdout
    last = json.loads(output.splitlines()[-1])
    assert list(last) == ["pass_at_1_before", "pass_at_1_after", "length_before", "length_after", "seconds"]
    assert 0.2 < last["pass_at_1_before"] < 0.35
    assert last["pass_at_1_after"] > 0.65
    assert "reward 1" in output and "A=+" in output  # a tree was shown
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "3*9-5?\n27-5=22\n#22"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_quickstart_has_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--help"])
    with pytest.raises(SystemExit) as end:
        quickstart.main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--seed" in shown and all(f"{rule}: " in shown for rule in ("length", "delimiter", "uncertainty"))


@pytest.mark.parametrize(("split_rule", "leaves"), [("length", 4), ("delimiter", 4), ("uncertainty", 2)])
def test_every_split_rule_has_as_many_prompts_a_step(split_rule, leaves, tmp_path):
    config = make_config(str(tmp_path), 0, split_rule)
    assert (config.split_rule, config.num_generations) == (split_rule, leaves)
    assert config.generation_batch_size == TREES_PER_STEP * leaves
