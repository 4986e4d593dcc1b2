"""Checks of arguments and data that fail before any training time is spent, naming the value and the fix."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, Value
from transformers import ProcessorMixin
from trl.data_utils import is_conversational
from trl.import_utils import is_vllm_available

from .generation_options import check_generation_kwargs
from .reward_functions import check_overlap, check_reward_columns, check_reward_funcs


IMAGE_COLUMNS = ("image", "images")
# Tokens that a chat template may add around the messages of a prompt.
TEMPLATE_MARGIN = 512
# What TRL keeps of a row if remove_unused_columns is set.
USED_COLUMNS = ("prompt", *IMAGE_COLUMNS)


def check_arguments(
    args: Any, config_class: type[Any], processing_class: Any, tools: Any, rollout_func: Any, environment_factory: Any
) -> None:
    """Refuse arguments of GRPOTrainer that a tree cannot use, and those that do not go together.

    Raises:
        TypeError: `args` is not a `config_class`, which is TreeRPOConfig.
        ValueError: A rollout function or a multimodal processor is given, or the split rule does not fit the tools.
        ImportError: vLLM is to sample, but is not installed.
    """
    if not isinstance(args, config_class):
        raise TypeError(
            f"args is a {type(args).__name__}, but TreeRPOTrainer needs a {config_class.__name__}; it takes the same "
            "parameters"
        )
    if rollout_func:
        raise ValueError(
            f"rollout_func={rollout_func!r} is not supported by TreeRPOTrainer: it samples whole completions by "
            "itself, of which no tree can be made. Pass what it does as tools or environment_factory, or use "
            "trl.GRPOTrainer"
        )
    _check_turns(args, bool(tools or environment_factory), bool(environment_factory))
    check_processing_class(processing_class)
    if args.use_vllm and not is_vllm_available():
        raise ImportError(
            'use_vllm=True needs vLLM, which is not installed: pip install "treerpo-trl[vllm]" (into an environment '
            "of its own, as vLLM needs certain versions of torch and transformers), or leave use_vllm out"
        )


def _check_turns(args: Any, has_tools: bool, has_environments: bool) -> None:
    if has_tools and args.split_rule not in ("turn", "length"):
        raise ValueError(
            f"split_rule='{args.split_rule}' does not work with tools, whose calls it would cut. Use 'turn', which is "
            "the default with tools, or 'length', with which turns end segments, too"
        )
    if not has_tools and args.split_rule == "turn":
        raise ValueError(
            "split_rule='turn' is for models that call tools, but neither tools nor environment_factory is given; "
            "pass them, or use split_rule='length'"
        )
    if args.replay_environments and not has_environments:
        raise ValueError(
            "replay_environments=True has no effect without environment_factory; pass one, or remove the option"
        )


def settle_split_rule(args: Any, has_tools: bool) -> None:
    """With tools, segments end with turns if the configuration leaves it open.

    Raises:
        ValueError: An environment has no tools, but turns are to end segments; or an option counts tokens of segments.
    """
    if has_tools and args._leaves_split_rule_open:
        args.split_rule = "turn"
    if has_tools:
        check_generation_kwargs(args, has_tools)
    elif args.split_rule == "turn":
        raise ValueError("split_rule='turn' is for models that call tools, but the environment has none; remove it")


def check_processing_class(processing_class: Any, *datasets: Any) -> None:
    """Refuse a processor, given or loaded with the model, that trees cannot use.

    Args:
        processing_class: The processor, or `None` if it is still to be loaded.
        datasets: What it is to tokenize; a dataset, a dict of datasets or `None` each.

    Raises:
        ValueError: It is multimodal, or has no end-of-sequence token, or no chat template for chat messages.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}, but TreeRPOTrainer does not support images "
            "yet; pass its tokenizer (processor.tokenizer) and a text-only dataset"
        )
    if processing_class is not None and processing_class.eos_token_id is None:
        raise ValueError(
            f"the {type(processing_class).__name__} has no end-of-sequence token, so no completion could end; set its "
            "eos_token"
        )
    for dataset in datasets:
        for part in _parts("", dataset).values():
            _check_chat_template(processing_class, part)


