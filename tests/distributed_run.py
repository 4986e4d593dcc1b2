"""What each of two processes runs in `test_distributed.py`: a few steps, and then what it saw as JSON.

torchrun --standalone --nproc_per_node 2 tests/distributed_run.py MODEL_PATH OUTPUT_DIR PREFIX_SHARING
"""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import coin_reward, make_tokenizer
from datasets import Dataset
from transformers import Qwen2ForCausalLM

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


def main(model_path: str, output_dir: str, prefix_sharing: str) -> None:
    calls = []

    def reward(prompts, completions, **kwargs):
        calls.append(list(zip(prompts, completions, strict=True)))
        return coin_reward(completions)

    rows = 32
    dataset = Dataset.from_dict({"prompt": ["7+" * (i % 4) + f"{i}=" for i in range(rows)]})
    args = TreeRPOConfig(
        output_dir, branching_factor=2, max_depth=3, segment_length=4, per_device_train_batch_size=8,
        steps_per_generation=2, gradient_accumulation_steps=2, max_steps=3, learning_rate=0.1, optim="sgd", beta=0.1,
        logging_steps=1, save_strategy="no", report_to="none", bf16=False, use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False, prefix_sharing=prefix_sharing,
    )  # fmt: skip
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    trainer = TreeRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    rank = trainer.accelerator.process_index
    seen = {
        "processes": trainer.accelerator.num_processes,
        "shares": trainer._prefix_sharing.is_active,
        "parameters": {name: parameter.double().sum().item() for name, parameter in model.named_parameters()},
        "scored": [len(call) for call in calls],
        "prompts": [list(scored.tree.prompt_ids) for scored in trainer.last_trees],
        "calls": [len(call) == len(set(call)) for call in calls],
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }
    (Path(output_dir) / f"rank_{rank}.json").write_text(json.dumps(seen))
    trainer.end()
    os._exit(0)  # with everything written: gloo's threads have been seen to hang in the interpreter's last moments


if __name__ == "__main__":
    main(*sys.argv[1:])
