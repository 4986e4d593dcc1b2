"""Segments from `generate`, with forked key-value caches: each prompt token and each sampled token is computed once.

Legend: R rows decoded together, P tokens of the longest prefix among them.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...tree import Segment, Tree
from ..waves import Backend, Place, Wave, drawn_nodes
from .caches import CACHE, CacheKeeper, check_forkable, fork, put_row_state, take_row_state
from .endings import Endings
from .options import options_of_segment
from .token_statistics import TokenStatistics
from .trial import find_fault


@dataclass
class _Block:
    """Prefixes of equal padded length that were decoded together, with what the model remembers of them.

    Args:
        input_ids: (R, P) prefixes, prompts left-padded.
        attention_mask: (R, P) 0 on padding.
        cache: Keys and values of the first P - 1 positions; `None` to prefill whole prefixes instead.
        num_sampled: How many of the P tokens were sampled, after the prompts; the fewest of any row.
        row_state: What the model had of these rows on itself.
    """

    input_ids: Tensor
    attention_mask: Tensor
    cache: Cache | None
    num_sampled: int = 0
    row_state: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)


class TransformersBackend(Backend):
    """Draws segments with a transformers model.

    The prompts are prefilled once. Where segments end at a fixed length, a node's children continue from a fork of
    its cache, so a token is computed once however many leaves lie below it. To continue, `generate` must be fed one
    token, so the last token of a prefix is computed by each child, and that of a leaf never: in all, a tree costs one
    position per sampled token, plus the prompt but its last token. Where segments end anywhere, each prefix that
    branches is prefilled once more, in parallel, and its children continue from forks of that.

    One backend serves one call of [`~treerpo_trl.growth.grow`].

    Args:
        model: A causal language model.
        generation_config: How to sample; its length limits are replaced by the wave's.
        eos_token_ids: Every token that ends a completion.
        pad_token_id: What to pad with; it may be one of `eos_token_ids`.
        max_rows: Most rows to decode at a time, and most branches of a depth whose caches are kept until they go on.
            With a tree of depth D, the caches of at most D times as many paths are in memory.
        tokenizer: Needed for `generation_config.stop_strings` and delimiters only.
        fork_caches: Whether to continue from forked caches. `False` prefills every prefix again, which is slower and
            draws from the same distribution. `None` tries out on the first prompts whether forks are right for this
            model, and warns if they are not. The attribute of this name has the outcome, for the next backend.
        synced_gpus: Whether processes hold shards of one model, so that all must run it equally often. Each then makes
            as many calls as the one with most, and each call lasts until all have finished theirs.
        statistics: What to note of each token: names of [`TokenStatistics`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_rows: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        fork_caches: bool | None = None,
        synced_gpus: bool = False,
        statistics: Sequence[str] = (),
    ):
        self.model = model
        self.generation_config = copy.deepcopy(generation_config)
        self.generation_config.use_cache = True  # whatever the checkpoint says: trees are grown on the cache
        self.logits_processors = LogitsProcessorList()  # that come after those of the generation config
        self.eos_token_ids = torch.tensor(list(eos_token_ids))
        self.pad_token_id = pad_token_id
        self.max_rows = max_rows
        self.fork_caches = fork_caches
        self.synced_gpus = synced_gpus
        self.statistics = tuple(statistics)
        # `generate` would stop at them without telling which rows stopped, so they are watched here.
        self.stop_strings = self.generation_config.stop_strings
        self.generation_config.stop_strings = None
        self.tokenizer = tokenizer
        self._places: dict[Place, tuple[_Block, int]] = {}

    @property
    def block_rows(self) -> int:
        """See [`~treerpo_trl.growth.Backend`]."""
        return self.max_rows

    def extend(self, trees: Sequence[Tree], wave: Wave) -> list[list[Segment]]:
        """See [`~treerpo_trl.growth.Backend`]."""
        num_children = wave.num_children
        max_tokens = dict(zip(wave.branches, wave.max_tokens, strict=True))
        drawn_as = dict(zip(wave.branches, drawn_nodes(trees, wave), strict=True))
        if self.fork_caches is None:
            self.fork_caches = self._can_fork([tree.prompt_ids for tree in trees])
        segments: dict[Place, list[Segment]] = defaultdict(list)
        for parents in self._together(wave.branches):
            if parents[0] not in self._places:
                self._prefill(trees, parents)
            rows = [parent for parent in parents for _ in range(num_children)]
            drawn_places: dict[Place, tuple[_Block, int]] = {}
            for start in range(0, len(rows), self.max_rows):
                chunk = rows[start : start + self.max_rows]
                block, drawn = self._draw(chunk, [max_tokens[parent] for parent in chunk], wave)
                alive = 0
                for parent, segment in zip(chunk, drawn, strict=True):
                    if block is not None and not segment.ended:
                        drawn_places[drawn_as[parent][len(segments[parent])]] = (block, alive)
                        alive += 1
                    segments[parent].append(segment)
            self.release(parents)
            self._places |= drawn_places
        return [segments[branch] for branch in wave.branches]

    def _together(self, branches: Sequence[Place]) -> list[list[Place]]:
        """The branches of each block, and those that are to be prefilled, as many as may be at a time."""
        blocks: dict[int, list[Place]] = defaultdict(list)
        num_unknown = 0
        for branch in branches:
            if branch in self._places:
                blocks[id(self._places[branch][0])].append(branch)
            else:
                blocks[-1 - num_unknown // self.max_rows].append(branch)
                num_unknown += 1
        return list(blocks.values())

    def goes_on(self, has_branches: bool) -> bool:
        """See [`~treerpo_trl.growth.Backend`]: its processes need not draw the same waves. One that has drawn its last
        keeps up with the calls of the others, on a token of no matter.
        """
        if not has_branches and self.synced_gpus:
            token = torch.full((1, 1), self.pad_token_id, device=self.model.device)
            while self._any_calls(False):
                self._generate_greedily(token, torch.ones_like(token))
        return has_branches

    def release(self, nodes: Sequence[Place]) -> None:
        """See [`~treerpo_trl.growth.Backend`]: a block goes with the last of its nodes."""
        for node in nodes:
            self._places.pop(node, None)

    def _any_calls(self, has_call: bool) -> bool:
        """Whether any process makes a call now: those that share a model make theirs together."""
        flag = torch.tensor(float(has_call), device=self.model.device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag.item())

    def _can_fork(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether forks are right for this model; a warning says why not."""
        fault = find_fault(self, prompts)
        if fault is not None:
            warnings.warn(
                f"The cache of {type(self.model).__name__} cannot be forked ({fault}), so every wave prefills its "
                "prefixes again. Sampling is slower, not different.",
                stacklevel=2,
            )
        return fault is None

    def _prefill(self, trees: Sequence[Tree], branches: Sequence[Place]) -> None:
        """Compute prefixes but their last tokens, which `generate` is fed to continue."""
        sampled = [trees[tree_index].completion_ids(node) for tree_index, node in branches]
        prefixes = [
            [*trees[tree_index].prompt_ids, *ids] for (tree_index, _), ids in zip(branches, sampled, strict=True)
        ]
        width = max(len(prefix) for prefix in prefixes)
        device = self.model.device
        padded = [[self.pad_token_id] * (width - len(prefix)) + prefix for prefix in prefixes]
        mask = [[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes]
        block = _Block(
            torch.tensor(padded, device=device),
            torch.tensor(mask, device=device),
            cache=None,
            num_sampled=min(map(len, sampled)),
        )
        if self.fork_caches and width == 1:
            block.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        elif self.fork_caches:
            self._keep_pace()
            # This prepares positions, masks and the kind of cache the way the model wants them.
            block.cache = self._generate_greedily(block.input_ids[:, :-1], block.attention_mask[:, :-1])
            block.row_state = take_row_state(self.model, torch.arange(len(prefixes)))
        if self.fork_caches:
            check_forkable(block.cache)
        for row, branch in enumerate(branches):
            self._places[branch] = (block, row)

    def _draw(
        self, parents: Sequence[Place], max_tokens: Sequence[int], wave: Wave
    ) -> tuple[_Block | None, list[Segment]]:
        """One segment below each of `parents` (all of one block), and the block of those that can branch.

        There is none where the next wave's prefixes are not of one length.
        """
        block = self._places[parents[0]][0]
        rows = torch.tensor([self._places[parent][1] for parent in parents], device=block.input_ids.device)
        input_ids, attention_mask = block.input_ids[rows], block.attention_mask[rows]
        cache = None if block.cache is None else fork(block.cache, rows, max(max_tokens))
        put_row_state(block.row_state, rows)
        arguments: dict[str, Any] = {} if cache is None else {CACHE: cache}
        endings = Endings(input_ids, max_tokens, self.stop_strings, wave.delimiters, self.tokenizer)
        generation_config = options_of_segment(
            self.generation_config, input_ids.size(1), block.num_sampled, max(max_tokens), wave.is_last
        )
        watchers = [TokenStatistics(self.statistics, generation_config.temperature)] if self.statistics else []
        keeper = CacheKeeper(cache) if self.synced_gpus and cache is not None else None
        endings.criteria += [] if keeper is None else [keeper]
        self._keep_pace()
        with _explain_nan():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=generation_config,
                synced_gpus=self.synced_gpus,
                logits_processor=LogitsProcessorList([*self.logits_processors, *watchers]),
                stopping_criteria=endings.criteria,
                **arguments,
            )
        cache = cache if keeper is None else keeper.kept
        drawn = endings.cut(output, self.eos_token_ids)
        for watcher in watchers:
            drawn = watcher.attach(drawn, output)
        alive = [row for row, segment in enumerate(drawn) if not segment.ended]
        if wave.is_last or not endings.is_even or not alive:
            return None, drawn
        alive_R = torch.tensor(alive, device=output.device)
        if cache is not None and len(alive) < len(drawn):
            cache.batch_select_indices(alive_R)
        grown = attention_mask.new_ones(len(drawn), output.size(1) - input_ids.size(1))
        attention_mask = torch.cat([attention_mask, grown], dim=1)[alive_R]
        state = [] if cache is None else take_row_state(self.model, alive_R)
        num_sampled = block.num_sampled + grown.size(1)
        return _Block(output[alive_R], attention_mask, cache, num_sampled, state), drawn

    def _keep_pace(self) -> None:
        """Tell processes that share the model of a call."""
        if self.synced_gpus:
            self._any_calls(True)

    def _generate_greedily(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """`generate` one token, which leaves the random state alone; what it gives is the cache."""
        config = self.model.config.get_text_config(decoder=True)
        keeper = CacheKeeper(DynamicCache(config=config)) if self.synced_gpus else None
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=self.pad_token_id,
                eos_token_id=self.generation_config.eos_token_id,
                bos_token_id=self.generation_config.bos_token_id,
                return_dict_in_generate=True,
                use_cache=True,
                disable_compile=True,
            ),
            synced_gpus=self.synced_gpus,
            **({} if keeper is None else {CACHE: keeper.cache, "stopping_criteria": [keeper]}),
        )
        return output[CACHE] if keeper is None else keeper.kept


@contextmanager
def _explain_nan() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # torch.multinomial's
            raise
        raise FloatingPointError(
            "the model's probabilities of the next token are not finite, so none can be drawn: its weights, or what "
            "comes of them in this precision, are inf or NaN. Go on from an earlier checkpoint, lower the learning "
            "rate, or use a dtype of more range"
        ) from error
