# /// script
# dependencies = [
#     "treerpo-trl",
# ]
# ///
"""Benchmark: steps whose rewards are computed while trees are sampled (`overlap_rewards`), against those in turn.

    python examples/benchmark_rewards.py --num_prompts 8 --max_frontier_rows 16 --shares 0 0.5 1

The reward function waits, as for a judge, or computes in Python, for a share of the time that sampling takes. With the
steps that overlap stand those in turn, in as many blocks, and those that sample all in one block, which are in turn in
any case. Steps are timed interleaved in one process, on random models, on CUDA if there is one. The last line printed
is JSON.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from typing import Any

from benchmark_speed import EOS_TOKEN_ID, make_batch, make_model, make_tokenizer, now, parity_reward
from datasets import Dataset

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


class SlowReward:
    """Takes so many seconds a completion: it sleeps, or is busy."""

    __name__ = "slow_reward"

    def __init__(self) -> None:
        self.seconds, self.is_busy = 0.0, False

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        seconds = self.seconds * len(completion_ids)
        if self.is_busy:
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                sum(number * number for number in range(100))
        elif seconds:
            time.sleep(seconds)
        return parity_reward(completion_ids)


def make_trainer(
    args: argparse.Namespace, reward: SlowReward, folder: str, overlap: bool, max_frontier_rows: int
) -> TreeRPOTrainer:
    """Ready for its steps, in which no completion ends early."""
    branching = [int(factor) for factor in args.shape.split("x")]
    config = TreeRPOConfig(
        folder,
        branching_factor=branching,
        max_depth=len(branching),
        segment_length=args.segment_length,
        per_device_train_batch_size=math.prod(branching) * args.num_prompts,
        max_frontier_rows=max_frontier_rows,
        overlap_rewards=overlap,
        generation_kwargs={"suppress_tokens": [EOS_TOKEN_ID]},
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    prompts = [" ".join(str(2 + (7 * i + j) % 500) for j in range(args.prompt_length)) for i in range(64)]
    dataset = Dataset.from_dict({"prompt": prompts})
    model = make_model(args)
    trainer = TreeRPOTrainer(model, reward, config, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def time_step(trainer: TreeRPOTrainer, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a step, and of its sampling."""
    start = now()
    trainer.training_step(trainer.model, make_batch(trainer, args), num_items_in_batch=None)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    total = now() - start
    return total, trainer._metrics["train"]["tree/seconds/sampling"][-1]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="2x2x2", help="branching factors, by depth")
    parser.add_argument("--segment_length", type=int, default=24, help="tokens of a segment")
    parser.add_argument("--prompt_length", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--num_prompts", type=int, default=8, help="prompts per batch")
    parser.add_argument("--max_frontier_rows", type=int, default=16, help="branches that are decoded at a time")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="time of rewards / sampling")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats of each measurement")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the random Qwen2")
    parser.add_argument("--num_layers", type=int, default=4, help="layers of the random Qwen2")
    return parser.parse_args()


def main() -> None:
    """A line for each kind of reward and share."""
    args, reward, found = parse_arguments(), SlowReward(), []
    with tempfile.TemporaryDirectory() as folder:
        num_rows = args.num_prompts * math.prod(map(int, args.shape.split("x")))
        trainers = {
            "overlapped": make_trainer(args, reward, folder, True, args.max_frontier_rows),
            "in_turn": make_trainer(args, reward, folder, False, args.max_frontier_rows),
            "one_block": make_trainer(args, reward, folder, False, num_rows),
        }
        sampling = {way: min(time_step(trainer, args)[1] for _ in range(3)) for way, trainer in trainers.items()}
        for kind in ("waits", "computes"):
            for share in args.shares:
                reward.seconds, reward.is_busy = share * sampling["in_turn"] / num_rows, kind == "computes"
                steps: dict[str, list[float]] = {way: [] for way in trainers}
                for repeat in range(args.repeats):
                    for way in list(trainers)[:: 1 if repeat % 2 else -1]:
                        steps[way].append(time_step(trainers[way], args)[0])
                result: dict[str, Any] = {"kind": kind, "share": share, "sampling": sampling}
                print(f"{kind} for {share:g} of sampling ({sampling['in_turn']:.2f} s): overlapped by", end="")
                for way in ("in_turn", "one_block"):
                    ratios = sorted(one / other for one, other in zip(steps["overlapped"], steps[way], strict=True))
                    result[way] = {"ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}
                    print(f" {way} {statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})", end="")
                found.append({**result, "seconds": {way: statistics.median(each) for way, each in steps.items()}})
                print(flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
