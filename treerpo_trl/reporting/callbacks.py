"""Callbacks for a TreeRPOTrainer: writing its trees down while it trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..views import build_index, print_tree, tree_records, write_page, write_trees
from ..views.files import step_path


logger = logging.getLogger(__name__)
FOLDER = "trees"


class TreeLoggingCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that writes a trainer's trees to `<output_dir>/trees`: all of them as
    `step_NNNNNN.parquet` (columns in [`~treerpo_trl.views.records.TREE_COLUMNS`]) and as pages, `step_NNNNNN.html` and
    so on, those with most trained nodes first; and `index.html` over the steps. It can print some as well.
    `TreeRPOConfig(log_trees=True)` adds it; to set what the config does not:

    ```python
    >>> trainer.add_callback(TreeLoggingCallback(trainer, steps=50, max_trees_per_page=4))
    ```

    A step's trees are those of the newest generation batch, of all processes. A disk that is full, or a folder that
    cannot be written to, costs these files and a warning; training goes on.

    Args:
        trainer ([`TreeRPOTrainer`]):
            Whose trees to write.
        steps (`int`, *optional*):
            Every how many optimizer steps, and at the last one. Defaults to the trainer's `logging_steps`.
        num_trees_to_print (`int`, *optional*, defaults to `0`):
            How many to print in the terminal: those with most nodes that are trained.
        max_trees_per_page (`int`, *optional*, defaults to `16`):
            Most trees on a page; the others are on further pages, `step_NNNNNN-2.html` and so on. A tree of 584 nodes
            and 384-token steps takes about a megabyte.
    """

    def __init__(
        self,
        trainer: Any,
        steps: int | None = None,
        num_trees_to_print: int = 0,
        max_trees_per_page: int = 16,
    ):
        if steps is not None and steps < 1:
            raise ValueError(f"steps is {steps}; trees are written every 1 or more steps")
        self.trainer = trainer
        self.steps = steps
        self.num_trees_to_print = num_trees_to_print
        self.max_trees_per_page = max_trees_per_page

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the trees, if it is their turn. Every process has to come here."""
        is_turn = state.global_step % (self.steps or state.logging_steps) == 0
        if not is_turn and state.global_step < state.max_steps:  # a short run has its last step's trees
            return
        trainer, trees = self.trainer, self.trainer.last_trees
        process = trainer.accelerator.process_index
        tokenizer = trainer.processing_class
        records = gather_object(
            tree_records(
                trees,
                tokenizer,
                state.global_step,
                shape=trainer.tree_shape,
                process=process,
                first_tree=process * len(trees),  # all processes have equally many
            )
        )
        if not state.is_world_process_zero or not records:  # a run that resumed may have no trees yet
            return
        folder = Path(str(args.output_dir)) / FOLDER
        try:
            write_trees(records, step_path(folder, state.global_step))
            page = step_path(folder, state.global_step, ".html")
            write_page(records, page, title=Path(str(args.output_dir)).name, max_trees=self.max_trees_per_page)
            build_index(folder)
        except OSError as error:
            logger.warning(f"The trees of step {state.global_step} could not be written to {folder}: {error}")
        by_num_kept = sorted(trees, key=lambda scored: -sum(scored.kept))
        for scored in by_num_kept[: self.num_trees_to_print]:
            print_tree(scored, tokenizer)
