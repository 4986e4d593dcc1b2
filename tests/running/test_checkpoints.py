"""Which checkpoints count as complete, what is in them, and what is said about those that a run cannot go on from."""

import json
import os
import pickle
import shlex
import shutil
from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_llama import save_tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from random_trees import forests, leaf_rewards
from test_train_script import log_history
from test_train_script import train as train_script
from tiny import make_tokenizer, spread_reward
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.credit import assign
from treerpo_trl.running.checkpoints import (
    SEAL,
    check_settings,
    choose_checkpoint,
    find_fault,
    last_complete_checkpoint,
    list_checkpoints,
    load_state,
    make_plain,
    make_room,
    read_seal,
    save_state,
    seal,
)
from treerpo_trl.trainers.resuming import pack, unpack
from treerpo_trl.tree import Tree


SETTINGS = {"num_processes": 1, "branching_factor": [2, 2]}


def write(folder: Path, is_mid_generation: bool = False, mark: str = "") -> Path:
    """A complete checkpoint."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights" + mark)
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "optimizer.pt").write_text("moments")
    save_state(folder, "state_0", {"step": 1})
    seal(folder, SETTINGS, is_mid_generation)
    (folder / "trainer_state.json").write_text('{"epoch": 0.5}')
    return folder


def train(model_path: str, args: TreeRPOConfig, dataset, resume=None, trainer_class=TreeRPOTrainer):
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    trainer = trainer_class(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# Complete or not


def test_a_checkpoint_is_complete_with_every_file_in_full(tmp_path):
    whole = write(tmp_path / "whole")
    assert find_fault(whole) is None
    files = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()]
    assert {"model.safetensors", "global_step3/optimizer.pt", "treerpo_state_0.pt", SEAL} < set(files)
    for name in files:
        for size in (None, 0, (whole / name).stat().st_size - 1):
            copy = Path(shutil.copytree(whole, tmp_path / "copy"))
            (copy / name).unlink() if size is None else os.truncate(copy / name, size)
            assert name in find_fault(copy), f"{name} with {size} bytes"
            shutil.rmtree(copy)


def test_files_that_are_added_later_do_no_harm(tmp_path):
    folder = write(tmp_path / "checkpoint-1")
    (folder / "notes.txt").write_text("good one")
    assert find_fault(folder) is None


def test_the_newest_complete_one_is_taken_and_newer_ones_are_named(tmp_path):
    for step in (2, 9, 10, 11):
        write(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-10" / "model.safetensors").unlink()
    os.truncate(tmp_path / "checkpoint-11" / "trainer_state.json", 5)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    with pytest.warns(
        UserWarning, match=r"checkpoint-11: .*trainer_state.json.*; checkpoint-10: model.safetensors is"
    ):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (11, 10, 9, 2)]


@pytest.mark.filterwarnings("error")
def test_without_faults_there_is_no_warning(tmp_path):
    write(tmp_path / "checkpoint-2")
    assert choose_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-2")
    assert choose_checkpoint(str(tmp_path / "checkpoint-2"), "elsewhere") == str(tmp_path / "checkpoint-2")
    assert choose_checkpoint(None, tmp_path) is None and choose_checkpoint(False, tmp_path) is None


def test_errors_name_what_is_missing_and_what_to_take(tmp_path):
    with pytest.raises(ValueError, match=rf"No valid checkpoint found in output directory \({tmp_path}/none\). Leave"):
        choose_checkpoint(True, tmp_path / "none")
    broken = write(tmp_path / "checkpoint-5")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-5'.*model.safetensors is missing; there is no complete one"):
        choose_checkpoint(str(broken), tmp_path)
    write(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"model.safetensors is missing; the newest complete one is .*/checkpoint-4"):
        choose_checkpoint(broken, tmp_path)
    with pytest.raises(ValueError, match=r"no such folder; the newest complete one is .*/checkpoint-4"):
        choose_checkpoint(tmp_path / "checkpoint-6", tmp_path)
    newer = json.loads((tmp_path / "checkpoint-4" / SEAL).read_text()) | {"format": 2}
    (tmp_path / "checkpoint-4" / SEAL).write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="written by a newer treerpo_trl"):
        choose_checkpoint(tmp_path / "checkpoint-4", tmp_path)


def test_room_is_made_without_losing_what_is_complete(tmp_path):
    write(tmp_path / "checkpoint-4", mark="old")
    half = write(tmp_path / "checkpoint-6")
    (half / "trainer_state.json").unlink()
    make_room(tmp_path / "checkpoint-4", delete_unfinished=False)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "replaced-checkpoint-4"]
    with pytest.warns(UserWarning, match="checkpoint-6"):
        assert last_complete_checkpoint(tmp_path).endswith("replaced-checkpoint-4")
    make_room(tmp_path / "checkpoint-4", delete_unfinished=True)  # nothing was written; the old one stays
    assert [path.name for path in list_checkpoints(tmp_path)] == ["replaced-checkpoint-4"]
    write(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path).endswith("/checkpoint-4")


# Settings


def test_other_settings_are_told_or_refused(tmp_path):
    between, within = write(tmp_path / "between"), write(tmp_path / "within", is_mid_generation=True)
    assert check_settings(between, SETTINGS) and check_settings(within, SETTINGS)
    changed = SETTINGS | {"num_processes": 2}
    with pytest.warns(UserWarning, match="not as an unbroken one would: num_processes was 1 and is now 2"):
        assert not check_settings(between, changed)
    with pytest.raises(ValueError, match=r"num_processes was 1 and is now 2\. Set them back.*model='.*within'"):
        check_settings(within, changed)


def test_a_run_goes_on_with_other_settings_between_generation_batches_only(model_path, make_args, dataset, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "branching_factor": [2, 2], "per_device_train_batch_size": 4}
    train(model_path, make_args(**options, max_depth=2, num_iterations=2), dataset)
    out = tmp_path / "out"
    options |= {"max_depth": 2, "max_steps": 4, "output_dir": str(tmp_path / "other")}
    wider = {**options, "num_iterations": 2, "branching_factor": [4, 2], "per_device_train_batch_size": 8}
    with pytest.raises(ValueError, match=r"branching_factor was \[2, 2\] and is now \[4, 2\]"):
        train(model_path, make_args(**wider), dataset, str(out / "checkpoint-1"))
    with pytest.warns(UserWarning, match=r"branching_factor was \[2, 2\] and is now \[4, 2\]"):
        trainer = train(model_path, make_args(**wider), dataset, str(out / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert trainer.last_trees[0].tree.children[0] == (1, 2, 3, 4)


@pytest.mark.parametrize("only_model", [True, False])
def test_checkpoints_without_our_state_are_refused_with_a_way_out(
    model_path, make_args, dataset, tmp_path, only_model
):
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": only_model}
    args, trainer_class = make_args(**options), TreeRPOTrainer
    if not only_model:  # another trainer's
        names = (
            "output_dir",
            "max_steps",
            "save_steps",
            "report_to",
            "bf16",
            "gradient_checkpointing",
            "num_generations",
        )
        args = GRPOConfig(**{name: getattr(args, name) for name in names}, max_completion_length=4)
        trainer_class = GRPOTrainer
    train(model_path, args, dataset, trainer_class=trainer_class)
    folder = tmp_path / "out" / "checkpoint-2"
    message = f"another trainer or with save_only_model=True .* pass model='{folder}'"
    with pytest.raises(ValueError, match=message):
        train(model_path, make_args(max_steps=4), dataset, str(folder))
    told = rf"No valid checkpoint found .*\. checkpoint-2: .*{message}.*Leave resume_from_checkpoint out"
    with pytest.raises(ValueError, match=told), pytest.warns(UserWarning, match=message):
        train(model_path, make_args(max_steps=4), dataset, True)


# State


@given(forest=forests(), rewards=st.lists(st.none() | st.floats(0, 1, width=32), min_size=1, max_size=5))
def test_trees_come_back_as_they_were(forest, rewards):
    for tree in forest[1]:
        scored = assign(tree, leaf_rewards(tree, rewards))
        packed = pack(scored)
        assert unpack(packed) == scored
        packed["nodes"] = [node[:4] for node in packed["nodes"]]  # as earlier versions wrote them
        nodes = tuple(replace(node, score_norms=None, uncertainties=None, is_rest=False) for node in tree.nodes)
        assert unpack(packed) == replace(scored, tree=Tree(nodes))


def test_what_rewards_log_comes_back_as_plain_data(tmp_path):
    view = torch.arange(1000.0)[:2]
    logged = {
        "a": np.float32(0.5),
        "b": np.arange(2),
        "c": deque([None, float("nan")]),
        4: {("x", 1): Path("p")},
        "v": view,
    }
    save_state(tmp_path, "state_0", make_plain(defaultdict(list, logged)))
    plain = load_state(tmp_path, "state_0")
    assert (plain["a"], plain["b"], plain["c"][0], plain[4]) == (0.5, [0, 1], None, {"('x', 1)": "p"})
    assert torch.equal(plain["v"], view) and plain["v"].untyped_storage().nbytes() == 8
    assert [path.name for path in tmp_path.iterdir()] == ["treerpo_state_0.pt"]


def test_a_state_file_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"step": Attack()}, tmp_path / "treerpo_state_0.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_state(tmp_path, "state_0")
    assert not (tmp_path / "attacked").exists()


def test_a_checkpoint_between_generation_batches_holds_none(model_path, make_args, dataset, tmp_path):
    train(model_path, make_args(save_strategy="steps", save_steps=1, num_iterations=2), dataset)
    first, second = (load_state(tmp_path / "out" / f"checkpoint-{step}", "state_0") for step in (1, 2))
    assert "micro_batches" in first and "trees" in first
    assert "micro_batches" not in second and "trees" not in second
    parts = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "treerpo_state_0.pt"}
    assert parts < read_seal(tmp_path / "out" / "checkpoint-1")["files"].keys()


def test_the_mean_loss_is_about_the_steps_since_the_checkpoint(model_path, make_args, dataset, tmp_path):
    """As upstream's, with a checkpoint between two logs."""
    options = {"max_steps": 4, "output_dir": str(tmp_path / "each")}
    each = [log["loss"] for log in train(model_path, make_args(**options), dataset).state.log_history if "loss" in log]
    args = make_args(max_steps=4, logging_steps=3, save_strategy="steps", save_steps=2)
    train(model_path, args, dataset)
    resumed = train(model_path, args, dataset, str(tmp_path / "out" / "checkpoint-2"))
    *_, log, end = resumed.state.log_history
    assert log["loss"] == pytest.approx(sum(each[:3]) / 3, abs=1e-7)
    means = [sum(each[2:]) / steps for steps in (2, 4)]  # older versions of transformers divide by all steps
    assert any(end["train_loss"] == pytest.approx(mean, abs=1e-7) for mean in means)


