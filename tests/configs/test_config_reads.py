"""Every declared key is read by some shipped configuration, and nothing reads a key that is not declared."""

import ast
from pathlib import Path

import pytest

from configs import schema
from configs.base import FIELDS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("training", "tasks", "data", "benchmarks")
GROUPS = {name for name, field in FIELDS.items() if isinstance(field, dict)}


def chains(tree: ast.AST):
    """Dotted names such as `self.config.optim.ema`, as `optim.ema` where they go through something called config."""
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            parts.insert(0, inner.id)
            if "config" in parts[:-2]:
                yield node.lineno, parts[parts.index("config") + 1 :]


def misspelt(source: str, path: str):
    known = set(schema.flatten(FIELDS))
    for line, parts in chains(ast.parse(source)):
        if parts[0] in GROUPS and len(parts) >= 2 and ".".join(parts[:2]) not in known:
            yield f"{path}:{line}: config.{'.'.join(parts[:2])}"


def test_every_read_in_the_source_is_declared():
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")] + [ROOT / "train.py", ROOT / "eval.py"]
    found = [m for p in files if p.exists() for m in misspelt(p.read_text(), str(p.relative_to(ROOT)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "planted", ["x = config.optim.lerning_rate", "y = self.config.data.batchsize + 1", "run.config.train.step.steps()"]
)
def test_a_misspelt_read_is_found(planted):
    assert list(misspelt(planted, "planted.py"))
