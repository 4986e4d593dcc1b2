"""Every code block of the READMEs and of the documentation is run, or at least parsed by what it is for.

LANGUAGES and COMMANDS, in `readme_rules.py`, say what is done with a block and with a command. One without a rule
fails.
"""

import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from byte_llama import save_tiny_llama
from datasets import Dataset
from local_hub import LocalHub
from places import PROCESSES, ROOT, free_port
from readme_rules import DRAWING, LANGUAGES, SHELLS, Block, check_shell, find_blocks, find_commands
from tool_policy import call, make_tool_policy
from transformers import LlamaConfig


READMES = ["README.md", "examples/README.md", "CONTRIBUTING.md"]
READMES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
# What the blocks ask the Hub for.
MODELS = ["Qwen/Qwen2.5-0.5B-Instruct"]
TOOL_MODELS = ["Qwen/Qwen3-0.6B"]
DATASETS = ["trl-lib/DeepMath-103K"]
BLOCKS = [block for file in READMES for block in find_blocks(file)]


@pytest.mark.parametrize("block", BLOCKS, ids=[block.id for block in BLOCKS])
def test_every_block_has_a_rule_and_keeps_to_it(block, monkeypatch):
    assert block.language in LANGUAGES, f"no rule for {block.language!r}; give it one in LANGUAGES"
    LANGUAGES[block.language](block, monkeypatch)


def is_run(words: list[str]) -> bool:
    """Launches of `train.py` with a model that the local Hub has, and no recipe: its trees are too large for a CPU."""
    return "examples/train.py" in words and "--config" not in words and {*MODELS} & {*words} != set()


def substitute(words: list[str]) -> list[str]:
    """What is put in place of GPUs, and of hours: one process on the CPU, and one step."""
    replaced = [re.sub(r"single_gpu\.yaml$", "single_cpu.yaml", word) for word in words]
    replaced = [str(ROOT / word) if (ROOT / word).is_file() else word for word in replaced]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    return [*launcher, *replaced[2:], "--use_cpu", "--max_steps", "1", "--disable_tqdm", "true"]


LAUNCHES = [
    words
    for block in BLOCKS
    if block.language in SHELLS and DRAWING not in block.text
    for words in find_commands(block)
    if is_run(words)
]


def save_model(path: Path) -> None:
    """A tiny Llama with room for the README's responses."""
    save_tiny_llama(path)
    config = LlamaConfig.from_pretrained(path)
    config.max_position_embeddings = 2048
    config.save_pretrained(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All processes, two at a time, by name: the Python blocks of a file, and each launch."""
    folder = tmp_path_factory.mktemp("readme")
    save_model(folder / "model")
    # One batch of the examples: the blocks train for as many epochs as they like.
    rows = [
        {"prompt": [{"role": "user", "content": f"What is ${i} + 4$?"}], "solution": f"${i + 4}$"} for i in range(16)
    ]
    (folder / "data" / "data").mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / "data" / "data" / "train-00000-of-00001.parquet")
    hub = LocalHub(folder / "hub")
    for name in MODELS:
        hub.add_folder("models", name, folder / "model")
    for part in make_tool_policy([call("multiply", a=a, b=12) for a in (11, 12)]):
        part.save_pretrained(folder / "tool_model")
    for name in TOOL_MODELS:
        hub.add_folder("models", name, folder / "tool_model")
    for name in DATASETS:
        hub.add_folder("datasets", name, folder / "data")
    commands = {}
    for file in READMES:
        blocks = [(block.line, block.text) for block in BLOCKS if (block.file, block.language) == (file, "python")]
        if blocks:
            (folder / f"{len(commands)}.json").write_text(json.dumps(blocks))
            script = str(PROCESSES / "readme_run.py")
            commands[file] = [sys.executable, script, str(folder / f"{len(commands)}.json")]
    for words in LAUNCHES:
        commands[shlex.join(words)] = substitute(words)

    def run(number: int, command: list[str]) -> tuple[int, str]:
        work = folder / f"work-{number}"
        work.mkdir()
        (work / "examples").symlink_to(ROOT / "examples")  # as in a clone
        with (work / "output").open("w") as output:
            environment = {**hub.environment(work), "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(
                command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=300
            )
        return done.returncode, (work / "output").read_text()

    with hub.serving(), ThreadPoolExecutor(2) as pool:
        done = dict(zip(commands, pool.map(run, range(len(commands)), commands.values()), strict=True))
    return SimpleNamespace(
        hub=hub,
        codes={name: code for name, (code, _) in done.items()},
        outputs={name: output for name, (_, output) in done.items()},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [file for file in READMES if any(b.file == file and b.language == "python" for b in BLOCKS)]
)
def test_python_blocks_run_in_order(file, runs):
    assert runs.codes[file] == 0, runs.outputs[file]
    assert runs.outputs[file].endswith("all blocks ran\n")
    lines = [block.line for block in BLOCKS if (block.file, block.language) == (file, "python")]
    assert [int(line) for line in re.findall(r"^block of line (\d+)$", runs.outputs[file], re.MULTILINE)] == lines


@pytest.mark.slow
@pytest.mark.parametrize("launch", [shlex.join(words) for words in LAUNCHES])
def test_launches_run(launch, runs):
    assert runs.codes[launch] == 0, runs.outputs[launch]
    assert "Model saved" in runs.outputs[launch]


@pytest.mark.slow
def test_the_blocks_push_what_they_trained(runs):
    pushed = {
        name: repo
        for (kind, name), repo in runs.hub.repos.items()
        if kind == "models" and name not in MODELS + TOOL_MODELS
    }
    assert "me/Qwen2.5-0.5B-TreeRPO" in pushed
    assert all("README.md" in repo.head.files for repo in pushed.values())
    assert runs.hub.unknown == []


def test_a_block_without_a_rule_is_noticed(monkeypatch):
    with pytest.raises(AssertionError, match="no rule for 'rm'"):
        check_shell(Block("x.md", 1, "", "rm -rf /\n"), monkeypatch)
    assert "toml" not in LANGUAGES


@pytest.mark.parametrize(
    "text",
    [
        "python examples/train.py --no_such_option 1",
        "python examples/no_such_script.py",
        "python examples/evaluate.py compare only_one",
        "accelerate launch --config_file accelerate_configs/none.yaml examples/train.py ...",
        "accelerate launch --no_such_option examples/train.py",
        "accelerate launch --config_file accelerate_configs/fsdp2_cpu.yaml examples/on_cpu.py examples/train.py --x",
        "python -m treerpo_trl.views --no_such_option",
        'pip install -e ".[no_such_extra]"',
        "make no-such-target",
    ],
)
def test_wrong_commands_fail(text, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, OSError, ValueError, subprocess.CalledProcessError)):
        check_shell(Block("x.md", 1, "", text), monkeypatch)
