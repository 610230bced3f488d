"""Schedules against numbers worked out by hand."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from training.optim import schedules

pytestmark = pytest.mark.smoke


def rates(schedule, steps, total=100, warmup=10, cooldown=0, final_fraction=0.0, learning_rate=2.0):
    cfg = SimpleNamespace(schedule=schedule, learning_rate=learning_rate, final_fraction=final_fraction)
    rate = schedules.learning_rate(cfg, total, warmup, cooldown)
    return [float(rate(step)) for step in steps]


def test_warmup_rises_from_zero_and_is_the_same_for_every_schedule():
    for name in schedules.DECAYS:
        np.testing.assert_allclose(rates(name, [0, 1, 5, 10]), [0.0, 0.2, 1.0, 2.0], rtol=1e-6)


def test_cosine():
    # 55 is half way from 10 to 100, 40 a third.
    np.testing.assert_allclose(rates("cosine", [55, 40, 100, 120]), [1.0, 1.5, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(rates("cosine", [55, 100], final_fraction=0.1), [1.1, 0.2], rtol=1e-6)


def test_linear():
    np.testing.assert_allclose(rates("linear", [55, 91, 100, 120]), [1.0, 0.2, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(rates("linear", [55, 100], final_fraction=0.5), [1.5, 1.0], rtol=1e-6)


def test_constant_with_cooldown():
    np.testing.assert_allclose(rates("constant", [50, 80, 90, 95, 100], cooldown=20), [2, 2, 1, 0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(rates("constant", [90, 100], cooldown=20, final_fraction=0.5), [1.5, 1.0], rtol=1e-6)


def test_rsqrt_has_a_fixed_timescale_and_a_linear_end():
    steps = [10_000, 40_000, 85_000, 95_000, 100_000]
    # 85,000 is 7.5 timescales after the warm-up, 95,000 is 8.5 and half of the cool-down.
    expected = [1.0, 0.5, 1 / math.sqrt(8.5), 0.5 / math.sqrt(9.5), 0.0]
    got = rates("rsqrt", steps, total=100_000, warmup=10_000, cooldown=10_000, learning_rate=1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_traced_step_and_no_warmup():
    cfg = SimpleNamespace(schedule="cosine", learning_rate=1.0, final_fraction=0.0)
    rate = schedules.learning_rate(cfg, 10, 0, 0)
    assert float(rate(0)) == 1.0
    np.testing.assert_allclose(jax.jit(rate)(5), 0.5, rtol=1e-6)
    assert rate(5).dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "phases", "words"),
    [
        ({"schedule": "cosin"}, (10, 0, 0), "config.optim.schedule.*'cosin'.*linear.*nearest: cosine"),
        ({"final_fraction": 1.5}, (10, 0, 0), r"config.optim.final_fraction: 1.5"),
        ({}, (10, 8, 3), r"config.optim.warmup \(8 steps\).*config.train.steps \(10 steps\)"),
        ({}, (10, -1, 0), r"config.optim.warmup \(-1 steps\)"),
    ],
)
def test_bad_values_are_named_in_one_line(changes, phases, words):
    cfg = SimpleNamespace(**{"schedule": "cosine", "learning_rate": 1.0, "final_fraction": 0.0} | changes)
    with pytest.raises(ValueError, match=words) as caught:
        schedules.learning_rate(cfg, *phases)
    assert "\n" not in str(caught.value)