def check_engine(accelerator: Any) -> None:
    """Refuse to train with another engine than the launch asked for, as accelerate does where it finds no accelerator.

    Raises:
        ValueError: Several processes were launched, but each is by itself; or DeepSpeed or FSDP is not in use.
    """
    on_cpu = "On CPUs, which accelerate does not connect, launch the script through examples/on_cpu.py"
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"WORLD_SIZE says that {launched} processes were launched, but accelerate does not connect them, so each "
            f"would train a model of its own. Start them with accelerate launch. {on_cpu}"
        )
    for engine in ("DEEPSPEED", "FSDP"):
        is_asked_for = os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
        actual = accelerator.distributed_type
        if is_asked_for and actual != engine:
            raise ValueError(f"the launch asked for {engine}, but accelerate runs {actual.value} instead. {on_cpu}")


def check_dataset(
    dataset: Any,
    eval_dataset: Any,
    args: Any,
    reward_funcs: Any,
    has_tools: bool = False,
    has_environments: bool = False,
) -> None:
    """Refuse training data that would train nothing, or that trees cannot use, and rewards that do not fit the data.

    Of a stream, the first rows are read. Prompts may be left to environments, and must be chat messages with tools.

    Raises:
        ValueError: The dataset is missing, has too few rows, no `prompt` column, or images; or the columns of it, or
            of the evaluation data, are not what a reward function takes; or texts are to call tools.
        TypeError, ImportError: What is given is no reward function, or lacks its package.
    """
    check_reward_funcs(reward_funcs)
    check_overlap(args, has_tools or has_environments, reward_funcs)
    if dataset is None and has_environments:
        return  # TRL says what this needs
    if dataset is None:
        raise ValueError("train_dataset is None; pass a dataset with a 'prompt' column")
    if not isinstance(dataset, Dataset | IterableDataset):
        return  # TRL says which kinds it takes
    prompts_per_batch = args.generation_batch_size // (args.num_generations or 1)
    rows = list(dataset.take(prompts_per_batch)) if isinstance(dataset, IterableDataset) else dataset
    if len(rows) < prompts_per_batch:
        raise ValueError(
            f"train_dataset has {len(rows)} rows, but one generation batch takes {prompts_per_batch} prompts "
            "(generation_batch_size / num_generations), so nothing would be trained. Use more rows, or a smaller "
            "per_device_train_batch_size, steps_per_generation or tree"
        )
    columns = list(rows[0])
    if not has_environments:
        _check_has_prompts("train_dataset", columns)
    for name in IMAGE_COLUMNS:
        if name in columns:
            raise ValueError(
                f"train_dataset has the column '{name}', but TreeRPOTrainer does not support images yet; remove it"
            )
    if isinstance(rows, list):
        for index, row in enumerate(rows):
            if "prompt" in row:
                _check_prompt(f"train_dataset[{index}]['prompt']", row["prompt"])
    if has_tools and isinstance(rows[0].get("prompt", []), str):
        raise ValueError(
            f"the prompts are texts, such as {rows[0]['prompt'][:60]!r}, but a model calls tools in a chat: make them "
            "lists of messages, such as [{'role': 'user', 'content': ...}]"
        )
    _check_reward_columns("train_dataset", columns, args, reward_funcs, has_environments)
    for name, part in _parts("eval_dataset", eval_dataset).items():
        if "prompt" in (columns := _columns_of(part)):  # if not, `check_prompts` says so
            _check_reward_columns(name, columns, args, reward_funcs, has_environments)


