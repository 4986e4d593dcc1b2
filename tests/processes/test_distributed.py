"""Two CPU processes over gloo under every engine: no hang, one model on both, the gradient of one process.

Each engine is launched once, as a user launches it, and runs scenarios of `distributed_run.py` one after the other.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distributed_run
import pytest
import torch
from peft import PeftModel
from places import ROOT, free_port
from test_train_script import check_run, prepare_run, rows_like_math
from tiny import make_tokenizer, spread_reward
from tool_policy import make_tool_policy
from torch import Tensor
from transformers import AutoModelForCausalLM

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.checks.compatibility import LOSS_TYPES
from treerpo_trl.views import read_trees


# Configuration of `accelerate launch` -> the engine that it must bring about.
ENGINES = {
    "multi_cpu": "MULTI_CPU",
    "fsdp2_cpu": "FSDP",
    "deepspeed_zero1_cpu": "DEEPSPEED",
    "deepspeed_zero2_cpu": "DEEPSPEED",
    "deepspeed_zero3_cpu": "DEEPSPEED",
}
HANG = 480  # seconds; a launch takes 15 to 90, and 30 more if it compiles, and is not alone on the machine


def launch_command(config: str, *options: str) -> list[str]:
    """`accelerate launch` of distributed_run.py, to be completed with its arguments."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accelerate_configs/{config}.yaml",
    ]
    return [*command, *options, "examples/on_cpu.py", "tests/processes/distributed_run.py"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@dataclass
class Run:
    """What the two processes left of a scenario."""

    folder: Path

    @property
    def seen(self) -> list[dict]:
        return [json.loads((self.folder / f"rank_{rank}.json").read_text()) for rank in range(2)]

    @property
    def parameters(self) -> list[dict[str, Tensor]]:
        return [torch.load(self.folder / f"rank_{rank}.pt") for rank in range(2)]


def given(loss_type: str) -> str:
    """Micro-batches of half a tree, where the loss takes them; those of the one process are whole trees."""
    options = {"loss_type": loss_type, "prefix_sharing": True}
    if loss_type != "bnpo":
        options |= {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 4}
    return f"given={json.dumps(options)}"


# Trees of other split rules, of 8 rows as well.
FORKS = {
    "split_rule": "uncertainty", "num_trunks": 2, "fork_rounds": 3, "forks_per_trunk": 1, "max_completion_length": 12,
    "max_depth": None, "segment_length": None,
}  # fmt: skip
DELIMITED = {"split_rule": "delimiter", "step_delimiters": list("0123456789")}

# Credit that depends on the trees of the other process, too. Of single paths each process has one.
CREDIT = {
    "credit-of-trees": {"advantage_estimator": "optimal_baseline"},
    "credit-of-paths": {
        "advantage_estimator": "optimal_baseline", "branching_factor": 1, "max_depth": 1, "segment_length": 12,
        "per_device_train_batch_size": 1, "trees": 2,
    },
    "credit-at-unit-size": {"advantage_estimator": "treepo"},
    "credit-of-forks": {"advantage_estimator": "optimal_baseline", **FORKS},
    "credit-of-delimiters": {"advantage_estimator": "optimal_baseline", **DELIMITED},
}  # fmt: skip


# Sampling by other rules from a sharded model.
RULES = {
    "rule-forks": FORKS,
    "rule-forks-of-prefilled-prefixes": {**FORKS, "fork_caches": False},
    "rule-delimiters": {**DELIMITED, "fork_caches": True},
}


TOOLS = "rule-tools"  # turns, of which one process has more
SCRIPT = "rule-script"  # examples/train.py, which ends what the processes share


def scenarios_of(config: str, tool_model: str, script: dict[str, Any]) -> dict[str, str]:
    """Name -> scenario for distributed_run.py; `tool_model` is the path of a model that calls tools, `script` the
    folder and the command line of examples/train.py."""
    scenarios = {
        "full": "uneven",
        "lora": 'uneven={"lora": true}',
        "given-dapo": given("dapo"),
    }
    if config in ("multi_cpu", "fsdp2_cpu"):
        scenarios["overlapping"] = 'uneven={"overlap_rewards": true}'
    credit = []
    if config == "multi_cpu":
        scenarios |= {f"given-{loss_type}": given(loss_type) for loss_type in LOSS_TYPES[1:]}
        credit = list(CREDIT)
    elif config in ("fsdp2_cpu", "deepspeed_zero3_cpu"):
        sharded = {"ds3_gather_for_generation": False} if config == "deepspeed_zero3_cpu" else {}
        if sharded:
            scenarios["sharded"] = f"uneven={json.dumps(sharded)}"
        credit = ["credit-of-forks"]  # the others differ in what no engine has a part in
        rules = [name for name in RULES if not sharded or name != "rule-forks-of-prefilled-prefixes"]
        scenarios |= {name: f"rule={json.dumps(RULES[name] | sharded)}" for name in rules}
        scenarios[TOOLS] = f"tools={json.dumps({'tool_model': tool_model} | sharded)}"
    scenarios |= {name: f"given={json.dumps(CREDIT[name])}" for name in credit}
    return scenarios | {SCRIPT: f"script={json.dumps(script)}"}


@pytest.fixture(scope="module", params=[pytest.param(engine, marks=pytest.mark.slow) for engine in ENGINES])
def runs(request, model_path, llama_path, tmp_path_factory) -> tuple[str, dict[str, Run]]:
    """The engine and its runs by name. A hang is a failure after `HANG` seconds."""
    config = request.param
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(config)
    make_tool_policy()[0].save_pretrained(folder / "tool_model")
    (folder / "script").mkdir()
    script = {
        "folder": str(folder / "script"),
        "arguments": prepare_run(folder / "script", llama_path, rows_like_math()),
    }
    scenarios = scenarios_of(config, str(folder / "tool_model"), script)
    command = launch_command(config, "--main_process_port", str(free_port()))
    command += [model_path, str(folder), *scenarios.values()]
    environment = {**ENVIRONMENT, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=HANG
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "script" / "output").write_text(result.stdout + result.stderr)
    return config, {name: Run(folder / str(index)) for index, name in enumerate(scenarios)}


def uneven_runs(runs: dict[str, Run]) -> list[Run]:
    return [run for name, run in runs.items() if not name.startswith(("given", "credit", "rule"))]


def test_processes_with_unequal_trees_train_one_model(runs):
    config, runs = runs
    for run in uneven_runs(runs):
        first, second = run.seen
        assert first["processes"] == second["processes"] == 2
        assert first["engine"] == second["engine"] == ENGINES[config]
        assert first["shares"] and second["shares"]
        losses = [log[name] for log in first["logs"] for name in ("loss", "grad_norm", "kl", "entropy")]
        assert len(losses) == 4 * distributed_run.STEPS and all(math.isfinite(loss) for loss in losses)
        parameters, other = run.parameters
        assert parameters.keys() == other.keys()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, other[name]), f"{name} differs between the processes"
            assert torch.isfinite(parameter).all()
        assert first["moved"] == first["trainable"]


