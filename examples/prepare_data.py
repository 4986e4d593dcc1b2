# /// script
# dependencies = [
#     "treerpo-trl",
# ]
# ///
r"""Write a dataset with the columns `prompt` and `solution`, as `train.py` would see it, for TRL's own scripts.

    python examples/prepare_data.py --dataset_name DigitalLearningGmbH/MATH-lighteval \
        --dataset_prompt_column problem --dataset_solution_column solution \
        --system_prompt "Please reason step by step, and put your final answer within \boxed{{}}." \
        --model_name_or_path Qwen/Qwen2.5-Math-1.5B --max_prompt_length 512 --output_dir math_prompts

Afterwards `dataset_name: math_prompts` loads it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from train_data import drop_long_prompts, load_split, set_columns
from transformers import AutoTokenizer


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_name", required=True, help="a dataset of the Hub, a local folder or a local file")
    parser.add_argument("--dataset_config", help="configuration of the dataset")
    parser.add_argument("--dataset_train_split", default="train", help="split of the dataset")
    parser.add_argument("--dataset_prompt_column", help="the column with the prompt, if it is not called `prompt`")
    parser.add_argument("--dataset_solution_column", help="the column with the right answer")
    parser.add_argument("--system_prompt", help="the system message of every prompt; turns strings into chat messages")
    parser.add_argument("--max_prompt_length", type=int, help="leaves out rows whose prompt has more tokens")
    parser.add_argument("--model_name_or_path", help="model whose tokenizer counts the tokens of prompts")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write train.parquet in")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, set the columns, leave out long prompts, write."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.max_prompt_length is not None and args.model_name_or_path is None:
        parser.error("--max_prompt_length needs --model_name_or_path, whose tokenizer counts the tokens")
    dataset = load_split(args.dataset_name, args.dataset_config, args.dataset_train_split, streaming=False)
    dataset = set_columns(
        dataset, args.dataset_prompt_column, args.dataset_solution_column, args.system_prompt, reward_names=[]
    )
    if args.max_prompt_length is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        dataset = drop_long_prompts(dataset, args.max_prompt_length, tokenizer, {})
    columns = [name for name in ("prompt", "solution") if name in dataset.column_names]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    dataset.select_columns(columns).to_parquet(args.output_dir / "train.parquet")
    print(f"Wrote {len(dataset)} rows with the columns {', '.join(columns)} to {args.output_dir / 'train.parquet'}")


if __name__ == "__main__":
    main()
