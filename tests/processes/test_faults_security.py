"""What a model wrote, or a file of someone else, runs nothing: in pages, the terminal, checkpoints and models."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from byte_llama import make_byte_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from local_hub import LocalHub
from peft import LoraConfig
from places import PROCESSES
from rich.console import Console
from test_train_script import RUN, run_in_process, train
from test_views_page import Page
from tiny import make_tokenizer, spread_reward
from transformers import Qwen2ForCausalLM
from view_trees import HOSTILE, Texts, make_tree

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.growth import TreeShape
from treerpo_trl.running.checkpoints import read_seal, seal
from treerpo_trl.tree import ROOT
from treerpo_trl.views import build_index, print_tree, read_trees, render_page, tree_records, write_page, write_trees
from treerpo_trl.views.files import step_path


TOKEN = "hf_of_me"  # the local Hub's
ESCAPES = [
    "\x1b]0;pwned\x07",
    "\x1b[2J\x1b[31m",
    "\x9b31m",
    "\u202egnp\u2066",
    "\x00\x08\r\x7f",
    "\ud83d half",
    "\ufeff",
]
BREAKOUTS = [*HOSTILE, '"><b onclick="x()">', "' autofocus onfocus='x()", "</title><style>*{}</style>", "<!--<script>"]
TEXTS = st.lists(st.sampled_from([*ESCAPES, *BREAKOUTS, "a", " ", "\n"]), min_size=1, max_size=4).map("".join)


def records_of(prompt: str, steps: tuple[str, str]) -> list[dict]:
    texts = Texts()
    return tree_records(
        [make_tree(texts, prompt, {ROOT: list(steps)}, [1.0, 0.0])], texts, 3, shape=TreeShape((2,), 9, 9)
    )


def encodable(text: str) -> str:
    return text.encode(errors="replace").decode()


# Views


@given(title=TEXTS, prompt=TEXTS, steps=st.tuples(TEXTS, TEXTS))
def test_no_text_adds_an_element_an_attribute_or_a_script_to_a_page(title, prompt, steps):
    page = Page(render_page(records_of(prompt, steps), title=title))
    assert page.elements == Page(render_page(records_of("p", ("a", "b")), title="t")).elements
    step, nodes = page.data()
    assert step["trees"][0]["prompt"] == encodable(prompt)
    assert nodes["text"] == [encodable(text) for text in (prompt, *steps)]
    for tag, content in page.contents:
        assert tag != "script" or "<" not in content or content.startswith('"use strict"'), "of the JSON, no markup"


@pytest.mark.parametrize("name", ["<img src=x onerror=pwn()>", "a\"b'c&amp;", "\u202enur\x1b[31m"])
def test_no_name_of_a_run_adds_anything_to_the_index_or_the_pages(tmp_path, name):
    pages = []
    for run in ("run", name):
        folder = tmp_path / run / "trees"
        folder.mkdir(parents=True)
        write_trees(records_of(HOSTILE[0], (HOSTILE[1], "\x1b")), step_path(folder, 3))
        write_page(read_trees(step_path(folder, 3)), step_path(folder, 3, ".html"), title=folder.parent.name)
        pages.append([build_index(folder).read_text(), step_path(folder, 3, ".html").read_text()])
    for plain, hostile in zip(*pages, strict=True):
        assert Page(hostile).elements == Page(plain).elements
        assert not set("\x1b\u202e") & set(hostile)


@given(texts=st.tuples(TEXTS, TEXTS, TEXTS))
def test_a_printed_tree_holds_no_control_character_of_the_model(texts):
    tokenizer = Texts()
    tree = make_tree(tokenizer, texts[0], {ROOT: list(texts[1:])}, [1.0, 0.0])
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        print_tree(tree, tokenizer, console)
    assert all(character.isprintable() for character in capture.get().replace("\n", ""))


def test_tables_hold_what_the_model_wrote(tmp_path):
    texts = ["".join(ESCAPES), *BREAKOUTS[:2]]
    write_trees(records_of(texts[0], (texts[1], texts[2])), tmp_path / "step_000003.parquet")
    assert [record["text"] for record in read_trees(tmp_path / "step_000003.parquet")] == list(map(encodable, texts))


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_table_of_completions_steers_no_terminal_and_its_file_holds_what_was_written(
    llama_path, make_args, capsys, monkeypatch, is_chat
):
    prompt, esc = "".join(ESCAPES[:3]) + "\n1 + 1", make_byte_tokenizer().convert_tokens_to_ids("ě")  # stands for \x1b

    def reward(completions, log_extra, **kwargs):
        log_extra("seen", [completion if is_chat else f"{completion}\x9b" for completion in completions])
        return [index / 7 for index in range(len(completions))]

    prompts = [[{"role": "user", "content": prompt}] if is_chat else prompt] * 4
    args = make_args(log_completions=True, max_steps=1, num_completions_to_print=3)
    trainer = TreeRPOTrainer(llama_path, reward, args, Dataset.from_dict({"prompt": prompts}))
    trainer.generation_config.sequence_bias = {(esc,): 100.0}
    monkeypatch.setenv("COLUMNS", "400")
    trainer.train()
    table = pd.read_parquet(Path(args.output_dir) / "completions" / "completions_00001.parquet")
    completion, written = table["completion"][0], table["prompt"][0]
    assert (completion[0]["content"] if is_chat else completion) == "\x1b" * 12
    assert (written[0]["content"] if is_chat else written) == prompt
    printed = capsys.readouterr().out
    assert printed.count("pwned") == 3 * printed.count("Step 1") > 0
    assert all(c.isprintable() for c in printed.replace("\n", "").replace("\r", ""))
    assert "\\x1b" in printed and "\\x9b" in printed
    assert trainer.num_completions_to_print == 3


# Rewards by name


def test_a_dotted_reward_imports_the_module_that_was_named_and_no_other(tmp_path, monkeypatch):
    for name in ("named_rewards", "other_rewards"):
        code = f"open('{name}.ran', 'w').close()\ndef reward(completions, **kwargs): return [0.0 for _ in completions]"
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    (reward,) = train.load_reward_funcs(train.TreeRPOScriptArguments(reward_funcs=["named_rewards.reward"]))
    assert reward(["a"]) == [0.0]
    assert [path.name for path in tmp_path.glob("*.ran")] == ["named_rewards.ran"]


@pytest.mark.parametrize(
    "name", ["os.system('touch ran')", "__import__('os').system('touch ran')", "os.mkdir('ran').x", "exec('1')", ""]
)
def test_code_in_place_of_a_reward_is_refused_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Use one of accuracy_reward, .*, or a dotted import path"):
        train.load_reward_funcs(train.TreeRPOScriptArguments(reward_funcs=[name]))
    assert not list(tmp_path.iterdir())


# Checkpoints of someone else


class Payload:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def make_trainer(model_path: str, output_dir: Path, lora: bool = False, **options) -> TreeRPOTrainer:
    defaults = {
        "branching_factor": [2, 2], "segment_length": 4, "per_device_train_batch_size": 8, "max_steps": 2,
        "save_steps": 1, "report_to": "none", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    prompts = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(8)]})
    return TreeRPOTrainer(
        model, spread_reward, TreeRPOConfig(str(output_dir), **{**defaults, **options}), prompts,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outputs(model_path, tmp_path_factory) -> dict[str, Path]:
    """What runs with a token leave: a full model's and an adapter's."""
    folder = tmp_path_factory.mktemp("outputs")
    for name in ("full", "lora"):
        trainer = make_trainer(model_path, folder / name, lora=name == "lora", hub_token=TOKEN, log_trees=True)
        trainer.train()
        trainer.save_model(str(folder / name))
        assert trainer.args.hub_token == TOKEN
    return {name: folder / name for name in ("full", "lora")}


@pytest.mark.parametrize(
    ("kind", "name", "replaced"),
    [
        ("full", "optimizer.pt", None),
        ("full", "scheduler.pt", None),
        ("full", "rng_state.pth", None),
        ("full", "treerpo_state_0.pt", None),
        ("full", "training_args.bin", None),
        ("full", "model.safetensors", None),
        ("full", "pytorch_model.bin", "model.safetensors"),
        ("lora", "adapter_model.bin", "adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_in_place_of_a_checkpoints_file_never_runs(
    outputs, model_path, tmp_path, kind, name, replaced, is_zip
):
    checkpoint = Path(shutil.copytree(outputs[kind] / "checkpoint-1", tmp_path / "out" / "checkpoint-1"))
    content, marker = read_seal(checkpoint), tmp_path / "ran"
    assert (checkpoint / (replaced or name)).is_file()
    (checkpoint / (replaced or name)).unlink()
    torch.save({"state": Payload(marker)}, tmp_path / "payload", _use_new_zipfile_serialization=is_zip)
    torch.load(tmp_path / "payload", weights_only=False)
    marker.rmdir()  # so it runs where it can
    shutil.copy(tmp_path / "payload", checkpoint / name)
    seal(checkpoint, content["settings"], content["is_mid_generation"])  # or its size would give it away
    trainer = make_trainer(model_path, tmp_path / "out", lora=kind == "lora")
    try:
        trainer.train(resume_from_checkpoint=True)
    except Exception as error:
        assert name != "training_args.bin", error  # which nothing reads
        refused = isinstance(error, pickle.UnpicklingError) or "safetensors" in type(error).__module__.lower()
        assert refused or "weights_only" in str(error) or "header" in str(error).lower(), repr(error)
    else:
        assert name == "training_args.bin" and trainer.state.global_step == 2
    assert not marker.exists()


# Models of someone else


@pytest.fixture
def foreign_model(llama_path, tmp_path, monkeypatch) -> Path:
    """A model with code of its own, which leaves a mark where it runs."""
    folder = Path(shutil.copytree(llama_path, tmp_path / "foreign"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class Config(LlamaConfig): pass\nclass Model(LlamaForCausalLM): config_class = Config\n"
    (folder / "foreign.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def give_type(folder: Path, model_type: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))


def test_code_of_a_model_runs_with_trust_remote_code_only(foreign_model, make_args, dataset, tmp_path):
    TreeRPOTrainer(str(foreign_model), spread_reward, make_args(), dataset)
    give_type(foreign_model, "foreign")  # which transformers cannot load without the code
    with pytest.raises(ValueError, match="trust_remote_code"):
        TreeRPOTrainer(str(foreign_model), spread_reward, make_args(), dataset)
    assert not (tmp_path / "ran").exists()
    give_type(foreign_model, "llama")
    TreeRPOTrainer(str(foreign_model), spread_reward, make_args(trust_remote_code=True), dataset)
    assert (tmp_path / "ran").exists()


def test_train_py_runs_no_code_of_a_model(foreign_model, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset.to_json("data.jsonl")
    (tmp_path / "my_lengths.py").write_text("def length(completions, **kwargs): return [0.0 for _ in completions]")
    names = ("branching_factor", "segment_length", "per_device_train_batch_size", "report_to", "use_cpu", "bf16")
    config = {name: RUN[name] for name in names} | {"max_steps": 1, "reward_funcs": ["my_lengths.length"]}
    config |= {"model_name_or_path": str(foreign_model), "dataset_name": "data.jsonl", "output_dir": "out"}
    run_in_process(config)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "ran").exists()


# What is saved


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_are_saved_as_safetensors_only_and_no_file_holds_the_token(outputs, kind):
    files = [path for path in outputs[kind].rglob("*") if path.is_file()]
    weights = {path.name for path in files if path.suffix == ".safetensors"}
    assert weights == {"model.safetensors" if kind == "full" else "adapter_model.safetensors"}
    pickles = {path.name for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")}
    assert pickles == {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "treerpo_state_0.pt"}
    assert [str(path) for path in files if TOKEN.encode() in path.read_bytes()] == []
    saved = torch.load(outputs[kind] / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.save_steps == 1


@pytest.mark.slow
def test_a_push_uses_the_token_and_does_not_contain_it(llama_path, tmp_path):
    hub = LocalHub(tmp_path / "hub")
    hub.add_folder("models", "base/tiny-llama", Path(llama_path))
    code = "from hub_run import make_trainer\n"
    code += f"trainer = make_trainer('token', hub_token={TOKEN!r}, hub_strategy='checkpoint')\n"
    code += "trainer.train()\ntrainer.push_to_hub()"
    with hub.serving():
        environment = hub.environment(tmp_path, token=None, with_xet=False)
        environment["PYTHONPATH"] += f":{PROCESSES}"
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
        assert result.returncode == 0, result.stderr[-3000:]
        repo = hub.repos["models", "me/token"]
        files = repo.at("main").files
        assert {"training_args.bin", "model.safetensors", "last-checkpoint/training_args.bin"} <= files.keys()
        for commit in repo.commits:
            assert [name for name, file in commit.files.items() if TOKEN.encode() in hub.content(file)] == []
    local = [path for path in (tmp_path / "token").rglob("*") if path.is_file()]
    assert [str(path) for path in local if TOKEN.encode() in path.read_bytes()] == []
