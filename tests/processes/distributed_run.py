r"""What every process runs in `test_distributed.py`, under whatever engine it is launched with.

accelerate launch --config_file CONFIG examples/on_cpu.py \
    tests/processes/distributed_run.py MODEL_PATH OUTPUT_DIR SCENARIO ...

A scenario is a name, or NAME=OPTIONS with options as JSON. Each trains, and leaves what process R saw as `rank_R.json`
and the whole parameters as `rank_R.pt`.
"""

import gc
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # as pytest does

import torch
from datasets import Dataset
from peft import LoraConfig
from random_trees import RandomBackend
from tiny import EOS, make_tokenizer, spread_reward
from tool_policy import CALLS, DIGITS, make_tool_tokenizer
from torch import Tensor
from transformers import TrainerCallback

from treerpo_trl import Tree, TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.growth import grow
from treerpo_trl.tree import ROOT


RANK = int(os.environ.get("RANK", "0"))
STEPS = 6
# Biases of `generate` under which each segment ends with its first token, or never.
ENDS_AT_ONCE, NEVER_ENDS = {(EOS,): 100.0}, {(EOS,): -100.0}
# Step -> the bias of each process. Where there is none, the model decides.
BIASES = {0: (ENDS_AT_ONCE, NEVER_ENDS), 4: (NEVER_ENDS, ENDS_AT_ONCE), 5: (ENDS_AT_ONCE, NEVER_ENDS)}
RULE_BIASES = {0: (ENDS_AT_ONCE, NEVER_ENDS), 2: (NEVER_ENDS, ENDS_AT_ONCE)}
# (Step, process) whose rewards are all equal, or all None.
ALL_PRUNED = {(1, 0)}
ALL_NONE = {(2, 0), (3, 0), (3, 1), (5, 1)}


def make_dataset() -> Dataset:
    """Two prompts a step and process; in order, those of process 0 in the second step have one token each."""
    prompts = ["7+" * (i % 4) + f"{i}=" for i in range(32)]
    prompts[4:6] = ["4", "5"]
    return Dataset.from_dict({"prompt": prompts})


