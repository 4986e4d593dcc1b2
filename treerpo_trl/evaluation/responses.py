"""Responses of a model to a set of prompts, scored: Pass@1 (the mean over several samples, avg@k) and their length.

[`evaluate`] does it in one call. [`respond`] and [`summarize`] are its parts, for any engine that samples: they work
on prompts and completions as token ids.

Legend of shapes: B rows of one batch, P prompt tokens, T completion tokens, S = P + T.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# An engine: (prompts as token ids, a seed) -> the completion of each, up to and with its first EOS, and whether it has
# one. Given the same it draws the same, as far as the engine can.
Sampler = Callable[[list[list[int]], int], tuple[list[list[int]], list[bool]]]


@dataclass(frozen=True, slots=True)
class Response:
    """One completion, scored."""

    problem: int  # row of the dataset
    sample: int  # which of the row's responses
    text: str  # without special tokens
    length: int  # tokens, EOS included
    finished: bool  # ended by an EOS
    reward: float | None  # None where no reward function gave one


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a model did on `num_problems` prompts with `num_samples` responses each."""

    pass_at_1: float  # mean over problems of the mean reward over samples
    mean_length: float  # tokens a response, EOS included
    truncated: float  # share of responses that reached max_new_tokens without an EOS
    num_problems: int
    num_samples: int
    problem_scores: tuple[float | None, ...]  # [num_problems] mean reward over samples; None if nothing was scored
    mean_length_correct: float  # tokens a response whose reward is 1 or more; nan if there is none
    pass_at_k: float  # share of the scored problems with a response whose reward is 1 or more, of all num_samples


def evaluate(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Sequence[Mapping[str, Any]],
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    progress_bar: bool = True,
) -> EvaluationResult:
    """Sample responses to every prompt, score them, and average.

    The model samples from its own distribution at `temperature` and `top_p` (no top-k or repetition penalty, whatever
    its generation config says). The random state of the caller and the train/eval mode of the model are left as found.

    Args:
        model: the policy, not wrapped for distributed training.
        processing_class: its tokenizer, or a processor that has one.
        dataset: rows with a `prompt` (a string or chat messages); other columns are handed to the reward functions.
        reward_funcs: one or several TRL reward functions; several are summed, and None leaves a response out.
        num_samples: responses a prompt.
        temperature: sampling temperature, 0 for greedy decoding.
        top_p: probability mass that is sampled from, 1 for all.
        max_new_tokens: longest response.
        batch_size: responses generated at once.
        seed: of the sampling; the result also depends on `batch_size`.
        progress_bar: whether to show progress.
    """
    sampler = TransformersSampler(
        model, processing_class, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens
    )
    batches = respond(
        sampler, processing_class, dataset, reward_funcs, num_samples=num_samples, batch_size=batch_size, seed=seed
    )
    total, responses = len(dataset) * num_samples, []
    with _isolated(model), tqdm(total=total, desc="Evaluating", disable=not progress_bar) as bar:
        for batch in batches:
            responses += batch
            bar.update(len(batch))
    return summarize(responses, len(dataset), num_samples)


