"""What is done with a code block of the documentation, by its language, and with a command, by its first word."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from places import ROOT
from trl import TrlParser

from treerpo_trl import TreeRPOTrainer


DRAWING = "─"
SHELLS = ("", "bash", "sh", "shell")  # languages of a block with commands


@dataclass(frozen=True)
class Block:
    """A fenced code block: where it is, its language ("" if it names none) and its text without indentation."""

    file: str
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.file}:{self.line}"


def find_blocks(file: str) -> Iterator[Block]:
    text = (ROOT / file).read_text()
    found = list(re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL))
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(found), f"a block of {file} is not closed, or odd"
    for match in found:
        lines = [line.removeprefix(match[1]) for line in match[3].splitlines(keepends=True)]
        yield Block(file, text.count("\n", 0, match.start()) + 1, match[2], "".join(lines))


class ParsedError(Exception):
    """A script has parsed its command line: it is stopped here."""


def parse_by_script(script: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script, or `-m` and a module, until its parser has read the arguments."""
    parse_args, parse_args_and_config = argparse.ArgumentParser.parse_args, TrlParser.parse_args_and_config

    def parse_and_stop(parser, args=None, namespace=None):
        parse_args(parser, args, namespace)
        raise ParsedError

    def parse_with_config_and_stop(parser, *args, **kwargs):
        # A recipe asks for what only GPUs have, such as bf16.
        on_cpu = ["--use_cpu"] if any(hasattr(kind, "use_cpu") for kind in parser.dataclass_types) else []
        parse_args_and_config(parser, [*sys.argv[1:], *on_cpu])
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(TrlParser, "parse_args_and_config", parse_with_config_and_stop)
        patch.setattr(sys, "argv", [script[-1], *arguments])
        patch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
        with pytest.raises(ParsedError):
            if script[0] == "-m":
                runpy.run_module(script[1], run_name="__main__")
            else:
                runpy.run_path(script[0], run_name="__main__")


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script or module that exists, with options that it has."""
    size = 2 if words[1] == "-m" else 1
    parse_by_script(words[1 : 1 + size], words[1 + size :], monkeypatch)


def check_launch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own options, a configuration that exists, and a script as above."""
    assert words[1] == "launch"
    parsed = launch_command_parser().parse_args(words[2:])
    assert Path(parsed.config_file).is_file(), f"there is no {parsed.config_file}"
    script, arguments = parsed.training_script, parsed.training_script_args
    if script == "examples/on_cpu.py":
        script, *arguments = arguments
    check_python(["python", *(["-m"] if parsed.module else []), script, *arguments], monkeypatch)


def check_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that exists; CI runs them."""
    subprocess.run(["make", "-n", *words[1:]], check=True, capture_output=True)


def check_pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras and files that exist; CI installs."""
    assert words[1] == "install"
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, given in re.findall(r"(\S*)\[(.+?)\]", " ".join(words)):
        assert name in (".", "treerpo-trl") and set(given.split(",")) <= set(extras)
    for option, file in pairwise(words):
        assert option not in ("-c", "-r") or Path(file).is_file()


def check_git(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that clones; the address is that of the package."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert words[1:] == ["clone", project["urls"]["Repository"]], "fill in [project.urls], and the same address here"


def check_cd(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Into what was cloned."""
    assert words[1:] == ["treerpo_trl"]


def check_vllm(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No options are parsed: vLLM has an environment of its own, whose tests start this server."""
    assert words[1] == "serve" and "/" in words[2]


# By the first word of a command.
COMMANDS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "accelerate": check_launch,
    "cd": check_cd,
    "git": check_git,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "vllm": check_vllm,
}


# What train.py cannot do without.
LEFT_OUT = shlex.split("--model_name_or_path a/model --dataset_name a/dataset --reward_funcs accuracy_reward")


def find_commands(block: Block) -> Iterator[list[str]]:
    """The words of each command, without comments and variables set before it; what `...` leaves out is put in."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        left_out = LEFT_OUT if "examples/train.py" in words else []
        words = [word for given in words for word in (left_out if given == "..." else [given])]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


def check_shell(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command by its rule. Those of `is_run` are run too."""
    monkeypatch.chdir(ROOT)
    commands = list(find_commands(block))
    assert commands
    for words in commands:
        assert words[0] in COMMANDS, f"{block.id}: no rule for {words[0]!r}; give it one in COMMANDS"
        COMMANDS[words[0]](words, monkeypatch)


def check_unnamed(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing, which nothing executes, or commands."""
    if DRAWING not in block.text:
        check_shell(block, monkeypatch)


def check_python_block(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run, unchanged, with the others of its file: see `test_python_blocks_run_in_order`."""
    compile(block.text, block.id, "exec")


def check_bibtex(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing executes it; it is the citation of the model card."""
    squeeze = re.compile(r"\s+")
    assert squeeze.sub(" ", block.text).strip() == squeeze.sub(" ", TreeRPOTrainer._paper["citation"]).strip()


# By the language that a block names.
def check_diff(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Python: before and after the change."""
    for kept, other in ("-+", "+-"):
        lines = [line for line in block.text.splitlines() if not line.startswith(other)]
        compile("\n".join(line.removeprefix(kept).removeprefix(" ") for line in lines), block.file, "exec")


LANGUAGES: dict[str, Callable[[Block, pytest.MonkeyPatch], None]] = {
    **dict.fromkeys(SHELLS, check_shell),
    "": check_unnamed,
    "bibtex": check_bibtex,
    "diff": check_diff,
    "python": check_python_block,
}
