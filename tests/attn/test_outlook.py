"""Outlook attention against explicit loops in float64: values, gradients, odd maps, edits, and the module around it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxprs import largest
from official import QUICK_COMPILE

from attn import Grid, outlook_attention
from attn.outlook import outlook_centres, xla
from kernels.outlook import oracle
from models.attention.outlook import OutlookAttention
from models.core.call import Call, Memory

# (rows, columns, window, stride): odd and even sides, maps smaller than a window, other windows.
MAPS = [(4, 6, 3, 2), (5, 7, 3, 2), (1, 2, 3, 2), (5, 4, 3, 1), (7, 5, 5, 2), (8, 7, 5, 3), (5, 3, 1, 1), (7, 4, 3, 3)]


def definition(logits, v, window, stride, scale):
    """One window after the other, in float64."""
    return oracle.forward(logits, v, window=window, stride=stride, scale=scale)[0]


def arrays(rows, columns, window, stride, batch=2, heads=2, depth=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, -(-rows // stride), -(-columns // stride), heads, window**2, window**2)
    return rng.normal(size=shape), rng.normal(size=(batch, rows, columns, heads, depth))


def run(logits, v, window, stride, **options):
    call = partial(outlook_attention, window=window, stride=stride, **options)
    return jax.jit(call, compiler_options=QUICK_COMPILE)(jnp.asarray(logits, jnp.float32), jnp.asarray(v, jnp.float32))


@pytest.mark.smoke
@pytest.mark.parametrize(("rows", "columns", "window", "stride"), MAPS)
def test_it_equals_the_definition(rows, columns, window, stride):
    logits, v = arrays(rows, columns, window, stride)
    for scale in (None, 0.7):
        expected = definition(logits, v, window, stride, 3**-0.5 if scale is None else scale)
        np.testing.assert_allclose(run(logits, v, window, stride, scale=scale), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("rows", "columns", "window", "stride"), [(4, 6, 3, 2), (5, 3, 3, 2), (5, 6, 5, 3)])
def test_gradients_are_those_of_the_definition(rows, columns, window, stride):
    """Differences of the loops in float64, which are exact to about 1e-9, in a few random directions."""
    logits, v = arrays(rows, columns, window, stride, batch=1)
    rng = np.random.default_rng(1)
    d_out = rng.normal(size=v.shape)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def gradients(logits, v):
        call = partial(outlook_attention, window=window, stride=stride)
        return jax.vjp(call, logits, v)[1](jnp.asarray(d_out, jnp.float32))

    found = gradients(jnp.asarray(logits, jnp.float32), jnp.asarray(v, jnp.float32))
    for _ in range(4):
        steps = [rng.normal(size=array.shape) for array in (logits, v)]
        slope = 0.0
        for sign in (1, -1):
            moved = [array + sign * 1e-5 * step for array, step in zip((logits, v), steps, strict=True)]
            slope += sign * np.sum(d_out * definition(*moved, window, stride, 3**-0.5)) / 2e-5
        ours = sum(float(np.sum(np.asarray(g, np.float64) * step)) for g, step in zip(found, steps, strict=True))
        size = np.sqrt(sum(float(np.sum(np.square(g))) for g in found))
        assert abs(ours - slope) < 2e-6 * size, (ours, slope)


def test_windows_add_up_and_zeros_outside_take_their_share():
    """Equal weights on a map of ones: each window gives its share of places that there are, to every one of them."""
    v = np.ones((1, 5, 4, 1, 1))
    out = run(np.zeros((1, 3, 2, 1, 9, 9)), v, 3, 2)[0, ..., 0, 0]
    # Rows have 2, 3, 2 places of the three windows in the map, columns 2 and 3 of the two.
    rows, columns = np.array([2, 2 + 3, 3, 3 + 2, 2]) / 3, np.array([2, 2 + 3, 3, 3]) / 3
    np.testing.assert_allclose(out, rows[:, None] * columns, rtol=1e-6)


@pytest.mark.parametrize(("rows", "columns", "stride"), [(4, 6, 2), (5, 7, 2), (7, 5, 3), (1, 1, 2), (3, 4, 1)])
def test_centres_are_means_of_the_places_that_there_are(rows, columns, stride):
    x = np.random.default_rng(0).normal(size=(2, rows, columns, 3)).astype(np.float32)
    found = outlook_centres(jnp.asarray(x), stride=stride)
    assert found.shape == (2, -(-rows // stride), -(-columns // stride), 3)
    for r, c in np.ndindex(found.shape[1:3]):
        block = x[:, r * stride : (r + 1) * stride, c * stride : (c + 1) * stride]
        np.testing.assert_allclose(found[:, r, c], block.mean((1, 2)), atol=1e-6)


def test_an_edit_sees_and_changes():
    logits, v = arrays(5, 4, 3, 2)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def attend(logits, v):
        seen = {}

        def edit(site, value):
            seen[site] = value
            return jnp.ones_like(value) / 9 if site == "probs" else value

        return outlook_attention(logits, v, edit=edit), seen

    out, seen = attend(*(jnp.asarray(array, jnp.float32) for array in (logits, v)))
    assert set(seen) == {"logits", "probs"}
    np.testing.assert_allclose(seen["logits"], logits * 3**-0.5, rtol=1e-6)
    np.testing.assert_allclose(seen["probs"].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(out, definition(0 * logits, v, 3, 2, 1.0), atol=1e-6)


def test_the_logsumexp_is_that_of_what_an_edit_gives():
    logits, v = arrays(3, 3, 3, 2, batch=1)
    cold = lambda site, value: value / 2 if site == "logits" else value  # noqa: E731
    found = run(logits, v, 3, 2, scale=1.0, edit=cold, return_lse=True)
    for one, other in zip(found, run(logits, v, 3, 2, scale=0.5, return_lse=True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_dropout_keeps_the_mean_and_needs_a_key():
    logits, v = arrays(4, 4, 3, 2)
    with pytest.raises(ValueError, match="dropout needs a key"):
        run(logits, v, 3, 2, dropout=0.5)
    outs = jax.vmap(lambda key: run(logits, v, 3, 2, dropout=0.5, key=key))(jax.random.split(jax.random.key(0), 400))
    assert float(outs.std(0).mean()) > 0.1
    np.testing.assert_allclose(outs.mean(0), run(logits, v, 3, 2), atol=0.25)


def test_bfloat16_has_its_softmax_in_float32():
    logits, v = arrays(6, 6, 3, 2)
    low = [jnp.asarray(array, jnp.bfloat16) for array in (logits, v)]
    dtypes = {}

    def edit(site, value):
        dtypes[site] = value.dtype
        return value

    out = jax.jit(partial(outlook_attention, edit=edit), compiler_options=QUICK_COMPILE)(*low)
    assert (out.dtype, dtypes) == (jnp.bfloat16, dict.fromkeys(("logits", "probs"), jnp.float32))
    exact = definition(*(np.asarray(array, np.float64) for array in low), 3, 2, 3**-0.5)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.03)


def test_nothing_larger_than_the_logits_is_made():
    """No array of all places times all weights, forward or backward: 9 of 4 places for values, 81 of 4 for weights."""
    shape = (1, 28, 28, 6, 32)
    logits = jax.ShapeDtypeStruct((1, 14, 14, 6, 9, 9), jnp.float32)
    v = jax.ShapeDtypeStruct(shape, jnp.float32)
    settings = {"window": 3, "stride": 2, "scale": 1.0}
    for step, arguments in ((xla.forward, (logits, v)), (xla.backward, (logits, v, v))):
        size = largest(partial(step, **settings), *arguments)
        assert 14 * 14 * 9 * 192 <= size <= 14 * 14 * 9 * 192 * 1.15  # the unfolded values, with their border


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 2}, "window=2, stride=2; allowed: an odd window"),
        ({"stride": 4}, "window=3, stride=4; allowed"),
        ({"stride": 1}, r"logits of shape \(1, 2, 2, 2, 9, 9\): .* they are \(1, 4, 4, 2, 9, 9\)"),
    ],
)
def test_a_wrong_choice_is_one_line(options, message):
    logits, v = arrays(4, 4, 3, 2, batch=1)
    with pytest.raises(ValueError, match=message) as error:
        outlook_attention(jnp.asarray(logits), jnp.asarray(v), **options)
    assert "\n" not in str(error.value)


def test_the_module_computes_what_the_paper_says():
    """Weights come from the centres by one linear map, heads first, then output place, then input place."""
    module = OutlookAttention(8, 2, rngs=nnx.Rngs(0))
    module.weights.kernel[...] = jax.random.normal(jax.random.key(1), (8, 2 * 81))
    x = jax.random.normal(jax.random.key(2), (2, 15, 8))
    value, weights, proj = (
        np.asarray(layer.kernel[...], np.float64) for layer in (module.value, module.weights, module.proj)
    )
    grid = np.asarray(x, np.float64).reshape(2, 5, 3, 8)
    blocks = [[grid[:, r : r + 2, c : c + 2] for c in (0, 2)] for r in (0, 2, 4)]
    centres = np.stack([np.stack([block.mean((1, 2)) for block in row], 1) for row in blocks], 1)
    logits = (centres @ weights).reshape(2, 3, 2, 2, 9, 9)
    heads = definition(logits, (grid @ value).reshape(2, 5, 3, 2, 4), 3, 2, 0.5)
    found = jax.jit(lambda x: module(x, Call(Grid((5, 3)))), compiler_options=QUICK_COMPILE)(x)
    np.testing.assert_allclose(found, heads.reshape(2, 15, 8) @ proj, atol=1e-5)


def test_the_module_has_no_meaning_for_a_memory_or_prefix():
    module = nnx.eval_shape(lambda: OutlookAttention(8, 2, rngs=nnx.Rngs(0)))
    x = jnp.zeros((1, 10, 8))
    for call, message in (
        (Call(Grid((3, 3), prefix=1)), "outlook attention has no place for 1 prefix tokens"),
        (Call(Grid((10,))), r"outlook attention is for grids of 2 axes, not for one of \(10,\)"),
        (Call(Grid((5, 2)), memory=Memory(x)), r"outlook attention attends to no other stream \(memory\)"),
    ):
        with pytest.raises(ValueError, match=message):
            module(x, call)
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        OutlookAttention(8, 3, rngs=nnx.Rngs(0))
