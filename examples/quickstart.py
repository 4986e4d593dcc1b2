# /// script
# dependencies = [
#     "treerpo-trl",
# ]
# ///
"""Quickstart: a small model learns to stop slipping in multi-step arithmetic, in minutes on a CPU.

    accelerate launch --config_file accelerate_configs/single_cpu.yaml examples/quickstart.py

It measures the shipped base model on held-out problems, trains it with TreeRPO, measures it again, shows a tree, and
saves the model. The last line printed is JSON with the numbers.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

# First, so that packages which are installed and not used say nothing.
from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


# isort: split
from chain_arithmetic import BASE_MODEL_DIR, MAX_SOLUTION_TOKENS, correctness_reward, make_dataset
from make_base_model import train_base_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

from treerpo_trl.credit import ScoredTree
from treerpo_trl.evaluation import EvaluationResult, evaluate
from treerpo_trl.views.console import print_tree


HAS_TERMINAL = sys.stderr.isatty()  # elsewhere progress bars are only noise
NUM_HELD_OUT = 2048
MAX_DEPTH = 2
TREES_PER_STEP = 64
MAX_STEPS = 60
SPLIT_RULES = """where a tree branches below its prompt q:

  length: after a number       delimiter: after a line     uncertainty: whole responses
  of tokens                                                fork at their least certain tokens

  q + ######## + ########      q + #####/ + #########      q - ##### + #### + #######
    |          + #####           |        + ######                  |      + #####
    + ######## + ######          + ###/ + ##########                + ##########
               + ########               + ########
"""


def measure(model, tokenizer, title: str) -> EvaluationResult:
    """Pass@1 and response length on held-out problems, sampled at the temperature of training."""
    result = evaluate(
        model,
        tokenizer,
        make_dataset(NUM_HELD_OUT, seed=0, held_out=True),
        correctness_reward,
        num_samples=2,
        temperature=1.0,
        max_new_tokens=MAX_SOLUTION_TOKENS,
        batch_size=512,
        progress_bar=HAS_TERMINAL,
    )
    print(f"{title}: Pass@1 {result.pass_at_1:.3f}, mean length {result.mean_length:.1f} tokens")
    return result


def make_config(output_dir: str, seed: int, split_rule: str) -> TreeRPOConfig:
    """Small trees and many prompts a step: 2 x 2 leaves, or one response that forks once."""
    shape = {
        "length": {},
        "delimiter": {"step_delimiters": ["\n"], "segment_length": MAX_SOLUTION_TOKENS // MAX_DEPTH},
        "uncertainty": {"min_segment_length": 2},
    }[split_rule]
    return TreeRPOConfig(
        output_dir=output_dir,
        split_rule=split_rule,
        max_completion_length=MAX_SOLUTION_TOKENS,
        **shape,
        per_device_train_batch_size=TREES_PER_STEP * (2 if split_rule == "uncertainty" else 2**MAX_DEPTH),
        max_steps=MAX_STEPS,
        learning_rate=4e-4,
        lr_scheduler_type="linear",
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=not HAS_TERMINAL,
        seed=seed,
    )


def interest(scored: ScoredTree) -> tuple[int, float]:
    """How much a tree shows: its different answers, and then how far its advantages lie apart."""
    leaves = {tuple(scored.tree.completion_ids(leaf)) for leaf in scored.tree.leaves}
    return len(leaves), max(scored.advantages) - min(scored.advantages)


def main() -> None:
    """Measure, train, measure, show, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=SPLIT_RULES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="quickstart-output", help="where to save the trained model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training problems and of the sampling")
    parser.add_argument(
        "--split_rule", choices=("length", "delimiter", "uncertainty"), default="length", help="where trees branch"
    )
    args = parser.parse_args()
    start = time.monotonic()
    is_main_process = os.environ.get("RANK", "0") == "0"  # which measures and shows; all processes train

    if not (BASE_MODEL_DIR / "config.json").exists():
        train_base_model("chain_arithmetic", BASE_MODEL_DIR, seed=0)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_DIR)
    before = measure(model, tokenizer, "Before") if is_main_process else None

    trainer = TreeRPOTrainer(
        model=model,
        reward_funcs=correctness_reward,
        args=make_config(args.output_dir, args.seed, args.split_rule),
        train_dataset=make_dataset(TREES_PER_STEP * MAX_STEPS, seed=args.seed),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    if before is None:
        return

    print(
        "\nA tree of the last step. Arithmetic is modulo 100, from left to right. V is the share of right answers\n"
        "below a step, and A the advantage that its tokens were trained with."
    )
    print_tree(max(trainer.last_trees, key=interest), tokenizer)

    unset_hf_deepspeed_config()  # under ZeRO-3 the saved model would be loaded in shards
    saved_model = AutoModelForCausalLM.from_pretrained(args.output_dir)
    saved_tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    after = measure(saved_model, saved_tokenizer, f"After, reloaded from {Path(args.output_dir).resolve().name}")
    print(
        f"\nPass@1 went from {before.pass_at_1:.3f} to {after.pass_at_1:.3f} on held-out problems, "
        f"in {time.monotonic() - start:.0f} seconds. The model is in {args.output_dir}."
    )
    print(
        json.dumps(
            {
                "pass_at_1_before": round(before.pass_at_1, 4),
                "pass_at_1_after": round(after.pass_at_1, 4),
                "length_before": round(before.mean_length, 2),
                "length_after": round(after.mean_length, 2),
                "seconds": round(time.monotonic() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
