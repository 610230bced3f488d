"""Patterns, pieces of stacked leaves, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.core.state import unstack
from training.optim import multipliers, patterns, pieces


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("pattern", "name", "matched"),
    [
        ("blocks.1", "blocks.1.norm1.bias", True),
        ("blocks.1", "blocks.10.norm1.bias", False),
        ("blocks.[0-5]", "blocks.5.attn.qkv.kernel", True),
        (r"blocks\.\d+\.attn", "blocks.11.attn.qkv.kernel", True),
        (r".*\.bias", "head.bias", True),
        ("bias", "head.bias", False),
        ("head", "head_dist.kernel", False),
        ("patch_embed|pos_embed", "patch_embed.kernel", True),
    ],
)
def test_a_pattern_names_a_parameter_or_a_module(pattern, name, matched):
    assert patterns.matches(pattern, name) == matched


@pytest.mark.parametrize(
    ("name", "shape", "decayed_in"),
    [
        ("blocks.3.mlp.fc1.kernel", (4, 8), "kernels matrices all"),
        ("blocks.[0::1].mlp.fc1.kernel", (12, 4, 8), "kernels matrices all"),
        ("patch_embed.kernel", (2, 2, 3, 8), "kernels matrices all"),
        ("token_mixing.kernel", (4, 8), "kernels matrices all"),
        ("text.embedding", (100, 8), "matrices all"),
        ("blocks.[0::1].norm1.scale", (12, 8), "all"),
        ("blocks.[0::1].attn.slopes", (12, 8), "all"),
        ("blocks.[0::1].attn.bias", (12, 3, 8), "all"),
        ("pos_embed", (1, 16, 8), "all"),
        ("pos_embed.embedding", (16, 8), "all"),
        ("cls_token", (1, 1, 8), "all"),
        ("register_tokens", (1, 4, 8), "all"),
        ("attn_pool.probe", (1, 1, 8), "all"),
        ("blocks.0.attn.rel_pos_table", (49, 3), "all"),
    ],
)
def test_decayed_parameters(name, shape, decayed_in):
    found = [which for which in multipliers.DECAYED if multipliers.decayed(which, {name: leaf(*shape)})[name]]
    assert found == decayed_in.split()


@settings(max_examples=25, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=9), start=st.integers(0, 2), step=st.integers(1, 3))
def test_pieces_are_the_owned_layers_and_no_others(mask, start, step):
    name = f"blocks.[{start}::{step}].w"
    flat = {name: np.arange(len(mask), dtype=np.float32)[:, None] * step + start}
    cut = pieces.cut({name: np.array(mask)})
    taken = unstack(pieces.take(flat, cut))
    assert taken.keys() == {f"blocks.{start + step * i}.w" for i, owned in enumerate(mask) if owned}
    assert all(int(value[0]) == int(key.split(".")[1]) for key, value in taken.items())
    put = pieces.put({name: jnp.full((len(mask), 1), -1.0)}, pieces.take(flat, cut), cut)
    np.testing.assert_array_equal(put[name], np.where(np.array(mask)[:, None], flat[name], -1.0))


def test_pieces_of_usual_patterns_are_few():
    for mask, count in (([0] * 6 + [1] * 6, 1), ([0, 1] * 6, 1), ([1] * 12, 1), ([1, 1, 0] * 4, 4)):
        assert len(pieces.cut({"blocks.[0::1].w": np.array(mask, bool)})) == count


def test_models_without_blocks_have_no_layer_order():
    with pytest.raises(ValueError, match="layer_decay"):
        multipliers.layer_scales({"head.kernel": leaf(2, 2)}, 0.5, None, None)
