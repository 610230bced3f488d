"""`training/` knows neither images nor classes: what data and weights mean, it asks the task."""

import ast
import dataclasses
import io
import re
import tokenize
from pathlib import Path

import numpy as np
import pytest
import tiny
from flax import nnx

import data
import tasks
from tasks.classification import Classification
from training.checkpoints import partners
from training.run import began, loop
from training.run.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
MEANING = re.compile(r"(?<![a-z<])(images?|pixels?|classes|class_names|num_classes|logits)(?![a-z/])")


def meanings(source: str) -> list[str]:
    """Words of names and messages (not of comments and docstrings) that say what data mean."""
    prose = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        f"{token.start[0]}: {token.string}"
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in (tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
        and token.start not in prose
        and MEANING.search(token.string)
    ]


def test_training_knows_neither_images_nor_classes():
    found = [
        f"{path.relative_to(ROOT)}:{one}"
        for path in sorted((ROOT / "training").rglob("*.py"))
        for one in meanings(path.read_text())
    ]
    assert not found, "\n".join(found)
    for planted in ("size = image.shape", "x = info.num_classes", "raise ValueError(f'{n} images here')"):
        assert meanings(planted)
    assert not meanings('"""Of images."""\nx = {}  # classes')


class Tones(Classification):
    """A task whose data are sounds, as far as it is asked."""

    def matched(self, source):
        return source

    def mismatch(self, source):
        return "heard, not seen"

    def noted(self):
        return {"rate": 16000}

    def check_same_data(self, before, where):
        if before.get("rate", 16000) != 16000:
            raise ValueError(f"{where}: was sampled at {before['rate']} Hz")

    def partner(self, model, theirs, their_info, *, octave=0):
        return model, [f"{octave} octaves higher"]


def test_a_task_says_itself_what_its_data_mean(tmp_path, capsys):
    config = tiny.config(train__steps=1)
    source = data.open_source(config.data.name, "train")
    task = Tones(config, source.info)
    said = io.StringIO()
    loop.train(config, tmp_path, terminal=Terminal(said), task=task, sources={"train": source, "test": source})
    assert "heard, not seen" in said.getvalue()
    begun = began.read(tmp_path)
    assert begun.noted == {"rate": 16000, "total_steps": 1}
    other = dataclasses.replace(begun, noted={"rate": 8000})
    ready = type("Ready", (), {"task": task, "source": source, "total_steps": 1})
    with pytest.raises(ValueError, match="was sampled at 8000 Hz"):
        began.changes(other, ready, "here")
    model = partners.load(task, str(tmp_path), octave=2)
    assert isinstance(model, nnx.Module)
    assert "2 octaves higher" in capsys.readouterr().err


def test_a_picture_is_written_whatever_its_values(tmp_path):
    from PIL import Image

    from tasks.base import Picture

    Picture(np.array([[[0.5], [2.0]], [[-1.0], [np.nan]]])).save(tmp_path / "one.png")
    np.testing.assert_array_equal(Image.open(tmp_path / "one.png"), [[128, 255], [0, 0]])
    assert tasks.create(tiny.config(), data.open_source("digits", "train").info).noted()["num_classes"] == 10
