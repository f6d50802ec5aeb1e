"""examples/tour.ipynb: every cell runs in a kernel of its own, as in Jupyter."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"


def test_the_notebook_runs_and_shows_its_outputs(tmp_path: Path):
    """`EXPECTTEST_ACCEPT=1` saves the notebook with the outputs of this run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = [_kinds(cell) for cell in notebook.cells]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        for cell in notebook.cells:
            cell.metadata = {}
            if "outputs" in cell:
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        nbformat.write(notebook, NOTEBOOK)
    else:
        assert [_kinds(cell) for cell in notebook.cells] == shown, "saved without its outputs"
    pictures = sum("image/png" in kinds for cell in notebook.cells for kinds in _kinds(cell))
    assert pictures == 2
    assert (tmp_path / "export" / "model.safetensors").exists()


def _kinds(cell: nbformat.NotebookNode) -> list[list[str]]:
    """The kinds of data that each output of a cell has; what goes to stderr may differ."""
    outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
    return [sorted(o.get("data", {})) for o in outputs]
