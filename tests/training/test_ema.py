"""The moving average against a loop by hand."""

import jax.numpy as jnp
import numpy as np

from training.optim import ema


def test_average_with_warmup_in_numbers():
    average = {"params": {"w": jnp.array([1.0])}, "model_state": {"count": jnp.array(0)}}
    by_hand = 1.0
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 0.3, 0.3)):  # 4/13 > 0.3
        new = {"params": {"w": jnp.array([float(step)])}, "model_state": {"count": jnp.array(step)}}
        average = ema.update_ema(average, new, step, 0.3)
        by_hand = decay * by_hand + (1 - decay) * step
        np.testing.assert_allclose(average["params"]["w"], [by_hand], rtol=1e-6)
        assert int(average["model_state"]["count"]) == step


def test_average_keeps_its_type():
    new = ema.update_ema({"w": jnp.zeros(2, jnp.float32)}, {"w": jnp.ones(2, jnp.bfloat16)}, 10**6, 0.9999)
    assert new["w"].dtype == jnp.float32
    np.testing.assert_allclose(new["w"], 1e-4, rtol=1e-2)
