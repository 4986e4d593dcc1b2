"""GRPOTrainer's generation replaced by the growth of trees, with transformers or vLLM, with tools or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from ..checks.arguments import check_prompt_lengths
from ..checks.generation_options import options_on_trees
from ..credit import ESTIMATORS
from ..growth import Backend, Shape, grow, statistics_of
from ..growth.backends import TransformersBackend, VLLMBackend
from ..growth.tool_use import ToolUse
from ..running.timing import timed
from ..tree import Tree
from .resuming import ResumableGRPOTrainer


class TreeSamplingTrainer(ResumableGRPOTrainer):
    """TRL's trainer, which grows a tree a prompt in training and returns its paths as rows.

    Attributes:
        tree_shape: Of the trees.
    """

    tree_shape: Shape
    _trees: list[Tree]
    _tool_use: ToolUse | None
    _can_fork_caches: bool | None
    _engine_context: int | None
    _max_prompt_length: int | None
    _must_sync_generation: bool
    _last_loaded_step: int
    _overlap: Any = None  # what is told of trees that have ended, while others grow

    @timed("sampling")
    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Grow one tree per distinct prompt, and return one completion per row; with tools, its first turn."""
        if self._tool_use is not None and self._tool_use.is_asking:
            return [[] for _ in prompt_ids], None  # its trees grow on by themselves
        if not self.model.training:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )
        # TRL repeats each prompt num_generations times; distinct ones are told by position, as prompts may be equal.
        prompts = prompt_ids[::num_generations]
        check_prompt_lengths(prompts, self._max_prompt_length, self.max_completion_length)
        self._trees = self._grow_with_vllm(prompts) if self.use_vllm else self._grow(prompts)
        if self._tool_use is not None and self._tool_use.has_tools:
            return self._tool_use.first_turns(self._trees, self.tree_shape), None
        if self._tool_use is not None:
            self._tool_use.seat_leaves(self._trees, self.tree_shape)
        rows = [(tree, leaf) for tree in self._trees for leaf in self.tree_shape.slots(tree)]
        completion_ids = [tree.completion_ids(leaf) for tree, leaf in rows]
        return completion_ids, [tree.completion_logprobs(leaf) for tree, leaf in rows] if self.use_vllm else None

    def _generate(self, prompts: list[Any]) -> Any:
        """Upstream's; in training, the rows of a tree have one prompt, with what its environment said."""
        if self._tool_use is not None and self.model.training:
            prompts[:] = self._tool_use.of_trees(prompts)  # in place, for rewards and logs, too
        return super()._generate(prompts)

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The turns of the trees, which have called their tools while they grew."""
        if self._tool_use is None or not self.model.training:
            return super()._tool_call_loop(*args, **kwargs)
        return self._tool_use.rows(self._trees, self.tree_shape, has_logprobs=self.use_vllm)

    def _grow(self, prompts: list[list[int]]) -> list[Tree]:
        with (
            self._generating() as model,
            options_on_trees(model, self.generation_config, "turn" if self.tools else self.args.split_rule) as options,
        ):
            backend = TransformersBackend(
                model=model,
                generation_config=options,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self._tokenizer.pad_token_id,
                max_rows=self.args.max_frontier_rows,
                tokenizer=self._tokenizer,
                fork_caches=self._can_fork_caches,
                synced_gpus=self._must_sync_generation,
                statistics=statistics_of(self.args, ESTIMATORS[self.args.advantage_estimator].of_forest is not None),
            )
            trees = self._grow_on(backend, prompts)
            self._can_fork_caches = backend.fork_caches
        return trees

    def _grow_with_vllm(self, prompts: list[list[int]]) -> list[Tree]:
        if self.state.global_step != self._last_loaded_step:
            with profiling_context(self, "sync_weights"):
                self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        backend = VLLMBackend(
            self.vllm_generation,
            eos_token_ids=self.eos_token_ids,
            tokenizer=self._tokenizer,
            profile=lambda: profiling_context(self, "vLLM.generate"),
            context_length=self._engine_context,
        )
        with backend.awake():
            return self._grow_on(backend, prompts)

    def _grow_on(self, backend: Backend, prompts: list[list[int]]) -> list[Tree]:
        has_tools = self._tool_use is not None and self._tool_use.has_tools
        dialogues = self._tool_use.start(len(prompts)) if self._tool_use is not None and has_tools else None
        on_end = None if self._overlap is None else self._overlap.add
        return grow(prompts, self.tree_shape, backend, dialogues, on_end)

    @contextmanager
    def _generating(self) -> Iterator[PreTrainedModel]:
        """The model as TRL hands it to `generate`, whatever engine it is wrapped in."""
        with (
            profiling_context(self, "transformers.generate"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model