def respond(
    sampler: Sampler,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Sequence[Mapping[str, Any]],
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    *,
    num_samples: int,
    batch_size: int,
    seed: int,
    num_done: int = 0,
) -> Iterator[list[Response]]:
    """Batches of scored responses: all of the first row, then of the second, and so on.

    The seed of a batch follows from `seed` and its number alone, so a run that leaves out the `num_done` first batches
    draws in the others what a whole run does.

    Args:
        sampler: the engine.
        processing_class, dataset, reward_funcs, num_samples, batch_size: as in [`evaluate`].
        seed: of the sampling.
        num_done: batches to leave out.
    """
    _check(dataset, num_samples, batch_size)
    functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    rows = list(dataset)
    order = [divmod(index, num_samples) for index in range(len(rows) * num_samples)]
    for number in range(num_done, -(-len(order) // batch_size)):
        batch = order[number * batch_size : (number + 1) * batch_size]
        examples = [dict(rows[problem]) for problem, _ in batch]
        prompt_ids = _tokenize(processing_class, [example["prompt"] for example in examples])
        completion_ids, finished = sampler(prompt_ids, _seed_of_batch(seed, number))
        texts = processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = _score(functions, examples, texts, completion_ids)
        yield [
            Response(problem, sample, text, len(ids), has_ended, reward)
            for (problem, sample), text, ids, has_ended, reward in zip(
                batch, texts, completion_ids, finished, rewards, strict=True
            )
        ]


def summarize(responses: Iterable[Response], num_problems: int, num_samples: int) -> EvaluationResult:
    """The averages of the responses to `num_problems` rows."""
    rewards: list[list[float]] = [[] for _ in range(num_problems)]
    lengths, correct_lengths, num_truncated = [], [], 0
    for response in responses:
        lengths.append(response.length)
        num_truncated += not response.finished
        if response.reward is not None:
            rewards[response.problem].append(response.reward)
            if response.reward >= 1:
                correct_lengths.append(response.length)
    scores = tuple(mean(values) if values else None for values in rewards)
    return EvaluationResult(
        pass_at_1=mean([score for score in scores if score is not None]),
        mean_length=mean(lengths),
        truncated=num_truncated / len(lengths) if lengths else math.nan,
        num_problems=num_problems,
        num_samples=num_samples,
        problem_scores=scores,
        mean_length_correct=mean(correct_lengths),
        pass_at_k=mean([float(max(values) >= 1) for values in rewards if values]),
    )


def mean(values: Sequence[float]) -> float:
    """Their mean, nan of none."""
    return math.fsum(values) / len(values) if values else math.nan


def _check(dataset: Sequence[Mapping[str, Any]], num_samples: int, batch_size: int) -> None:
    if len(dataset) == 0:
        raise ValueError("the evaluation dataset is empty; pass at least one row with a `prompt` column")
    if "prompt" not in dataset[0]:
        raise ValueError(f"the evaluation dataset has the columns {sorted(dataset[0])}; rename one to `prompt`")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; set it to 1 or more")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; set it to 1 or more")


def check_sampling(temperature: float, top_p: float, max_new_tokens: int) -> None:
    """Refuse what no engine can sample with."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; use 0 for greedy decoding or a positive value")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; use 1 to sample from all tokens, or less, above 0")
    if max_new_tokens < 1:
        raise ValueError(f"the longest response has {max_new_tokens} tokens; allow 1 or more")


def _seed_of_batch(seed: int, number: int) -> int:
    """Batches of one run, and of runs whose seeds are neighbours, share no seed."""
    return random.Random(f"{seed} {number}").getrandbits(63)


@contextmanager
def _isolated(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and a random state of its own; both are put back, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=range(torch.accelerator.device_count())), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


class TransformersSampler:
    """A [`Sampler`] that calls `model.generate`. It seeds torch, and leaves the train/eval mode to the caller.

    Args:
        model: the policy, not wrapped for distributed training.
        processing_class: its tokenizer, or a processor that has one.
        temperature, top_p, max_new_tokens: as in [`evaluate`].
    """

    def __init__(
        self, model: PreTrainedModel, processing_class: Any, *, temperature: float, top_p: float, max_new_tokens: int
    ):
        check_sampling(temperature, top_p, max_new_tokens)
        self.model = model
        self.eos_token_ids = eos_token_ids_of(model.generation_config, processing_class)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_token_ids[0]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
        self.options = {
            "max_new_tokens": max_new_tokens,
            "repetition_penalty": 1.0,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_ids,
            **(sampling if temperature > 0 else {"do_sample": False}),
        }

    def __call__(self, prompt_ids: list[list[int]], seed: int) -> tuple[list[list[int]], list[bool]]:
        """See [`Sampler`]."""
        torch.manual_seed(seed)
        rows = [torch.tensor(ids) for ids in prompt_ids]
        inputs_BP = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id, padding_side="left")
        mask_BP = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True, padding_side="left")
        device = self.model.device
        output_BS = self.model.generate(
            input_ids=inputs_BP.to(device), attention_mask=mask_BP.to(device), **self.options
        )
        return _cut_after_eos(output_BS[:, inputs_BP.size(1) :].cpu(), torch.tensor(self.eos_token_ids))


def eos_token_ids_of(generation_config: Any, processing_class: Any) -> list[int]:
    """The tokens that end a response, as TRL collects them."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    configured = generation_config.eos_token_id
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
    functions: list[RewardFunc], examples: list[dict[str, Any]], texts: list[str], completion_ids: list[list[int]]
) -> list[float | None]:
    """The summed reward of each response, or None where no function returned one; called as TRL calls them."""
    completions: list[Any] = texts
    if is_conversational({"prompt": examples[0]["prompt"]}):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    reserved = ("prompt", "completion", "completion_ids")
    columns: dict[str, Any] = {key: [row[key] for row in examples] for key in examples[0] if key not in reserved}
    # TRL hands these to every reward function; an evaluation has nothing to log to.
    columns |= {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    prompts = [row["prompt"] for row in examples]
    per_function = [
        f(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns) for f in functions
    ]
    for function, values in zip(functions, per_function, strict=True):
        if len(values) != len(examples):
            name = getattr(function, "__name__", repr(function))
            raise ValueError(f"{name} returned {len(values)} rewards for {len(examples)} completions; return one each")
    valued = [[value for value in row if value is not None] for row in zip(*per_function, strict=True)]
    return [math.fsum(row) if row else None for row in valued]
