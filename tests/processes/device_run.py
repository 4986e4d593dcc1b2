"""What `test_devices.py` runs: short training runs of many kinds, on the CPU and on a device that is not the CPU.

python tests/processes/device_run.py OUTPUT_DIR [NAME ...]

The device is that of `helpers/strict_device.py`, which a process cannot get rid of. What a run comes to is in
OUTPUT_DIR/NAME.json: by device, its numbers, or the error that ended it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # as pytest does

import strict_device
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from families import FAMILIES, WINDOW, random_rows
from peft import LoraConfig
from tiny import make_tokenizer, spread_reward, tiny_config
from tool_policy import make_tool_policy
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.evaluation import evaluate
from treerpo_trl.prefix_sharing.flex import block_mask
from treerpo_trl.prefix_sharing.packing import pack_rows


PROMPTS = Dataset.from_dict({"prompt": ["7+" * (i % 4) + f"{i}=" for i in range(8)]})
QUESTIONS = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"question {i}"}] for i in range(4)]})
BASE = {
    "per_device_train_batch_size": 16, "max_steps": 2, "learning_rate": 1e-2, "prefix_sharing": True, "bf16": False,
    "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip
TREE = {"branching_factor": 2, "max_depth": 3, "segment_length": 4, "advantage_estimator": "treerpo"}
# They differ from run to run.
TIMES = ("step_time", "tree/seconds/", "runtime", "_per_second")


def make_model(family: str) -> PreTrainedModel:
    """A random model of the tiny tokenizer's tokens, sharp enough that its samples are not uniform."""
    config = FAMILIES[family]()
    config.vocab_size = len(make_tokenizer())
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def save_model(folder: Path) -> str:
    """One that trainers load, as they do a reference model."""
    torch.manual_seed(0)
    Qwen2ForCausalLM(tiny_config(initializer_range=0.2)).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def train(
    model: Any, folder: Path, options: dict[str, Any], resume: bool = False, **arguments: Any
) -> tuple[TreeRPOTrainer, dict[str, float]]:
    """A run and what it logs. An error that would only make it sample or train in a slower way ends it.

    Args:
        model, arguments: Of the trainer.
        folder: For what the run writes.
        options: Of the configuration.
        resume: Whether to go on from a checkpoint.
    """
    defaults = {"reward_funcs": spread_reward, "train_dataset": PROMPTS, "processing_class": make_tokenizer()}
    trainer = TreeRPOTrainer(
        model, args=TreeRPOConfig(str(folder / "out"), **{**BASE, **options}), **{**defaults, **arguments}
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer._can_fork_caches, "caches cannot be forked"
    logged = {
        f"{log['step']} {name}": value
        for log in trainer.state.log_history
        for name, value in log.items()
        if not any(part in name for part in TIMES)
    }
    return trainer, logged


def whole(folder: Path) -> dict[str, float]:
    """All that a run usually does, with a reference model, a reward model, micro-batches and an entropy bonus."""
    torch.manual_seed(1)
    reward_model = Qwen2ForSequenceClassification(tiny_config(initializer_range=0.2, num_labels=1))
    options = {
        **TREE, "advantage_estimator": "optimal_baseline", "per_device_train_batch_size": 4, "loss_weighting": "node",
        "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "beta": 0.1, "entropy_coef": 0.01,
        "max_frontier_rows": 4, "eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2,
        "per_device_eval_batch_size": 2, "log_trees": True, "log_completions": True,
    }  # fmt: skip
    trainer, logged = train(
        save_model(folder), folder, options, reward_funcs=[spread_reward, reward_model],
        reward_processing_classes=[None, make_tokenizer()], eval_dataset=PROMPTS.select(range(2)),
    )  # fmt: skip
    scores = evaluate(
        trainer.model, make_tokenizer(), PROMPTS, spread_reward, num_samples=2, max_new_tokens=6, progress_bar=False
    )
    return {**logged, "pass_at_1": scores.pass_at_1, "mean_length": scores.mean_length}


def adapters(folder: Path) -> dict[str, float]:
    """Adapters; segments end at delimiters, and completions at stop strings."""
    options = {
        **TREE, "segment_length": 6, "split_rule": "delimiter", "step_delimiters": ["1", "+"], "beta": 0.1,
        "generation_kwargs": {"stop_strings": ["5"]}, "min_advantage": 0.1, "max_frontier_rows": 3,
    }  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear")
    return train(make_model("qwen2"), folder, options, peft_config=lora)[1]


def forks(folder: Path) -> dict[str, float]:
    """Responses fork where they are least certain; the model has windows and bounds its scores."""
    options = {
        "split_rule": "uncertainty", "num_trunks": 2, "fork_rounds": 2, "uncertainty_measure": "entropy",
        "max_completion_length": 12, "per_device_train_batch_size": 12,
    }  # fmt: skip
    return train(make_model("gemma2"), folder, options)[1]


def mixture(folder: Path) -> dict[str, float]:
    """A mixture of experts, with its load-balancing loss."""
    model = make_model("qwen2_moe")
    model.set_experts_implementation("eager")  # the others take operators that the CPU lacks
    return train(model, folder, {**TREE, "router_aux_loss_coef": 0.1})[1]


def tools(folder: Path) -> dict[str, float]:
    """Turns that call a tool."""

    def look_up(key: str) -> str:
        """
        Look up a key.

        Args:
            key: What to look up.

        Returns:
            Its value.
        """
        return f"{key} is {ord(key[0])}"

    model, tokenizer = make_tool_policy()
    options = {**TREE, "segment_length": None, "max_completion_length": 200}
    return train(model, folder, options, processing_class=tokenizer, train_dataset=QUESTIONS, tools=[look_up])[1]


def checkpoints(folder: Path) -> dict[str, float]:
    """A run that ends between two updates of one generation batch, and one that goes on, with a moving reference."""
    options = {
        **TREE, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "num_iterations": 2, "save_steps": 1,
        "save_strategy": "steps",
    }  # fmt: skip
    path = save_model(folder)
    train(path, folder, {**options, "max_steps": 1})
    return train(path, folder, {**options, "max_steps": 3}, resume=True)[1]


def blocks(folder: Path) -> dict[str, float]:
    """The mask of FlexAttention; its kernel would have to be compiled."""
    device = torch.device(os.environ["ACCELERATE_TORCH_DEVICE"])
    rows = random_rows(0)
    packed = pack_rows(*(states.to(device) for states in (rows.input_ids, rows.attention_mask, rows.needed)))
    mask = block_mask(packed.layout.paths, WINDOW, device)
    position_S = torch.arange(packed.input_ids.numel(), device=device)
    zero = position_S.new_zeros(())
    seen_SS = mask.mask_mod(zero, zero, position_S[:, None], position_S)
    parts = [seen_SS, *(part for part in mask.as_tuple() if isinstance(part, Tensor))]
    assert {part.device.type for part in parts} == {device.type}
    return {str(index): part.sum().item() for index, part in enumerate(parts)}


SCENARIOS: dict[str, Callable[[Path], dict[str, float]]] = {
    scenario.__name__: scenario for scenario in (whole, adapters, forks, mixture, tools, checkpoints, blocks)
}


# What CUDA refuses to do with a tensor of its own and one of the CPU, and what it does.
REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda own, host: own + host,
    "sum, other way round": lambda own, host: host + own,
    "comparison": lambda own, host: own == host,
    "product": lambda own, host: own @ host,
    "concatenation": lambda own, host: torch.cat([own, host]),
    "stack of numbers": lambda own, host: torch.stack([own.sum(), host.sum()]),
    "where": lambda own, host: torch.where(own > 0, own, host),
    "mask": lambda own, host: own.masked_fill(host > 0, 0.0),
    "gather": lambda own, host: own.gather(0, host.long()),
    "embedding": lambda own, host: torch.nn.functional.embedding(host.long(), own[:, None]),
    "index on the device": lambda own, host: host[own.long()],
    "sum into a CPU tensor": lambda own, host: host.add_(own),
    "sum into a number on the CPU": lambda own, host: host.sum().add_(own.sum()),
    "numpy": lambda own, host: own.numpy(),
}
GRANTED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum with a number": lambda own, host: own + host.sum(),
    "where with a number": lambda own, host: torch.where(own > 0, own, host.sum()),
    "mask with a number": lambda own, host: own.masked_fill(own > 0, host.sum()),
    "index on the CPU": lambda own, host: own[host.long()],
    "mask on the CPU": lambda own, host: own[host > 0],
    "assignment": lambda own, host: own.__setitem__(slice(0, 1), host[:1]),
    "assignment of a number": lambda own, host: own.__setitem__(own > 0, host.sum()),
    "copy": lambda own, host: host.copy_(own),
    "move": lambda own, host: host.to(own.device) + own,
    "move of a gradient": lambda own, host: (host.requires_grad_().to(own.device) * own).sum().backward(),
    "list": lambda own, host: [*own.tolist(), own.sum().item()],
}


