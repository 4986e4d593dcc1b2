"""One run of a comparison: a method, a learning rate and a seed, trained to a budget and measured on the way."""

import json
import math
import shutil
import time
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from compare_plan import Run, expected_tokens, is_complete, read_records
from compare_workload import Workload
from large_vocabulary import speed_up_head
from peft import LoraConfig
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.evaluation import EvaluationResult, evaluate
from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.growth.backends import TransformersBackend


CALIBRATION_PROMPTS = 256
MOST_STEPS = 10_000  # of a run whose budget is time


class Recorder(TrainerCallback):
    """Counts what training spends, measures the model on the way, and ends training when the budget is spent.

    With every measurement goes a checkpoint, so that a run that was killed goes on from its last one.
    """

    def __init__(self, run: Run, path: Path, rows_per_step: int, trees_per_step: int):
        self.run, self.path = run, path
        self.rows_per_step, self.trees_per_step = rows_per_step, trees_per_step
        self.tokens, self.leaves, self.prompts, self.seconds, self.cpu_seconds = 0.0, 0, 0, 0.0, 0.0
        self.next_evaluation = 1
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.trainer: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clocks."""
        self._clock = time.perf_counter(), time.process_time()

    def on_log(self, args, state, control, logs, **kwargs):
        """Add up what the step took, and note its metrics."""
        if "reward" not in logs:  # the summary at the end of training
            return
        wall, cpu = self._clock
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        if "tree/sampled_tokens" in logs:
            self.tokens += logs["tree/sampled_tokens"] * self.trees_per_step
        else:
            self.tokens += logs["completions/mean_length"] * self.rows_per_step
        self.leaves += self.rows_per_step
        self.prompts += self.trees_per_step
        for name, value in logs.items():
            if is_kept(name) and value is not None and not math.isnan(value):  # undefined without trained nodes
                self.metrics[name].append(value)
        if self.is_spent(state.global_step):
            self.measure(state.global_step, is_final=True)
            control.should_training_stop = True
        elif self.progress() >= self.next_evaluation / self.run.num_evaluations:
            self.measure(state.global_step)
            self.next_evaluation += 1
            control.should_save = True

    def progress(self) -> float:
        """Share of the budget that is spent."""
        return getattr(self, self.run.budget.kind) / self.run.budget.total

    def is_spent(self, step: int) -> bool:
        """Whether another step would end further from the budget than this one."""
        return self.progress() * (1 + 0.5 / step) >= 1

    def resume(self, records: list[dict[str, Any]]) -> None:
        """Go on after these measurements."""
        last = records[-1]
        self.tokens, self.leaves, self.prompts = last["tokens"], last["leaves"], last["prompts"]
        self.seconds, self.cpu_seconds = last["seconds"], last["cpu_seconds"]
        self.next_evaluation = len(records)  # the first was before training

    def measure(self, step: int, is_final: bool = False) -> None:
        """Evaluate the model and write a line."""
        run, workload = self.run, self.run.workload
        problems = workload.held_out(run.split)
        if not is_final:
            problems = problems.select(range(min(run.curve_problems, len(problems))))
        result: EvaluationResult = evaluate(
            self.trainer.accelerator.unwrap_model(self.trainer.model),
            self.trainer.processing_class,
            problems,
            workload.reward_funcs(),
            num_samples=run.final_samples if is_final else 1,
            temperature=self.trainer.args.temperature,
            max_new_tokens=workload.max_completion_length,
            batch_size=workload.eval_batch_size,
            seed=1000 + run.seed,
            progress_bar=False,
        )
        record = {
            "step": step,
            "tokens": round(self.tokens),
            "leaves": self.leaves,
            "prompts": self.prompts,
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "pass_at_1": round(result.pass_at_1, 5),
            "mean_length": round(result.mean_length, 3),
            "mean_length_correct": round(result.mean_length_correct, 3),
            "truncated": round(result.truncated, 5),
            "metrics": {name: float(f"{fmean(values):.5g}") for name, values in self.metrics.items()},
        }
        if is_final:
            record |= {
                "final": True,
                "num_samples": run.final_samples,
                "pass_at_k": round(result.pass_at_k, 5),
                "problem_scores": [None if score is None else round(score, 4) for score in result.problem_scores],
            }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.metrics.clear()


def is_kept(name: str) -> bool:
    """Whether a logged metric helps to explain the outcome."""
    return name.startswith("tree/") or name in ("reward", "entropy", "grad_norm", "frac_reward_zero_std")


def response_lengths(workload: Workload, model: Any, tokenizer: Any) -> list[int]:
    """Lengths of the base model's responses to training prompts, for the calibration of a step."""
    lengths: list[int] = []

    def measure_length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [0.0] * len(completion_ids)

    prompts = workload.train(CALIBRATION_PROMPTS, seed=0)
    evaluate(
        model,
        tokenizer,
        prompts,
        measure_length,
        temperature=workload.temperature,
        max_new_tokens=workload.max_completion_length,
        batch_size=workload.eval_batch_size,
        progress_bar=False,
    )
    return lengths


