"""What `test_hub.py` runs in processes whose Hub is a local one: `python hub_run.py FOLDER SCENARIO ...`.

Each scenario trains a tiny model that it loads from the Hub, in a folder of its own name, and pushes to the repository
of that name. What it saw is written to FOLDER as `SCENARIO.json`.
"""

import contextlib
import gc
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


BASE = "base/tiny-llama"
TEXT = "What is\n3 + 4?  é"


def parity_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(sum(map(ord, text)) % 2) for text in texts]


class SlowSteps(TrainerCallback):
    """A step that takes longer than a push, as real ones do: the next push would be left out if not."""

    def on_save(self, args: TreeRPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._finish_current_push()


def make_trainer(name: str, steps: int = 2, is_chat: bool = True, **options: Any) -> TreeRPOTrainer:
    problems = [f"{i} + {i}?" for i in range(16)]
    prompts = [[{"role": "user", "content": problem}] for problem in problems] if is_chat else problems
    peft_config = options.pop("peft_config", None)
    settings = {
        "branching_factor": [2, 2], "segment_length": 4, "per_device_train_batch_size": 8, "max_steps": steps,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 1, "report_to": "none", "bf16": False,
        "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False, "push_to_hub": True,
        "hub_model_id": f"me/{name}",
    }  # fmt: skip
    slow_steps = SlowSteps()
    slow_steps.trainer = trainer = TreeRPOTrainer(
        BASE,
        parity_reward,
        TreeRPOConfig(name, **{**settings, **options}),
        Dataset.from_dict({"prompt": prompts}),
        callbacks=[slow_steps],
        peft_config=peft_config,
    )
    return trainer


def titles(name: str) -> list[str]:
    """Of the commits, oldest first."""
    return [commit.title for commit in reversed(HfApi().list_repo_commits(f"me/{name}"))]


def run_quick_start(name: str) -> str:
    """What the card's own code prints, where the name is no folder's."""
    card = ModelCard.load(f"me/{name}")
    card.validate()
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    output = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(output):
        exec(code, {})
    return output.getvalue()


def compare_reloaded(name: str, trainer: TreeRPOTrainer, load: Callable[[str], Any]) -> dict[str, Any]:
    """The model of the Hub against the trained and the untrained one, parameter by parameter."""
    base = AutoModelForCausalLM.from_pretrained(BASE).state_dict()
    trained, loaded = trainer.accelerator.unwrap_model(trainer.model).state_dict(), load(f"me/{name}").state_dict()
    tokenizer = AutoTokenizer.from_pretrained(f"me/{name}")
    chat = [{"role": "user", "content": TEXT}]
    return {
        "names": sorted(trained) == sorted(loaded),
        "differ": [key for key in trained if not torch.equal(trained[key], loaded[key])],
        "trained": [key for key in trained if not (key in base and torch.equal(trained[key], base[key]))],
        "text": tokenizer.decode(tokenizer(TEXT)["input_ids"]),
        "template": tokenizer.apply_chat_template(chat) == trainer.processing_class.apply_chat_template(chat),
    }


def full(strategy: str, **options: Any) -> dict[str, Any]:
    """Training that pushes by itself, and at its end what examples/train.py does."""
    name = strategy.replace("_", "-")
    trainer = make_trainer(name, hub_strategy=strategy, **options)
    trainer.train()
    during = titles(name)
    trainer.save_model(trainer.args.output_dir)
    trainer.push_to_hub(dataset_name="me/rows")
    return {"during": during, **compare_reloaded(name, trainer, AutoModelForCausalLM.from_pretrained)}


def every_save() -> dict[str, Any]:
    return {**full("every_save", hub_private_repo=True), "output": run_quick_start("every-save")}


def end() -> dict[str, Any]:
    return {**full("end", is_chat=False), "output": run_quick_start("end")}


def checkpoint() -> dict[str, Any]:
    """A run that is lost with its disk goes on from the Hub's copy."""
    before = full("checkpoint")
    folder = Path(snapshot_download("me/checkpoint", allow_patterns="last-checkpoint/*"), "last-checkpoint")
    trainer = make_trainer("resumed", steps=3, push_to_hub=False)
    trainer.train(resume_from_checkpoint=str(folder))
    state = json.loads((folder / "trainer_state.json").read_text())
    return {**before, "first": state["log_history"], "resumed": trainer.state.log_history}


def all_checkpoints() -> dict[str, Any]:
    return full("all_checkpoints")


def failing() -> dict[str, Any]:
    """The second and the third of three pushes fail; the one at the end does not."""
    trainer = make_trainer("failing", steps=3)
    trainer.train()
    during = titles("failing")
    trainer.push_to_hub()
    return {
        "during": during,
        "steps": trainer.state.global_step,
        "checkpoints": sorted(path.parent.name for path in Path("failing").glob("checkpoint-*/model.safetensors")),
        **compare_reloaded("failing", trainer, AutoModelForCausalLM.from_pretrained),
    }


def adapter() -> dict[str, Any]:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer("adapter", peft_config=lora, learning_rate=0.1)
    trainer.train()
    during = titles("adapter")
    trainer.save_model("adapter")
    trainer.push_to_hub(dataset_name="me/rows")
    reloaded = compare_reloaded("adapter", trainer, AutoPeftModelForCausalLM.from_pretrained)
    return {"during": during, **reloaded, "output": run_quick_start("adapter")}


def refused() -> dict[str, Any]:
    """Trainers whose pushes could not work: no token, a wrong one, and a repository of someone else."""
    errors = {}
    for case, options in [("none", {}), ("wrong", {"hub_token": "hf_wrong"}), ("other", {"hub_model_id": "you/x"})]:
        token = {"HF_TOKEN": ""} if case == "none" else {}
        with patch.dict(os.environ, token), pytest.raises(HfHubHTTPError) as error:
            make_trainer(f"refused-{case}", **options)
        errors[case] = str(error.value)
    return errors


if __name__ == "__main__":
    gc.freeze()  # `Trainer.train` collects garbage: what was imported is none
    os.chdir(sys.argv[1])
    for scenario in sys.argv[2:]:
        Path(f"{scenario}.json").write_text(json.dumps(globals()[scenario]()))
