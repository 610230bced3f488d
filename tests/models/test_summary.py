"""Model summaries: published numbers, twins, convolutions, loops."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from shapes import full_size

from models.core.summary import summarize


@pytest.mark.parametrize(
    ("name", "image_size", "giga"),
    [("vit_ti16", 224, 1.25), ("vit_s16", 224, 4.60), ("vit_b16", 224, 17.56), ("vit_g14", 224, 267.0)],
)
def test_published_multiply_adds(name, image_size, giga):
    summary = summarize(full_size(name), (1, image_size, image_size, 3))
    assert summary.total.multiply_adds == pytest.approx(giga * 1e9, rel=0.01)


def test_rows_by_formula():
    tokens, width, hidden, patches = 197, 384, 1536, 196
    summary = summarize(full_size("vit_s16", num_classes=10), (4, 224, 224, 3))
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    assert summary.rows["blocks.7"].multiply_adds == 4 * block
    assert summary.rows["patch_embed"].multiply_adds == 4 * patches * width * 3 * 16**2
    assert summary.rows["head"].multiply_adds == 4 * width * 10
    assert summary.rows["head"].parameters == 10 * width + 10
    assert list(summary.rows)[-3:] == ["blocks.11", "norm", "head"]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("block", ["pre_norm", "two_branch"])
def test_twins_cost_the_same(remat, block):
    scanned, unrolled = (
        summarize(full_size("vit_ti16", depth=3, block=block, remat=remat, scan=scan), (2, 64, 64, 3))
        for scan in (True, False)
    )
    assert scanned.total == unrolled.total
    assert scanned.rows.keys() == unrolled.rows.keys()
    for name, row in scanned.rows.items():
        assert row.parameters == unrolled.rows[name].parameters
        assert row.multiply_adds == unrolled.rows[name].multiply_adds
    if remat == "none":
        assert scanned.rows == unrolled.rows


def test_activation_bytes_know_rematerialization_and_dtype():
    sizes = [
        summarize(full_size("vit_ti16", **options), (256, 64, 64, 3)).rows["blocks.5"].activation_bytes
        for options in (
            {"remat": "none"},
            {"remat": "none", "dtype": jnp.bfloat16},
            {"remat": "attention"},
            {"remat": "full"},
            {},
            {"scan": False},
        )
    ]
    full, half, attention, inputs, scanned, unrolled = sizes
    assert inputs == 256 * 17 * 192 * 4
    assert attention == 9 * inputs  # input, q k v, heads, 4 x hidden
    assert attention < half < full
    assert scanned == 10 * inputs  # and what the projection of heads gives
    assert unrolled == full


def test_table_folds_equal_layers():
    text = str(summarize(full_size("vit_ti16"), (1, 224, 224, 3)))
    assert "blocks.[0:12] (each)" in text
    assert "blocks.3" not in text
    assert "5,717,416" in text
    assert "1.25 G" in text
    assert max(map(len, text.splitlines())) <= 100


class Small(nnx.Module):
    """Two groups of unlike layers in a scan of their own, a grouped convolution, a branch."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((3, 3, 2, 8)))
        self.stages = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(2)])

    def __call__(self, images):
        with jax.named_scope("kernel"):
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                images, self.kernel[...], (2, 2), "SAME", feature_group_count=2, dimension_numbers=layout
            )
        for index, stage in enumerate(self.stages):
            with jax.named_scope(f"stages.{index}"):
                x = jax.lax.fori_loop(0, 1 + index, lambda _, x, stage=stage: jax.checkpoint(stage)(x), x)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x.mT @ x, lambda x: x, x)


def test_other_models_loops_branches_and_grouped_convolutions():
    summary = summarize(Small(), (1, 8, 8, 4))
    places = 4 * 4
    assert summary.rows["kernel"].multiply_adds == places * 8 * 3 * 3 * 2
    assert summary.rows["stages.0"].multiply_adds == places * 8 * 8
    assert summary.rows["stages.1"].multiply_adds == 2 * places * 8 * 8
    assert summary.rows["(other)"].multiply_adds == 2 * 4 * 4 * 4 * 8
    assert summary.rows["stages.1"].parameters == 8 * 8 + 8
