"""The notebooks of docs/ run from top to bottom, each in its own process, and what a cell ends with can be shown."""

import ast
import json
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SHORT = {"STEPS": 2}
"""Of cells tagged `parameters`, what is smaller here."""

SHOW = """
def show(value):
    ways = [getattr(value, way, None) for way in ("_repr_html_", "_repr_png_")]
    found = [way() for way in ways if way]
    if any(found):
        print("shown", type(value).__name__, *map(len, filter(None, found)))
"""


def script(notebook, workdir):
    """The code of a notebook, in which a cell that ends with an expression shows it."""
    lines = [SHOW]
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body[-1]
        if isinstance(last, ast.Expr) and ast.unparse(last.value).partition("(")[0] != "print":
            tree.body[-1] = ast.Expr(ast.Call(ast.Name("show"), [last.value], []))
        lines.append(ast.unparse(tree))
        if "parameters" in cell["metadata"].get("tags", []):
            lines += [f"{name} = {value!r}" for name, value in SHORT.items()]
            lines.append(f"WORKDIR = Path({str(workdir)!r})")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_says(notebook, tmp_path):
    done = commands.run([script(notebook, tmp_path / "run")], None, 300, ROOT / "docs" / "notebooks")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shown") >= 2
    if notebook.stem == "attention":
        assert "shown Picture" in done.stdout


def test_notebooks_are_kept_without_outputs():
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), notebook.name
        assert cells[0]["cell_type"] == "markdown"
