"""A long run of a tiny model, with trees of every shape and random rewards, and what of it grows.

python tests/tools/soak.py [--steps 2000]

Between steps it takes count: the memory of the process, tensors and key-value caches that are alive, open files and
threads. After a warm-up none of them may grow (memory by less than 1%), and no number may be NaN.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # as pytest does

import psutil
import torch
from datasets import Dataset
from tiny import make_tokenizer, tiny_config
from transformers import Cache, Qwen2ForCausalLM, TrainerCallback

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.growth import TreeShape


# Trees of 8 leaves, as all rows of a prompt have to be there, and of 12 tokens.
SHAPES = [TreeShape((2, 2, 2), 4, 12), TreeShape((4, 2), 6, 12), TreeShape((2, 4), 6, 11), TreeShape((8,), 12, 12)]
WARM_UP = 0.2  # of the steps
MOST_GROWTH = 0.01


def random_reward(completions, **kwargs) -> list[float | None]:
    """0 or 1, anything between, or nothing."""
    return [random.choice([0.0, 1.0, random.random(), None]) for _ in completions]


@dataclass
class Count:
    """What there is between two steps: megabytes, and numbers."""

    step: int
    megabytes: float
    tensors: int
    caches: int
    files: int
    threads: int


@dataclass
class Soak(TrainerCallback):
    """Changes the shape of the trees at every step, and counts at every `every`-th."""

    every: int
    trainer: Any = None
    counts: list[Count] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.tree_shape = random.choice(SHAPES)

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.update(str((self.trainer.tree_shape.branching, s.tree.parents)) for s in self.trainer.last_trees)
        if state.global_step % self.every == 0:
            self.counts.append(take_count(state.global_step))


def take_count(step: int) -> Count:
    gc.collect()
    process = psutil.Process()
    kinds = [type(thing) for thing in gc.get_objects()]
    return Count(
        step=step,
        megabytes=process.memory_info().rss / 2**20,
        tensors=sum(issubclass(kind, torch.Tensor) for kind in kinds),
        caches=sum(issubclass(kind, Cache) for kind in kinds),
        files=process.num_fds(),
        threads=process.num_threads(),
    )


def soak(steps: int, output_dir: str) -> dict[str, Any]:
    """Train, and tell what was counted."""
    random.seed(0)
    torch.manual_seed(0)
    prompts = ["7+" * (index % 4) + f"{index}=" for index in range(64)]
    callback = Soak(every=max(1, steps // 20))
    args = TreeRPOConfig(
        output_dir, branching_factor=2, max_depth=3, segment_length=4, per_device_train_batch_size=8,
        gradient_accumulation_steps=2, learning_rate=1e-5, beta=0.1, entropy_coef=0.01, max_steps=steps,
        model_init_kwargs={"dtype": "float32"}, bf16=False, report_to="none", logging_steps=max(1, steps // 20),
        log_completions=True, num_completions_to_print=0, log_trees=True, num_trees_to_print=0,
        eval_strategy="steps", eval_steps=max(1, steps // 4), num_generations_eval=2, per_device_eval_batch_size=4,
        save_steps=max(1, steps // 4), save_total_limit=1, disable_tqdm=True,
    )  # fmt: skip
    folder = Path(output_dir) / "model"
    Qwen2ForCausalLM(tiny_config(initializer_range=0.2)).save_pretrained(folder)
    trainer = callback.trainer = TreeRPOTrainer(
        str(folder),
        random_reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:4]}),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )
    start = time.monotonic()
    trainer.train()
    numbers = [value for log in trainer.state.log_history for value in log.values() if isinstance(value, float)]
    parameters = [parameter for _, parameter in trainer.model.named_parameters()]
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - start),
        "different_trees": len(callback.seen),
        "is_finite": all(map(math.isfinite, numbers)) and all(torch.isfinite(p).all().item() for p in parameters),
        **growth_of(callback.counts),
    }


def growth_of(counts: list[Count]) -> dict[str, Any]:
    """How memory grew from the first fifth after the warm-up to the last; least and most of what else is counted."""
    warm = counts[int(WARM_UP * len(counts)) :]
    share = max(1, len(warm) // 5)
    first, last = (statistics.median(count.megabytes for count in part) for part in (warm[:share], warm[-share:]))
    ranges = {
        name: [min(values), max(values)]
        for name in ("tensors", "caches", "files", "threads")
        if (values := [getattr(count, name) for count in warm])
    }
    return {"megabytes": [round(first, 1), round(last, 1)], "memory_growth": last / first - 1, **ranges}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(options.steps, folder)
    print(json.dumps(report, indent=2))
    is_flat = report["memory_growth"] < MOST_GROWTH and report["is_finite"]
    sys.exit(0 if is_flat and all(low == high for low, high in (report["files"], report["threads"])) else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
