"""TreeRPOTrainer: TRL's GRPOTrainer, which grows trees and trains each step with an advantage of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import get_config_model_id, print_prompt_completions_sample

from .checks.adapters import check_adapter, check_quantization, prepare_adapter
from .checks.arguments import (
    check_arguments,
    check_dataset,
    check_engine,
    check_processing_class,
    check_prompts,
    settle_split_rule,
)
from .checks.generation_options import check_generation_options
from .credit import ScoredTree, assign_batch
from .growth import shape_of
from .growth.backends import find_context_length
from .growth.tool_use import ToolUse
from .prefix_sharing import PrefixSharing
from .reporting.callbacks import TreeLoggingCallback
from .reporting.console import print_compactly
from .reporting.metrics import Metrics, call_metrics, pool, step_metrics, tree_metrics
from .reporting.model_card import PAPER, write_model_card
from .reporting.starvation import StarvationWatch
from .rows import (
    DistinctRows,
    RewardOverlap,
    RowRewards,
    check_rewards,
    credit_tokens,
    entropy_of_the_batch,
    lay_out,
    leaf_rewards,
    leave_out_small,
    row_means,
    score_once,
    shuffle_micro_batches,
)
from .running.numerics import GradientGuard
from .running.timing import PhaseTimer, timed
from .trainers.sampling import TreeSamplingTrainer
from .treerpo_config import TreeRPOConfig
from .views.console import completions_visible


class TreeRPOTrainer(TreeSamplingTrainer):
    """
    Trainer for Tree Relative Policy Optimization (TreeRPO), introduced in [TreeRPO: Tree Relative Policy
    Optimization](https://huggingface.co/papers/2506.05183).

    It takes the arguments of [`~trl.GRPOTrainer`] and differs in two things. Sampling: each prompt grows a tree of
    segments, in place of `num_generations` independent completions. Credit: the value of a segment is the mean of its
    children's values, up from the rewards of the leaves, and its tokens are trained with the segment's advantage.

    The batch has TRL's shape: row k of a prompt is the k-th path from the root to a leaf, depth first. A segment
    carries loss only in the first row in which it appears. Evaluation samples plain completions, as GRPO does.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
    >>> from trl.rewards import accuracy_reward

    >>> trainer = TreeRPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=TreeRPOConfig(
    ...         "Qwen2.5-0.5B-TreeRPO",
    ...         max_completion_length=512,
    ...         per_device_train_batch_size=8,
    ...         gradient_accumulation_steps=8,
    ...     ),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
        optimizers, quantization_config, peft_config:
            As for [`~trl.GRPOTrainer`].
        tools, environment_factory:
            As for [`~trl.GRPOTrainer`]. With them, a node of a tree is a turn of the model and what its tools
            answered, and each branch has an environment of its own. Images are not supported.
        args ([`TreeRPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        rollout_func:
            Refused, because it samples whole completions by itself, of which no tree can be made.

    Attributes:
        last_trees (`list[ScoredTree]`): This process's trees of the newest generation batch, with their rewards,
            values, advantages and which nodes were kept.
    """

    reward_funcs: list[Any]
    _buffered_inputs: list[dict[str, Any]] | None
    _last_loaded_step: int
    _overlap: RewardOverlap | None = None

    _tag_names = ["trl", "treerpo"]
    _name = "TreeRPO"
    _paper = PAPER

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: TreeRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Callable[..., Any] | None = None,
        environment_factory: Any = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TreeRPOConfig(f"{model_name.split('/')[-1]}-TreeRPO")
        has_tools = bool(tools or environment_factory)
        check_arguments(args, TreeRPOConfig, processing_class, tools, rollout_func, environment_factory)
        has_environments = environment_factory is not None
        check_dataset(train_dataset, eval_dataset, args, reward_funcs, has_tools, has_environments)
        check_quantization(model, quantization_config, peft_config, args.model_init_kwargs)
        check_adapter(model, peft_config, args.beta)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            environment_factory=environment_factory,
        )
        prepare_adapter(self.model, args.beta)
        check_engine(self.accelerator)
        check_processing_class(self.processing_class, train_dataset, eval_dataset)
        self._tool_use = ToolUse(self, args.replay_environments) if has_tools else None
        has_tools = bool(self.tools)  # an environment may have none
        settle_split_rule(args, has_tools)
        check_generation_options(args, self.model.generation_config, self.eos_token_ids, has_tools)
        config: Any = args  # whose optional fields are all resolved
        self.tree_shape = shape_of(config, has_tools)
        self.last_trees: list[ScoredTree] = []
        self._trees = []
        self._can_fork_caches = None  # not known yet
        self._rewards = RowRewards([], [], {})
        self._phase_timer = PhaseTimer(self.accelerator.device)
        self._gradient_guard = GradientGuard(self.accelerator)
        self._starvation_watch = StarvationWatch(args, self.accelerator.is_main_process)
        self._engine_context = find_context_length(self.vllm_generation) if self.use_vllm else None
        own_context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        known = [context for context in (own_context, self._engine_context) if context is not None]
        self._max_prompt_length = min(known) - config.max_completion_length if known else None
        # Where every forward pass of the model gathers its shards, processes must run it equally often.
        is_sharded = self._dist.is_fsdp or (self._dist.is_zero3 and not args.ds3_gather_for_generation)
        self._must_sync_generation = is_sharded and self.accelerator.num_processes > 1
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        self._prefix_sharing = PrefixSharing(args.prefix_sharing, models, self.accelerator)
        self._loss_inputs: dict[str, Any] | None = None
        if args.compact_log:
            print_compactly(self)
        if args.log_trees:
            self.add_callback(TreeLoggingCallback(self, args.log_trees_steps, args.num_trees_to_print))
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if has_environments:
                break  # what it says when it is reset belongs to the prompt
            check_prompts(name, dataset, self._tokenize_prompts, self._max_prompt_length, config.max_completion_length)

    @timed("rewards")
    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        """Score each distinct trajectory once, and keep this process's rewards for the back-up."""
        if not self.model.training:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        states = None if self._tool_use is None else self.environments
        rows = DistinctRows.of(completion_ids_list, self.num_generations, states)
        reward_funcs = self.reward_funcs
        once = [score_once(reward_func, rows) for reward_func in reward_funcs]
        self.reward_funcs = once if self._overlap is None else self._overlap.in_place_of(once)
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = reward_funcs
        weights, names = self.reward_weights, self.reward_func_names
        check_rewards(rewards_per_func, weights, names, self.args.advantage_estimator)
        start = self.accelerator.process_index * len(prompts)
        self._rewards = RowRewards.of(rewards_per_func[start : start + len(prompts)], weights, names, rows)
        return rewards_per_func

    @timed("batch")
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Replace the group-relative advantages of the rows by those of the trees' nodes."""
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        with nullcontext() if self._tool_use is None else self._tool_use.batch(inputs), self._overlapping(inputs):
            output = super()._generate_and_score_completions(inputs)
        trees = self.last_trees = self._assign_credit()
        device, completion_mask = output["completion_ids"].device, output["completion_mask"]
        layout = lay_out(
            self._trees,
            self.tree_shape,
            width=completion_mask.size(1),
            active_B=completion_mask.any(dim=1).tolist(),  # mask_truncated_completions empties rows
        )
        advantages, weights = (
            values.to(device)
            for values in credit_tokens(layout, trees, self.args.loss_weighting, self.tree_shape.longest_segment)
        )
        # In the completions table, which holds one batch, a row's advantage is the mean over its tokens.
        self._logs["advantages"].extend(gather(row_means(advantages, layout)).tolist())
        weights = completion_mask * weights
        loss_mask = leave_out_small(weights, advantages, self.args.min_advantage)
        sums = torch.stack([weights.sum(), loss_mask.sum()])
        whole_weight, trained_weight = self.accelerator.gather(sums[None]).sum(dim=0)
        rewards, trained = self._rewards, int((loss_mask > 0).sum())
        metrics = tree_metrics(trees, self.tree_shape, rewards.distinct, rewards.by_func, trained)
        if self._tool_use is not None and self._tool_use.has_tools:
            metrics |= call_metrics(len(trees), self._tool_use.calls_made, self._tool_use.calls_on_rows)
        self._starvation_watch.check(self._log_pooled(metrics), trained_weight)
        return {
            **output,
            "advantages": advantages,
            "tool_mask": loss_mask,
            "num_items_in_batch": whole_weight,
            "row": torch.arange(len(inputs), device=device),
        }

    @contextmanager
    def _overlapping(self, inputs: list[dict[str, Any]]) -> Iterator[None]:
        """Call reward functions while the batch is sampled, if the configuration says so."""
        with RewardOverlap(self, inputs) if self.args.overlap_rewards else nullcontext() as self._overlap:
            try:
                yield
            finally:
                self._overlap = None

    def _assign_credit(self) -> list[ScoredTree]:
        """Score the trees of all processes with the rewards of their leaves."""
        process = self.accelerator.process_index
        return assign_batch(
            self._trees,
            leaf_rewards(self._trees, self.tree_shape, self._rewards.total),
            self.args.advantage_estimator,
            self.args.prune_threshold,
            rows_below=self.tree_shape.rows_below,
            gather=lambda own: (gather_object(own), process * len(own)),  # all processes have equally many
        )

    def _log_pooled(self, metrics: Metrics) -> dict[str, float]:
        """Log the metrics of all processes as one, and return them."""
        pooled = pool(gather_object([metrics]))
        for name, value in pooled.items():
            self._metrics["train"][name].append(value)
        return pooled

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's, but its table of completions is printed so that what a model wrote cannot steer the terminal."""
        with completions_visible(self, print_prompt_completions_sample):
            super().log(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Upstream's; after the last one before an optimizer step, log what that step took."""
        with self._phase_timer.run("training"):
            loss = super().training_step(*args, **kwargs)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._log_pooled(step_metrics(self._phase_timer.take(), *self._prefix_sharing.take_token_counts()))
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, which is asked for just before the update: one that would ruin the weights is skipped."""
        grad_norm = super()._get_grad_norm(*args, **kwargs)
        is_skipped = self._gradient_guard.check(grad_norm, self.model_wrapped, self.state.global_step + 1)
        self._metrics["train"]["skipped_updates"].append(float(is_skipped))
        return grad_norm

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Shuffle whole micro-batches: TRL's shuffle of rows would scatter a tree over them."""
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not None and self._buffered_inputs is not buffered:
            self._buffered_inputs = shuffle_micro_batches(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    @timed("log_probs")
    @entropy_of_the_batch
    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the prefixes that rows share once and, for the loss, only what carries loss."""
        if not self._prefix_sharing.can_share(model, input_ids):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
                **multimodal,
            )  # fmt: skip
        needed, missing = attention_mask[:, -logits_to_keep:] > 0, None
        if (inputs := self._loss_inputs) is not None:
            needed = needed & (inputs.get("tool_mask", needed) > 0)
            missing = inputs.get("old_per_token_logps")  # what is not computed has the ratio 1
        return self._prefix_sharing.forward(
            model, input_ids, attention_mask, needed, missing, batch_size or len(input_ids), compute_entropy,
            compute_aux_loss,
        )  # fmt: skip

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Upstream's loss; its forward pass learns here which tokens it is for."""
        self._loss_inputs = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs = None

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """As upstream, on whether a token counts rather than how much (`loss_weighting='node'` weighs tokens)."""
        return super().get_high_entropy_mask(entropies, (mask > 0).to(entropies.dtype), threshold)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Our own card, with the metadata of TRL's."""
        draft = super().create_model_card
        write_model_card(self, lambda: draft(model_name, dataset_name, tags))
