"""Imports run one way: train.py, eval.py -> training -> tasks -> data, configs -> models -> attn -> kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A folder may import from folders with a larger number, and from itself.
LEVEL = {
    "train": 0,
    "eval": 0,
    "training": 1,
    "tasks": 2,
    "data": 3,
    "configs": 3,
    "models": 4,
    "attn": 5,
    "kernels": 6,
}


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno


def violations(source: str, home: str, path: str):
    for name, line in imported(ast.parse(source)):
        target = name.split(".")[0]
        if target in LEVEL and target != home and LEVEL[target] <= LEVEL[home]:
            yield f"{path}:{line}: {home} imports {target}"


def files():
    for home in LEVEL:
        yield from (
            (home, path)
            for path in (
                [ROOT / f"{home}.py"] if (ROOT / f"{home}.py").exists() else sorted((ROOT / home).rglob("*.py"))
            )
        )


@pytest.mark.smoke
def test_imports_run_one_way():
    found = [v for home, path in files() for v in violations(path.read_text(), home, str(path.relative_to(ROOT)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("home", "source"),
    [("attn", "from models import core"), ("data", "import configs"), ("models", "def f():\n  import training.run")],
)
def test_a_turned_arrow_is_found(home, source):
    assert list(violations(source, home, "planted.py"))


def test_the_house_has_its_folders():
    for name in ("attn", "models", "kernels", "configs", "tests"):
        assert (ROOT / name).is_dir()
    assert (ROOT / "train.py").is_file()
    assert (ROOT / "eval.py").is_file()
    assert not list(ROOT.glob("*/util*.py"))
