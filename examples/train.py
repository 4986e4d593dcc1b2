# /// script
# dependencies = [
#     "treerpo-trl[math]",
# ]
# ///
r"""Train a causal language model with TreeRPO: any model, any dataset, any reward functions.

Full fine-tuning on a GPU, each step on 16 prompts with trees of 2 x 2 leaves:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml examples/train.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward \
        --max_completion_length 512 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
        --output_dir Qwen2.5-0.5B-TreeRPO

LoRA:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml examples/train.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward \
        --max_completion_length 512 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
        --learning_rate 1e-5 \
        --use_peft --lora_r 16 --lora_alpha 32 --lora_dropout 0 --lora_target_modules all-linear \
        --output_dir Qwen2.5-0.5B-TreeRPO-LoRA

QLoRA, with the base model in 4 bits (the extra `quantization`): the same, with

        --load_in_4bit --use_bnb_nested_quant --dtype bfloat16

The paper's setting (any option of a recipe can be overridden on the command line):

    accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml examples/train.py \
        --config examples/recipes/treerpo_qwen2.5_math_1.5b.yaml

With `--resume_from_checkpoint true` a run that was killed goes on from its newest complete checkpoint, or starts from
the beginning if there is none yet.

Add `--use_vllm --vllm_mode server --vllm_server_host HOST` to have a vLLM server grow the trees, or
`--use_vllm --vllm_mode colocate` for engines beside the model; docs/scaling.md says how to start a server.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

# First, so that packages which are installed and not used say nothing.
from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


# isort: split
from command_line import ScriptParser, names_of
from datasets import Dataset, IterableDataset
from train_data import drop_long_prompts, load_split, set_columns
from transformers import AutoProcessor
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from treerpo_trl.adapters import check_quantization
from treerpo_trl.checkpoints import last_complete_checkpoint
from treerpo_trl.rewards import boxed_math_accuracy_reward, math_accuracy_reward


REWARD_FUNCS: dict[str, Callable] = {
    "accuracy_reward": accuracy_reward,
    "math_accuracy_reward": math_accuracy_reward,
    "boxed_math_accuracy_reward": boxed_math_accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}


@dataclass
class TreeRPOScriptArguments(ScriptArguments):
    """
    Script arguments for the TreeRPO training script. `dataset_name` is a dataset of the Hub, a local folder, or a
    local .parquet, .json, .jsonl or .csv file (whose only split is `train`).

    Args:
        reward_model_name_or_path (`str`, *optional*):
            Reward model, from the Hub or a local folder, used next to the reward functions.
        reward_funcs (`list[str]`, *optional*):
            Reward functions to use. Supported values are:
                - `"accuracy_reward"`
                - `"math_accuracy_reward"` (the same, for bare gold answers and LaTeX such as `\\frac43`)
                - `"boxed_math_accuracy_reward"` (the same, of the last `\\boxed` only, as the paper's authors)
                - `"reasoning_accuracy_reward"`
                - `"think_format_reward"`
                - `"get_soft_overlong_punishment"` (used values are `max_completion_len=1280`, `soft_punish_cache=256`)
                - any dotted import path (e.g., `'my_lib.rewards.custom_reward'`).
        dataset_prompt_column (`str`, *optional*):
            Column that holds the prompt, a string or chat messages. Defaults to `prompt`.
        dataset_solution_column (`str`, *optional*):
            Column that holds the right answer; it becomes the column `solution`, wrapped in `$...$` unless it is
            already marked as LaTeX. Defaults to leaving the dataset as it is.
        system_prompt (`str`, *optional*):
            System message of every prompt, in place of the dataset's if it has one. It turns prompts that are strings
            into chat messages; an empty string does so without a system message.
        max_prompt_length (`int`, *optional*):
            Rows whose prompt has more tokens are left out. Defaults to keeping all.
    """

    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reward model, from the Hub or a local folder, used next to the reward functions."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions to use. Supported values are: `accuracy_reward`, `math_accuracy_reward`, "
            "`boxed_math_accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`, "
            "`get_soft_overlong_punishment` (used values are `max_completion_len=1280`, `soft_punish_cache=256`), or "
            "any dotted import path (e.g., `'my_lib.rewards.custom_reward'`)."
        },
    )
    dataset_prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the prompt, a string or chat messages; a dotted path reaches into structs "
            "(e.g., `extra_info.question`). Defaults to `prompt`."
        },
    )
    dataset_solution_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the right answer; a dotted path reaches into structs (e.g., "
            "`reward_model.ground_truth`). It becomes the column `solution`, wrapped in `$...$` for math-verify "
            "unless it has a formula or a box already. Defaults to leaving the dataset as it is."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message of every prompt, in place of the dataset's if it has one. It turns prompts that "
            "are strings into chat messages; an empty string does so without a system message."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Rows whose prompt has more tokens are left out. Defaults to keeping all."},
    )


def load_reward_func(name: str) -> Callable:
    """A reward function of TRL by its name, or any by its dotted import path.

    Raises:
        ValueError: There is no such function; the message lists the choices.
    """
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    choices = f"Use one of {', '.join(REWARD_FUNCS)}, or a dotted import path such as my_rewards.my_reward"
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ValueError(f"There is no reward function '{name}'. {choices}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module raises, it is of no use
        raise ValueError(
            f"Reward function '{name}': module '{module_name}' cannot be imported ({type(error).__name__}: {error}). "
            f"Modules are looked for in {os.getcwd()} and among the installed packages. {choices}"
        ) from error
    if not callable(getattr(module, attribute, None)):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"Reward function '{name}': module '{module_name}' has no function '{attribute}'; it has "
            f"{', '.join(functions) or 'none'}. {choices}"
        )
    return getattr(module, attribute)


def load_reward_funcs(script_args: TreeRPOScriptArguments) -> list[str | Callable]:
    """All rewards that the arguments ask for: the reward model, then the functions."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    reward_funcs: list[str | Callable] = [load_reward_func(name) for name in script_args.reward_funcs or []]
    if script_args.reward_model_name_or_path:
        reward_funcs.insert(0, script_args.reward_model_name_or_path)
    if not reward_funcs:
        raise ValueError(
            f"No reward is given. Set reward_funcs to one or more of {', '.join(REWARD_FUNCS)} or a dotted import "
            "path, or set reward_model_name_or_path"
        )
    return reward_funcs


def load_data(
    script_args: TreeRPOScriptArguments, training_args: TreeRPOConfig, model_args: ModelConfig, split: str
) -> Dataset | IterableDataset:
    """A split with the columns that TRL expects, and without the prompts that are too long."""
    dataset = load_split(script_args.dataset_name, script_args.dataset_config, split, script_args.dataset_streaming)
    dataset = set_columns(
        dataset,
        script_args.dataset_prompt_column,
        script_args.dataset_solution_column,
        script_args.system_prompt,
        script_args.reward_funcs or [],
    )
    if script_args.max_prompt_length is None:
        return dataset
    processor = AutoProcessor.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    template_kwargs = training_args.chat_template_kwargs or {}
    return drop_long_prompts(dataset, script_args.max_prompt_length, processor, template_kwargs)


def find_checkpoint(training_args: TreeRPOConfig) -> str | None:
    """The checkpoint to go on from: if `resume_from_checkpoint` is true, the newest complete one, if there is one.

    So a job that is submitted with it can be submitted again whenever it was killed.
    """
    given = training_args.resume_from_checkpoint
    if given is None or str(given).lower() not in ("true", "false"):
        return given
    if str(given).lower() == "false":
        return None
    checkpoint = last_complete_checkpoint(training_args.output_dir)
    if training_args.process_index == 0:
        no_checkpoint = f"Starting from the beginning: no complete checkpoint in {training_args.output_dir} yet."
        print("▶️ " + (f"Going on from {checkpoint}." if checkpoint else no_checkpoint))
    return checkpoint


def main(script_args: TreeRPOScriptArguments, training_args: TreeRPOConfig, model_args: ModelConfig) -> None:
    """Load the rewards, the data and the model; train; save."""
    # The rewards come first: a mistyped name should not cost the time to load a model.
    reward_funcs = load_reward_funcs(script_args)
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set; give a model of the Hub or a local folder")
    quantization_config, peft_config = get_quantization_config(model_args), get_peft_config(model_args)
    check_quantization(model_args.model_name_or_path, quantization_config, peft_config)

    # The other processes find the results of the first in the cache.
    with training_args.main_process_first(desc="loading the data"):
        splits = [script_args.dataset_train_split]
        if training_args.eval_strategy != "no":
            splits.append(script_args.dataset_test_split)
        train_dataset, *eval_dataset = [load_data(script_args, training_args, model_args, split) for split in splits]

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    trainer = TreeRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset[0] if eval_dataset else None,
        quantization_config=quantization_config,
        peft_config=peft_config,
    )

    trainer.train(resume_from_checkpoint=find_checkpoint(training_args))
    trainer.accelerator.print("✅ Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")

    trainer.accelerator.end_training()  # finishes the trackers and destroys the process group


def make_parser() -> ScriptParser:
    """The parser of the command line and of the YAML file given with `--config`."""
    return ScriptParser(
        (TreeRPOScriptArguments, TreeRPOConfig, ModelConfig),
        usage="train.py --model_name_or_path MODEL --dataset_name DATASET --reward_funcs REWARD ... [options]\n"
        "       train.py --config FILE.yaml [options]",
        description="Train a causal language model with TreeRPO: any model, any dataset, any reward functions. "
        "Options of the command line override those of the YAML file.",
        sections={
            "the tree": names_of(TreeRPOConfig, own=True),
            "data and rewards": names_of(TreeRPOScriptArguments),
            "the model": names_of(ModelConfig),
            "training (TRL's GRPOConfig)": names_of(TreeRPOConfig),
        },
        needed={
            "a model of the Hub or a local folder": ["model_name_or_path"],
            "a dataset of the Hub, a local folder or a local file": ["dataset_name"],
            f"one or more of {', '.join(REWARD_FUNCS)} or a dotted import path": [
                "reward_funcs",
                "reward_model_name_or_path",
            ],
        },
    )


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
