"""What the tests share: the settings of a run. The fixtures are in `helpers/shared_fixtures.py`."""

import gc
import os
import tempfile

import pytest
from hypothesis import settings


# Random cases on a developer's machine, the same ones in CI.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")

# A process that is killed while it compiles leaves a lock, for which every later one waits for ever. So what DeepSpeed
# compiles is shared with the processes that the tests start, and with no other run of the tests.
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    _extensions = tempfile.TemporaryDirectory(prefix="torch-extensions-")
    os.environ["TORCH_EXTENSIONS_DIR"] = _extensions.name

# Test processes side by side, and what they start, take a core each. Torch reads it when it is imported, below.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Files that take longest, in this order: begun last, one of them would keep the other processes waiting.
LONGEST = [
    "processes/test_distributed.py",
    "processes/test_resume.py",
    "examples/test_notebook.py",
    "examples/test_compare.py",
    "examples/test_agent.py",
    "docs/test_readme.py",
    "tools/test_soak.py",
    "tools/test_fuzz.py",
    "processes/test_faults_process.py",
    "processes/test_hub.py",
    "prefix_sharing/test_prefix_sharing.py",
]


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, but not where tests are only handed out: it takes ten seconds to import all they need."""
    if not config.getoption("numprocesses", default=None):
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {os.path.join(os.path.dirname(__file__), name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


def pytest_collection_finish() -> None:
    """Have the collector leave alone what was imported: `Trainer.train` calls it, which took half of a short run."""
    gc.collect()
    gc.freeze()
