"""Masks: what each kind allows, several together, and what is no mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import Mask, causal, dense_attention, lengths, sliding_window
from attn.core.masks import as_mask

pytestmark = pytest.mark.smoke


def pairs(queries, keys, rule, first=None):
    """By a rule of places (query, key); queries are the last of the keys unless `first` says where they begin."""
    first = keys - queries if first is None else first
    return np.array([[rule(i + first, j) for j in range(keys)] for i in range(queries)])


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (2, 5), (1, 4)])
def test_rules_count_from_the_last_key(queries, keys):
    for mask, rule in (
        (causal(), lambda i, j: j <= i),
        (sliding_window(2), lambda i, j: abs(i - j) < 2),
        (causal() & sliding_window(3), lambda i, j: i - 3 < j <= i),
    ):
        found = mask.dense(2, 3, queries, keys)
        assert found.shape == (1, 1, queries, keys)
        np.testing.assert_array_equal(found[0, 0], pairs(queries, keys, rule))


def test_queries_may_stand_elsewhere():
    """As in a cache that is longer than what there is; the place may be traced."""

    @jax.jit
    def dense(offset):
        return (Mask(offset=offset, is_causal=True) & sliding_window(2)).dense(1, 1, 2, 6)[0, 0]

    for offset in (0, 3):
        np.testing.assert_array_equal(dense(offset), pairs(2, 6, lambda i, j: i - 2 < j <= i, offset))


def test_several_masks_allow_what_all_do():
    some = np.random.default_rng(0).random((2, 1, 4, 4)) < 0.6
    plain = np.random.default_rng(1).random((4, 4)) < 0.8
    mask = some & (causal() & lengths([3, 4]) & plain & lengths([4, 2])) & sliding_window(4) & sliding_window(3)
    ends = np.arange(4) < np.array([3, 2])[:, None]
    expected = some & plain & pairs(4, 4, lambda i, j: i - 3 < j <= i) & ends[:, None, None]
    np.testing.assert_array_equal(mask.dense(2, 3, 4, 4), expected)
    assert mask.kinds == ("boolean", "lengths", "causal", "window")
    assert Mask().kinds == ()
    assert Mask().dense(2, 3, 4, 5).all()


def test_attention_under_a_mask_is_that_to_fewer_keys():
    """And under `jax.vmap`, since a mask is a pytree."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 4, 1, 8)).astype(np.float32)
    found = jax.jit(lambda ends: dense_attention(q, k, v, mask=lengths(ends)))(jnp.array([3, 1]))
    np.testing.assert_allclose(found[:1], dense_attention(q[:1], k[:1, :3], v[:1, :3]), atol=1e-6)
    np.testing.assert_allclose(found[1], np.broadcast_to(v[1, :1], (4, 1, 8)), atol=1e-6)
    masks = jax.vmap(lambda end: lengths(end[None]))(jnp.array([3, 1]))
    mapped = jax.vmap(lambda q, k, v, mask: dense_attention(q[None], k[None], v[None], mask=mask)[0])(q, k, v, masks)
    np.testing.assert_allclose(mapped, found, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_mask(np.ones((3, 3))), r"mask float64\[3, 3\]: must be boolean, True where a query may look"),
        (lambda: as_mask(np.ones((2, 3, 3), bool)), r"mask \[2, 3, 3\]: must be \[queries, keys\] or \[batch, heads, "),
        (lambda: causal() & np.ones(3, bool), r"mask \[3\]: must be"),
        (
            lambda: as_mask(np.ones((2, 1, 3, 3), bool)).dense(3, 1, 3, 3),
            r"mask \[2, 1, 3, 3\]: .*\[3, 1, 3, 3\]",
        ),
        (lambda: lengths([1.0, 2.0]), r"lengths float32\[2\]: must be integers, one for each example"),
        (lambda: lengths(3), r"lengths int32\[\]: must be integers, one for each"),
        (lambda: sliding_window(0), "window=0 of a mask; allowed: an integer of at least 1"),
        (lambda: sliding_window(2.0), "window=2.0 of a mask"),
        (
            lambda: Mask(offset=jnp.array(1)) & Mask(offset=jnp.array(2)),
            "two masks with an offset each cannot be",
        ),
    ],
)
def test_what_is_no_mask_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
