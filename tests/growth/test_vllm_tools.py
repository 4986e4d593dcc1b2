"""Trees of turns from a real vLLM engine on a CPU, whose tools answer between its calls: `make test-vllm`."""

import os

import pytest
import torch
from datasets import Dataset
from places import free_port
from test_tools import look_up, reward
from tiny import VLLM_ROUNDING
from tool_policy import CALLS, make_tool_policy

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm makes an environment that has it")
pytestmark = pytest.mark.vllm

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # starts without compiling the model
os.environ.setdefault("MASTER_PORT", str(free_port()))  # else the engine takes 29500, which others may have
STOP = "9"  # is in every answer of the tool, and in some of the model's


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> TreeRPOTrainer:
    """A trainer after its only step; the engine has the weights that it began with."""
    path, folder = tmp_path_factory.mktemp("tool-policy"), tmp_path_factory.mktemp("out")
    model, tokenizer = make_tool_policy(call_share=0.7, context_length=512, hidden_size=64)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    args = TreeRPOConfig(
        str(folder), branching_factor=[2, 2], per_device_train_batch_size=16, max_steps=1, logging_steps=1,
        save_strategy="no", report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False,
        disable_tqdm=True, model_init_kwargs={"dtype": "float32"}, use_vllm=True, vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=512, max_completion_length=120, generation_kwargs={"stop": [STOP]},
    )  # fmt: skip
    questions = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"question {i}"}] for i in range(8)]})
    trainer = TreeRPOTrainer(
        str(path), reward, args, train_dataset=questions, processing_class=tokenizer, tools=[look_up]
    )
    trainer._last_loaded_step = 0  # a CPU engine takes no weights, and has those of the model
    trainer.train()
    return trainer


def test_tools_answer_between_the_calls_of_the_engine(trainer):
    tokenizer, (log, _) = trainer.processing_class, trainer.state.log_history
    assert log["tools/call_frequency"] > 0.5 and log["tools/failure_frequency"] == 0
    nodes = [node for scored in trainer.last_trees for node in scored.tree.nodes[1:]]
    answered = [node for node in nodes if node.sampled is not None]
    assert len(answered) > 4
    for node in answered:
        pieces = tokenizer.decode(node.token_ids).split("<tool_response>\n")
        assert pieces[0].startswith(tuple(CALLS)) and len(pieces) > 1
        assert all(piece.startswith(("a is 97", "b is 98")) for piece in pieces[1:])


def test_what_tools_answered_stops_no_turn(trainer):
    """Stop strings are looked for in what the model writes."""
    tokenizer, log = trainer.processing_class, trainer.state.log_history[0]
    longest, stopped = 0, 0
    for scored in trainer.last_trees:
        for leaf in scored.tree.leaves:
            ids, sampled = scored.tree.completion_ids(leaf), scored.tree.sampled_mask(leaf)
            text = tokenizer.decode([token for token, drawn in zip(ids, sampled, strict=True) if drawn])
            longest = max(longest, text.count("<tool_call>"))
            stopped += text.endswith(STOP)
            assert STOP not in text[:-1]
    assert longest > 1 and stopped
    assert log["completions/clipped_ratio"] < 1


def test_log_probabilities_are_those_of_what_was_sampled(trainer):
    log = trainer.state.log_history[0]
    assert log["sampling/sampling_logp_difference/max"] < 2 * VLLM_ROUNDING
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.05)
    for scored in trainer.last_trees:
        for node in scored.tree.nodes[1:]:
            logprobs = torch.tensor(node.logprobs)
            assert (logprobs[torch.tensor(node.sampled_mask)] < 0).any()
            assert len(node.logprobs) == len(node.token_ids)
