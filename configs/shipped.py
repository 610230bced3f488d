"""The experiments of this folder by name: `--config=quickstart` is `configs/quickstart.py`, wherever one stands."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = ("base",)
"""Files that have a `get_config` and are no experiment."""


def names() -> list[str]:
    """Names of all experiments, sorted. Nothing is run."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in LIBRARY and _is_experiment(path))


def file(name: str) -> Path:
    """Where the experiment of this name is, whether it is there or not."""
    return FOLDER / f"{name}.py"


def description(name: str) -> str:
    """What the experiment says of itself, its docstring."""
    return ast.get_docstring(_tree(file(name))) or ""


def _is_experiment(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in _tree(path).body)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))
