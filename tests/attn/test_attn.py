"""Attention primitives against slow oracles in float64, and position tables against PyTorch's and SciPy's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from attn import Grid, dense_attention, resample_positions, sincos_2d

pytestmark = pytest.mark.smoke


def attention_oracle(q, k, v, mask=None, bias=None, scale=None):
    """One query and head at a time, float64."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    batch, queries, heads, dim = q.shape
    out = np.zeros((batch, queries, heads, v.shape[-1]))
    for b in range(batch):
        for n in range(queries):
            for h in range(heads):
                logits = k[b, :, h] @ q[b, n, h] * (dim**-0.5 if scale is None else scale)
                if bias is not None:
                    logits = logits + np.broadcast_to(bias, (batch, heads, queries, k.shape[1]))[b, h, n]
                weights = np.exp(logits - logits.max())
                if mask is not None:
                    weights = weights * np.broadcast_to(mask, (batch, heads, queries, k.shape[1]))[b, h, n]
                if weights.sum() > 0:
                    out[b, n, h] = weights @ v[b, :, h] / weights.sum()
    return out


@pytest.fixture
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 6))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("case", ["plain", "mask", "bias", "scale"])
def test_dense_attention_equals_oracle(qkv, case):
    rng = np.random.default_rng(1)
    options = {
        "plain": {},
        "mask": {"mask": rng.random((2, 1, 5, 7)) < 0.6},
        "bias": {"bias": rng.normal(size=(1, 3, 5, 7)).astype(np.float32)},
        "scale": {"scale": 0.7},
    }[case]
    np.testing.assert_allclose(dense_attention(*qkv, **options), attention_oracle(*qkv, **options), atol=2e-6)


def test_query_that_sees_nothing_gets_zeros_and_finite_gradients(qkv):
    mask = np.ones((1, 1, 5, 7), bool)
    mask[..., 2, :] = False

    def total(q):
        return dense_attention(q, *qkv[1:], mask=mask)

    assert not total(qkv[0])[:, 2].any()
    gradient = jax.grad(lambda q: jnp.sum(total(q) ** 2))(qkv[0])
    assert np.isfinite(gradient).all()
    assert not gradient[:, 2].any()


