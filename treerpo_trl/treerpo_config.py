"""TreeRPOConfig: TRL's GRPOConfig with the shape of the tree and how its rewards become advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from .checks.compatibility import refuse_oversized_engine, refuse_unsupported
from .checks.generation_options import check_generation_kwargs
from .checks.moved_options import explains_unknown_options
from .checks.objective import check_min_advantage, check_normalizer, check_prune_threshold
from .checks.options import check_options
from .checks.paper import paper_setting
from .checks.precision import bf16_explained
from .checks.tree_shape import check_trees_fit, derive_tree, one_completion_allowed


if TYPE_CHECKING:
    Branching = int | Sequence[int]
    Sharing = bool | str
else:  # what the command line parses
    Branching = list[int]
    Sharing = str
AS_FLAG = {"true": True, "1": True, "false": False, "0": False}


@explains_unknown_options
@dataclass
class TreeRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`TreeRPOTrainer`].

    It has every parameter of [`~trl.GRPOConfig`]; only the ones below are new or differ.

    Parameters:
        branching_factor (`int` or `list[int]`, *optional*, defaults to `2`):
            Number of children of each unfinished node: one number for every depth, or one per depth (N_1 .. N_D).
            `1` needs `advantage_estimator="optimal_baseline"`: the other estimators compare nodes of one tree.
        max_depth (`int`, *optional*):
            Depth D of the tree. Defaults to the length of `branching_factor` if that has several numbers, else to `2`.
        segment_length (`int`, *optional*):
            Maximum number of tokens of a segment; the tree branches there (the paper's L_step). Defaults to
            `max_completion_length` divided by `max_depth`, rounded up, if that is given, else to `128`.
        split_rule (`str`, *optional*):
            Where a tree branches. Defaults to `"turn"` if there are tools and no `segment_length`, else to `"length"`.

            - `"length"`: each segment has `segment_length` tokens, as in the paper. With tools, a turn ends one too.
            - `"turn"`: with tools, a segment is a turn of the model and what tools answered. A segment at depth D goes
              on with more turns until one calls no tool.
            - `"delimiter"`: a segment ends after one of `step_delimiters`, or after `segment_length` tokens. Segments
              at depth D run to the end of the completion.
            - `"uncertainty"`: first, `num_trunks` whole responses are drawn. Then, in each of `fork_rounds` rounds,
              each of them forks at its `forks_per_trunk` least certain tokens into `continuations_per_fork` new
              continuations to the end, beside the one it has (EPTree of TreeRL). `branching_factor`, `max_depth` and
              `segment_length` are not used. This rule and `"delimiter"` do not work with tools.
        step_delimiters (`list[str]`, *optional*, defaults to a blank line, `["\n\n"]`):
            With `split_rule="delimiter"`: texts that end a segment. A text must lie wholly within the segment.
        min_segment_length (`int`, *optional*, defaults to `1`):
            With `"delimiter"`, the minimum number of tokens of a segment that a delimiter ends. With `"uncertainty"`,
            the minimum number of tokens that a fork leaves on either side of it in the segment it cuts.
        num_trunks (`int`, *optional*, defaults to `1`):
            With `split_rule="uncertainty"`: M, the number of whole responses per prompt. A single one has no siblings,
            so it needs `advantage_estimator="optimal_baseline"`.
        forks_per_trunk (`int`, *optional*, defaults to `1`):
            K, the number of forks per round of each trunk with all that has grown from it. It may find fewer places.
        continuations_per_fork (`int`, *optional*, defaults to `1`):
            T, the number of new continuations of each fork.
        fork_rounds (`int`, *optional*, defaults to `1`):
            L, the number of rounds of forks.
        uncertainty_measure (`str`, *optional*, defaults to `"surprisal"`):
            How to measure that the policy was uncertain of a token: `"surprisal"`, -log p of the token that was drawn,
            or `"entropy"` of the distribution, which vLLM does not report.
        advantage_estimator (`str`, *optional*, defaults to `"optimal_baseline"`):
            How the value V of a node becomes its advantage. Against its siblings, whose values have the mean mu:

            - `"treerpo"`: (V - mu) / (mu (1 - mu)), the paper's eq. 4. Needs rewards in [0, 1].
            - `"bernoulli_std"`: (V - mu) / sqrt(mu (1 - mu)). Needs rewards in [0, 1].
            - `"group_std"`: (V - mu) / (std + 1e-4), as GRPO. For rewards on any scale.
            - `"centered"`: V - mu, as Dr. GRPO. Leaves the scale of the rewards as it is.
            - `"leave_one_out"`: V - mean of the other siblings, as RLOO: `"centered"` without its bias.

            Against its tree, with n leaves below the node:

            - `"parent"`: V - V(parent), as SPO-tree.
            - `"tree_mean"`: V - mean reward of the leaves that are not below the node. Unbiased.
            - `"treerl"`: sqrt(n) (2 V - V(root) - V(parent)), as TreeRL.
            - `"treepo"`: n times the mean over the node's ancestors of V - V(ancestor), as TreePO, divided by the root
              mean square over the tokens of the batch.
            - `"tree_grpo"`: the sum over the leaves below of their rewards, normalized as in GRPO, once within the
              branch of the root's child and once within the tree, as Tree-GRPO, divided likewise.

            Against the other trees of the batch:

            - `"optimal_baseline"`: sqrt(n) (V - b), divided likewise. n is the number of rows of the batch that pass
              through the node. b is the baseline that leaves the least noise in the gradient, fitted by depth to the
              other trees. For small trees, or single paths (`branching_factor=1`), and many prompts per batch.
        prune_threshold (`float` or `None`, *optional*, defaults to `0.1`):
            tau: a group is trained if and only if max - min of its values exceeds it. It is in units of the reward
            (the weighted sum of the reward functions). If rewards do not go from 0 to 1, take about a tenth of the
            difference between good and bad ones. `None`, or a negative number, keeps every group. A threshold that no
            group can exceed, such as 1 for rewards in [0, 1], is an error. It has no effect with estimators that
            compare a node with more than its siblings: they prune nothing.
        min_advantage (`float`, *optional*, defaults to `0.0`):
            Tokens of nodes with a smaller advantage, in absolute value, are left out of the training forward and the
            loss, which is still divided by the number of all tokens. This saves time where most advantages are small,
            as with `"optimal_baseline"` (whose advantages have the root mean square 1) if few answers are right. It
            biases the gradient. Tokens that are left out have no KL or entropy term either.
        loss_weighting (`str`, *optional*, defaults to `"token"`):
            `"token"`: the loss is a mean over all kept tokens (the authors' code). `"node"`: a mean over kept nodes of
            the mean over a node's tokens (eq. 5 as printed).
        max_frontier_rows (`int`, *optional*, defaults to `256`):
            Maximum number of branches decoded at a time, and of branches of each depth whose caches wait until they go
            on. It bounds the memory of sampling. It has no effect with vLLM, which schedules by itself.
        prefix_sharing (`bool` or `"auto"`, *optional*, defaults to `"auto"`):
            Whether the training forward computes each distinct token of a micro-batch once, instead of row by row. The
            log-probabilities and gradients are those of dense rows. `"auto"` shares if the model can, and else warns
            with the reason. `True` makes that an error. `False` computes dense rows.
        overlap_rewards (`bool`, *optional*, defaults to `False`):
            Whether to call reward functions on the trees that have ended, in a thread, while others grow. It hides the
            time of functions that wait, such as for a judge. A function then sees the rows of some trees at a time,
            not of the whole batch. Reward models and async functions are called as before. Not with tools.
        num_generations (`int`, *optional*):
            Number of rows of a prompt: the leaves of the complete tree, N_1 x .. x N_D, or M (1 + K T L) with
            `split_rule="uncertainty"`. Derived; a given number is checked. It may be 1 if every branching factor is.
        max_completion_length (`int`, *optional*):
            Maximum number of tokens of a completion. Defaults to `max_depth * segment_length`. It may be smaller by
            less than a segment, which makes the last segment shorter. With other split rules than `"length"` it may
            be anything, and with `"uncertainty"` it defaults to `384`.
        loss_type (`str`, *optional*, defaults to `"dapo"`):
            As in TRL: `"dapo"`, `"cispo"`, `"dr_grpo"`; or `"bnpo"`, which normalizes by micro-batch, if
            `per_device_train_batch_size` is a multiple of `num_generations`, so that no tree is split.
        entropy_coef (`float`, *optional*, defaults to `0.0`):
            As in TRL, but the bonus is a mean over the trained tokens of the whole batch, not of each micro-batch.
        replay_environments (`bool`, *optional*, defaults to `False`):
            With an `environment_factory`: copy an environment that has no `fork()` by a fresh `reset` and the same
            calls, instead of `copy.deepcopy`. For environments that always give the same answers to the same calls.
        compact_log (`bool`, *optional*, defaults to `True`):
            Whether the terminal shows one line of the main metrics per log (loss, reward, kept groups, length, tokens,
            seconds). `False` shows all metrics. Trackers and `trainer.state.log_history` have all of them either way.
        log_trees (`bool`, *optional*, defaults to `False`):
            Whether to write the trees to `<output_dir>/trees`, as parquet files and as pages for a browser, and to
            print some in the terminal.
        log_trees_steps (`int`, *optional*):
            Number of optimizer steps between two writes. Defaults to `logging_steps`.
        num_trees_to_print (`int`, *optional*, defaults to `1`):
            Number of trees to print: those with the most trained nodes.
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_mask"`):
            As in TRL, but by token only: `"token_mask"` or `"token_truncate"`. A row holds only the tokens of the tree
            that it owns, so the ratio of its whole sequence says nothing about them.
    """

    branching_factor: Branching = field(
        default_factory=lambda: [2],
        metadata={
            "help": "Number of children of each unfinished node: one number for every depth, or one per depth. 1 "
            "needs advantage_estimator 'optimal_baseline'.",
            "nargs": "+",
        },
    )
    max_depth: int | None = field(
        default=None,
        metadata={"help": "Depth of the tree. Defaults to the length of `branching_factor` if above 1, else to 2."},
    )
    segment_length: int | None = field(
        default=None,
        metadata={"help": "Maximum tokens of a segment. Defaults to `max_completion_length / max_depth`, or 128."},
    )
    split_rule: str | None = field(
        default=None,
        metadata={
            "help": "Where a tree branches: 'length' (after `segment_length` tokens, the default), 'turn' (after a "
            "turn, the default with tools), 'delimiter' (after one of `step_delimiters`) or 'uncertainty' (whole "
            "responses fork at their least certain tokens)."
        },
    )
    step_delimiters: list[str] = field(
        default_factory=lambda: ["\n\n"],
        metadata={"help": "Texts that end a segment, with split_rule 'delimiter'. Defaults to a blank line."},
    )
    min_segment_length: int = field(
        default=1,
        metadata={"help": "Minimum tokens of a segment that a delimiter ends, or that a fork leaves on either side."},
    )
    num_trunks: int = field(default=1, metadata={"help": "Whole responses per prompt (split_rule 'uncertainty')."})
    forks_per_trunk: int = field(
        default=1, metadata={"help": "Forks per round of each whole response (split_rule 'uncertainty')."}
    )
    continuations_per_fork: int = field(
        default=1, metadata={"help": "New continuations of each fork (split_rule 'uncertainty')."}
    )
    fork_rounds: int = field(default=1, metadata={"help": "Rounds of forks (split_rule 'uncertainty')."})
    uncertainty_measure: str = field(
        default="surprisal",
        metadata={"help": "Which tokens count as uncertain: by 'surprisal' (-log p of the token) or by 'entropy'."},
    )
    advantage_estimator: str = field(
        default="optimal_baseline",
        metadata={
            "help": "What a step's value is compared with. Its siblings: 'treerpo' (the paper), 'bernoulli_std', "
            "'group_std' (GRPO), 'centered' (Dr. GRPO) or 'leave_one_out' (RLOO). Its tree: 'parent' (SPO-tree), "
            "'tree_mean', 'treerl', 'treepo' or 'tree_grpo'. The other trees of the batch: 'optimal_baseline'."
        },
    )
    prune_threshold: float | None = field(
        default=0.1,
        metadata={"help": "Train a group of siblings if max - min of its values exceeds this; if negative, always."},
    )
    min_advantage: float = field(
        default=0.0,
        metadata={"help": "Do not train tokens of nodes whose advantage is smaller than this, in absolute value."},
    )
    loss_weighting: str = field(
        default="token",
        metadata={"help": "The loss is a mean over all kept tokens ('token'), or over nodes of their mean ('node')."},
    )
    max_frontier_rows: int = field(
        default=256,
        metadata={"help": "Maximum branches decoded at a time. It bounds the memory of sampling, except with vLLM."},
    )
    prefix_sharing: Sharing = field(
        default="auto",
        metadata={"help": "Compute distinct tokens once: 'auto' (if the model can), 'true' (else fail) or 'false'."},
    )
    overlap_rewards: bool = field(
        default=False,
        metadata={"help": "Call reward functions in a thread, with some trees at a time, while others are sampled."},
    )
    num_generations: int | None = field(
        default=None,
        metadata={"help": "Number of leaves of a tree, which is derived. If you give a number, it is checked."},
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of a completion. Defaults to `max_depth * segment_length`."}
    )
    replay_environments: bool = field(
        default=False,
        metadata={"help": "Copy an environment by a fresh reset and the same calls, instead of copy.deepcopy."},
    )
    compact_log: bool = field(
        default=True, metadata={"help": "Show one line of the main metrics per log in the terminal, not all."}
    )
    log_trees: bool = field(
        default=False,
        metadata={"help": "Whether to write the trees to `<output_dir>/trees`, and to print some in the terminal."},
    )
    log_trees_steps: int | None = field(
        default=None, metadata={"help": "Write trees every so many optimizer steps. Defaults to `logging_steps`."}
    )
    num_trees_to_print: int = field(
        default=1, metadata={"help": "Number of trees to print: those with the most trained nodes."}
    )
    vllm_importance_sampling_mode: str = field(
        default="token_mask",
        metadata={
            "help": "What happens to importance sampling ratios between vLLM and the model that are out of bounds: "
            "they count as 0 ('token_mask') or are clipped ('token_truncate')."
        },
    )

    def __post_init__(self) -> None:
        check_options(self)
        self._leaves_split_rule_open = self.split_rule is None and self.segment_length is None
        derive_tree(self)
        self.prefix_sharing = AS_FLAG.get(str(self.prefix_sharing).lower(), self.prefix_sharing)
        refuse_unsupported(self)
        check_normalizer(self)
        check_prune_threshold(self)
        check_min_advantage(self)
        if self.generation_batch_size is None:
            check_trees_fit(self, self.steps_per_generation or self.gradient_accumulation_steps)
        with bf16_explained(self), one_completion_allowed(self):
            # Resolves steps_per_generation, and parses generation_kwargs from the command line.
            super().__post_init__()
        check_trees_fit(self, self.steps_per_generation)
        check_generation_kwargs(self)
        refuse_oversized_engine(self)

    @classmethod
    def paper(
        cls, output_dir: str, num_processes: int = 8, per_device_train_batch_size: int = 64, **overrides: Any
    ) -> TreeRPOConfig:
        """The setting of the paper (arXiv:2506.05183, section 4): 8 x 8 x 8 trees of 384-token segments.

        There are 300 steps. Each grows trees for 128 prompts (65,536 rows) over all processes and makes two updates,
        which is what `max_steps` counts. What the paper leaves open follows the authors' scripts.

        Args:
            output_dir: Where to write the model and its checkpoints.
            num_processes: Number of processes that will train; the rows are divided among them.
            per_device_train_batch_size: Rows of a micro-batch.
            overrides: Any other parameter, instead of the paper's. `num_train_epochs` replaces its `max_steps`.

        Raises:
            ValueError: 128 trees of 512 rows do not divide into two updates of whole micro-batches.
        """
        return cls(output_dir, **paper_setting(num_processes, per_device_train_batch_size, overrides))