def test_rewards_that_overlap_with_sampling_change_nothing(runs):
    """Each process has a thread of its own, while processes call a sharded model together."""
    runs = runs[1]
    if "overlapping" in runs:
        for seen, plain in zip(runs["overlapping"].seen, runs["full"].seen, strict=True):
            assert seen["record"] == plain["record"] and seen["moved"] == plain["moved"]
        for parameters, others in zip(runs["overlapping"].parameters, runs["full"].parameters, strict=True):
            assert all(torch.equal(parameter, others[name]) for name, parameter in parameters.items())


def test_the_scenario_is_what_it_says(runs):
    """Trees of depth 1 beside full ones, a process with every group pruned, and rewards that are all None."""
    for run in uneven_runs(runs[1]):
        first, second = (seen["record"] for seen in run.seen)
        assert (first[0]["depths"], second[0]["depths"]) == ([1], [3])
        assert (first[4]["depths"], second[4]["depths"]) == ([3], [1])
        assert first[1]["prompt_length"] == 1 < second[1]["prompt_length"]
        assert first[1]["kept"] == 0 < first[1]["scored"] and second[1]["kept"] > 0
        assert first[2]["scored"] == 0 < second[2]["kept"]
        assert first[3]["scored"] == second[3]["scored"] == 0
        assert run.seen[0]["logs"][3]["loss"] == 0
        evaluations = run.seen[0]["evaluations"]
        assert len(evaluations) == 3
        for log in evaluations:
            assert (log["eval_completions/min_length"], log["eval_completions/max_length"]) == (1, 12)


def test_tree_metrics_are_those_of_the_trees_of_both_processes(runs):
    for run in uneven_runs(runs[1]):
        first, second = run.seen
        for step in range(distributed_run.STEPS):
            logs, other = ({k: v for k, v in seen["logs"][step].items() if "tree/" in k} for seen in (first, second))
            assert logs == other  # also the seconds, which are a mean over the processes
            nodes = first["record"][step]["nodes"] + second["record"][step]["nodes"]
            assert logs["tree/nodes"] == sum(nodes) / len(nodes)
            values = [value for seen in (first, second) for value in seen["record"][step]["values"]]
            valued = [value for value in values if value is not None]
            assert logs.get("tree/value_std/depth_1") == (pytest.approx(statistics.stdev(valued)) if valued else None)


def test_the_trees_of_all_processes_are_written_down(runs):
    for run in uneven_runs(runs[1]):
        records = read_trees(run.folder / "trees" / "step_000001.parquet")
        trees = {record["tree"]: record["process"] for record in records}
        assert trees == {0: 0, 1: 0, 2: 1, 3: 1}


