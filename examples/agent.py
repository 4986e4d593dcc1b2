# /// script
# dependencies = [
#     "treerpo-trl",
# ]
# ///
"""Agent: a small model learns to use a tool over several turns, in minutes on a CPU.

    accelerate launch --config_file accelerate_configs/single_cpu.yaml examples/agent.py

It makes a base model that knows the tool but slips often, measures it on held-out problems, trains it with TreeRPO on
trees whose nodes are turns, measures it again, and shows a tree. The last line printed is JSON with the numbers.
`--trainer grpo` trains with TRL's GRPOTrainer instead, with as many completions a step; `agent_study.py` compares the
two.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

# First, so that packages which are installed and not used say nothing.
from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


# isort: split
from lookup import MAX_COMPLETION_LENGTH, Table, correctness_reward, make_base_model, make_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from treerpo_trl.views.console import print_tree


NUM_HELD_OUT = 1024
ROWS_PER_STEP = 256
MAX_STEPS = 40


def make_trainer(args: argparse.Namespace, base_model: Path, **more: Any) -> GRPOTrainer:
    """TreeRPOTrainer with trees of turns, or GRPOTrainer with as many rows a step; `more` options of both."""
    options: dict[str, Any] = {
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "per_device_train_batch_size": ROWS_PER_STEP,
        "per_device_eval_batch_size": ROWS_PER_STEP,
        "num_generations_eval": 1,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
        **more,
    }
    if args.trainer == "grpo":
        trainer_class, config = (
            GRPOTrainer,
            GRPOConfig(args.output_dir, num_generations=args.num_generations, **options),
        )
    else:
        trainer_class = TreeRPOTrainer
        config = TreeRPOConfig(args.output_dir, branching_factor=args.branching_factor, **options)
    prompts_per_step = ROWS_PER_STEP // config.num_generations
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(base_model),
        reward_funcs=correctness_reward,
        args=config,
        train_dataset=make_dataset(prompts_per_step * args.max_steps, seed=args.seed),
        eval_dataset=make_dataset(NUM_HELD_OUT, seed=0, held_out=True),
        processing_class=AutoTokenizer.from_pretrained(base_model),
        environment_factory=Table,
    )


def measure(trainer: GRPOTrainer, title: str) -> tuple[float, float]:
    """(Pass@1, tool calls an answer) on held-out problems, sampled at the temperature of training."""
    metrics = trainer.evaluate()
    pass_at_1, calls = metrics["eval_reward"], metrics["eval_tools/call_frequency"]
    print(f"{title}: Pass@1 {pass_at_1:.3f}, {calls:.2f} calls an answer")
    return pass_at_1, calls


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line's, or these."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output_dir", default="agent-output", help="where to save the base model and the trained one"
    )
    parser.add_argument("--trainer", choices=("treerpo", "grpo"), default="treerpo", help="which trainer to use")
    parser.add_argument(
        "--branching_factor", type=int, nargs="+", default=[2, 2], help="branching of the trees, by depth"
    )
    parser.add_argument("--num_generations", type=int, default=8, help="completions per prompt, for GRPOTrainer")
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS, help="training steps")
    parser.add_argument(
        "--learning_rate", type=float, default=4e-4, help="learning rate of the first step; it falls to 0"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training problems and of the sampling")
    return parser.parse_args(words)


def main() -> None:
    """Measure, train, measure, show, save."""
    args = parse_arguments()
    start = time.monotonic()
    base_model = Path(args.output_dir) / "base_model"
    if not (base_model / "config.json").exists():
        make_base_model(base_model)
    trainer = make_trainer(args, base_model)
    pass_at_1_before, calls_before = measure(trainer, "Before")
    trainer.train()
    trainer.save_model(args.output_dir)
    if isinstance(trainer, TreeRPOTrainer):
        # The tree with most to learn from: the one whose nodes differ most.
        tree = max(trainer.last_trees, key=lambda scored: max(scored.advantages) - min(scored.advantages))
        print_tree(tree, trainer.processing_class)
    pass_at_1_after, calls_after = measure(trainer, "After")
    print(
        json.dumps(
            {
                "pass_at_1_before": round(pass_at_1_before, 4),
                "pass_at_1_after": round(pass_at_1_after, 4),
                "calls_before": round(calls_before, 2),
                "calls_after": round(calls_after, 2),
                "seconds": round(time.monotonic() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
