"""Dropout and drop path: what is kept is scaled without a bias of its own, in every dtype, and rates are checked."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.dense.xla import dropped
from models.layers.drop import drop_path, dropout

KEY = jax.random.key(0)
RATES = (0.1, 0.3, 0.37, 0.8)
DROPS = {"dropout": dropout, "drop path": drop_path}


def of_rate(drop, rate, traced):
    """`drop(x)` in training, its rate known or traced as in a scanned layer."""
    if not traced:
        return lambda x: drop(x, rate, train=True, key=KEY)
    return lambda x: jax.jit(lambda x, rate: drop(x, rate, train=True, key=KEY))(x, np.float32(rate))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", DROPS)
def test_what_is_kept_is_scaled_and_rounded_once(name, rate, traced):
    """Value by value: the product of float32 in the dtype; and so is the gradient."""
    run = of_rate(DROPS[name], rate, traced)
    x, g = (jax.random.normal(jax.random.key(seed), (4000, 3)).astype(jnp.bfloat16) for seed in (1, 2))
    y, pullback = jax.vjp(run, x)
    assert y.dtype == jnp.bfloat16
    kept = np.asarray(y != 0)
    assert abs(kept.mean() - (1 - rate)) < 0.04
    factor = 1 / (1 - np.float32(rate)) if traced else np.float32(1 / (1 - rate))
    for found, given in ((y, x), (pullback(g)[0], g)):
        product = np.asarray(given, np.float32) * factor
        np.testing.assert_array_equal(found, np.where(kept, product, 0).astype(jnp.bfloat16))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", DROPS)
def test_the_mean_stays(name, rate):
    """Of ones as well as bfloat16 can, half of its last bit; of numbers of all sizes, whose roundings even out, to the
    noise of the draw.
    """
    run = of_rate(DROPS[name], rate, traced=False)
    ones = run(jnp.ones((40_000, 5), jnp.bfloat16)).astype(jnp.float32)
    assert abs(float(ones[ones > 0].mean()) * (1 - rate) - 1) <= 2**-9
    x = jax.random.uniform(jax.random.key(3), (40_000, 5), minval=1, maxval=2).astype(jnp.bfloat16)
    y = np.asarray(run(x), np.float64)
    kept = y != 0
    assert abs(y[kept].mean() / np.asarray(x, np.float64)[kept].mean() * (1 - rate) - 1) < 1e-4


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", DROPS)
def test_a_traced_rate_draws_and_scales_alike(name, rate):
    """A scanned layer and an unrolled one, whose rate is a number of NumPy in float32, bit for bit."""
    x = jax.random.normal(jax.random.key(1), (4000, 3))
    one, other = (of_rate(DROPS[name], np.float32(rate), traced)(x) for traced in (True, False))
    np.testing.assert_array_equal(one, other)


def test_probabilities_are_divided_in_float32():
    """As the softmax gives them; only what multiplies the values is rounded."""
    probs = jax.nn.softmax(jax.random.normal(KEY, (2, 3, 50, 40)))
    found = dropped(probs, 0.3, KEY)
    assert found.dtype == jnp.float32
    kept = np.asarray(found != 0)
    assert 0.65 < kept.mean() < 0.75
    np.testing.assert_allclose(found, np.where(kept, np.asarray(probs, np.float64) / 0.7, 0), rtol=3e-7)


@pytest.mark.parametrize("rate", [1, 1.0, -0.1, 2, float("nan"), np.float32(1.5), True])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("dropout", partial(dropout, train=True, key=KEY)),
        ("dropout", partial(dropout, train=False, key=None)),
        ("drop path", partial(drop_path, train=True, key=KEY)),
        ("drop path", partial(drop_path, train=False, key=None)),
    ],
)
def test_a_rate_that_is_no_share_is_one_line(name, call, rate):
    with pytest.raises(ValueError, match=f"{name} rate {rate}; allowed: at least 0 and less than 1") as error:
        call(jnp.ones((2, 3)), rate)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", [0, 0.0, np.float32(0)])
def test_a_rate_of_nothing_draws_nothing(rate):
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert dropout(x, rate, train=True, key=None) is x
    assert drop_path(x, rate, train=True, key=None) is x