def find_refused(device: Any) -> list[str]:
    """Which of these calls a device refuses."""
    refused = []
    for name, call in {**REFUSED, **GRANTED}.items():
        try:
            call(torch.tensor([0.0, 1.0], device=device), torch.tensor([0.0, 1.0]))
        except (RuntimeError, TypeError):
            refused.append(name)
    return refused


def play(names: tuple[str, ...], device: str, output_dir: Path) -> dict[str, Any]:
    """What each scenario comes to on a device."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    AcceleratorState._reset_state(reset_partial_state=True)
    outcomes: dict[str, Any] = {}
    for name in names:
        folder = output_dir / name / device
        folder.mkdir(parents=True)
        try:
            outcomes[name] = SCENARIOS[name](folder)
        except Exception:
            outcomes[name] = traceback.format_exc()
    return outcomes


def main(output_dir: str, *names: str) -> None:
    warnings.filterwarnings("error", category=UserWarning, module=r"treerpo_trl\.")  # says why a run is slower
    names = names or tuple(SCENARIOS)
    strict = strict_device.register()
    outcomes = {}
    for device, entered in (("cpu", nullcontext()), (f"{strict_device.NAME}:0", strict)):
        with entered:
            outcomes[device] = play(names, device, Path(output_dir))
    with strict:
        (Path(output_dir) / "refused.json").write_text(json.dumps(find_refused(strict_device.NAME)))
    for name in names:
        by_device = {device: outcome[name] for device, outcome in outcomes.items()}
        (Path(output_dir) / f"{name}.json").write_text(json.dumps(by_device))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # a thread that torch keeps for the device's backward pass may abort on the way out