def make_args(output_dir: str, **overrides: Any) -> TreeRPOConfig:
    """8 leaves a tree; a tree a micro-batch, two of them a step."""
    defaults = {
        "branching_factor": 2, "max_depth": 3, "segment_length": 4, "advantage_estimator": "treerpo",
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "beta": 0.1, "entropy_coef": 0.01,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False,
        "disable_tqdm": True, "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    return TreeRPOConfig(output_dir, **{**defaults, **overrides})


def uneven_reward(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float | None]:
    """Rewards that leave a process without anything to train in some steps."""
    moment = (trainer_state.global_step, RANK)
    if moment in ALL_PRUNED:
        return [1.0] * len(completions)
    if moment in ALL_NONE:
        return [None] * len(completions)
    return spread_reward(completions)


class Bias(TrainerCallback):
    """Sets the bias of each step, and that of evaluation."""

    trainer: TreeRPOTrainer

    def __init__(self, biases: dict[int, tuple[Any, Any]]):
        self.biases = biases

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.generation_config.sequence_bias = self.biases.get(state.global_step, (None, None))[RANK]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.generation_config.sequence_bias = (ENDS_AT_ONCE, NEVER_ENDS)[RANK]  # in evaluation


class RecordingTrainer(TreeRPOTrainer):
    """Keeps of each step what its trees looked like."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.record: list[dict[str, Any]] = []
        self.start = whole_parameters(self)
        self.forwards = 0

    def _grow(self, prompts: list[list[int]]) -> list[Tree]:
        def count(*args: Any) -> None:
            self.forwards += 1

        handle = self.accelerator.unwrap_model(self.model).register_forward_pre_hook(count)
        try:
            return super()._grow(prompts)
        finally:
            handle.remove()

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            leaves = [(scored.tree, leaf) for scored in self.last_trees for leaf in scored.tree.leaves]
            self.record.append(
                {
                    "prompt_length": max(len(scored.tree.prompt_ids) for scored in self.last_trees),
                    "depths": sorted({tree.depths[leaf] for tree, leaf in leaves}),
                    "nodes": [len(scored.tree.nodes) - 1 for scored in self.last_trees],
                    "values": [s.values[node] for s in self.last_trees for node in s.tree.children[ROOT]],
                    "forwards": self.forwards,
                    "kept": sum(sum(scored.kept) for scored in self.last_trees),
                    "scored": sum(reward is not None for s in self.last_trees for reward in s.rewards.values()),
                    "owned": (output["tool_mask"] * output["completion_mask"]).sum().item(),
                    "old_logps": "old_per_token_logps" in output,
                    "advantages": [scored.advantages for scored in self.last_trees],
                }
            )
        return output


class GivenTrees(RecordingTrainer):
    """Trains on trees that follow from their prompts alone, whichever process they are on."""

    def _grow(self, prompts: list[list[int]]) -> list[Tree]:
        trees = []
        short = 0.7 if self.args.split_rule == "delimiter" else 0.1
        for prompt in prompts:
            backend = RandomBackend(hash(tuple(prompt)), 0.3 * (len(prompt) % 3), short)
            trees += grow([prompt], self.tree_shape, backend)
        return [
            Tree(
                tuple(
                    replace(node, score_norms=(sum(node.token_ids) / (1 + place),)) for place, node in enumerate(nodes)
                )
            )
            for nodes in (tree.nodes for tree in trees)
        ]


def whole_parameters(trainer: TreeRPOTrainer) -> dict[str, Tensor]:
    """The parameters as one process would have them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = {}
    for name, parameter in model.named_parameters():
        with trainer._dist.gather_params([parameter]):
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            parameters[name] = whole.detach().cpu().clone()
    return parameters


def leave(trainer: RecordingTrainer, output_dir: str, **seen: Any) -> None:
    """Write what this process saw."""
    parameters = whole_parameters(trainer)
    seen |= {
        "engine": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "shares": trainer._prefix_sharing.is_active,
        "record": trainer.record,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "moved": [name for name, start in trainer.start.items() if not torch.equal(start, parameters[name])],
        "trainable": [
            name
            for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            if parameter.requires_grad
        ],
    }
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(parameters, folder / f"rank_{RANK}.pt")
    (folder / f"rank_{RANK}.json").write_text(json.dumps(seen))


def train_uneven(model_path: str, output_dir: str, lora: bool = False, **overrides: Any) -> None:
    """Steps in which the processes have trees of other depths, nothing to learn, or no reward, and evaluations."""
    args = make_args(
        output_dir, max_frontier_rows=4, save_strategy="steps", save_steps=STEPS, num_generations_eval=2,
        per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=2, shuffle_dataset=False,
        log_trees=True, num_trees_to_print=0, **overrides,
    )  # fmt: skip
    bias = Bias(BIASES)
    dataset = make_dataset()
    bias.trainer = trainer = RecordingTrainer(
        model_path, uneven_reward, args, train_dataset=dataset, eval_dataset=dataset.select(range(4)),
        processing_class=make_tokenizer(), callbacks=[bias],
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(f"{output_dir}/final")
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    leave(trainer, output_dir, evaluations=evaluations)


def train_given(model_path: str, output_dir: str, processes: int = 2, trees: int = 4, **overrides: Any) -> None:
    """Train on given trees, the same global batches on one process as on two; micro-batches are trees in both."""
    steps = {"steps_per_generation": trees // processes, "gradient_accumulation_steps": trees // processes}
    args = make_args(output_dir, num_iterations=2, max_steps=4, **{**steps, **overrides})
    trainer = GivenTrees(
        model_path, spread_reward, args, train_dataset=make_dataset(), processing_class=make_tokenizer()
    )
    trainer.train()
    leave(trainer, output_dir)


def train_rule(model_path: str, output_dir: str, fork_caches: bool | None = None, **overrides: Any) -> None:
    """Three steps: one process has trees of single tokens, which nothing can branch from, then both have any, then the
    other one has. `fork_caches` is what is known of the model's caches before the first step."""
    bias = Bias(RULE_BIASES)
    args = make_args(output_dir, max_frontier_rows=3, max_steps=3, **overrides)
    bias.trainer = trainer = RecordingTrainer(
        model_path, spread_reward, args, train_dataset=make_dataset(), processing_class=make_tokenizer(),
        callbacks=[bias],
    )  # fmt: skip
    trainer._can_fork_caches = fork_caches
    trainer.train()
    leave(trainer, output_dir)


def look_up(key: str) -> str:
    """
    Look up a key.

    Args:
        key: What to look up.
    """
    return f"it is {key}"


def train_tools(model_path: str, output_dir: str, tool_model: str, **overrides: Any) -> None:
    """As with the rules: one process answers at once, where the other calls its tool turn after turn."""
    tokenizer = make_tool_tokenizer(CALLS)
    answers, calls = (
        {(tokenizer.convert_tokens_to_ids(token),): -100.0 for token in refused} for refused in (CALLS, DIGITS)
    )
    bias = Bias({0: (answers, calls), 2: (calls, answers)})
    args = make_args(
        output_dir, max_frontier_rows=3, max_steps=3, segment_length=None, max_completion_length=400,
        max_tool_calling_iterations=4, beta=0.0, learning_rate=1e-3, **overrides,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "?" * (i % 3)}] for i in range(32)]})

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [sum(map(ord, messages[-1]["content"])) % 5 / 4 for messages in completions]

    bias.trainer = trainer = RecordingTrainer(
        tool_model, reward, args, train_dataset=dataset, processing_class=tokenizer,
        callbacks=[bias], tools=[look_up],
    )  # fmt: skip
    trainer.train()
    leave(trainer, output_dir)


def train_killed(model_path: str, output_dir: str) -> None:
    """Process 1 dies in the middle of the third step."""

    def reward(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        if (trainer_state.global_step, RANK) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return spread_reward(completions)

    trainer = RecordingTrainer(
        model_path, reward, make_args(output_dir), train_dataset=make_dataset(), processing_class=make_tokenizer()
    )
    trainer.train()


def run_script(model_path: str, output_dir: str, folder: str, arguments: list[str]) -> None:
    """examples/train.py, run in a folder. It ends what the processes share, so nothing can come after it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    os.chdir(folder)
    import train

    class KeptTrainer(TreeRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            KEPT.append(self)

    train.TreeRPOTrainer = KeptTrainer
    train.main(*train.make_parser().parse_args_and_config(arguments))


KEPT: list[TreeRPOTrainer] = []  # for the reason that `main` ends with
SCENARIOS = {
    "uneven": train_uneven, "given": train_given, "rule": train_rule, "tools": train_tools, "killed": train_killed,
    "script": run_script,
}  # fmt: skip


def main(model_path: str, output_dir: str, *scenarios: str) -> None:
    """Run one scenario after the other, each into a folder of its own."""
    gc.freeze()  # `Trainer.train` collects garbage: what was imported is none
    for index, scenario in enumerate(scenarios):
        name, _, options = scenario.partition("=")
        SCENARIOS[name](model_path, f"{output_dir}/{index}", **json.loads(options or "{}"))
    # With everything written. Torch may hang on the way out: freeing DDP holds the interpreter's lock while it waits
    # for a thread of gloo that wants it.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
