# /// script
# dependencies = [
#     "trl",
# ]
# ///
"""Train the small base model of a built-in task: it knows the task, but slips often.

    python examples/make_base_model.py --task countdown --output_dir countdown-base

Supervised training with TRL's SFTTrainer, first on clean solutions and then, briefly, on solutions with slips.
"""

import argparse
import tempfile
from pathlib import Path

from tasks import BASE_MODELS, TASKS
from tiny_llama import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from treerpo_trl.evaluation import evaluate


BATCH_SIZE = 48


def train_base_model(name: str, output_dir: Path, seed: int) -> None:
    """Train a model of `BASE_MODELS` and save it with its tokenizer."""
    base = BASE_MODELS[name]
    set_seed(seed)
    if base.start_from:
        folder = BASE_MODELS[base.start_from].shipped
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        model.config.max_position_embeddings = base.context_length
    else:
        tokenizer = make_tokenizer(base.characters)
        model = make_model(tokenizer, base.context_length)
    error_rates = [0.0] * (BATCH_SIZE * base.clean_steps) + [base.error_rate] * (BATCH_SIZE * base.noisy_steps)
    with tempfile.TemporaryDirectory() as scratch_dir:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch_dir,
                learning_rate=3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=150,
                per_device_train_batch_size=BATCH_SIZE,
                num_train_epochs=1,
                # The noisy solutions must come last.
                train_sampling_strategy="sequential",
                logging_steps=100,
                save_strategy="no",
                report_to="none",
                bf16=False,
                gradient_checkpointing=False,
                seed=seed,
            ),
            train_dataset=base.make_demonstrations(error_rates, seed),
            processing_class=tokenizer,
        )
        trainer.train()
    model.config.use_cache = True  # the trainer turned it off
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    report(name, model, tokenizer)


def report(name: str, model, tokenizer) -> None:
    """Print the accuracy on held-out problems of every task that starts from the model."""
    for task_name, task in TASKS.items():
        if task.base != name:
            continue
        held_out = task.make_dataset(500, 0, True)
        for temperature in (0.0, 1.0):
            result = evaluate(
                model,
                tokenizer,
                held_out,
                task.reward_func,
                num_samples=1 if temperature == 0 else 4,
                temperature=temperature,
                max_new_tokens=task.max_solution_tokens,
            )
            print(
                f"{task_name}, temperature {temperature}: Pass@1 {result.pass_at_1:.3f}, "
                f"mean length {result.mean_length:.1f}, truncated {result.truncated:.3f}"
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=list(BASE_MODELS), default="chain_arithmetic", help="which base model")
    parser.add_argument("--output_dir", type=Path, help="where to save it (default: the folder it is shipped in)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the problems")
    args = parser.parse_args()
    output_dir = args.output_dir or BASE_MODELS[args.task].shipped
    if output_dir is None:
        parser.error(f"the base model of {args.task} is not shipped; say where to save it with --output_dir")
    train_base_model(args.task, output_dir, args.seed)


if __name__ == "__main__":
    main()
