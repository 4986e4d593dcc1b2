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
from ..waves import Wave, drawn_nodes
from .caches import check_forkable, fork, put_row_state, take_row_state
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


class TransformersBackend:
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
        max_rows: Most rows to decode at a time. It bounds the memory of decoding; branches that go on are kept, too.
        tokenizer: Needed for `generation_config.stop_strings` and delimiters only.
        fork_caches: Whether to continue from forked caches. `False` prefills every prefix again, which is slower and
            draws from the same distribution. `None` tries out on the first prompts whether forks are right for this
            model, and warns if they are not. The attribute of this name has the outcome, for the next backend.
        synced_gpus: Whether processes hold shards of one model, so that all must run it equally often. Each then makes
            as many calls a wave as the one with most, and each call lasts until all have finished theirs. Every
            process must bring the same number of trees.
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
        self._places: dict[tuple[int, int], tuple[_Block, int]] = {}

    def extend(self, trees: Sequence[Tree], wave: Wave) -> list[list[Segment]]:
        """See [`~treerpo_trl.growth.Backend`]."""
        branches, num_children = wave.branches, wave.num_children
        max_tokens = dict(zip(branches, wave.max_tokens, strict=True))
        if self.fork_caches is None:
            self.fork_caches = self._can_fork([tree.prompt_ids for tree in trees])
        unknown = [branch for branch in branches if branch not in self._places]
        if self.synced_gpus and self.fork_caches:
            self._keep_pace(-(-len(unknown) // self.max_rows))
        for start in range(0, len(unknown), self.max_rows):
            self._prefill(trees, unknown[start : start + self.max_rows])
        drawn_as = dict(zip(branches, drawn_nodes(trees, wave), strict=True))
        parents_by_block: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for branch in branches:
            parents_by_block[id(self._places[branch][0])].append(branch)
        segments: dict[tuple[int, int], list[Segment]] = defaultdict(list)
        places: dict[tuple[int, int], tuple[_Block, int]] = {}
        if self.synced_gpus:
            sizes = [len(parents) * num_children for parents in parents_by_block.values()]
            self._keep_pace(sum(-(-size // self.max_rows) for size in sizes))
        for parents in parents_by_block.values():
            rows = [parent for parent in parents for _ in range(num_children)]
            for start in range(0, len(rows), self.max_rows):
                chunk = rows[start : start + self.max_rows]
                block, drawn = self._draw(chunk, [max_tokens[parent] for parent in chunk], wave)
                alive = 0
                for parent, segment in zip(chunk, drawn, strict=True):
                    if block is not None and not segment.ended:
                        places[drawn_as[parent][len(segments[parent])]] = (block, alive)
                        alive += 1
                    segments[parent].append(segment)
            for parent in parents:  # frees the block, which no other parent is in
                del self._places[parent]
        self._places = places
        return [segments[branch] for branch in branches]

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

    def _prefill(self, trees: Sequence[Tree], branches: Sequence[tuple[int, int]]) -> None:
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
            if self.synced_gpus:  # other processes may have prompts to prefill
                self._generate_greedily(block.input_ids, block.attention_mask)
        elif self.fork_caches:
            # This prepares positions, masks and the kind of cache the way the model wants them.
            output = self._generate_greedily(block.input_ids[:, :-1], block.attention_mask[:, :-1])
            block.cache = output.past_key_values
            block.row_state = take_row_state(self.model, torch.arange(len(prefixes)))
        if self.fork_caches:
            check_forkable(block.cache)
        for row, branch in enumerate(branches):
            self._places[branch] = (block, row)

    def _draw(
        self, parents: Sequence[tuple[int, int]], max_tokens: Sequence[int], wave: Wave
    ) -> tuple[_Block | None, list[Segment]]:
        """One segment below each of `parents` (all of one block), and the block of those that can branch.

        There is none where the next wave's prefixes are not of one length.
        """
        block = self._places[parents[0]][0]
        rows = torch.tensor([self._places[parent][1] for parent in parents], device=block.input_ids.device)
        input_ids, attention_mask = block.input_ids[rows], block.attention_mask[rows]
        cache = None if block.cache is None else fork(block.cache, rows, max(max_tokens))
        put_row_state(block.row_state, rows)
        arguments: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        endings = Endings(input_ids, max_tokens, self.stop_strings, wave.delimiters, self.tokenizer)
        generation_config = options_of_segment(
            self.generation_config, input_ids.size(1), block.num_sampled, max(max_tokens), wave.is_last
        )
        watchers = [TokenStatistics(self.statistics, generation_config.temperature)] if self.statistics else []
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

    def _keep_pace(self, num_calls: int) -> None:
        """Make the calls that this process has fewer in this wave than the one with most, on a token of no matter."""
        most_calls = torch.tensor(num_calls, device=self.model.device)
        distributed.all_reduce(most_calls, op=distributed.ReduceOp.MAX)
        token = torch.full((1, 1), self.pad_token_id, device=self.model.device)
        for _ in range(int(most_calls) - num_calls):
            self._generate_greedily(token, torch.ones_like(token))

    def _generate_greedily(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """`generate` one token, which leaves the random state alone; what it gives is the cache."""
        return self.model.generate(
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
        )


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
