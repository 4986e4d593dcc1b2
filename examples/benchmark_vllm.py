# /// script
# dependencies = [
#     "treerpo-trl[vllm]",
# ]
# ///
"""Benchmark: trees against as many flat samples of the same length, on one colocated vLLM engine.

    python examples/benchmark_vllm.py --shape 4x4x4

Without `--model` the model is a small random one, which runs on a CPU too. Trees and flat samples take turns, on
prompts that the engine has not seen. The last line printed is JSON.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time

import torch
from accelerate import Accelerator
from benchmark_speed import EOS_TOKEN_ID, VOCABULARY_SIZE, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation.vllm_generation import VLLMGeneration

from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.growth.backends import VLLMBackend


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a model of the Hub or a local folder; a random Qwen2 by default")
    parser.add_argument("--shape", default="4x4x4", help="branching factors, by depth")
    parser.add_argument("--segment_length", type=int, default=128, help="tokens of a segment")
    parser.add_argument("--prompt_length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--num_prompts", type=int, default=1, help="prompts per batch")
    parser.add_argument("--repeats", type=int, default=7, help="repeats of each measurement, taking turns")
    parser.add_argument("--hidden_size", type=int, default=256, help="width of the random Qwen2")
    parser.add_argument("--num_layers", type=int, default=6, help="layers of the random Qwen2")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.3, help="share of memory for the engine")
    return parser.parse_args()


def main() -> None:
    """Time both in turns, and count what came from the prefix cache."""
    args = parse_arguments()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    branching = tuple(int(number) for number in args.shape.split("x"))
    leaves, length = math.prod(branching), len(branching) * args.segment_length
    shape = TreeShape(branching, args.segment_length, length)
    folder = tempfile.mkdtemp()
    if args.model is None:
        args.model = folder
        make_model(args).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    generation = VLLMGeneration(
        AutoModelForCausalLM.from_pretrained(args.model),
        Accelerator(cpu=not torch.cuda.is_available()),
        AutoTokenizer.from_pretrained(args.model),
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_model_length=args.prompt_length + length,
        max_num_seqs=leaves * args.num_prompts,
        max_completion_length=length,
        generation_kwargs={"ignore_eos": True},  # every completion has its full length
    )
    waves: list[list[tuple[int, int]]] = []
    generate = generation.llm.generate

    def counted(*arguments, **options):
        outputs = generate(*arguments, **options)
        waves.append([(len(output.prompt_token_ids), output.num_cached_tokens) for output in outputs])
        return outputs

    generation.llm.generate = counted
    seconds: dict[str, list[float]] = {"tree": [], "flat": []}
    cached: list[list[float]] = [[] for _ in branching]
    for turn in range(-1, args.repeats):  # the first turn warms up
        for kind in ("tree", "flat"):
            prompts = torch.randint(2, VOCABULARY_SIZE, (args.num_prompts, args.prompt_length)).tolist()
            waves.clear()
            start = time.perf_counter()
            if kind == "tree":
                grow(prompts, shape, VLLMBackend(generation, [EOS_TOKEN_ID]))
            else:
                rows = [prompt for prompt in prompts for _ in range(leaves)]
                generation.generate(prompts=rows, images=None, num_generations=1)
            if turn >= 0:
                seconds[kind].append(time.perf_counter() - start)
                for depth, wave in enumerate(waves if kind == "tree" else []):
                    cached[depth].append(sum(hits for _, hits in wave) / sum(tokens for tokens, _ in wave))
    ratios = sorted(tree / flat for tree, flat in zip(seconds["tree"], seconds["flat"], strict=True))
    result = {
        "leaves": leaves,
        "tree_seconds": round(statistics.median(seconds["tree"]), 3),
        "flat_seconds": round(statistics.median(seconds["flat"]), 3),
        "tree_over_flat": [round(ratio, 2) for ratio in (statistics.median(ratios), ratios[0], ratios[-1])],
        "cached_share_by_wave": [round(statistics.median(shares), 3) for shares in cached],
        "sampled_tokens_tree_over_flat": round(
            sum(math.prod(branching[: depth + 1]) for depth in range(len(branching))) / (leaves * len(branching)), 3
        ),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