def measure_tree_tokens(run: Run, model: Any, tokenizer: Any) -> float:
    """Sampled tokens of a tree of the base model, on average: what a prompt costs."""
    workload, shape = run.workload, run.method.shape(run.workload.max_completion_length)
    if isinstance(shape, TreeShape) and shape.delimiters is None:
        return expected_tokens(shape, response_lengths(workload, model, tokenizer))
    prompts = [as_ids(prompt, tokenizer) for prompt in workload.train(CALIBRATION_PROMPTS, seed=0)["prompt"]]
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    backend = TransformersBackend(
        model.eval(),
        GenerationConfig(
            do_sample=True,
            temperature=workload.temperature,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_token_id,
        ),
        [tokenizer.eos_token_id],
        pad_token_id,
        max_rows=workload.eval_batch_size,
        tokenizer=tokenizer,
        statistics=run.method.statistics,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        return fmean(tree.num_sampled_tokens for tree in grow(prompts, shape, backend))


def as_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, plain text or messages."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def length_cost_reward(cost: float, max_completion_length: int) -> Any:
    """A TRL reward function: minus `cost` for a response of the greatest length, in proportion for shorter ones."""

    def length_cost(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-cost * len(ids) / max_completion_length for ids in completion_ids]

    return length_cost


def make_trainer(run: Run, tokens_per_tree: float, output_dir: Path, max_steps: int, **kwargs: Any) -> GRPOTrainer:
    """The trainer of the method, with a step's prompts set by the budget."""
    workload, method = run.workload, run.method
    shape = method.shape(workload.max_completion_length)
    prompts_per_step = run.budget.prompts_per_step(shape, tokens_per_tree)
    micro_batches = -(-prompts_per_step * shape.num_leaves // workload.max_rows_per_micro_batch)
    prompts_per_micro_batch = max(1, round(prompts_per_step / micro_batches))
    options = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": prompts_per_micro_batch * shape.num_leaves,
        "gradient_accumulation_steps": max(1, round(prompts_per_step / prompts_per_micro_batch)),
        "max_completion_length": workload.max_completion_length,
        "max_steps": max_steps,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant",
        "temperature": workload.temperature,
        "bf16": workload.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),  # what transformers wants to be told, for bf16
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",  # the recorder asks for checkpoints
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": run.seed,
        **run.options,
        **method.options,
    }
    if method.branching:
        # A single number would hold for every depth.
        options |= {"branching_factor": list(method.branching), "max_depth": shape.max_depth}
    if method.grows_trees:
        args: Any = TreeRPOConfig(**options)
        trainer_class: Any = TreeRPOTrainer
    else:
        args = GRPOConfig(num_generations=method.num_generations, **options)
        trainer_class = GRPOTrainer
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    reward_funcs = workload.reward_funcs()
    if workload.lora_rank:
        rank = workload.lora_rank
        kwargs["peft_config"] = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    if method.length_cost:
        reward_funcs.append(length_cost_reward(method.length_cost, workload.max_completion_length))
    trainer = trainer_class(
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=workload.train(max_steps * rows_per_step // shape.num_leaves, seed=run.seed),
        **kwargs,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; newer ones that were cut short are removed.

    The trainer writes `trainer_state.json` last.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return checkpoint
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return None


def execute(run: Run, folder: Path) -> Path:
    """Train to the budget; returns the file of the run.

    A run that is complete in `folder` is not repeated, and one that was cut short goes on from its last checkpoint.
    """
    path, scratch = folder / f"{run.name}.jsonl", folder / "checkpoints" / run.name
    if is_complete(path):
        return path
    model, tokenizer = run.workload.load()
    model.to(PartialState().device)
    speed_up_head(model)
    tokens_per_tree = measure_tree_tokens(run, model, tokenizer)
    # Twice the steps that the budget takes, in case responses become shorter; the recorder ends training.
    steps = MOST_STEPS if run.budget.kind == "seconds" else round(2 * run.budget.total / run.budget.per_step)
    trainer = make_trainer(run, tokens_per_tree, scratch, steps, model=model, processing_class=tokenizer)
    rows = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    recorder = Recorder(run, path, rows, rows // run.method.shape(run.workload.max_completion_length).num_leaves)
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    checkpoint = last_checkpoint(scratch)
    if checkpoint is None:
        versions = {name: version(name) for name in ("torch", "transformers", "trl", "treerpo-trl")}
        header = {"run": asdict(run), "rows_per_step": rows, "threads": torch.get_num_threads(), "versions": versions}
        path.write_text(json.dumps(header, default=str) + "\n")
        recorder.measure(step=0)
    else:
        step = step_of(checkpoint)
        header, *records = read_records(path)
        records = [record for record in records if record["step"] <= step]
        path.write_text("".join(json.dumps(record) + "\n" for record in (header, *records)))
        recorder.resume(records)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    release_memory(model, trainer)  # the process goes on with other runs
    if not is_complete(path):
        raise RuntimeError(
            f"{run.name} has spent only {recorder.progress():.0%} of its budget of {run.budget.total:g} "
            f"{run.budget.kind} in {steps} steps: responses are less than half as long as the base model's; raise "
            "per_step or lower the total"
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return path
