"""The notebooks in docs/examples run."""

import json
import tempfile

import matplotlib.pyplot as plt
import pytest
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))  # make docs copies them to docs/_build


def cells(notebook):
    """The code cells of a notebook."""
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_no_outputs_are_stored(notebook):
    assert not [cell for cell in cells(notebook) if cell["outputs"] or cell["execution_count"]]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_the_cells_run_one_after_another(notebook, tmp_path, monkeypatch, capsys):
    """With one epoch of training in place of many."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plt.switch_backend("Agg")
    names = {}
    for i, cell in enumerate(cells(notebook)):
        code = "".join(cell["source"]).replace("epochs=20", "epochs=1")
        exec(compile(code, f"{notebook.name}, code cell {i}", "exec"), names)
    assert capsys.readouterr().out.strip().endswith("of the first queries right")
    assert len(plt.get_fignums()) == 2
    plt.close("all")
