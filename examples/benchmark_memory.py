# /// script
# dependencies = [
#     "treerpo-trl",
# ]
# ///
"""Benchmark: peak memory while trees grow, against the number that `max_frontier_rows` is said to bound.

    python examples/benchmark_memory.py --shape 8x8x8 --num_trees 4 --max_frontier_rows 64 256 4096

Every setting is measured in a process of its own, on a random model whose keys and values outweigh all else, on CUDA
if there is one. On a CPU, the peak is that of the process's resident memory above what it has before growth, which
Linux tells. The last line printed is JSON.
"""

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from benchmark_speed import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCABULARY_SIZE
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.growth.backends import TransformersBackend
from treerpo_trl.growth.memory import most_cached_tokens


NUM_LAYERS, HIDDEN_SIZE, HEAD_SIZE, NUM_HEADS = 8, 128, 64, 8
BYTES_PER_TOKEN = 2 * 4 * NUM_LAYERS * NUM_HEADS * HEAD_SIZE  # keys and values in float32


def make_model() -> Qwen2ForCausalLM:
    """Narrow layers with wide attention."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=8192,
        pad_token_id=PAD_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()


class PeakMemory:
    """The peak since it was made, in bytes, above what was in use then."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
            self.before = self._resident("VmRSS")

    def read(self) -> int:
        """Bytes."""
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._resident("VmHWM")
        return peak - self.before

    def _resident(self, name: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines[name].split()[0])


def measure(args: argparse.Namespace, max_rows: int) -> dict[str, Any]:
    """Grow the trees twice, first small ones."""
    model = make_model()
    branching = tuple(map(int, args.shape.split("x")))
    shape = TreeShape(branching, args.segment_length, len(branching) * args.segment_length)
    prompts = torch.randint(2, VOCABULARY_SIZE, (args.num_trees, args.prompt_length)).tolist()
    config = GenerationConfig(do_sample=True, suppress_tokens=[EOS_TOKEN_ID], pad_token_id=PAD_TOKEN_ID)
    with torch.no_grad():
        for growing in (TreeShape((2, 2), 2, 4), shape):
            backend = TransformersBackend(model, config, [EOS_TOKEN_ID], PAD_TOKEN_ID, max_rows, fork_caches=True)
            peak = PeakMemory()
            trees = grow(prompts, growing, backend)
    assert all(len(tree.leaves) == shape.num_leaves for tree in trees)
    bound = BYTES_PER_TOKEN * most_cached_tokens(shape, args.num_trees, args.prompt_length, max_rows)
    return {"max_frontier_rows": max_rows, "peak": peak.read(), "bound": bound}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="8x8x8", help="branching factors, by depth")
    parser.add_argument("--segment_length", type=int, default=32, help="tokens of a segment")
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--num_trees", type=int, default=4, help="trees that grow at once")
    parser.add_argument(
        "--max_frontier_rows",
        type=int,
        nargs="+",
        default=[64, 256, 4096],
        help="values of max_frontier_rows to measure",
    )
    return parser.parse_args()


def main() -> None:
    """A line a setting."""
    args = parse_arguments()
    found = []
    for max_rows in args.max_frontier_rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(measure, (args, max_rows))
        result["ratio"] = round(result["peak"] / result["bound"], 3)
        found.append(result)
        print(
            f"max_frontier_rows {max_rows}: peak {result['peak'] / 1e9:.2f} GB, bound {result['bound'] / 1e9:.2f} GB, "
            f"ratio {result['ratio']:.2f}",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