def test_an_edit_sees_logits_and_probabilities_and_may_change_them(qkv):
    """Logits are those after scale, bias and mask; the logsumexp is that of edited ones."""
    mask = np.ones((1, 1, 5, 7), bool)
    mask[..., 3] = False
    seen = {}

    def remember(site, value):
        seen[site] = value
        return value

    options = {"mask": mask, "bias": np.full((1, 3, 1, 1), 0.5, np.float32), "return_lse": True}
    plain, lse = dense_attention(*qkv, **options)
    np.testing.assert_array_equal(dense_attention(*qkv, edit=remember, **options)[0], plain)
    assert list(seen) == ["logits", "probs"]
    expected = np.einsum("bnhd,bmhd->bhnm", *qkv[:2]) / 2 + 0.5
    np.testing.assert_allclose(seen["logits"], np.where(mask, expected, np.finfo(np.float32).min), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(np.exp(seen["logits"] - np.swapaxes(lse, 1, 2)[..., None]), seen["probs"], atol=1e-6)

    def cold(site, value):
        return value * 0.5 if site == "logits" else value

    found, lse = dense_attention(*qkv, edit=cold, return_lse=True)
    np.testing.assert_allclose(found, attention_oracle(*qkv, scale=0.25), atol=2e-6)
    np.testing.assert_allclose(lse, dense_attention(*qkv, scale=0.25, return_lse=True)[1], atol=1e-6)
    halved = dense_attention(*qkv, edit=lambda site, value: value * 0.5 if site == "probs" else value)
    np.testing.assert_allclose(halved, attention_oracle(*qkv) / 2, atol=2e-6)


def test_attention_dropout_keeps_the_mean_and_needs_a_key(qkv):
    keys = jax.random.split(jax.random.key(3), 3000)
    dropped = jax.vmap(lambda key: dense_attention(*qkv, dropout=0.3, key=key))(keys)
    np.testing.assert_allclose(dropped.mean(0), dense_attention(*qkv), atol=0.1)
    with pytest.raises(ValueError, match="key"):
        dense_attention(*qkv, dropout=0.3)


def test_bfloat16_softmax_runs_in_float32(qkv):
    # Logits near 256 that differ by 0.5: bfloat16 has steps of 1 or 2 there and would see no difference.
    q = jnp.asarray([16.0, 0.5], jnp.bfloat16).reshape(1, 1, 1, 2)
    k = jnp.asarray([[16.0, 1.0], [16.0, 2.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    expected = 1 / (1 + np.exp(-0.5))
    assert abs(float(dense_attention(q, k, v, scale=1.0).squeeze()) - expected) < 0.004


def test_grid_counts_tokens():
    grid = Grid((3, 5), prefix=2)
    assert (grid.places, grid.tokens) == (15, 17)
    assert hash(grid) == hash(Grid((3, 5), 2))


def test_sincos_2d_by_its_formula():
    table = sincos_2d((2, 3), 16)
    for row in range(2):
        for column in range(3):
            omega = np.array([10000 ** (-k / 3) for k in range(4)])
            expected = [f(p * omega) for p in (column, row) for f in (np.sin, np.cos)]
            np.testing.assert_allclose(table[row * 3 + column], np.concatenate(expected), atol=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d((2, 2), 10)


def test_resample_copies_prefix_and_keeps_constants():
    table = np.full((1, 2 + 12, 4), 3.0, np.float32)
    table[:, :2] = 7.0
    for method in ("bicubic", "bilinear", "corners", "dinov2"):
        out = resample_positions(table, (3, 4), (5, 2), prefix=2, method=method)
        assert out.shape == (1, 12, 4)
        np.testing.assert_array_equal(out[:, :2], 7.0)
        np.testing.assert_allclose(out[:, 2:], 3.0, atol=1e-6)
        np.testing.assert_allclose(resample_positions(jnp.asarray(table), (3, 4), (5, 2), prefix=2, method=method), out)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 9)), ((9, 8), (4, 3)), ((5, 6), (6, 4))])
def test_resample_against_independent_implementations(old, new):
    """`jax.image` follows PyTorch's antialiased bicubic; SciPy is what big_vision calls. PyTorch: test_vit_golden."""
    table = np.random.default_rng(0).normal(size=(1, old[0] * old[1], 3)).astype(np.float32)
    grid = table.reshape(*old, 3)
    cubic = jax.image.resize(grid, (*new, 3), "cubic", antialias=True)
    np.testing.assert_allclose(resample_positions(table, old, new)[0].reshape(*new, 3), cubic, atol=1e-5)
    linear = jax.image.resize(grid, (*new, 3), "linear", antialias=False)
    np.testing.assert_allclose(
        resample_positions(table, old, new, method="bilinear")[0].reshape(*new, 3), linear, atol=1e-5
    )
    zoomed = scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    np.testing.assert_allclose(
        resample_positions(table, old, new, method="corners")[0].reshape(*new, 3), zoomed, atol=1e-5
    )


def test_resample_dinov2_against_numbers_from_pytorch():
    """`interpolate(x, scale_factor=(5 + 0.1) / 3, mode="bicubic")` of PyTorch 2.13 on these numbers."""
    table = np.array([0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0, 64.0], np.float32).reshape(1, 9, 1)
    expected = [
        [-0.9169, -0.8868, -0.5203, 0.9408, 2.1489],
        [1.2146, 2.1956, 4.1286, 7.2405, 9.4820],
        [7.5784, 10.1260, 14.6393, 20.4706, 24.4142],
        [23.9582, 28.1566, 35.3893, 44.0865, 49.8240],
        [36.8537, 42.0855, 51.0203, 61.5114, 68.3717],
    ]
    result = resample_positions(table, (3, 3), (5, 5), method="dinov2")
    np.testing.assert_allclose(result.reshape(5, 5), expected, rtol=1e-5, atol=1e-4)


def test_resample_says_what_is_wrong():
    table = np.zeros((1, 10, 4), np.float32)
    with pytest.raises(ValueError, match=r"10 rows, expected 1 \+ 2 x 2"):
        resample_positions(table, (2, 2), (3, 3), prefix=1)
    with pytest.raises(ValueError, match="unknown position resampling 'nearest'"):
        resample_positions(table, (3, 3), (4, 4), prefix=1, method="nearest")
