"""Kinds of rows, and what is wrong with a table."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official import assert_same

import models
from models.weights import table
from models.weights.table import Table


class Stage(nnx.Module):
    """A grouped convolution, batch normalization and relative positions, in our layouts."""

    def __init__(self):
        self.conv = nnx.Dict(kernel=nnx.Param(jnp.zeros((3, 5, 1, 8))), bias=nnx.Param(jnp.zeros(8)))
        self.bn = nnx.Dict(
            scale=nnx.Param(jnp.zeros(8)),
            bias=nnx.Param(jnp.zeros(8)),
            mean=nnx.BatchStat(jnp.zeros(8)),
            var=nnx.BatchStat(jnp.zeros(8)),
        )
        self.table = nnx.Param(jnp.zeros((3, 3, 2)))
        self.qkv = nnx.Dict(kernel=nnx.Param(jnp.zeros((8, 24))))


def stage_table(turn_back=lambda table: table.reshape(9, 2)):
    return Table(
        table.conv("stages.0.dwconv", "conv"),
        table.batch_norm("stages.0.bn", "bn"),
        table.custom(
            "stages.0.relative_position_bias_table",
            "table",
            lambda arrays, sizes: [arrays[0].reshape(3, 3, 2)],
            lambda arrays: [turn_back(arrays[0])],
        ),
        table.constant("stages.0.relative_position_index", np.arange(4)),
        table.linear(["stages.0.q", "stages.0.k", "stages.0.v"], "qkv"),
    )


def test_kinds_of_rows_and_state():
    _, params, state = models.split(Stage())
    rng = np.random.default_rng(0)
    theirs = {
        "stages.0.dwconv.weight": rng.normal(size=(8, 1, 3, 5)),
        "stages.0.dwconv.bias": rng.normal(size=8),
        **{f"stages.0.bn.{x}": rng.normal(size=8) for x in ("weight", "bias", "running_mean", "running_var")},
        "stages.0.bn.num_batches_tracked": np.zeros((), np.int64),
        "stages.0.relative_position_bias_table": rng.normal(size=(9, 2)),
        "stages.0.relative_position_index": np.arange(4),
        **{f"stages.0.{x}.weight": rng.normal(size=(8, 8)) for x in "qkv"},
    }
    reading = stage_table().read(theirs, {name: v.shape for name, v in {**params, **state}.items()})
    assert not reading.problems
    assert not reading.unknown
    assert {name: value.shape for name, value in reading.arrays.items()} == {
        name: value.shape for name, value in {**params, **state}.items()
    }
    assert reading.arrays["conv.kernel"][2, 4, 0, 7] == theirs["stages.0.dwconv.weight"][7, 0, 2, 4]
    assert reading.arrays["qkv.kernel"][3, 8] == theirs["stages.0.k.weight"][0, 3]
    np.testing.assert_array_equal(reading.arrays["bn.var"], theirs["stages.0.bn.running_var"])
    assert_same(stage_table().write(reading.arrays), theirs)


def test_tables_are_checked_when_made_and_when_written():
    with pytest.raises(ValueError, match=r"ambiguous: blocks\.0\.fc\.weight and blocks\.\{\}\.fc\.weight"):
        Table(table.linear("blocks.{}.fc", "a.{}"), table.linear("blocks.0.fc", "b"))
    with pytest.raises(ValueError, match="ambiguous: x and x"):
        Table(table.copy("a", "x"), table.copy("b", "x"))
    with pytest.raises(ValueError, match="differ in their numbers"):
        Table(table.copy("blocks.{}.a", "a"))
    with pytest.raises(ValueError, match="several to several"):
        Table(table.linear(["a", "b"], ["c", "d"]))
    with pytest.raises(ValueError, match="cannot be written"):
        Table(table.constant("blocks.{}.index", np.zeros(2)))
    values = {name: np.ones(v.shape, np.float32) for flat in models.split(Stage())[1:] for name, v in flat.items()}
    values["table"] = np.arange(18, dtype=np.float32).reshape(3, 3, 2)
    stage_table().write(values)
    with pytest.raises(ValueError, match="the row of table does not read back"):
        stage_table(turn_back=lambda table: table.transpose(1, 0, 2).reshape(9, 2)).write(values)
    with pytest.raises(ValueError, match=r"unknown parameter 'conv\.kernels'; nearest: conv\.kernel"):
        stage_table().write(values | {"conv.kernels": np.zeros(2)})
