"""Merging of partial attention outputs against attention over all keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import dense_attention, merge_attention


@jax.jit
def partial_attention(q, k, v):
    logits = jnp.einsum("bnhd,bmhd->bnhm", q, k) * q.shape[-1] ** -0.5
    return dense_attention(q, k, v), jax.nn.logsumexp(logits, axis=-1)


def tokens(count, seed):
    return jax.random.normal(jax.random.key(seed), (2, count, 3, 4))


def test_parts_give_the_whole_and_its_gradient():
    q, k, v, cotangent = tokens(5, 0), 3 * tokens(11, 1), tokens(11, 2), tokens(5, 3)

    def whole(k, v):
        return (dense_attention(q, k, v) * cotangent).sum()

    def merged(k, v):
        parts = [partial_attention(q, k[:, rows], v[:, rows]) for rows in (slice(0, 2), slice(2, 3), slice(3, 11))]
        return (merge_attention(*zip(*parts, strict=True))[0] * cotangent).sum()

    value, gradients = jax.jit(jax.value_and_grad(merged, (0, 1)))(k, v)
    expected, expected_gradients = jax.jit(jax.value_and_grad(whole, (0, 1)))(k, v)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_sets_without_keys():
    out, lse = partial_attention(tokens(5, 0), tokens(4, 1), tokens(4, 2))
    nothing = jnp.full_like(out, jnp.nan), jnp.full_like(lse, -jnp.inf)

    def merge(out, lse):
        return merge_attention([nothing[0], out], [nothing[1], lse])

    for ours, theirs in zip(merge(out, lse), (out, lse), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda *parts: merge(*parts)[0].sum(), (0, 1)))(out, lse)
    np.testing.assert_allclose(gradients[0], 1, rtol=1e-6)
    np.testing.assert_allclose(gradients[1], 0, atol=1e-5)

    empty, below = merge_attention([nothing[0]] * 2, [nothing[1]] * 2)
    assert (empty == 0).all()
    assert (below == -jnp.inf).all()
    lost = jax.jit(jax.grad(lambda lse: merge_attention([out], [lse])[0].sum()))(nothing[1])
    assert (lost == 0).all()


def test_half_precision_and_large_logarithms():
    out, lse = partial_attention(tokens(5, 0), tokens(4, 1), tokens(4, 2))
    merged, total = merge_attention([out.astype(jnp.bfloat16)] * 2, [lse + 1e4] * 2)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(merged.astype(jnp.float32), out, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(total, lse + 1e4 + np.log(2), rtol=1e-6)


def test_one_logarithm_for_each_output():
    with pytest.raises(ValueError, match="2 outputs cannot be merged with 1"):
        merge_attention([tokens(2, 0)] * 2, [tokens(2, 0)[..., 0]])
    with pytest.raises(ValueError, match="0 outputs"):
        merge_attention([], [])
