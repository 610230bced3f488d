"""Images that are not square, from `data.image_size=16x24` through training, evaluation, prediction and export."""

import json

import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

import data
import eval as eval_command
import models
import tasks
from training.checkpoints import starts
from training.run import command, loop


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps on images of 16 x 24, cut from squares."""
    folder = tmp_path_factory.mktemp("runs") / "wide"
    loop.train(config(), folder, terminal=tiny.quiet())
    return folder


def config(**overrides):
    made = "synthetic:classes=4,examples=32,size=32"
    wide = dict(data__image_size=(16, 24), data__name=made, train__steps=2)
    texts = dict(
        data__train_transforms="random_resized_crop({size})|flip|normalize",
        data__eval_transforms="resize({size/0.875})|center_crop({size})|normalize",
    )
    return tiny.config(**{**wide, **texts, **overrides})


def run(*arguments):
    return command.guarded(eval_command.main, [str(argument) for argument in arguments])


def test_a_rectangle_is_trained_on_and_exported(workdir, tmp_path):
    assert np.isfinite([row["loss"] for row in tiny.rows(workdir)]).all()
    assert run("--workdir", workdir, "--export", tmp_path / "export") == 0
    about = json.loads((tmp_path / "export" / "export.json").read_text())
    assert about["input"]["shape"] == [None, 16, 24, 3]
    assert about["input"]["transforms"] == "resize((18, 27))|center_crop((16, 24))|normalize"


def test_other_rectangles_are_evaluated_and_predicted(workdir, tmp_path, capsys):
    """The positions of 2 x 3 patches are as many as those of 3 x 2, and are not theirs."""
    (tmp_path / "images").mkdir()
    for name, size in (("a", (40, 20)), ("b", (20, 40))):
        Image.new("RGB", size, (200, 10, 90)).save(tmp_path / "images" / f"{name}.png")
    tall = ("--workdir", workdir, "--config.data.image_size=24x16", "--predict", tmp_path / "images")
    assert run(*tall, "--output", tmp_path / "out") == 0
    assert "positions resampled from 2 x 3 to 3 x 2 (bicubic)" in capsys.readouterr().err
    assert (tmp_path / "out" / "predictions.csv").read_text().count("\n") == 3


def test_a_run_starts_from_another_rectangle(workdir, capsys):
    start = config(model__init_from=str(workdir), data__image_size=(32, 24))
    info = data.open_source(start.data.name, "train").info
    model = tasks.create(start, info).build_model(nnx.Rngs(0))
    params, _ = starts.start_from(starts.of_config(start), tasks.create(start, info), *models.split(model)[1:], model)
    assert params["pos_embed"].shape == (1, 13, 16)
    assert "positions resampled from 2 x 3 to 4 x 3 (bicubic)" in capsys.readouterr().err
