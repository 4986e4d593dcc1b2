r"""What each of two processes runs in `test_vllm_server.py`: trees from one vLLM server, and a training step.

accelerate launch --config_file CONFIG examples/on_cpu.py \
    tests/processes/vllm_server_run.py MODEL_PATH OUTPUT_DIR URL PROMPTS

The URL is that of the server; the prompts are lists of token ids, as JSON.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # as pytest does

from datasets import Dataset
from tiny import EOS, VLLM_SHAPE, VLLM_TOKENS, make_tokenizer, spread_reward
from trl.generation.vllm_client import VLLMClient

from treerpo_trl import Tree, TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.growth import Delimiters, ForkShape, TreeShape, grow
from treerpo_trl.growth.backends import VLLMBackend


RANK = int(os.environ.get("RANK", "0"))
CONTEXT = 400
DELIMITED = replace(VLLM_SHAPE, delimiters=Delimiters(tuple("13579+"), 2))
# Greedy continuations at the forks of a response are what it has there.
FORKS = ForkShape(1, 3, 1, 2, min_segment_length=2, max_completion_length=VLLM_SHAPE.max_completion_length)


def to_json(tree: Tree) -> list:
    return [[node.parent, node.token_ids, node.ended, node.logprobs] for node in tree.nodes]


def main(model_path: str, output_dir: str, url: str, prompts: str) -> None:
    # The engine that pushes weights runs on CUDA only; all else is what a user has.
    VLLMClient.init_communicator = lambda self, device: None
    dataset = Dataset.from_dict({"prompt": [f"{i}+" * (i % 5 + 1) for i in range(10, 26)]})
    args = TreeRPOConfig(
        output_dir, branching_factor=[2, 2, 2], segment_length=4, per_device_train_batch_size=16, max_steps=1,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, model_init_kwargs={"dtype": "float32"}, use_vllm=True,
        vllm_mode="server", vllm_server_base_url=url, vllm_server_timeout=10, advantage_estimator="centered",
    )  # fmt: skip
    trainer = TreeRPOTrainer(model_path, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    generation = trainer.vllm_generation
    shares, generate = [], generation.generate

    def spy(prompts, **kwargs):
        shares.append(len(prompts))
        return generate(prompts=prompts, **kwargs)

    generation.generate = spy
    trainer._last_loaded_step = 0  # the server has the weights that the first step starts with
    trainer.train()
    training_shares = shares.copy()

    shares.clear()
    generation.temperature = 0.0
    rows = json.loads(prompts)
    # All prompts on one process, then one on one and the others on the other.
    mine = [[rows, []], [rows[:1], rows[1:]]]
    trees = [grow(split[RANK], VLLM_SHAPE, VLLMBackend(generation, [EOS])) for split in mine]
    # Three branches, which do not divide by two.
    odd = grow(rows[1:2] if RANK == 0 else [], TreeShape((3, 3), 4, 8), VLLMBackend(generation, [EOS]))
    shares_by_length = shares.copy()
    shares.clear()
    tokenizer = make_tokenizer(tokens=VLLM_TOKENS)
    delimited = grow(mine[1][RANK], DELIMITED, VLLMBackend(generation, [EOS], tokenizer))
    at_the_end = [[5] * (CONTEXT - FORKS.max_completion_length)] * RANK
    forked = grow(mine[1][RANK] + at_the_end, FORKS, VLLMBackend(generation, [EOS]))
    seen = {
        "context": trainer._max_prompt_length + args.max_completion_length,
        "training_shares": training_shares,
        "shares": shares_by_length,
        "shares_of_split_rules": shares,
        "trees": [[to_json(tree) for tree in some] for some in trees],
        "odd": [to_json(tree) for tree in odd],
        "delimited": [to_json(tree) for tree in delimited],
        "forked": [to_json(tree) for tree in forked],
        "trained": [to_json(scored.tree) for scored in trainer.last_trees],
        "log": next(log for log in trainer.state.log_history if "loss" in log),
        "parameters": {name: parameter.double().sum().item() for name, parameter in trainer.model.named_parameters()},
    }
    (Path(output_dir) / f"rank_{RANK}.json").write_text(json.dumps(seen))
    # With everything written. Torch may hang on the way out: freeing DDP holds the interpreter's lock while it waits
    # for a thread of gloo that wants it.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