def check_prompts(
    name: str,
    dataset: Any,
    tokenize: Callable[[list[Any]], tuple[list[list[int]], Any, Any]],
    max_prompt_length: int | None,
    max_completion_length: int,
) -> None:
    """Check each prompt of a dataset, or of each in a dict of datasets: that it is one, and fits the model's context.

    A tokenizer makes at most one token of a byte, so a prompt of few bytes need not be tokenized; the first one is, as
    it shows what is wrong with a chat template. Streams are checked batch by batch while they train.

    Raises:
        ValueError: Something is no prompt, or does not fit, or no prompt could: the completion alone fills the
            context.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(
            f"max_completion_length={max_completion_length} leaves no room for a prompt in the model's context of "
            f"{max_prompt_length + max_completion_length} tokens; lower segment_length or max_depth"
        )
    if isinstance(dataset, dict):
        for place, part in _parts(name, dataset).items():
            check_prompts(place, part, tokenize, max_prompt_length, max_completion_length)
    if not isinstance(dataset, Dataset):
        return
    _check_has_prompts(name, dataset.column_names)
    for row, prompt in enumerate(dataset["prompt"]):
        _check_prompt(f"{name}[{row}]['prompt']", prompt)
        messages = [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt]
        num_bytes = sum(len(message.encode(errors="replace")) for message in messages)
        is_long = max_prompt_length is not None and num_bytes + TEMPLATE_MARGIN > max_prompt_length
        if row == 0 or num_bytes == 0 or is_long:
            check_prompt_lengths(tokenize([prompt])[0], max_prompt_length, max_completion_length)


def _check_reward_columns(
    name: str, columns: Sequence[str], args: Any, reward_funcs: Any, has_environments: bool
) -> None:
    if args.remove_unused_columns:
        name, columns = f"{name}, by remove_unused_columns=True,", [key for key in columns if key in USED_COLUMNS]
    check_reward_columns(reward_funcs, name, columns, has_environments)


def _check_chat_template(processing_class: Any, dataset: Any) -> None:
    """Chat messages need a template; TRL looks at the first prompt to tell them from texts."""
    features = getattr(dataset, "features", None)
    if isinstance(dataset, IterableDataset) and isinstance((features or {}).get("prompt"), Value):
        return  # so that the stream need not be opened
    prompt = _first_row(dataset).get("prompt")
    if is_conversational({"prompt": prompt}) and getattr(processing_class, "chat_template", None) is None:
        raise ValueError(
            f"prompts are chat messages, such as {repr(prompt)[:80]}, but the {type(processing_class).__name__} has "
            "no chat template. Use an instruction-tuned model, set the tokenizer's chat_template, or make the prompts "
            "texts"
        )


def _parts(name: str, dataset: Any) -> dict[str, Any]:
    """The datasets of an argument that takes one or a dict of several, each with what to call it."""
    if isinstance(dataset, dict):
        return {f"{name}['{key}']": part for key, part in dataset.items()}
    return {name: dataset}


def _columns_of(dataset: Any) -> list[str]:
    """The columns of a dataset's rows. A stream is opened only if it does not know them."""
    known = dataset.column_names if isinstance(dataset, IterableDataset) else None
    return list(known or _first_row(dataset))


def _first_row(dataset: Any) -> dict[str, Any]:
    """The first row; none of it of an empty dataset, or of what is no dataset."""
    return next(iter(dataset), {}) if isinstance(dataset, Dataset | IterableDataset) else {}


def _check_has_prompts(name: str, columns: Sequence[str]) -> None:
    if "prompt" not in columns:
        raise ValueError(f"{name} has the columns {columns}, but no 'prompt'; rename the one that holds it")


def _check_prompt(place: str, prompt: Any) -> None:
    if isinstance(prompt, str):
        return
    is_messages = isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    )
    if not is_messages or not prompt:
        raise ValueError(
            f"{place} is {repr(prompt)[:80]}; a prompt is a text, or a list of messages with a 'role' and a "
            "'content' each. Remove this row, or convert it"
        )


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]], max_prompt_length: int | None, max_completion_length: int
) -> None:
    """Refuse empty prompts and those that leave no room for the completion in the model's context.

    Raises:
        ValueError: A prompt has no token, or more than `max_prompt_length`.
    """
    for prompt in prompts:
        if len(prompt) == 0:
            raise ValueError("a prompt has no tokens; remove empty prompts from the dataset")
        if max_prompt_length is not None and len(prompt) > max_prompt_length:
            raise ValueError(
                f"a prompt has {len(prompt)} tokens, but the model's context of "
                f"{max_prompt_length + max_completion_length} leaves {max_prompt_length} for it next to "
                f"max_completion_length={max_completion_length}. Filter out prompts this long, or lower "
                "segment_length or max_depth"
            )
