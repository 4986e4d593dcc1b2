"""Segments from vLLM, through TRL's `VLLMGeneration`: the engine's prefix cache computes what branches share once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase

from ...tree import Segment, Tree
from ..delimiters import DelimiterFinder
from ..waves import Delimiters, Wave


# A server takes these from its model's generation config, and would count the tokens of one segment, not of its path.
NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0}


class _Completion(NamedTuple):
    """What vLLM drew after a prefix: tokens, and the log-probability, in nats, that each was drawn with.

    `has_stopped` says whether it stopped before the length limit of the call.
    """

    token_ids: list[int]
    logprobs: list[float]
    has_stopped: bool

    def extended(self, more: _Completion) -> _Completion:
        """This completion, with what was drawn after it."""
        return _Completion(self.token_ids + more.token_ids, self.logprobs + more.logprobs, more.has_stopped)


class VLLMBackend:
    """Draws segments with vLLM, colocated or on a server.

    Each child is a request of its own: the prompt and the path as token ids, one completion of at most a segment.

    Processes that must call the engine together (a server, tensor parallelism) share the branches of all their trees
    out evenly, so that each passes the same number of prefixes although its trees have other sizes.

    Args:
        generation (`trl.generation.vllm_generation.VLLMGeneration`): The engine, with the weights to sample from.
        eos_token_ids: Every token that ends a completion.
        tokenizer: Needed for stop strings and delimiters only.
        profile: Makes a context that times one call of the engine.
        context_length: What [`find_context_length`] gives, where it is known: a server is asked for it otherwise.
    """

    def __init__(
        self,
        generation: Any,
        eos_token_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        profile: Callable[[], AbstractContextManager[None]] = nullcontext,
        context_length: int | None = None,
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
        self._context_length = context_length

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its completion that the engine takes."""
        if self._context_length is None:
            self._context_length = find_context_length(self.generation)
        return self._context_length

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

    def extend(self, trees: Sequence[Tree], wave: Wave) -> list[list[Segment]]:
        """See [`~treerpo_trl.growth.Backend`]."""
        waiting = zip(wave.branches, wave.max_tokens, strict=True)
        rows = [row for row in waiting for _ in range(wave.num_children)]
        paths = [trees[tree_index].completion_ids(node_index) for (tree_index, node_index), _ in rows]
        prefixes = [
            [*trees[tree_index].prompt_ids, *path] for ((tree_index, _), _), path in zip(rows, paths, strict=True)
        ]
        limits = [most for _, most in rows]
        drawn = self._draw_segments(prefixes, paths, limits, wave.delimiters)
        return [drawn[start : start + wave.num_children] for start in range(0, len(drawn), wave.num_children)]

    def _draw_segments(
        self, prefixes: list[list[int]], paths: list[list[int]], limits: list[int], delimiters: Delimiters | None
    ) -> list[Segment]:
        """One segment after each prefix, of which its path is the sampled part.

        vLLM stops where a segment ends or before that: it completes characters that began above the segment, and a
        server may have a limit of its own. What has no end yet is continued.
        """
        finder = None if delimiters is None else DelimiterFinder(delimiters, self.tokenizer)
        # The first tokens pass delimiters by. vLLM's own option for that, min_tokens, bans end tokens, too.
        free = 0 if delimiters is None else delimiters.min_tokens - 1
        drawn = [_Completion([], [], False)] * len(prefixes)
        going = list(range(len(prefixes)))
        while self._is_any(going):
            most = free or max(limits, default=0)
            stop = () if free or delimiters is None else delimiters.texts
            more = self._draw(
                [prefixes[row] + drawn[row].token_ids for row in going],
                [min(most, limits[row] - len(drawn[row].token_ids)) for row in going],
                stop,
            )
            for row, completion in zip(going, more, strict=True):
                drawn[row] = drawn[row].extended(completion)
            going = [row for row in going if not self._is_over(paths[row], drawn[row], limits[row], finder)]
            free = 0
        return [
            self._cut(path, completion, limit, finder)
            for path, completion, limit in zip(paths, drawn, limits, strict=True)
        ]

    def _is_any(self, rows: Sequence[int]) -> bool:
        """Whether this process has rows, or one of those that must call the engine with it."""
        return any(gather_object([bool(rows)])) if self.is_collective else bool(rows)

    def _draw(self, prefixes: list[list[int]], limits: list[int], stop: Sequence[str]) -> list[_Completion]:
        """One completion after each prefix, of at least as many tokens as its limit if it does not stop.

        One call is for all if the context has room for the largest limit after each prefix. What is nearer to the end
        of the context goes in a second one, as a server refuses to be asked for more than there is room for.
        """
        counts, rows = [len(prefixes)], list(zip(prefixes, limits, strict=True))
        if self.is_collective:
            counts, rows = gather_object(counts), gather_object(rows)
        most = max(limit for _, limit in rows)
        is_near_end = [len(prefix) + most > self.context_length for prefix, _ in rows]
        drawn: dict[int, _Completion] = {}
        for is_near, max_tokens in ((False, most), (True, None)):
            group = [row for row in range(len(rows)) if is_near_end[row] == is_near]
            if group:
                completions = self._draw_together([rows[row][0] for row in group], max_tokens, stop)
                drawn.update(zip(group, completions, strict=True))
        start = sum(counts[: self.generation.accelerator.process_index]) if self.is_collective else 0
        return [drawn[row] for row in range(start, start + len(prefixes))]

    def _draw_together(
        self, prefixes: list[list[int]], max_tokens: int | None, stop: Sequence[str]
    ) -> list[_Completion]:
        """One completion after each prefix, of which all processes of a collective call have the same."""
        if not self.is_collective:
            return self._call_engine(prefixes, max_tokens, stop)
        accelerator = self.generation.accelerator
        share = -(-len(prefixes) // accelerator.num_processes)
        fillers = prefixes[-1:] * (share * accelerator.num_processes - len(prefixes))
        start = share * accelerator.process_index
        own = [*prefixes, *fillers][start : start + share]
        drawn: list[_Completion] = gather_object(self._call_engine(own, max_tokens, stop))
        return drawn[: len(prefixes)]

    def _call_engine(
        self, prefixes: list[list[int]], max_tokens: int | None, stop: Sequence[str]
    ) -> list[_Completion]:
        """At most `max_tokens` after each prefix; `None`: to the end of the context."""
        generation = self.generation
        max_completion_length, options = generation.max_completion_length, generation.generation_kwargs
        generation.max_completion_length = max_tokens
        generation.generation_kwargs = {**NO_PENALTIES, **options}
        if stop:  # looked for as `DelimiterFinder` does
            generation.generation_kwargs |= {"stop": [*self.stop_strings, *stop], "skip_special_tokens": False}
            if "detokenize" in options:
                generation.generation_kwargs["detokenize"] = True
        try:
            _, token_ids, logprobs, _ = generation.generate(
                prompts=prefixes, images=None, num_generations=1, profiler=self.profile()
            )
        finally:
            generation.max_completion_length, generation.generation_kwargs = max_completion_length, options
        # Of each token, vLLM lists the log-probabilities of the sampled one alone; `None` stands for NaN. To the end
        # of the context a server may have a limit of its own, so that what is short may go on.
        return [
            _Completion(
                list(ids),
                [float("nan") if sampled is None else sampled for (sampled,) in rows],
                max_tokens is not None and len(ids) < min(max_tokens, self.context_length - len(prefix)),
            )
            for prefix, ids, rows in zip(prefixes, token_ids, logprobs, strict=True)
        ]

    def _is_over(
        self, path: Sequence[int], completion: _Completion, limit: int, finder: DelimiterFinder | None
    ) -> bool:
        """Whether a segment ends in a completion."""
        ids = completion.token_ids
        return (
            len(ids) >= limit
            or ids[-1] in self.end_token_ids
            or (completion.has_stopped if finder is None else finder.find(ids) is not None)
            or self._find_stop(path, ids) is not None
        )

    def _cut(
        self, path: Sequence[int], completion: _Completion, limit: int, finder: DelimiterFinder | None = None
    ) -> Segment:
        """Cut a completion after its first stop string, or where the segment ends.

        A stop string may begin in the path: vLLM looks for it after it.
        """
        ids, logprobs, _ = completion
        stop = self._find_stop(path, ids)
        end = min(limit, len(ids))
        if finder is not None:
            end = finder.find(ids[:end]) or end
        if stop is not None and stop <= end:
            return self._segment(ids[:stop], True, logprobs[:stop])
        is_whole = end == len(ids)
        # What stops at a delimiter has not ended, though vLLM stops there, too.
        ended = is_whole and (ids[-1] in self.end_token_ids or (finder is None and completion.has_stopped))
        return self._segment(ids[:end], ended, logprobs[:end])

    def _segment(self, ids: Sequence[int], ended: bool, logprobs: Sequence[float]) -> Segment:
        """Of the squared norm of a score, vLLM tells half at least: (1 - p)^2 of 1 - 2 p + sum_v p_v^2."""
        norms = tuple((1 - math.exp(logprob)) ** 2 for logprob in logprobs)
        is_known = all(map(math.isfinite, norms))
        return Segment(
            tuple(ids), ended, tuple(logprobs), norms if is_known else None, tuple(-logprob for logprob in logprobs)
        )

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
