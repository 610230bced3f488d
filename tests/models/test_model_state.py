"""Model state besides parameters: through the step, accumulation, average, checkpoint, import, and over a mesh."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
import tiny
from flax import nnx

from tasks.classification import Classification
from training.checkpoints import checkpoint
from training.run import feeding, loop

ROOT = Path(__file__).resolve().parents[2]


class Normed(nnx.Module):
    """Convolution, batch normalization, mean, linear."""

    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, images, train=False, key=None):
        x = self.norm(self.conv(images), use_running_average=not train)
        return self.head(jax.nn.relu(x).mean((1, 2)))


class NormedTask(Classification):
    """Classification with the model above."""

    def build_model(self, rngs):
        return Normed(self.info.num_classes, rngs)


def train(workdir, **overrides):
    config = tiny.config(**{"optim__learning_rate": 0.01, "data__train_transforms": "normalize", **overrides})
    source = feeding.open_source(config, config.data.name, "train")
    return loop.train(config, workdir, task=NormedTask(config, source.info), terminal=tiny.quiet())


def batches(config, count):
    stream = feeding.train_stream(config, feeding.open_source(config, config.data.name, "train"), 0)
    return [next(stream)["image"] for _ in range(count)]


def test_statistics_pass_through_step_average_and_checkpoint(tmp_path):
    """Running statistics with learning rate 0 are a known function of the batches."""
    train(
        tmp_path,
        optim__learning_rate=0.0,
        optim__ema=0.5,
        train__steps=3,
        checkpoint__every_steps=1,
        checkpoint__keep_last=3,
    )
    saved = [checkpoint.restore_for_eval(tmp_path, step) for step in (1, 2, 3)]
    params = saved[0]["params"]
    expected = np.zeros(8, np.float32)
    for state, images in zip(saved, batches(tiny.config(data__train_transforms="normalize"), 3), strict=True):
        x = (
            jax.lax.conv_general_dilated(
                images, params["conv.kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            + params["conv.bias"]
        )
        expected = 0.5 * expected + 0.5 * np.asarray(x.mean((0, 1, 2)))
        np.testing.assert_allclose(state["model_state"]["norm.mean"], expected, rtol=1e-4, atol=1e-6)
    first, second = saved[0]["ema"]["model_state"]["norm.mean"], saved[1]["ema"]["model_state"]["norm.mean"]
    assert not np.allclose(first, second)  # float state is averaged as parameters are
    assert not np.allclose(second, saved[1]["model_state"]["norm.mean"])


def test_statistics_pass_through_accumulation(tmp_path):
    """Two parts of half a batch leave the statistics of two small steps."""
    train(tmp_path, optim__learning_rate=0.0, optim__accumulate=2, train__steps=1)
    saved = checkpoint.restore_for_eval(tmp_path)
    (images,) = batches(tiny.config(data__train_transforms="normalize"), 1)
    expected = np.zeros(8, np.float32)
    for part in (images[0::2], images[1::2]):
        x = jax.lax.conv_general_dilated(
            part, saved["params"]["conv.kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        expected = 0.5 * expected + 0.5 * np.asarray((x + saved["params"]["conv.bias"]).mean((0, 1, 2)))
    np.testing.assert_allclose(saved["model_state"]["norm.mean"], expected, rtol=1e-4, atol=1e-6)


def test_statistics_are_resumed_and_imported(tmp_path):
    train(tmp_path / "whole", train__steps=4, checkpoint__every_steps=2)
    train(tmp_path / "again", train__steps=4, checkpoint__every_steps=2)
    import shutil

    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    (tmp_path / "again" / "summary.json").unlink()
    train(tmp_path / "again", train__steps=4, checkpoint__every_steps=2)
    whole, again = (checkpoint.restore_for_eval(tmp_path / name) for name in ("whole", "again"))
    for part in ("params", "model_state"):
        for name, value in whole[part].items():
            np.testing.assert_array_equal(again[part][name], value, err_msg=name)
    train(tmp_path / "tuned", model__init_from=str(tmp_path / "whole"), optim__learning_rate=0.0, train__steps=1)
    tuned = checkpoint.restore_for_eval(tmp_path / "tuned")
    before, after = whole["model_state"]["norm.mean"], tuned["model_state"]["norm.mean"]
    (images,) = batches(tiny.config(data__train_transforms="normalize"), 1)
    x = jax.lax.conv_general_dilated(
        images, whole["params"]["conv.kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    fresh = np.asarray((x + whole["params"]["conv.bias"]).mean((0, 1, 2)))
    np.testing.assert_allclose(after, 0.5 * before + 0.5 * fresh, rtol=1e-4, atol=1e-6)


SCRIPT = """
import sys, json, pathlib
sys.path[:0] = [{root!r} + "/tests/models"]
import test_model_state, tiny
from training.checkpoints import checkpoint
from training.run import loop
folder = pathlib.Path(sys.argv[1])
mesh = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), map(int, sys.argv[2].split(","))))
flip = "flip|normalize"
test_model_state.train(
    folder / "normed", **mesh, data__train_transforms=flip, optim__name="sgd", optim__learning_rate=0.1
)
config = tiny.config(
    **mesh, model__drop_path=0.2, task__options__mixup=0.8, optim__ema=0.9, optim__accumulate=2, optim__name="lamb"
)
loop.train(config, folder / "vit", terminal=tiny.quiet())
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_mesh_of_eight_devices_takes_the_steps_of_one(tmp_path):
    """Batch statistics are those of the whole batch, and sharded parameters take the same step."""
    runs = {}
    for number, mesh in ((1, "1,1,1"), (8, "2,2,2")):
        folder = tmp_path / str(number)
        simulated.run(number, SCRIPT.format(root=str(ROOT)), folder, mesh)
        runs[number] = folder
    for name in ("normed", "vit"):
        one, eight = (checkpoint.restore_for_eval(runs[number] / name) for number in (1, 8))
        losses = [
            [
                json.loads(line)["loss"]
                for line in (runs[number] / name / "metrics.jsonl").read_text().splitlines()
                if '"train"' in line
            ]
            for number in (1, 8)
        ]
        np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
        for part in ("params", "model_state"):
            for key, value in one[part].items():
                np.testing.assert_allclose(
                    eight[part][key], value, rtol=0, atol=2e-5 * max(1, np.abs(value).max()), err_msg=f"{name} {key}"
                )


def test_a_statistic_of_a_shard_would_be_seen():
    """The planted fault of the test above: statistics of half a batch differ by far more than its tolerance."""
    (images,) = batches(tiny.config(data__train_transforms="flip|normalize"), 1)
    whole, half = jnp.var(images, (0, 1, 2)), jnp.var(images[:8], (0, 1, 2))
    assert float(jnp.abs(whole - half).max()) > 1e-2
