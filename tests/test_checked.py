"""The check of signatures (`checked.py`) finds what is false, and lets a function speak first."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from checked import check, jaxtyped
from jaxtyping import Array, Float


@jaxtyped(typechecker=check)
def halved(x: "Float[Array, 'n d']", names: "dict[str, Float[Array, ' d']]" = {}) -> "Float[Array, 'n d']":  # noqa: B006
    """A second axis of three is said to stay, and does not."""
    if x.shape[0] == 0:
        raise ValueError("nothing to halve")
    return (x[:, :2] if x.shape[1] == 3 else x) / 2


FALSE = {
    "the result": (np.zeros((1, 3), np.float32),),
    "too few axes": (np.zeros((1, 4, 1), np.float32),),
    "a dtype": (np.zeros((1, 4), np.int32),),
    "what is in a container": (np.zeros((1, 4), np.float32), {"a": np.zeros(2, np.float32)}),
}


@pytest.mark.parametrize("arguments", FALSE.values(), ids=FALSE)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["called", "traced"])
def test_what_is_false_is_found_whatever_came_before(arguments, wrap):
    halved(jnp.zeros((1, 4)), {"a": jnp.zeros(4)})
    with pytest.raises(jaxtyping.TypeCheckError):
        wrap(halved)(*arguments)
    with pytest.raises(jaxtyping.TypeCheckError):
        wrap(halved)(*arguments)


def test_a_refusal_of_its_own_goes_first():
    with pytest.raises(ValueError, match="nothing to halve"):
        halved(np.zeros((0, 4, 1), np.int32))
