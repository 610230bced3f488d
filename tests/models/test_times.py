"""The product with a weight has the derivatives of a plain product, whatever they are lowered to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.core.times import times

RANDOM = np.random.default_rng(0)
X, KERNEL = (jnp.asarray(RANDOM.standard_normal(shape), jnp.float32) for shape in ((2, 5, 3), (3, 2, 4)))


def plain(x, kernel):
    return jnp.tensordot(x, kernel, 1)


def loss(function):
    return lambda x, kernel: (jnp.sin(function(x, kernel)) ** 2).sum()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("derivative", "kernel"),
    [
        (lambda function: jax.grad(loss(function), (0, 1)), KERNEL),
        (lambda function: jax.jacfwd(loss(function), (0, 1)), KERNEL),
        (lambda function: jax.hessian(loss(function), (0, 1)), KERNEL),
        (lambda function: jax.vmap(jax.grad(loss(function), (0, 1)), (0, None)), KERNEL),
        (lambda function: jax.vmap(jax.grad(loss(function), 1), (None, 0)), jnp.stack([KERNEL, -KERNEL])),
        (lambda function: jax.grad(jax.checkpoint(loss(function)), 1), KERNEL),
    ],
)
def test_derivatives_are_those_of_a_plain_product(derivative, kernel):
    found, expected = (jax.tree.leaves(jax.jit(derivative(function))(X, kernel)) for function in (times, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


def lowered(platform):
    gradient = jax.jit(jax.grad(lambda kernel: times(X, kernel).sum()))
    return gradient.trace(KERNEL).lower(lowering_platforms=(platform,)).as_text()


def test_rows_are_made_where_that_is_free():
    """On a TPU `[2, 5, 3]` as rows would be a copy: five rows are no whole tile."""
    assert "tensor<10x3xf32>" in lowered("cpu")
    assert "tensor<10x3xf32>" in lowered("cuda")
    assert "tensor<10x3xf32>" not in lowered("tpu")


def test_the_precision_that_was_asked_for_is_that_of_the_gradient():
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(jax.grad(lambda kernel: times(X, kernel).sum())).trace(KERNEL)
    assert "HIGHEST" in traced.lower(lowering_platforms=("tpu",)).as_text()
