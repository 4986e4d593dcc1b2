"""Segments from vLLM, through TRL's `VLLMGeneration`: the engine's prefix cache computes what branches share once."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from ...tree import Segment, Tree
from ..delimiters import DelimiterFinder
from ..waves import Backend, Delimiters, Wave
from .context import choose_call, find_context_length


# A server takes these from its model's generation config, and would count the tokens of one segment, not of its path.
NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
MOST_STOPS_OF_A_SERVER = 4  # as in OpenAI's API


class _Completion(NamedTuple):
    """What vLLM drew after a prefix: tokens, and the log-probability, in nats, that each was drawn with.

    `has_stopped` says whether it stopped before the length limit of the call and the end of the context.
    """

    token_ids: list[int]
    logprobs: list[float]
    has_stopped: bool

    def extended(self, more: _Completion) -> _Completion:
        """This completion, with what was drawn after it."""
        return _Completion(self.token_ids + more.token_ids, self.logprobs + more.logprobs, more.has_stopped)


class VLLMBackend(Backend):
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

    def goes_on(self, has_branches: bool) -> bool:
        """See [`~treerpo_trl.growth.Backend`]."""
        return any(gather_object([has_branches])) if self.is_collective else has_branches

    def extend(self, trees: Sequence[Tree], wave: Wave) -> list[list[Segment]]:
        """See [`~treerpo_trl.growth.Backend`]."""
        waiting = zip(wave.branches, wave.max_tokens, strict=True)
        rows = [row for row in waiting for _ in range(wave.num_children)]
        paths = [trees[tree_index].completion_ids(node_index) for (tree_index, node_index), _ in rows]
        turns = [trees[tree_index].turn_ids(node_index) for (tree_index, node_index), _ in rows]
        prefixes = [
            [*trees[tree_index].prompt_ids, *path] for ((tree_index, _), _), path in zip(rows, paths, strict=True)
        ]
        limits = [most for _, most in rows]
        drawn = self._draw_segments(prefixes, turns, limits, wave.delimiters)
        return [drawn[start : start + wave.num_children] for start in range(0, len(drawn), wave.num_children)]

    def _draw_segments(
        self, prefixes: list[list[int]], paths: list[list[int]], limits: list[int], delimiters: Delimiters | None
    ) -> list[Segment]:
        """One segment after each prefix, of which its path is the part that was sampled since tools answered."""
        drawn = [_Completion([], [], False)] * len(prefixes)
        finder = None
        if delimiters is None:
            drawn = self._extend(drawn, prefixes, paths, limits)
        else:
            finder = DelimiterFinder(delimiters, self.tokenizer)
            # The first tokens pass delimiters by. vLLM's own option for that, min_tokens, bans end tokens, too.
            firsts = [min(limit, delimiters.min_tokens - 1) for limit in limits]
            drawn = self._extend(drawn, prefixes, paths, firsts, finder)
            drawn = self._extend(drawn, prefixes, paths, limits, finder, delimiters.texts)
        return [
            self._cut(path, completion, limit, finder)
            for path, completion, limit in zip(paths, drawn, limits, strict=True)
        ]

    def _extend(
        self,
        drawn: list[_Completion],
        prefixes: list[list[int]],
        paths: list[list[int]],
        limits: list[int],
        finder: DelimiterFinder | None = None,
        stop: Sequence[str] = (),
    ) -> list[_Completion]:
        """What was drawn after each prefix, continued until a segment ends in it or it is as long as its limit.

        vLLM may stop before: at the end of what it was asked for, or at a delimiter that began above the segment.
        """
        drawn = list(drawn)

        def is_going(row: int) -> bool:
            return not self._is_over(paths[row], drawn[row], limits[row], finder)

        going = list(filter(is_going, range(len(drawn))))
        while self._is_any(going):
            more = self._draw(
                [prefixes[row] + drawn[row].token_ids for row in going],
                [limits[row] - len(drawn[row].token_ids) for row in going],
                stop,
            )
            for row, completion in zip(going, more, strict=True):
                if completion is not None:
                    drawn[row] = drawn[row].extended(completion)
            going = list(filter(is_going, going))
        return drawn

    def _is_any(self, rows: Sequence[int]) -> bool:
        """Whether this process has rows, or one of those that must call the engine with it."""
        return any(gather_object([bool(rows)])) if self.is_collective else bool(rows)

    def _is_over(
        self, path: Sequence[int], completion: _Completion, limit: int, finder: DelimiterFinder | None
    ) -> bool:
        """Whether a completion has as many tokens as its limit, or a segment ends in it."""
        ids = completion.token_ids
        if not ids or len(ids) >= limit:
            return len(ids) >= limit
        is_end = completion.has_stopped if finder is None else finder.find(ids) is not None
        return is_end or ids[-1] in self.end_token_ids or self._find_stop(path, ids) is not None

    def _draw(self, prefixes: list[list[int]], limits: list[int], stop: Sequence[str]) -> list[_Completion | None]:
        """A completion after each prefix, of one call, `None` for those that are left for the next."""
        counts, rows = [len(prefixes)], list(zip(prefixes, limits, strict=True))
        if self.is_collective:
            counts, rows = gather_object(counts), gather_object(rows)
        called, max_tokens = choose_call([limit for _, limit in rows], [self._room(prefix) for prefix, _ in rows])
        drawn: list[_Completion | None] = [None] * len(rows)
        completions = self._draw_together([rows[row][0] for row in called], max_tokens, stop)
        for row, completion in zip(called, completions, strict=True):
            drawn[row] = completion
        start = sum(counts[: self.generation.accelerator.process_index]) if self.is_collective else 0
        return drawn[start : start + len(prefixes)]

    def _room(self, prefix: list[int]) -> int:
        """Most tokens to ask for after a prefix. A server refuses more than fits, a colocated engine stops there."""
        return self.context_length - len(prefix) if self.generation.mode == "server" else sys.maxsize

    def _draw_together(self, prefixes: list[list[int]], max_tokens: int, stop: Sequence[str]) -> list[_Completion]:
        """One completion after each prefix. Processes that must call the engine together have the same prefixes."""
        if not self.is_collective:
            return self._call_engine(prefixes, max_tokens, stop)
        accelerator = self.generation.accelerator
        share = -(-len(prefixes) // accelerator.num_processes)
        fillers = prefixes[-1:] * (share * accelerator.num_processes - len(prefixes))
        start = share * accelerator.process_index
        own = [*prefixes, *fillers][start : start + share]
        drawn: list[_Completion] = gather_object(self._call_engine(own, max_tokens, stop))
        return drawn[: len(prefixes)]

    def _call_engine(self, prefixes: list[list[int]], max_tokens: int, stop: Sequence[str]) -> list[_Completion]:
        generation = self.generation
        max_completion_length, options = generation.max_completion_length, generation.generation_kwargs
        generation.max_completion_length = max_tokens
        generation.generation_kwargs = {**NO_PENALTIES, **options}
        if stop:  # looked for as `DelimiterFinder` does
            # What a server is not told of costs tokens that are cut off again.
            stops = [*stop, *self.stop_strings][: MOST_STOPS_OF_A_SERVER if generation.mode == "server" else None]
            generation.generation_kwargs |= {"stop": stops, "skip_special_tokens": False}
            if "detokenize" in options:
                generation.generation_kwargs["detokenize"] = True
        try:
            _, token_ids, logprobs, _ = generation.generate(
                prompts=prefixes, images=None, num_generations=1, profiler=self.profile()
            )
        finally:
            generation.max_completion_length, generation.generation_kwargs = max_completion_length, options
        # Of each token, vLLM lists the log-probabilities of the sampled one alone; `None` stands for NaN.
        return [
            _Completion(
                list(ids),
                [float("nan") if sampled is None else sampled for (sampled,) in rows],
                len(ids) < min(max_tokens, self.context_length - len(prefix)),
            )
            for prefix, ids, rows in zip(prefixes, token_ids, logprobs, strict=True)
        ]

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
