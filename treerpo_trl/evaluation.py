"""Pass@1 (the mean over several samples, avg@k) and response length of a model on a set of prompts.

Legend of shapes: B rows of one batch, P prompt tokens, T completion tokens, S = P + T.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import is_conversational


# A TRL reward function: (prompts, completions, completion_ids, **columns) -> one float or None a completion.
RewardFunc = Callable[..., list[float | None]]


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a model did on `num_problems` prompts with `num_samples` responses each."""

    pass_at_1: float  # mean over problems of the mean reward over samples
    mean_length: float  # tokens a response, EOS included
    truncated: float  # share of responses that reached max_new_tokens without an EOS
    num_problems: int
    num_samples: int


def evaluate(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Sequence[Mapping[str, Any]],
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    progress_bar: bool = True,
) -> EvaluationResult:
    """Sample responses to every prompt, score them, and average.

    The model samples from its own distribution at `temperature` (no top-k, top-p or repetition penalty, whatever its
    generation config says). The random state of the caller and the train/eval mode of the model are left as found.

    Args:
        model: the policy, not wrapped for distributed training.
        processing_class: its tokenizer, or a processor that has one.
        dataset: rows with a `prompt` (a string or chat messages); other columns are handed to the reward functions.
        reward_funcs: one or several TRL reward functions; several are summed, and None leaves a response out.
        num_samples: responses a prompt.
        temperature: sampling temperature, 0 for greedy decoding.
        max_new_tokens: longest response.
        batch_size: responses generated at once.
        seed: of the sampling; the result also depends on `batch_size`.
        progress_bar: whether to show progress.
    """
    _check(dataset, num_samples, temperature)
    functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    rows = [(problem, row) for problem, row in enumerate(dataset) for _ in range(num_samples)]
    rewards: list[list[float]] = [[] for _ in range(len(dataset))]
    lengths, truncated = 0, 0
    with _isolated(model, seed), tqdm(total=len(rows), desc="Evaluating", disable=not progress_bar) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            examples = [dict(row) for _, row in batch]
            completion_ids, finished = _generate(model, processing_class, examples, temperature, max_new_tokens)
            scores = _score(functions, processing_class, examples, completion_ids)
            for (problem, _), reward in zip(batch, scores, strict=True):
                if reward is not None:
                    rewards[problem].append(reward)
            lengths += sum(map(len, completion_ids))
            truncated += len(batch) - sum(finished)
            bar.update(len(batch))
    means = [math.fsum(values) / len(values) for values in rewards if values]
    return EvaluationResult(
        pass_at_1=math.fsum(means) / len(means) if means else math.nan,
        mean_length=lengths / len(rows),
        truncated=truncated / len(rows),
        num_problems=len(dataset),
        num_samples=num_samples,
    )


def _check(dataset: Sequence[Mapping[str, Any]], num_samples: int, temperature: float) -> None:
    if len(dataset) == 0:
        raise ValueError("the evaluation dataset is empty; pass at least one row with a `prompt` column")
    if "prompt" not in dataset[0]:
        raise ValueError(f"the evaluation dataset has the columns {sorted(dataset[0])}; rename one to `prompt`")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; set it to 1 or more")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; use 0 for greedy decoding or a positive value")


@contextmanager
def _isolated(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Evaluation mode and a random state of its own; both are put back, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda"), torch.no_grad():
            torch.manual_seed(seed)
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _generate(
    model: PreTrainedModel,
    processing_class: Any,
    examples: list[dict[str, Any]],
    temperature: float,
    max_new_tokens: int,
) -> tuple[list[list[int]], list[bool]]:
    """The response of each example as token ids up to and with its first EOS, and whether it has one."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    eos_token_ids = _eos_token_ids(model, tokenizer)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_token_ids[0]
    prompt_ids = [
        torch.tensor(ids) for ids in _tokenize(processing_class, [example["prompt"] for example in examples])
    ]
    inputs_BP = pad_sequence(prompt_ids, batch_first=True, padding_value=pad_token_id, padding_side="left")
    mask_BP = pad_sequence([torch.ones_like(ids) for ids in prompt_ids], batch_first=True, padding_side="left")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output_BS = model.generate(
        input_ids=inputs_BP.to(model.device),
        attention_mask=mask_BP.to(model.device),
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_ids,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    completion_BT = output_BS[:, inputs_BP.size(1) :].cpu()
    return _cut_after_eos(completion_BT, torch.tensor(eos_token_ids))


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response, as TRL collects them."""
    configured = model.generation_config.eos_token_id
    eos_token_ids = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos_token_ids:
        eos_token_ids.insert(0, tokenizer.eos_token_id)
    if not eos_token_ids:
        raise ValueError("neither the tokenizer nor the model's generation config has an EOS token; set one")
    return eos_token_ids


def _cut_after_eos(completion_BT: Tensor, eos_token_ids: Tensor) -> tuple[list[list[int]], list[bool]]:
    """By position and never by token, because padding may equal EOS."""
    is_eos_BT = torch.isin(completion_BT, eos_token_ids)
    finished = is_eos_BT.any(dim=1)
    lengths = torch.where(finished, is_eos_BT.int().argmax(dim=1) + 1, completion_BT.size(1))
    ids = [row[:length] for row, length in zip(completion_BT.tolist(), lengths.tolist(), strict=True)]
    return ids, finished.tolist()


def _tokenize(processing_class: Any, prompts: list[Any]) -> list[list[int]]:
    if is_conversational({"prompt": prompts[0]}):
        return processing_class.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    return processing_class(text=prompts)["input_ids"]


def _score(
    functions: list[RewardFunc], processing_class: Any, examples: list[dict[str, Any]], completion_ids: list[list[int]]
) -> list[float | None]:
    """The summed reward of each response, or None where no function returned one; called as TRL calls them."""
    texts = processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational({"prompt": examples[0]["prompt"]}):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    reserved = ("prompt", "completion", "completion_ids")
    columns: dict[str, Any] = {key: [row[key] for row in examples] for key in examples[0] if key not in reserved}
    # TRL hands these to every reward function; an evaluation has nothing to log to.
    columns |= {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    prompts = [row["prompt"] for row in examples]
    per_function = [f(prompts=prompts, completions=texts, completion_ids=completion_ids, **columns) for f in functions]
    for function, values in zip(functions, per_function, strict=True):
        if len(values) != len(examples):
            name = getattr(function, "__name__", repr(function))
            raise ValueError(f"{name} returned {len(values)} rewards for {len(examples)} completions; return one each")
    valued = [[value for value in row if value is not None] for row in zip(*per_function, strict=True)]
    return [math.fsum(row) if row else None for row in valued]
