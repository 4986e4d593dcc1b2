"""Segments from vLLM, through TRL's `VLLMGeneration`: the engine's prefix cache computes what branches share once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase

from ...tree import Segment, Tree


# A server takes these from its model's generation config, and would count the tokens of one segment, not of its path.
NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0}


class _Completion(NamedTuple):
    """What vLLM drew after a prefix: tokens, and the log-probability, in nats, that each was drawn with."""

    token_ids: list[int]
    logprobs: list[float]


class VLLMBackend:
    """Draws segments with vLLM, colocated or on a server.

    Each child is a request of its own: the prompt and the path as token ids, one completion of at most a segment.

    Processes that must call the engine together (a server, tensor parallelism) share the branches of all their trees
    out evenly, so that each passes the same number of prefixes although its trees have other sizes.

    Args:
        generation (`trl.generation.vllm_generation.VLLMGeneration`): The engine, with the weights to sample from.
        eos_token_ids: Every token that ends a completion.
        tokenizer: Needed for stop strings only.
        profile: Makes a context that times one call of the engine.
    """

    def __init__(
        self,
        generation: Any,
        eos_token_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        profile: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.generation = generation
        self.tokenizer = tokenizer
        self.profile = profile
        options = generation.generation_kwargs
        ignored = set(eos_token_ids) if options.get("ignore_eos") else set()
        self.end_token_ids = (set(eos_token_ids) - ignored) | set(options.get("stop_token_ids") or ())
        stop = options.get("stop") or ()
        self.stop_strings = [stop] if isinstance(stop, str) else list(stop)
        self.skip_special_tokens = options.get("skip_special_tokens", True)
        is_shared = generation.mode == "server" or generation.tensor_parallel_size > 1
        self.is_collective = is_shared and generation.accelerator.num_processes > 1

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep an engine with sleep mode awake, and let it sleep afterwards.

        Left to itself it would sleep after every wave, which discards the prefix cache and loads the weights again.
        """
        generation = self.generation
        if generation.mode != "colocate" or not generation.enable_sleep_mode:
            yield
            return
        if generation._llm_weights_sleeping:
            generation.sync_weights()
        generation.llm.wake_up(tags=["kv_cache"])
        generation.enable_sleep_mode = False
        try:
            yield
        finally:
            generation.enable_sleep_mode = True
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True

    def extend(
        self,
        trees: Sequence[Tree],
        branches: Sequence[tuple[int, int]],
        num_children: int,
        max_tokens: int,
        is_last: bool,
    ) -> list[list[Segment]]:
        """See [`~treerpo_trl.growth.Backend`]."""
        paths = [trees[tree_index].completion_ids(node_index) for tree_index, node_index in branches]
        prefixes = [
            [*trees[tree_index].prompt_ids, *path] for (tree_index, _), path in zip(branches, paths, strict=True)
        ]
        drawn = self._draw([prefix for prefix in prefixes for _ in range(num_children)], max_tokens)
        return [
            [self._cut(path, completion, max_tokens) for completion in drawn[start : start + num_children]]
            for path, start in zip(paths, range(0, len(drawn), num_children), strict=True)
        ]

    def _draw(self, prefixes: list[list[int]], max_tokens: int) -> list[_Completion]:
        """One completion after each prefix."""
        if not self.is_collective:
            return self._call_engine(prefixes, max_tokens) if prefixes else []
        accelerator = self.generation.accelerator
        counts = gather_object([len(prefixes)])
        everyones = gather_object(prefixes)
        if not everyones:
            return []
        share = -(-len(everyones) // accelerator.num_processes)
        everyones += everyones[-1:] * (share * accelerator.num_processes - len(everyones))
        start = share * accelerator.process_index
        drawn = gather_object(self._call_engine(everyones[start : start + share], max_tokens))
        start = sum(counts[: accelerator.process_index])
        return drawn[start : start + len(prefixes)]

    def _call_engine(self, prefixes: list[list[int]], max_tokens: int) -> list[_Completion]:
        generation = self.generation
        max_completion_length, options = generation.max_completion_length, generation.generation_kwargs
        generation.max_completion_length = max_tokens
        generation.generation_kwargs = {**NO_PENALTIES, **options}
        try:
            _, token_ids, logprobs, _ = generation.generate(
                prompts=prefixes, images=None, num_generations=1, profiler=self.profile()
            )
        finally:
            generation.max_completion_length, generation.generation_kwargs = max_completion_length, options
        # Of each token, vLLM lists the log-probabilities of the sampled one alone; `None` stands for NaN.
        return [
            _Completion(list(ids), [float("nan") if sampled is None else sampled for (sampled,) in rows])
            for ids, rows in zip(token_ids, logprobs, strict=True)
        ]

    def _cut(self, path: Sequence[int], completion: _Completion, max_tokens: int) -> Segment:
        """Cut a completion after its first stop string, which may begin in the path: vLLM looks for it after it."""
        ids, logprobs = completion
        length = self._find_stop(path, ids)
        if length is not None:
            return self._segment(ids[:length], True, logprobs[:length])
        ended = len(ids) < max_tokens or ids[-1] in self.end_token_ids
        return self._segment(ids, ended, logprobs)

    def _segment(self, ids: Sequence[int], ended: bool, logprobs: Sequence[float]) -> Segment:
        """Of the squared norm of a score, vLLM tells half at least: (1 - p)^2 of 1 - 2 p + sum_v p_v^2."""
        norm = sum((1 - math.exp(logprob)) ** 2 for logprob in logprobs)
        return Segment(tuple(ids), ended, tuple(logprobs), norm if math.isfinite(norm) else None)

    def _find_stop(self, path: Sequence[int], ids: Sequence[int]) -> int | None:
        """How many of `ids` it takes until the text of the completion contains a stop string, if it does."""
        if not self.stop_strings or not self._has_stop([*path, *ids]):
            return None
        return next(length for length in range(1, len(ids) + 1) if self._has_stop([*path, *ids[:length]]))

    def _has_stop(self, token_ids: list[int]) -> bool:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)
        return any(stop in text for stop in self.stop_strings)


def find_context_length(generation: Any) -> int:
    """Most tokens of a prompt and its completion that the engine takes."""
    if generation.mode == "colocate":
        length: int = generation.llm.llm_engine.model_config.max_model_len
        return length
    answer = [None]
    if generation.accelerator.is_main_process:  # no other process has a client
        answer = [generation.vllm_client.get_server_info()["model_config"]["max_model_len"]]
    (length,) = broadcast_object_list(answer)
    return length
