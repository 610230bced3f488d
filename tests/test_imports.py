"""Imports run one way: train.py, eval.py -> training -> tasks -> data, configs -> models -> attn -> kernels -> errors.

Inside `models/`: families -> hosts -> attention -> layers, weights -> core. Inside `training/`: plans, evaluation ->
run -> checkpoints -> distributed, optim. Inside `attn/`: operators -> common -> core.
"""

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
    "naming": 7,
    "errors": 8,
}
INSIDE = {
    "models": {"families": 0, "hosts": 1, "attention": 2, "layers": 3, "weights": 3, "core": 4},
    "training": {"plans": 0, "evaluation": 0, "run": 1, "checkpoints": 2, "distributed": 3, "optim": 3},
    "attn": {"common": 1, "core": 2},
}
"""The same for the folders of a folder; one that is not named stands before them all."""


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


def turned(source: str, path: Path):
    """Imports inside a folder that run the other way, or to the side."""
    home, *rest = path.parts
    levels = INSIDE.get(home, {})
    own = rest[0] if rest[0] in levels else None
    for name, line in imported(ast.parse(source)):
        folder, *inside = name.split(".")
        target = inside[0] if folder == home and inside and inside[0] in levels else None
        if target is None or target == own or own is None:
            continue
        if levels[target] <= levels[own]:
            yield f"{path}:{line}: {home}/{own} imports {home}/{target}"


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


@pytest.mark.smoke
def test_imports_inside_a_folder_run_one_way():
    paths = [path.relative_to(ROOT) for home in INSIDE for path in sorted((ROOT / home).rglob("*.py"))]
    found = [v for path in paths for v in turned((ROOT / path).read_text(), path)]
    assert not found, "\n".join(found)
    assert list(turned("from models.hosts.block import Block", Path("models/layers/planted.py")))
    assert list(turned("def f():\n  import training.run.run", Path("training/optim/planted.py")))


def likens(source: str) -> bool:
    return any(name == "difflib" for name, _ in imported(ast.parse(source)))


def test_one_place_says_what_somebody_may_have_meant():
    found = [str(path.relative_to(ROOT)) for _, path in files() if likens(path.read_text())]
    assert found == ["naming/nearest.py"]
    assert likens("def f():\n  from difflib import get_close_matches")


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
