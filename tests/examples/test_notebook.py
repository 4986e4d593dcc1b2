"""The notebook, executed as a user would: offline on the CPU, with its push going to a Hub on this machine."""

import os
import re

import nbformat
import pytest
from local_hub import LocalHub
from nbclient import NotebookClient
from nbformat import NotebookNode
from places import EXAMPLES, ROOT


NOTEBOOK = EXAMPLES / "notebooks" / "treerpo_lora.ipynb"


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def text_of(notebook: NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_the_notebook_is_kept_with_the_outputs_of_a_run_and_with_its_defaults():
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "ON_GPU = False\nPUSH_TO = None\n" in "\n".join(cell.source for cell in code)
    text = text_of(notebook)
    assert re.search(r"Pass@1 0\.2\d+ -> 0\.7\d+", text)
    assert str(ROOT) not in text and "Warning" not in text


@pytest.mark.slow
def test_the_notebook_trains_shows_a_tree_and_pushes(tmp_path):
    folder = tmp_path / "anywhere"  # the notebook finds the examples from any working directory
    folder.mkdir()
    notebook = read()
    (settings,) = [cell for cell in notebook.cells if "PUSH_TO = None" in cell.source and cell.cell_type == "code"]
    settings.source = settings.source.replace("PUSH_TO = None", 'PUSH_TO = "me/adapter"')
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    with LocalHub(tmp_path / "hub").serving() as hub:
        threads = os.environ.get("OMP_NUM_THREADS", "2")
        client.execute(env={**hub.environment(tmp_path, with_xet=False), "OMP_NUM_THREADS": threads})
        assert hub.unknown == []
        adapter = hub.read("me/adapter", "adapter_model.safetensors")
        assert "TreeRPO" in hub.read("me/adapter", "README.md").decode()

    text = text_of(notebook)
    before, after = map(float, re.search(r"Pass@1 (0\.\d+) -> (0\.\d+)", text).groups())
    assert after > before + 0.2
    measured = re.findall(r"Pass@1 (0\.\d+), mean length", text)
    assert [float(value) for value in measured] == [
        before,
        after,
        pytest.approx(after, abs=0.01),
    ]  # the last is merged
    assert "answer #" in text  # the tree in the terminal
    assert "look_up" in text.partition("tree/call_sharing")[2]  # and the agent's
    output = folder / "treerpo-lora"
    assert adapter == (output / "adapter_model.safetensors").read_bytes()
    pages = sorted(path.name for path in (output / "trees").glob("*.html"))
    # A step has more trees than a page.
    parts = ("-2", "-3", "-4", "")
    assert pages == ["index.html", *(f"step_{step:06}{part}.html" for step in (20, 40) for part in parts)]