# From the command line


@pytest.mark.parametrize("given", ["true", "True", True])
def test_train_py_goes_on_from_the_newest_complete_checkpoint_or_from_the_start(tmp_path, make_args, capsys, given):
    args = make_args(resume_from_checkpoint=given)
    assert train_script.find_checkpoint(args) is None
    assert f"Starting from the beginning: no complete checkpoint in {tmp_path}/out yet" in capsys.readouterr().out
    write(tmp_path / "out" / "checkpoint-2")
    assert train_script.find_checkpoint(args) == str(tmp_path / "out" / "checkpoint-2")
    assert "Going on from" in capsys.readouterr().out


def test_train_py_takes_a_path_or_nothing(make_args):
    assert train_script.find_checkpoint(make_args(resume_from_checkpoint="out/checkpoint-7")) == "out/checkpoint-7"
    assert train_script.find_checkpoint(make_args()) is None
    assert train_script.find_checkpoint(make_args(resume_from_checkpoint="false")) is None


def test_one_job_script_can_be_submitted_again(tmp_path, dataset, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    dataset.to_json("data.jsonl")
    (tmp_path / "my_lengths.py").write_text(
        "def length(completions, **kwargs): return [len(c) % 7 / 7 for c in completions]"
    )
    command = shlex.split("""
        --model_name_or_path model --dataset_name data.jsonl --reward_funcs my_lengths.length --output_dir out
        --branching_factor 2 2 --segment_length 4 --per_device_train_batch_size 8 --save_steps 1 --logging_steps 1
        --report_to none --use_cpu --bf16 false --disable_tqdm true --resume_from_checkpoint true --max_steps
    """)
    for steps, said in [("2", "Starting from the beginning"), ("3", "Going on from out/checkpoint-2.")]:
        train_script.main(*train_script.make_parser().parse_args_and_config([*command, steps]))
        assert said in capsys.readouterr().out
    first, second = log_history(tmp_path / "out" / "checkpoint-2"), log_history(tmp_path / "out" / "checkpoint-3")
    assert second[:2] == first  # with its times: a run from the start would have others
