# /// script
# dependencies = [
#     "trl",
# ]
# ///
"""Train the small base model that `quickstart.py` starts from: it knows the arithmetic, but slips often.

    python examples/make_base_model.py --output_dir examples/base_model

Supervised training with TRL's SFTTrainer, first on clean solutions and then, briefly, on solutions with slips. So the
model is limited by noise, which a verifier's reward can sharpen away, and not by knowledge, which it could not add.
"""

import argparse
import tempfile
from pathlib import Path

from chain_arithmetic import (
    BASE_MODEL_DIR,
    MAX_SOLUTION_TOKENS,
    correctness_reward,
    make_dataset,
    make_demonstrations,
    make_model,
    make_tokenizer,
)
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from treerpo_trl.evaluation import evaluate


BATCH_SIZE = 48
CLEAN_STEPS, NOISY_STEPS = 1000, 600
ERROR_RATE = 0.18


def train_base_model(output_dir: Path, seed: int) -> None:
    """Train, report the accuracy on held-out problems, and save the model with its tokenizer."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    error_rates = [0.0] * (BATCH_SIZE * CLEAN_STEPS) + [ERROR_RATE] * (BATCH_SIZE * NOISY_STEPS)
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
            train_dataset=make_demonstrations(error_rates, seed),
            processing_class=tokenizer,
        )
        trainer.train()
    held_out = make_dataset(500, seed=0, held_out=True)
    for temperature in (0.0, 1.0):
        result = evaluate(
            model,
            tokenizer,
            held_out,
            correctness_reward,
            num_samples=1 if temperature == 0 else 4,
            temperature=temperature,
            max_new_tokens=MAX_SOLUTION_TOKENS,
        )
        print(f"temperature {temperature}: Pass@1 {result.pass_at_1:.3f}, mean length {result.mean_length:.1f}")
    model.config.use_cache = True  # the trainer turned it off
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=BASE_MODEL_DIR, help="where to save the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the problems")
    args = parser.parse_args()
    train_base_model(args.output_dir, args.seed)


if __name__ == "__main__":
    main()
