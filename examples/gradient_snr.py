# /// script
# dependencies = [
#     "treerpo-trl[compare]",
# ]
# ///
"""Signal-to-noise ratio of the gradient, TreeRPO against GRPO, at as many sampled tokens a step on a fixed policy.

    python examples/gradient_snr.py --task chain_arithmetic --num_batches 48

The policy is the base model and stays it (the learning rate is 0). Every batch has prompts and samples of its own; its
gradient is what the optimizer would get, without clipping. Signal is the norm of the mean gradient, noise the root of
the summed variance of its entries over batches. The last line printed is JSON.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from compare_grpo import parse_options
from compare_plan import Budget, Method, Run
from compare_run import make_trainer, measure_tree_tokens
from compare_workload import Workload, built_in
from tasks import TASKS
from transformers import TrainerCallback


class GradientRecorder(TrainerCallback):
    """Keeps the gradient of every step, before it is used, and its mean reward."""

    def __init__(self):
        self.gradients: list[torch.Tensor] = []
        self.rewards: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Keep the gradient of the whole batch."""
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        self.gradients.append(torch.cat(grads).float().cpu())

    def on_log(self, args, state, control, logs, **kwargs):
        """Keep the batch's mean reward."""
        if "reward" in logs:
            self.rewards.append(logs["reward"])


def sample_gradients(run: Run, num_batches: int) -> tuple[np.ndarray, float]:
    """[K, P] gradients of K independent batches at the base model, and its mean reward."""
    model, tokenizer = run.workload.load()
    tokens = measure_tree_tokens(run, model, tokenizer)
    recorder = GradientRecorder()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            run, tokens, Path(scratch), num_batches, model=model, processing_class=tokenizer, callbacks=[recorder]
        )
        trainer.train()
    return torch.stack(recorder.gradients).numpy(), fmean(recorder.rewards)


def snr(gram: np.ndarray) -> float:
    """Signal over noise from the inner products of gradients.

    The mean product of two different batches is the squared norm of the expected gradient, without bias; what the
    squared norm of a batch exceeds it by is the variance.

    Args:
        gram: [K, K] inner products of the gradients of K batches.
    """
    count = len(gram)
    signal = (gram.sum() - np.trace(gram)) / (count * (count - 1))
    noise = np.trace(gram) / count - signal
    return math.sqrt(max(signal, 0.0) / noise)


def log_snr_variance(gram: np.ndarray) -> float:
    """Jackknife variance of log SNR over batches."""
    count = len(gram)
    kept = [np.delete(np.delete(gram, index, 0), index, 1) for index in range(count)]
    logs = np.log([max(snr(part), 1e-12) for part in kept])
    return float((count - 1) / count * ((logs - logs.mean()) ** 2).sum())


def compare_snr(tree: np.ndarray, flat: np.ndarray) -> dict[str, Any]:
    """SNR of both, their ratio with a 95% interval, and the cosine between their expected gradients."""
    grams = tree @ tree.T, flat @ flat.T
    ratio = snr(grams[0]) / snr(grams[1])
    half = 1.96 * math.sqrt(sum(map(log_snr_variance, grams)))
    signals = [math.sqrt((gram.sum() - np.trace(gram)) / (len(gram) * (len(gram) - 1))) for gram in grams]
    return {
        "snr_treerpo": snr(grams[0]),
        "snr_grpo": snr(grams[1]),
        "snr_ratio": ratio,
        "snr_ratio_ci": [ratio * math.exp(-half), ratio * math.exp(half)],
        "cosine": float((tree @ flat.T).mean() / (signals[0] * signals[1])),
        "batches": len(tree),
    }


def measure_snr(
    workload: Workload, trees: Sequence[Method], flat: Method, per_step: float, num_batches: int
) -> list[dict[str, Any]]:
    """Each tree against GRPO on the base model of the workload."""
    options = {"max_grad_norm": 0.0}  # no clipping
    template = Run(workload, flat, Budget("tokens", 0, per_step), 0.0, seed=7, split="validation", options=options)
    flat_gradients, pass_at_1 = sample_gradients(template, num_batches)
    results = []
    for tree in trees:
        tree_gradients, _ = sample_gradients(replace(template, method=tree), num_batches)
        numbers = compare_snr(tree_gradients, flat_gradients)
        results.append({"treerpo": tree.name, "grpo": flat.name, "pass_at_1": pass_at_1, **numbers})
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=list(TASKS), default="chain_arithmetic", help="a built-in task")
    parser.add_argument(
        "--models_dir", type=Path, default=Path("compare-output/base_models"), help="where base models are kept"
    )
    parser.add_argument("--branching_factor", type=int, nargs="+", default=[2, 2], help="TreeRPO: branching by depth")
    parser.add_argument("--advantage_estimator", default="optimal_baseline", help="TreeRPO: the estimator")
    parser.add_argument(
        "--treerpo_options", nargs="*", default=[], help="name=value options for TreeRPOConfig, such as split_rule"
    )
    parser.add_argument("--num_generations", type=int, default=8, help="GRPO: completions per prompt")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature; fewer answers are right at higher ones"
    )
    parser.add_argument("--per_step", type=float, default=4000, help="sampled tokens per batch")
    parser.add_argument("--num_batches", type=int, default=48, help="batches per method; all stay in memory")
    args = parser.parse_args()
    workload = built_in(args.task, args.models_dir, temperature=args.temperature)
    options = {"advantage_estimator": args.advantage_estimator, **parse_options(args.treerpo_options)}
    branching = () if options.get("split_rule") == "uncertainty" else tuple(args.branching_factor)
    shape = "x".join(map(str, branching)) or "forks"
    tree = Method(f"treerpo-{shape}-{args.advantage_estimator}", branching, options=options)
    flat = Method(f"grpo-{args.num_generations}", (), args.num_generations)
    print(json.dumps(measure_snr(workload, [tree], flat, args.per_step, args.num_batches)[0]))


if __name__ == "__main__":
    main()
