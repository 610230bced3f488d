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

import models
from attn import Grid
from models import Call
from models.core.stack import Stack
from models.layers.norm import BatchNorm
from tasks.classification import Classification
from training.checkpoints import checkpoint
from training.optim import frozen
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
    usual = {"optim__learning_rate": 0.01, "data__train_transforms": "normalize", **tiny.OWN_MODEL}
    config = tiny.config(**{**usual, **overrides})
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


class FrozenTask(Classification):
    """Classification with two of our own batch normalizations, in place of flax's."""

    class Model(nnx.Module):
        def __init__(self, classes, rngs):
            self.norm, self.late = BatchNorm(3), BatchNorm(3)
            self.head = nnx.Linear(3, classes, rngs=rngs)

        def __call__(self, images, train=False, key=None):
            x = self.late(self.norm(images, train=train) ** 2, train=train)
            return self.head(x.mean((1, 2)))

    def build_model(self, rngs):
        return self.Model(self.info.num_classes, rngs)


def test_a_run_keeps_the_statistics_of_frozen_modules(tmp_path):
    frozen = dict(optim__freeze=("norm",), optim__ema=0.5, train__steps=2)
    config = tiny.config(data__train_transforms="normalize", **frozen, **tiny.OWN_MODEL)
    source = feeding.open_source(config, config.data.name, "train")
    loop.train(config, tmp_path, task=FrozenTask(config, source.info), terminal=tiny.quiet())
    saved = checkpoint.restore_for_eval(tmp_path)
    assert set(saved["model_state"]) == {"norm.mean", "norm.var", "late.mean", "late.var"}  # and no flags
    for state in (saved["model_state"], saved["ema"]["model_state"]):
        assert set(state["norm.mean"]) | set(state["norm.var"] - 1) == {0}
        assert 0 not in {*state["late.mean"], *(state["late.var"] - 1)}


def test_frozen_statistics_of_a_foreign_normalization_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^config\.optim\.freeze=\('norm',\): the batch statistics of norm \(flax"):
        train(tmp_path, optim__freeze=("norm",))
    assert not tmp_path.joinpath("config.json").exists()


class NormedStack(nnx.Module):
    """Three layers, each a batch normalization and a sine, then a head."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = BatchNorm(4)
            self.norm.scale[...] += jax.random.normal(rngs.params(), (4,))
            self.norm.mean[...] += 0.2

        def __call__(self, x, call):
            return x + jnp.sin(self.norm(x, train=call.train))

    def __init__(self, scan):
        self.blocks = Stack([self.Block], 3, rngs=nnx.Rngs(0), scan=scan)
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

    def __call__(self, x, train=True):
        return self.head(self.blocks(x, Call(Grid((5,)), train=train))[0])


def after_a_step(scan, patterns):
    """Outputs, state and gradients of a call with train=True, with frozen modules, and outputs without."""
    graph, params, state = models.split(NormedStack(scan))
    trained, constants = frozen.training_graph(graph, params, state, patterns)
    x = jax.random.normal(jax.random.key(0), (8, 5, 4))

    def call(params):
        model = models.merge(trained, params, {**state, **constants})
        outputs = model(x)
        return jnp.sum(jnp.sin(outputs)), (outputs, models.split(model)[2])

    (_, (outputs, after)), grads = jax.value_and_grad(call, has_aux=True)(params)
    after = {name: value for name, value in after.items() if name not in constants}
    assert after.keys() == state.keys()
    evaluated = models.merge(graph, params, state)(x, train=False)
    return outputs, models.unstack(state), models.unstack(after), models.unstack(grads), constants, evaluated


def test_layers_of_a_scanned_stack_are_frozen_one_by_one():
    patterns = (r"blocks\.[02]", r".*\.bias")
    outputs, before, after, grads, constants, _ = after_a_step(True, patterns)
    assert {name: flags.tolist() for name, flags in constants.items()} == {"blocks.[0::1].norm.frozen": [1, 0, 1]}
    for name, value in before.items():  # layer 1 is not frozen: its bias alone is
        assert np.array_equal(after[name], value) == ("blocks.1." not in name), name
    other_outputs, _, other_after, other_grads, none, _ = after_a_step(False, patterns)
    assert not none
    np.testing.assert_allclose(outputs, other_outputs, rtol=1e-5, atol=1e-6)
    for mine, other in ((after, other_after), (grads, other_grads)):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_wholly_frozen_stack_trains_as_it_evaluates():
    outputs, before, after, _, constants, evaluated = after_a_step(True, ("(?!head).*",))
    assert not constants
    assert all(np.array_equal(after[name], before[name]) for name in before)
    np.testing.assert_array_equal(outputs, evaluated)
    assert not np.allclose(evaluated, after_a_step(True, ())[0])


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
