"""What importing the package costs and says: nothing heavy before it is needed, no lines of packages not in use."""

import ast
import importlib
import importlib.util
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import ROOT

import treerpo_trl
from treerpo_trl.reporting.quiet import BITSANDBYTES, DEEPSPEED, HeldBackLine, hold_back_lines


HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    "code",
    [
        "import treerpo_trl; treerpo_trl.Tree; dir(treerpo_trl)",
        "import treerpo_trl.views",
        "import treerpo_trl.views.serve",
        "from treerpo_trl.views.__main__ import main; main([FOLDER])",
        "from treerpo_trl.views.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path, code):
    from view_trees import example_records

    from treerpo_trl.views import write_trees

    write_trees(example_records(), tmp_path / "step_000010.parquet")
    report = f"\nimport sys; print('loaded', sorted(set(sys.modules) & set({HEAVY!r})))"
    finished = run("-c", code.replace("FOLDER", repr(str(tmp_path))) + report)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "loaded []"


def test_the_public_names_are_there_as_ever():
    from treerpo_trl import TreeRPOConfig, TreeRPOTrainer

    assert TreeRPOConfig is importlib.import_module("treerpo_trl.treerpo_config").TreeRPOConfig
    assert TreeRPOTrainer is importlib.import_module("treerpo_trl.treerpo_trainer").TreeRPOTrainer
    assert pickle.loads(pickle.dumps(TreeRPOConfig)) is TreeRPOConfig
    assert set(treerpo_trl.__all__) <= set(dir(treerpo_trl))
    star: dict = {}
    exec("from treerpo_trl import *", star)
    assert set(treerpo_trl.__all__) <= set(star)


def test_modules_are_attributes_without_an_import_of_their_own():
    finished = run("-c", "import treerpo_trl as t; print(t.credit.ESTIMATORS and t.views.index.INDEX)")
    assert finished.stdout.strip() == "index.html", finished.stderr
    with pytest.raises(AttributeError, match="module 'treerpo_trl' has no attribute 'TreeRPOTrainr'"):
        treerpo_trl.TreeRPOTrainr  # noqa: B018
    assert not hasattr(treerpo_trl, "__wrapped__")


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def records():
    """What handlers get of a logger of the tests."""
    logger, handler = logging.getLogger("test-of-quiet"), Records()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.filters.clear()


def test_a_line_is_held_back_until_its_package_is_used(records):
    line = HeldBackLine("test-of-quiet", "No kernel")
    line.logger.addFilter(line)
    line.logger.warning("No kernel: %s", "not installed")
    line.logger.warning("another line")
    assert records.lines == ["another line"]
    line.show()
    line.show()
    line.logger.warning("No kernel again")
    assert records.lines == ["another line", "No kernel: not installed", "No kernel again"]


def test_the_lines_are_those_that_the_packages_log():
    """A wording that changed upstream would be shown again."""
    for package, file, line in (
        ("bitsandbytes", "backends/cpu/ops.py", BITSANDBYTES),
        ("deepspeed", "accelerator/real_accelerator.py", DEEPSPEED),
    ):
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed")
        assert f'"{line.start}' in (Path(spec.origin).parent / file).read_text()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed finds the GPU and has nothing to say")
def test_deepspeeds_line_is_shown_to_those_who_use_it():
    """accelerate imports it to unwrap any model."""
    pytest.importorskip("deepspeed")
    code = "import os; os.environ.pop('DS_ACCELERATOR', None); import treerpo_trl, accelerate, torch; "
    code += "accelerate.utils.extract_model_from_parallel(torch.nn.ReLU())"
    said = {}
    for used in ("false", "true"):
        finished = run("-c", code, ACCELERATE_USE_DEEPSPEED=used)
        assert finished.returncode == 0, finished.stderr
        said[used] = "Setting accelerator to CPU" in finished.stdout + finished.stderr
    assert said == {"false": False, "true": True}


# Lets bitsandbytes find a CPU with AVX512-BF16, and no kernel for it.
PROCESSOR = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "bitsandbytes.functional":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def run(module):
            execute(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = run
        return spec

sys.meta_path.insert(0, Finder())
sys.modules["kernels"] = None
"""


@pytest.mark.slow
def test_commands_say_nothing_of_packages_that_are_not_used(tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "sitecustomize.py").write_text(PROCESSOR)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert "Failed to load CPU gemm_4bit_forward" in run("-c", "import peft", PYTHONPATH=path).stderr
    finished = run("examples/evaluate.py", "--help", PYTHONPATH=path)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("script", ["evaluate.py", "quickstart.py", "train.py"])
def test_scripts_import_the_package_before_what_it_keeps_quiet(script):
    lines = ast.parse((ROOT / "examples" / script).read_text()).body
    modules = [line.module if isinstance(line, ast.ImportFrom) else line.names[0].name for line in lines if
               isinstance(line, ast.Import | ast.ImportFrom)]  # fmt: skip
    others = [module.split(".")[0] for module in modules if module.split(".")[0] not in sys.stdlib_module_names]
    assert others[0] == "treerpo_trl"


def test_the_line_of_bitsandbytes_is_shown_once_weights_are_quantized(monkeypatch):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from treerpo_trl.checks import adapters

    shown = []
    monkeypatch.setattr(adapters, "BITSANDBYTES", SimpleNamespace(show=lambda: shown.append(True)))
    adapters.check_quantization("a/model", None, None)
    assert shown == []
    adapters.check_quantization("a/model", BitsAndBytesConfig(load_in_4bit=True), object())
    assert shown == [True]


def test_holding_back_twice_changes_nothing():
    hold_back_lines()
    assert BITSANDBYTES.logger.filters.count(BITSANDBYTES) <= 1
    assert DEEPSPEED.logger.filters.count(DEEPSPEED) == 1