def test_the_gradient_is_that_of_one_process(runs, model_path, tmp_path):
    """Plain SGD on the same trees, with clipping, KL and entropy terms and second passes over each batch; packed rows
    on two processes against dense rows on one."""
    start = dict(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).named_parameters())
    for name, run in runs[1].items():
        if not name.startswith("given"):
            continue
        options = {"loss_type": name.removeprefix("given-"), "prefix_sharing": False}
        distributed_run.train_given(model_path, str(tmp_path / name), processes=1, **options)
        alone = torch.load(tmp_path / name / "rank_0.pt")
        first, second = (seen["record"] for seen in run.seen)
        assert all(one["owned"] != other["owned"] for one, other in zip(first, second, strict=True))
        assert all(step["old_logps"] for step in first)
        for parameter, expected in alone.items():
            moved = (expected - start[parameter]).norm()
            assert moved > 0
            assert (run.parameters[0][parameter] - expected).norm() < 1e-4 * moved, f"{name}: {parameter}"


def test_credit_of_the_batch_is_that_of_one_process(runs, model_path, tmp_path):
    """The same advantages of the same trees, and the same parameters after four updates."""
    start = dict(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).named_parameters())
    for name in CREDIT.keys() & runs[1].keys():
        run = runs[1][name]
        distributed_run.train_given(model_path, str(tmp_path / name), processes=1, **CREDIT[name])
        alone = json.loads((tmp_path / name / "rank_0.json").read_text())
        for steps in zip(alone["record"], *(seen["record"] for seen in run.seen), strict=True):
            one, first, second = ([a for tree in step["advantages"] for a in tree] for step in steps)
            assert any(first) and any(second)
            assert one == pytest.approx([*first, *second], rel=1e-9, abs=1e-9)
        for parameter, expected in torch.load(tmp_path / name / "rank_0.pt").items():
            moved = (expected - start[parameter]).norm()
            assert moved > 0
            assert (run.parameters[0][parameter] - expected).norm() < 1e-4 * moved, f"{name}: {parameter}"


def test_processes_with_unequal_forks_run_a_sharded_model_equally_often(runs):
    """Also where one of them has nothing to fork, or prefixes to prefill while the other has none."""
    for name in {*RULES, TOOLS} & runs[1].keys():
        first, second = runs[1][name].seen
        nodes = [(one["nodes"], other["nodes"]) for one, other in zip(first["record"], second["record"], strict=True)]
        assert max(nodes[0][0]) == max(nodes[2][1]) == 2  # of one token each, but for the root
        assert min(nodes[0][1]) > 2 and min(nodes[2][0]) > 2
        forwards = [[step["forwards"] for step in seen["record"]] for seen in (first, second)]
        assert forwards[0] == forwards[1] and min(forwards[0]) > 0
        parameters, other = runs[1][name].parameters
        assert all(torch.equal(parameter, other[key]) for key, parameter in parameters.items())
        assert first["moved"] == first["trainable"]


def test_full_models_reload_with_transformers(runs):
    for name in {"full", "sharded"} & runs[1].keys():
        run = runs[1][name]
        for folder in ("final", f"checkpoint-{distributed_run.STEPS}"):
            model = AutoModelForCausalLM.from_pretrained(run.folder / folder, dtype=torch.float32)
            saved = dict(model.named_parameters())
            assert saved.keys() == run.parameters[0].keys()
            assert all(torch.equal(saved[key], value) for key, value in run.parameters[0].items())


def test_adapters_reload_with_peft(runs, model_path):
    run = runs[1]["lora"]
    for folder in ("final", f"checkpoint-{distributed_run.STEPS}"):
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        saved = dict(PeftModel.from_pretrained(base, run.folder / folder).named_parameters())
        assert saved.keys() == run.parameters[0].keys()
        assert all(torch.equal(saved[key], value) for key, value in run.parameters[0].items())


def test_the_script_trains_under_every_engine(runs, llama_path):
    """With a YAML file and options, on rows of a local file."""
    folder = next(iter(runs[1].values())).folder.parent / "script"
    check_run(folder, llama_path, (folder / "output").read_text())


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(model_path, tmp_path):
    """Two launches, as on two machines, so that no launcher ends the process that is left: it must fail by itself.
    `test_resume.py` has it for shards."""
    port = str(free_port())
    machines = []
    for rank in range(2):
        options = ["--num_machines", "2", "--machine_rank", str(rank)]
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        command = [*launch_command("multi_cpu", *options), model_path, str(tmp_path), "killed"]
        output = (tmp_path / f"machine_{rank}.log").open("w")
        machines.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT))
    try:
        killed = machines[1].wait(timeout=HANG)
        died = time.monotonic()
        left = machines[0].wait(timeout=60)
        log = (tmp_path / "machine_0.log").read_text()
        assert killed != 0 and left != 0
        assert time.monotonic() - died < 60
        assert "Signal 9" in (tmp_path / "machine_1.log").read_text()
        assert "Connection closed by peer" in log or "Connection reset by peer" in log, log[-3000:]
    finally:
        for machine in machines:
            machine.kill()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "2", "that 2 processes were launched, .* a model of its own.* examples/on_cpu.py"),
        ("ACCELERATE_USE_FSDP", "true", "asked for FSDP, but accelerate runs NO instead"),
    ],
)
def test_another_engine_than_was_launched_is_refused(monkeypatch, model, make_args, dataset, variable, value, message):
    """accelerate would train by itself, or with DDP, without a word."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        TreeRPOTrainer(model, spread_reward, make_args(), train_dataset=dataset, processing_class=make_tokenizer())
